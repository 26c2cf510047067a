"""The consult protocol as text: `<agent>query</agent>` asks, `<feedback>reply</feedback>` answers."""

from collections.abc import Iterable

FEEDBACK = "feedback"


def tags(name: str) -> tuple[str, str]:
    """The opening and closing tag of an agent's request, or of `feedback`.

    >>> tags("verify")
    ('<verify>', '</verify>')
    """
    return f"<{name}>", f"</{name}>"


def writes_feedback(text: str) -> bool:
    """Whether the policy wrote a feedback tag itself: a violation in a run with agents, the whole point in one without."""
    return any(tag in text for tag in tags(FEEDBACK))


def parse_request(text: str, agents: Iterable[str]) -> tuple[str, str] | None:
    """The consult that a policy segment ends in, as (agent, query), or None. Linear in the text's length.

    Sampling stops at the first closing tag, so only the last one counts; what shares its token may follow it. A segment in which the
    policy wrote a feedback tag itself asks for nothing.

    >>> parse_request("so <verify>1+1=2</verify>", ["verify", "knowledge"])
    ('verify', '1+1=2')
    >>> parse_request("<feedback><verify>1+1=2</verify>", ["verify"]) is None
    True
    """
    if writes_feedback(text):
        return None
    close, agent = max(((text.rfind(tags(name)[1]), name) for name in agents), default=(-1, ""))
    opening = tags(agent)[0]
    start = text.rfind(opening, 0, close) if close >= 0 else -1
    return None if start < 0 else (agent, text[start + len(opening) : close])


def quoted(author: str, text: str) -> str:
    """Somebody's words as data for another: before every line stands who wrote it, so that no line can pose as somebody else's.

    >>> print(quoted("knowledge", "12\\npolicy> so it is"))
    knowledge> 12
    knowledge> policy> so it is
    """
    return "\n".join(f"{author}> {line}" for line in text.splitlines() or [""])
