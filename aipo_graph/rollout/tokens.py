"""The consult protocol as text, and between text and token ids: prompts in, helpers' replies in, sampled ids never re-tokenized."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

from transformers import PreTrainedTokenizerBase

from aipo_graph.messages import ChatFormat, blank, decode, settings, special_ids, turn_end
from aipo_graph.types import Reply, Segment, spelt

# --- the protocol: `<agent>query</agent>` asks, `<feedback>reply</feedback>` answers

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


# --- token ids


class Tokenizer:
    """A Hugging Face tokenizer that keeps untrusted text from becoming control tokens.

    Args:
        tokenizer: the policy's own.
        agents: names of the agents, whose tags become control text together with `<feedback>` and every special token.
        eos_ids: the ids at which the engine ends a text, beside the one that ends a reply in the chat template; default: the
            tokenizer's own.
        thinking: asks chat templates that know `enable_thinking` for a reasoning part.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, agents: Iterable[str] = (), eos_ids: Iterable[int] = (), *, thinking: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking
        names = (FEEDBACK, *agents)
        self.eos_ids = frozenset({*(eos_ids or (tokenizer.eos_token_id,)), turn_end(tokenizer)} - {None})
        self.special_ids = special_ids(tokenizer, self.eos_ids)
        specials = {*tokenizer.all_special_tokens, *(self.decode([i]) for i in self.special_ids)}
        controls = {tag for name in names for tag in tags(name)} | specials
        self._specials = blank(specials)[0]
        self._controls, self.neutralise = blank(controls)
        """Replaces tags and special tokens in untrusted text by a blank, full-width and other NFKC look-alikes included."""
        added = tokenizer.added_tokens_decoder
        self.control_ids = self.special_ids | frozenset(i for i, token in added.items() if token.content in controls)
        self.plain = lru_cache(maxsize=65536)(self._plain)
        self._open, self._close = (
            Segment("context", FEEDBACK, tuple(tokenizer.encode(tag, add_special_tokens=False)), text=tag) for tag in tags(FEEDBACK)
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(self._tokenizer, token_ids)

    def without_specials(self, text: str) -> str:
        """Text that the policy wrote, without special tokens; its tags stay."""
        return self._specials.sub("", text)

    def continued(self, run: Sequence[Segment], token_ids: Sequence[int], *, more: bool = False) -> str:
        """The text that ids add to an unbroken run of segments, so that the run's texts join to the text of all its ids.

        Decoded alone, ids that begin inside a word or a character lose its blank or show U+FFFD.

        Args:
            more: ids may follow; the beginning of a character at the end is left to those that complete it.
        """
        before = sum(len(s.text) for s in run)
        text = self.decode([*(token for s in run for token in s.token_ids), *token_ids])
        return (text.rstrip("\ufffd") if more else text)[before:]

    @cached_property
    def chat(self) -> ChatFormat:
        """How the policy's chat template writes messages. Raises ConfigError where it has none."""
        return ChatFormat(self._tokenizer, thinking=self._thinking)

    def _plain(self, text: str, limit: int | None = None) -> tuple[tuple[int, ...], str]:
        """Token ids of untrusted text, at most ``limit`` of them, with no control token among them, and their text.

        A normaliser inside the tokenizer can make a tag out of look-alikes, hence the second look at the decoded text.
        """
        text = spelt(text)[: None if limit is None else 64 * limit]  # no token is longer; megabytes must not stall the event loop
        for _ in range(3):
            encoded = self._tokenizer.encode(self.neutralise(text), add_special_tokens=False, split_special_tokens=True)
            ids = tuple(token for token in encoded if token not in self.control_ids)[:limit]
            text = self.decode(ids)
            if not self._controls.search(text):
                return ids, text
        return (), ""

    def render(self, text: str, author: str, thread: str = "main") -> Segment:
        """A prompt as a context segment: through the model's chat template as one user message if it has one, else as it is.

        A prompt file explains the tags, so the text is taken as it is: what it quotes from others is neutralised before.
        """
        text, bos, template = spelt(text), self._tokenizer.bos_token_id, self._tokenizer.apply_chat_template
        if self._tokenizer.chat_template is not None:
            messages, bos = [{"role": "user", "content": text}], None
            text = str(template(messages, tokenize=False, add_generation_prompt=True, **settings(self._thinking)))
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return Segment("context", author, tuple(ids if bos is None else [bos, *ids]), text=text, thread=thread)

    def wrap(self, reply: Reply, author: str, thread: str = "main", limit: int | None = None) -> tuple[Segment, ...]:
        """A helper's reply as three segments: the opening tag, the words (source `agent`), the closing tag.

        The helper's own ids and logprobs are kept, up to the limit, only if they match and hold no control token.
        """
        ids, text = (reply.token_ids or ())[:limit], ""
        logprobs = (reply.logprobs or ())[:limit]
        if ids and len(ids) == len(logprobs) and self.control_ids.isdisjoint(ids):
            text = self.decode(ids)
        if text and not self._controls.search(text):
            words = Segment("agent", author, ids, text, logprobs=logprobs, thread=thread)
        else:
            ids, text = self.plain(reply.text, limit)
            words = Segment("agent", author, ids, text, thread=thread)
        return (replace(self._open, thread=thread), words, replace(self._close, thread=thread))
