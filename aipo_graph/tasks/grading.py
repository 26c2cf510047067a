r"""Whether an untrusted answer equals the gold one, and whether a helper's reply gives the gold away.

The order is cheapest and surest first: last box, plain form, equal text, integers, choice letters, words, bases, numbers, units,
sequences element by element; only what is left is parsed, by math-verify, in a worker process that can be killed. What the answer causes
(refused, out of CPU time or memory, a crashed worker) is a wrong answer; what we cause is a TaskError: no score.
"""

import re
from fractions import Fraction
from typing import Any

from aipo_graph.errors import TaskError, ToolError
from aipo_graph.tasks import forms
from aipo_graph.tools import sandbox, symbolic
from aipo_graph.tools.notation import LONGEST, Written, compact, latex, number, plain, refusal, without_unit

CPU_SECONDS = 1.0
MOST_ELEMENTS = 16
EXACT_DIGITS = 3
"""A decimal gold of fewer significant digits is exact; one of more accepts what rounds to it."""
ROUNDED_DIGITS = 4
"""A decimal answer of at least so many significant digits may stand for a gold that is exact, if it is its correct rounding."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"([-+]?)(\d+|\d{1,3}(?:,\d{3})+)", re.ASCII)
_CHOICE = re.compile(
    r"(?:(?:the )?(?:option|choice|(?:correct |final )?answer)(?: is|\s*:)?)?\s*(?:\(([A-J])\)|([A-J]))\s*(?:[.:)]\s*(.*)|)",
    re.IGNORECASE | re.DOTALL,
)
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]*")
_ARTICLE = re.compile(r"(?:an?|the) (?=.)", re.IGNORECASE)


def last_box(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``; None if there is none, or if the last one is not closed. Linear time.

    >>> last_box(r"so \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()].strip()
    return None


async def grade(text: str, gold: str, workers: sandbox.Workers = sandbox.SHARED) -> bool:
    """Whether the last box of ``text``, the policy's own final words, holds the gold answer. Raises TaskError as ``equal`` does."""
    answer = last_box(text)
    return answer is not None and await equal(answer, gold, workers)


async def equal(answer: str, gold: str, workers: sandbox.Workers = sandbox.SHARED) -> bool:
    """Whether an untrusted answer states the gold one. Raises TaskError on an empty gold answer, or if the grader itself failed."""
    answer, gold = (text if (box := last_box(text)) is None else box for text in (answer, gold))
    if not gold.strip():
        raise TaskError("the gold answer is empty: correct the data set")
    if not answer.strip() or len(answer) > 2 * LONGEST + len(gold):
        return False
    try:
        return await _equal(_unbraced(plain(answer)), _unbraced(plain(gold)), workers)
    except ToolError as error:
        raise TaskError(f"the grader failed on the gold answer {gold[:80]!r}: {error}") from error


async def _equal(answer: str, gold: str, workers: sandbox.Workers) -> bool:
    verdict = _quick(answer, gold)
    if verdict is not None:
        return verdict
    answer, gold = forms.in_one_form(*forms.without_names(answer, gold))
    (answer, unit), (gold, gold_unit) = without_unit(answer), without_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    verdict = _quick(answer, gold)
    if verdict is not None:
        return verdict
    one, two = _sequence(answer), _sequence(gold)
    if len(one[1]) > 1 or len(two[1]) > 1:
        return await _same_sequence(one, two, workers)
    if one[0] != two[0] and "{" in one[0] + two[0]:
        return False
    if refusal(answer) or refusal(gold) or any(answer.count(sign) != gold.count(sign) for sign in ("=", r"\approx")):
        return False
    try:
        return bool(await workers.run(_same, latex(answer), latex(gold), timeout=CPU_SECONDS))
    except sandbox.InputFault:
        return False


def _unbraced(text: str) -> str:
    # Plain braces around everything: a set that somebody forgot to escape, or nothing at all.
    if not (text.startswith("{") and text.endswith("}") and _closes_at_end(text)):
        return text
    inner = text[1:-1].strip()
    return rf"\{{{inner}\}}" if len(_split(inner)) > 1 else inner


