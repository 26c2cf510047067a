"""Whether an untrusted answer equals the gold one, and whether a helper's reply gives the gold away.

Equal texts and integers are compared here; all else by `tools.symbolic` in a worker process that can be killed. What the answer causes
(out of CPU time or memory, a crashed worker) is a wrong answer; what we cause is a TaskError: no score.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

from aipo_graph.errors import TaskError, ToolError
from aipo_graph.tools import sandbox
from aipo_graph.tools.notation import LONGEST, number, plain

LONGEST_READ = 1 << 17  # characters at the end of a text that are searched for the gold answer: more than any budget lets one write


def last_box(text: str) -> str | None:
    r"""Finds what stands in the last ``\boxed{...}``; None if there is none, or if the last one is not closed within 4096 characters.

    >>> last_box(r"so \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    depth, start = 1, match.end() if (match := re.match(r".*\\(?:boxed|fbox)\s*\{", text, re.DOTALL)) else len(text)
    for brace in re.finditer(r"\\.|[{}]", text[start : start + 8 * LONGEST], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()].strip()
    return None


async def equal(answer: str, gold: str, workers: sandbox.Workers = sandbox.SHARED, *, rounded_digits: int = 0) -> bool:
    """Whether an untrusted answer states the gold one. Raises TaskError on an empty gold answer, or if the grader itself failed.

    A decimal of at least ``rounded_digits`` significant digits also stands for an exact gold that it rounds; 0: none.
    """
    answer, gold = ((text if (box := last_box(text)) is None else box).strip() for text in (answer, only(gold)))
    if not gold:
        raise TaskError("the gold answer is empty: correct the data set")
    if not answer or answer == gold or max(len(answer), len(gold)) > 2 * LONGEST:
        return answer == gold
    if re.fullmatch(r"[-+]?\d+ [-+]?\d+", f"{answer} {gold}", re.ASCII):
        return int(answer) == int(gold)
    failed = f"the grader failed on the gold answer {gold[:80]!r}"
    return bool(await judged(failed, _verdict, answer, gold, str(rounded_digits), workers=workers))


async def judged(
    failed: str, verdict: Callable[..., Any], *given: str, workers: sandbox.Workers = sandbox.SHARED, seconds: float = 1.0
) -> float:
    """What a worker says of an untrusted text: 0 where the text breaks it. Raises TaskError, which begins with ``failed``, where we do."""
    try:
        return float(await workers.run(verdict, *given, timeout=seconds))
    except sandbox.InputFault:
        return 0.0
    except ToolError as error:
        raise TaskError(f"{failed}: {error}") from error


def only(gold: str) -> str:
    """Reads a gold answer that is written as a list of one: ``["70"]`` is 70."""
    match = re.fullmatch(r"""\s*\[\s*(["'])(.*)\1\s*\]\s*""", gold)
    if match is None or match[1] in match[2]:
        return gold
    halved = match[2].replace(r"\\", "\\")  # a list as JSON writes it
    return match[2] if 2 * halved.count("\\") > match[2].count("\\") else halved


def _verdict(answer: str, gold: str, rounded: str) -> bool:
    from aipo_graph.tools.symbolic import same  # a second of imports, in the worker only

    return same(plain(answer), plain(gold), int(rounded))


_STATED = r"(?:[=:]|->|\\to|boxed\s?\{|\b(?:is|are|get|gives|equals|makes|answer))\s?+[\\{(]*+\s?+"
_DRESSING = re.compile(
    r"\$|\*\*|\\(?:[,!;:]|left|right|(?:text|math)[a-z]*|[dt]?(?=frac)| (?=\d{3}(?!\d)))|\{,\}(?=\d{3}(?!\d))"
    r"|[,~\xa0\u2009\u202f](?<=\d.)(?=\d{3}(?!\d))"
)


def leaks(reply: str, gold: str, known: str) -> bool:
    """Whether a helper's reply states the gold answer, where ``known`` (the question and what was asked) did not already. Linear time.

    Numbers are compared by value: 1,250.0 states 1250. A gold of one or two characters is everywhere by chance (``step 3``), so it
    counts only where it is presented as a result: alone in the reply, boxed, or after ``=``, ``:``, ``is`` or an arrow. That lets a
    short gold slip through in other wordings; the other error would mask most replies of a task with small answers.
    """
    texts = (_DRESSING.sub("", text[-LONGEST_READ:].replace("−", "-")) for text in (reply, known))
    found = (pattern.search(text) is not None for pattern, text in zip(_stated(gold), texts, strict=True))
    return next(found) and not next(found)


@lru_cache(maxsize=4096)
def _stated(gold: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of a text that states a gold answer, which none does that is empty, and of one that it stands in; each reply asks."""
    gold = (last_box(gold) or only(gold))[:LONGEST]
    target = form if re.fullmatch(r"[\w .,/-]+", form := plain(gold), re.ASCII) else _DRESSING.sub("", gold).strip()
    if written := number(form):
        top, bottom = abs(written[0].numerator), written[0].denominator
        whole, _, rest = (f"{Decimal(top) / bottom:f}" if bottom > 1 else str(top)).partition(".")
        decimal = rf"{whole.lstrip('0') or '0?'}\.{rest}0*" if rest else rf"{whole}(?:\.0*)?"
        # A minus after a number, a letter or a bracket is one of a difference.
        sign = r"(?<![\w)}])(?<![\d)}] )(?<!\b[A-Za-z] )-" if written[0] < 0 else r"(?:(?<!-)|(?<=[\w)}]-)|(?<=[\d)}] -)|(?<=\b[A-Za-z] -))"
        spelled = rf"(?<![\w.,/]){sign}(?:{decimal}|{top}\s?/\s?{bottom}|frac\s?\{{{top}\}}\{{{bottom}\}})(?![\w/]|[.,]\d)"
    else:  # as it stands, however it is spaced
        tokens = re.findall(r"\\[A-Za-z]+|[A-Za-z0-9]+|\S", target)
        spelled = r"(?<![\w\\])" + r"\s?".join(map(re.escape, tokens)) + r"(?!\w)"
    if len(target.lstrip("-")) > 2:
        return (found := re.compile(spelled, re.ASCII | re.IGNORECASE)), found
    result = rf"{_STATED}{spelled}(?!\s?[-+*/^=])|\A[\s([{{]*{spelled}[\s)\]}}.]*\Z" if target else r"(?!)"
    return re.compile(result, re.ASCII), re.compile(spelled, re.ASCII)