def _quick(answer: str, gold: str) -> bool | None:
    """The verdict where text alone gives it: equal strings, integers, choice letters, words, numbers."""
    one, two = compact(answer), compact(gold)
    if one == two:
        return True
    integers = _INTEGER.fullmatch(one), _INTEGER.fullmatch(two)
    if integers[0] and integers[1]:
        # Digits are compared as text: no conversion, whatever the length.
        (sign, digits), (gold_sign, gold_digits) = (((m[1] == "-"), m[2].replace(",", "").lstrip("0")) for m in integers if m)
        return digits == gold_digits and (sign == gold_sign or not digits)
    if choice := re.fullmatch(r"\(([A-J])\)|([A-J])", two):
        return _choice(answer) == (choice[1] or choice[2])
    if _WORD.fullmatch(gold) and (len(two) > 3 or " " in two):
        return _ARTICLE.sub("", answer, count=1).casefold() == _ARTICLE.sub("", gold, count=1).casefold()
    if (based := forms.based(one)) and (gold_based := forms.based(two)):
        return based == gold_based
    written, gold_written = number(answer), number(gold)
    if written and gold_written:
        return _same_number(written, gold_written)
    return None


def _choice(answer: str) -> str | None:
    match = _CHOICE.fullmatch(answer.strip().strip("*"))
    if match is None:
        return None
    letter = (match[1] or match[2]).upper()
    others = re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", match[3] or "")
    return letter if all(other == letter for other in others) else None


def _same_number(answer: Written, gold: Written) -> bool:
    values = [answer.value]
    if answer.percent != gold.percent:
        # 50 for 50 %; and 50 % for 50, but 50 % is not the half of a per cent that a gold of 0.5 would make it.
        if gold.percent:
            values.append(answer.value / 100)
        elif abs(gold.value) > 1:
            values.append(answer.value * 100)
    return any(_close(value, answer, gold) for value in values)


def _close(value: Fraction, answer: Written, gold: Written) -> bool:
    if value == gold.value:
        return True
    if gold.digits >= EXACT_DIGITS:
        # Relative to the gold: what its own last digit leaves open. An answer with fewer digits is another rounding.
        return abs(value - gold.value) <= gold.half_place and (not answer.digits or answer.half_place <= gold.half_place)
    return not gold.digits and _rounds_to(answer, value, gold.value)


def _rounds_to(answer: Written, value: Fraction, gold: Fraction) -> bool:
    # 0.3333 for 1/3, but not 4.9999 for 5: an exact gold with a finite decimal expansion of that length is to be met exactly.
    if answer.digits < ROUNDED_DIGITS or (gold / answer.half_place / 2).denominator == 1:
        return False
    return abs(value - gold) <= answer.half_place


def _sequence(text: str) -> tuple[str, list[str]]:
    r"""Brackets and elements: ``("(]", ["1", "2"])`` for an interval, ``("\{\}", ...)`` for a set, ``("", ...)`` for a bare list.

    A plus-minus is a list of two. A text that is no sequence is a list of one.
    """
    brackets, inner = "", text
    for opening in ("(", "[", r"\{"):
        if text.startswith(opening) and (closing := re.search(r"(?:[)\]]|\\\})$", text)) and _closes_at_end(text):
            brackets, inner = opening + closing[0], text[len(opening) : closing.start()]
    parts = [part.strip() for part in _split(inner)]
    if len(parts) == 1 and not brackets and text.count(r"\pm") == 1:
        parts = [text.replace(r"\pm", "+").lstrip("+ "), text.replace(r"\pm", "-")]
    if len(parts) == 1 and brackets in ("()", "[]"):
        brackets = ""
    return brackets, parts if all(parts) or len(parts) == 1 else [text]


def _closes_at_end(text: str) -> bool:
    depth = 0
    for match in re.finditer(r"\\.|.", text):
        depth += (match[0] in ("(", "[", "{", r"\{")) - (match[0] in (")", "]", "}", r"\}"))
        if depth == 0:
            return match.end() == len(text)
    return False


def _split(text: str) -> list[str]:
    # At commas outside of brackets; a comma between digits, 1,234, is one only where no space follows.
    parts, depth, start = [], 0, 0
    thousands = bool(re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text))
    for match in re.finditer(r"\\[{}]|\\.|[(\[{)\]},;]", text):
        if match[0] in (",", ";"):
            if depth == 0 and not thousands:
                parts.append(text[start : match.start()])
                start = match.end()
        elif match[0] in ("(", "[", "{", r"\{"):
            depth += 1
        elif match[0] in (")", "]", "}", r"\}"):
            depth -= 1
    last = text[start:]
    return [*parts, last] if last.strip() or not parts else parts


async def _same_sequence(one: tuple[str, list[str]], two: tuple[str, list[str]], workers: sandbox.Workers) -> bool:
    (brackets, answers), (gold_brackets, golds) = one, two
    if len(answers) != len(golds) or len(golds) > MOST_ELEMENTS:
        return False
    ordered = False
    if not (brackets or gold_brackets) and (named := forms.names(answers)) and (gold_named := forms.names(golds)):
        if sorted(named) != sorted(gold_named):
            return False
        if len(set(named)) == len(named):  # x=1, x=2 are two solutions; a=1, b=2 are one
            answers, ordered = [answers[named.index(name)] for name in gold_named], True
    answers = answers if brackets else [forms.NAMED.sub("", part, count=1) for part in answers]
    golds = golds if gold_brackets else [forms.NAMED.sub("", part, count=1) for part in golds]
    unordered = (r"\{\}", "")
    if brackets in unordered and gold_brackets in unordered and not ordered:
        left = list(answers)
        for gold in golds:
            for answer in left:
                if await _equal(answer, gold, workers):
                    left.remove(answer)
                    break
            else:
                return False
        return True
    # A tuple may be written bare; an interval's brackets are part of it.
    if brackets != gold_brackets and {brackets, gold_brackets} != {"()", ""}:
        return False
    for answer, gold in zip(answers, golds, strict=True):
        if not await _equal(answer, gold, workers):
            return False
    return True


def _same(answer: str, gold: str) -> bool:
    """Runs in a worker."""
    import math_verify
    import sympy

    a, g = symbolic.parse(answer), symbolic.parse(gold)
    if a is None or g is None:
        return False
    if isinstance(a, sympy.Eq) and isinstance(g, sympy.Eq):
        return _same_equation(a, g)
    if isinstance(a, sympy.Expr) and isinstance(g, sympy.Expr):
        written, gold_written = number(answer), number(gold)
        if a.is_number and g.is_number and (written or gold_written):
            return _same_constant(a, g, written, gold_written)
        return bool(symbolic.is_zero(a - g, g if g.is_number else 1))
    if isinstance(a, sympy.Expr) or isinstance(g, sympy.Expr):
        return False
    return bool(math_verify.verify(g, a, timeout_seconds=None))


def _same_equation(a: Any, g: Any) -> bool:
    # One is a multiple of the other. math-verify would solve them, and any two without real solutions would be equal.
    import sympy

    ratio = sympy.simplify((a.lhs - a.rhs) / (g.lhs - g.rhs))
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def _same_constant(a: Any, g: Any, answer: Written | None, gold: Written | None) -> bool:
    if not (a.is_extended_real and g.is_extended_real and a.is_finite and g.is_finite):
        return bool(symbolic.is_zero(a - g, g))
    if symbolic.is_zero(a - g, g):
        return True
    value, gold_value = (Fraction(str(x.evalf(40))) for x in (a, g))
    return _close(value, answer or Written(value), gold or Written(gold_value))


def leaks(reply: str, gold: str, known: str) -> bool:
    """Whether a helper's reply states the gold answer, where ``known`` (the question and what was asked) did not already. Linear time.

    Numbers are compared by value: 1,250.0 states 1250. A gold of one or two characters is everywhere by chance (``step 3``), so it
    counts only where it is presented as a result: alone in the reply, boxed, or after ``=``, ``:``, ``is`` or an arrow. That lets a
    short gold slip through in other wordings; the other error would mask most replies of a task with small answers.
    """
    target = plain(last_box(gold) or gold)
    value = number(target)
    short = len(target.lstrip("-")) <= 2
    return _states(reply, target, value, short) and not _states(known, target, value, short=False)


_STATED = re.compile(r"(?:[=:]|\b(?:is|are|equals|get|gives|answer|makes)|\\to|->|boxed\s?\{)\s?[\\{($*]*\s?$")
_GOES_ON = re.compile(r"\s?[-+*/^=]")
_VALUE = re.compile(
    r"(?<![\w.,/])(?:(?<![\w)}] )(?<![)}])[-+])?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?(?![\w/]|[.,]\d)", re.ASCII
)


def _states(text: str, target: str, value: Written | None, short: bool) -> bool:
    text = plain(text)
    if compact(text).strip("([{)]} ") == compact(target).strip("([{)]} "):
        return True
    if value is not None:
        text = re.sub(r"\\frac\{(\d{1,20})\}\{(\d{1,20})\}", r"\1/\2", text)
        found = (m for m in _VALUE.finditer(text) if len(m[0]) <= 40 and (n := number(m[0])) and n.value == value.value)
    else:
        tokens = re.findall(r"\\[A-Za-z]+|[A-Za-z0-9]+|\S", target)
        pattern = r"\s?".join(re.escape(token) for token in tokens)
        found = (m for m in re.finditer(rf"(?<![\w\\]){pattern}(?!\w)", text, 0 if short else re.IGNORECASE))
    return any(not short or (_STATED.search(text, max(0, m.start() - 24), m.start()) and not _GOES_ON.match(text, m.end())) for m in found)
