r"""Whether an untrusted answer equals the gold one, and whether a helper's reply gives the gold away.

Equal texts and integers are compared here; all else in a worker process that can be killed: letters and words as text, numbers exactly,
sequences, matrices and conditions part by part, and what is left by math-verify's parser and sympy. What the answer causes (out of CPU
time or memory, a crashed worker) is a wrong answer; what we cause is a TaskError: no score.
"""

import re
from fractions import Fraction
from itertools import chain, pairwise
from typing import Any

from aipo_graph.errors import TaskError, ToolError
from aipo_graph.tasks import forms
from aipo_graph.tools import sandbox, symbolic
from aipo_graph.tools.notation import LONGEST, Number, compact, number, plain, without_commas

CPU_SECONDS = 1.0
MOST_ELEMENTS = 32
EXACT_DIGITS = 3
"""A decimal gold of fewer significant digits is exact; one of more accepts what rounds to it."""
_BOX = re.compile(r".*\\(?:boxed|fbox)\s*\{", re.DOTALL)
_LONGEST_BOX = 8 * LONGEST
_INTEGER = re.compile(r"([-+]?)0*(\d+)", re.ASCII)
_CHOICE = re.compile(
    r"(?:(?:the )?(?:option|choice|(?:correct |final )?answer)(?: is|\s*:)?)?\s*(?:\(([A-J])\)|([A-J]))\s*(?:[.:)]\s*(.*)|)",
    re.IGNORECASE | re.DOTALL,
)
_BASED = re.compile(r"(?=\w*\d|\w{2})([0-9A-Z]+)\s?_\s?\{?\s?(\d{1,2}|[a-z]{3,7})\s?\}?", re.IGNORECASE)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12, "sixteen": 16}


def last_box(text: str) -> str | None:
    r"""Finds what stands in the last ``\boxed{...}``; None if there is none, or if the last one is not closed within 4096 characters.

    >>> last_box(r"so \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    depth, start = 1, match.end() if (match := _BOX.match(text)) else len(text)
    for brace in re.finditer(r"\\.|[{}]", text[start : start + _LONGEST_BOX], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()].strip()
    return None


async def grade(text: str, gold: str, workers: sandbox.Workers = sandbox.SHARED, *, rounded_digits: int = 0) -> bool:
    """Whether the last box of ``text``, the policy's own final words, holds the gold answer. Raises TaskError as `equal` does."""
    answer = last_box(text)
    return answer is not None and await equal(answer, gold, workers, rounded_digits=rounded_digits)


async def equal(answer: str, gold: str, workers: sandbox.Workers = sandbox.SHARED, *, rounded_digits: int = 0) -> bool:
    """Whether an untrusted answer states the gold one. Raises TaskError on an empty gold answer, or if the grader itself failed.

    Args:
        rounded_digits: a decimal of at least so many significant digits also stands for an exact gold that it rounds; 0: none.
    """
    answer, gold = ((text if (box := last_box(text)) is None else box).strip() for text in (answer, only(gold)))
    if not gold:
        raise TaskError("the gold answer is empty: correct the data set")
    if not answer or answer == gold or max(len(answer), len(gold)) > 2 * LONGEST:
        return answer == gold
    if (integer := _INTEGER.fullmatch(answer)) and (gold_integer := _INTEGER.fullmatch(gold)):
        return integer[2] == gold_integer[2] and ((integer[1] == "-") == (gold_integer[1] == "-") or integer[2] == "0")
    try:
        return bool(await workers.run(_verdict, answer, gold, str(rounded_digits), timeout=CPU_SECONDS))
    except sandbox.InputFault:
        return False
    except ToolError as error:
        raise TaskError(f"the grader failed on the gold answer {gold[:80]!r}: {error}") from error


def only(gold: str) -> str:
    """Reads a gold answer that is written as a list of one: ``["70"]`` is 70."""
    match = re.fullmatch(r"\s*\[\s*(?:\"([^\"]*)\"|'([^']*)')\s*\]\s*", gold)
    return (match[1] or match[2] or "") if match else gold


# What follows, down to `_close`, runs in a worker only.


def _verdict(answer: str, gold: str, rounded: str) -> bool:
    return _same(plain(answer), plain(gold), int(rounded))


def _same(answer: str, gold: str, rounded: int) -> bool:
    one, two = compact(answer), compact(gold)
    if one == two:
        return True
    if choice := re.fullmatch(r"\(?([A-J])\)?", two):
        return _choice(answer) == choice[1]
    bare = without_commas(answer), without_commas(gold)
    if bare != (answer, gold) and not re.search(r"[(\[⦃]", answer + gold) and _same(*bare, rounded):
        return True
    if based := _BASED.fullmatch(two):  # without its base a numeral is in the gold's, which the question names
        values = [int(m[1], int(_BASES.get(m[2].lower(), m[2]))) if m else -1 for m in (_BASED.fullmatch(one), based)]
        return values[0] == values[1] or one.upper() == based[1].upper()
    if re.search("[<>≤≥≠∈∪∩∖ℝ∅]", answer + gold) and (region := forms.region(answer)) and (wanted := forms.region(gold)):
        return len({region[0], wanted[0]} - {""}) < 2 and forms.same_region(region[1], wanted[1])
    if (
        symbolic.RELATION.search(answer)
        and symbolic.RELATION.search(gold)
        and (links := forms.links(answer))
        and (gold_links := forms.links(gold))
    ):
        return forms.same_links(links, gold_links)
    return _same_unnamed(*_without_names(answer, gold), rounded)


def _choice(answer: str) -> str | None:
    if (match := _CHOICE.fullmatch(answer.strip("* "))) is None:
        return None
    letter = (match[1] or match[2]).upper()
    return letter if all(other == letter for other in re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", match[3] or "")) else None


def _without_names(answer: str, gold: str) -> tuple[str, str]:
    """``x = 5`` for ``5`` and the other way round, ``m+n = 5`` and ``2+3 = 5`` for ``5``. Anything else, 1=2=5, keeps its equals sign."""
    one, two = forms.NAMED.match(answer), forms.NAMED.match(gold)
    if ("," in answer and answer.count("=") > 1) or (
        one and two and (compact(one[1]) != compact(two[1]) or ("," in answer and "," in gold))
    ):
        return answer, gold
    if one and (two or not re.search("[=∈]", gold)):
        answer = answer[one.end() :]
        names, values = one[1].strip("()").split(","), forms.sequence(answer)[1]
        if 1 < len(names) == len(values) and not two:  # (y, x) = (3, 2) is the point (2, 3)
            answer = f"({','.join(value for _, value in sorted(zip(names, values, strict=True)))})"
    if two and (one or not re.search("[=∈]", answer)) and not re.search(r"^[^(]*[-+]", two[1]):
        gold = gold[two.end() :]
    if "=" in answer and "=" not in gold:
        sides = [symbolic.parse(side) for side in answer.split("=")]
        if None not in sides and all(symbolic.is_zero(a - b, b) for a, b in pairwise(sides)):
            answer = answer.rpartition("=")[2]
    return answer.removeprefix("≈").strip(), gold.strip()


def _same_unnamed(answer: str, gold: str, rounded: int) -> bool:
    rows, gold_rows = forms.matrix(answer), forms.matrix(gold)
    if rows and gold_rows:
        same = [*map(len, rows)] == [*map(len, gold_rows)]
        return same and all(
            _same(a, b, rounded) for row, gold_row in zip(rows, gold_rows, strict=True) for a, b in zip(row, gold_row, strict=True)
        )
    (brackets, answers), (gold_brackets, golds) = (
        ("()", list(chain(*each))) if each and 1 in (len(each), len(each[0])) else forms.sequence(text)
        for each, text in ((rows, answer), (gold_rows, gold))
    )
    if len(answers) == len(golds) == 1 and "⦃" not in brackets + gold_brackets:
        return _same_value(answers[0], golds[0], rounded)
    names, gold_names = ([compact(m[1]) for part in parts if (m := forms.NAMED.match(part))] for parts in (answers, golds))
    if max(len(answers), len(golds)) > MOST_ELEMENTS or (names and gold_names and {*names} != {*gold_names}):
        return False
    ordered = False
    if not brackets and len(names) == len(answers) == len({*names}):  # a=1, b=2 is one solution; x=1, x=2 are two
        answers = [answers[names.index(name)] for name in (gold_names or sorted(names))]
        ordered = bool(gold_names or gold_brackets == "()")
    answers, golds = ([forms.NAMED.sub("", part, count=1) for part in parts] for parts in (answers, golds))
    if not ordered and {brackets, gold_brackets} <= {"", "⦃⦄"}:
        table = [[_same(a, b, rounded) for b in golds] for a in answers]
        repeats = len(answers) == len(golds) or {brackets, gold_brackets} != {""}
        return repeats and all(map(any, table)) and all(map(any, zip(*table, strict=True)))
    # A tuple may be written bare; an interval's brackets are part of it.
    like = brackets == gold_brackets or {brackets, gold_brackets} == {"()", ""}
    return like and len(answers) == len(golds) and all(_same(a, b, rounded) for a, b in zip(answers, golds, strict=True))


def _same_value(answer: str, gold: str, rounded: int) -> bool:
    import sympy

    (bare, unit), (gold_bare, gold_unit) = forms.without_unit(answer), forms.without_unit(gold)
    if _is_text(gold_bare):
        one, two = (re.sub(r"[\s.'-]+", "", re.sub(r"^(?:an?|the) (?=.)", "", text.casefold())) for text in (answer, gold))
        return one == two
    factors = [sympy.Integer(1)]
    if unit is not None and gold_unit is not None:
        factors = [forms.ratio(unit, gold_unit)]
    elif "π" in bare + gold_bare and (unit is not None or gold_unit is not None):  # 60° for π/3
        factors += [factor for each, factor in ((unit, sympy.pi / 180), (gold_unit, 180 / sympy.pi)) if str(each) == "degree"]
    percent, gold_percent, bare, gold_bare = bare.endswith("%"), gold_bare.endswith("%"), bare.rstrip("% "), gold_bare.rstrip("% ")
    if percent != gold_percent:
        # 50 for 50 %; and 50 % for 50, but 50 % is not the half of a per cent that a gold of 0.5 would make it.
        large = (written := number(gold_bare)) is None or abs(written.value) > 1
        factors = [sympy.Integer(1), sympy.Integer(100)] if gold_percent else [sympy.Rational(1, 100), sympy.Integer(1)][: 1 + large]
    return any(factor is not None and _same_number(bare, gold_bare, factor, rounded) for factor in factors)


def _is_text(text: str) -> bool:
    runs = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+|cis", " ", text))
    # ab, xyz and mgh are products; even, odd, no and nan are words. In a formula only a long run, or one that stands alone, is one.
    words = [
        run for run in runs if (list(run) != sorted({*run}) or {*run.lower()} & {*"eio"}) and (not run.islower() or {*run} & {*"aeiouy"})
    ]
    return any(len(word) > 3 or re.search(rf"(?:^|\s){word}(?:\s|$)", text) for word in words)


def _same_number(answer: str, gold: str, factor: Any, rounded: int) -> bool:
    free, gold_free = ({*re.findall(r"[a-df-hj-z]", re.sub(r"\\[A-Za-z]+|cis", "", text.lower()))} for text in (answer, gold))
    x, y = symbolic.parse(answer), symbolic.parse(gold)
    if x is None or y is None or not free <= gold_free:
        return False  # a letter that comes to nothing, 0x10, is no number
    x = x * factor
    if symbolic.is_zero(x - y, y if y.is_number else 1):
        return True
    constants = x.is_number and y.is_number and x.is_extended_real and y.is_extended_real and x.is_finite and y.is_finite
    return bool(constants and _close(x.evalf(60), y.evalf(60), number(answer) or Number(Fraction(0)), number(gold), rounded))


def _close(value: Any, gold_value: Any, answer: Number, gold: Number | None, rounded: int) -> bool:
    difference = abs(value - gold_value)
    if gold and gold.digits >= EXACT_DIGITS:
        # What the gold's own last digit leaves open. An answer with fewer digits is another rounding.
        return bool(difference <= gold.half and answer.half <= gold.half)
    if not rounded or answer.digits < rounded or (gold and (gold.digits or (gold.value / answer.half / 2).denominator == 1)):
        return False  # 4.9999 is not 5: an exact gold with an expansion of that length is to be met exactly
    return bool(difference <= answer.half)


_STATED = re.compile(r"(?:[=:]|\b(?:is|are|equals|get|gives|answer|makes)|\\to|->|boxed\s?\{)\s?[\\{($*]*\s?$")
_GOES_ON = re.compile(r"\s?[-+*/^=]")
_DRESSED = re.compile(
    r"(?<=\d)(?:,|\\,|\\ |\{,\}|~|[\xa0\u2009\u202f])(?=\d{3}(?!\d))"
    r"|\\(?:left|right|text|mathrm|textbf|mathbf)(?![a-z])|\\[,!;:]|\$|\*\*|(?<=\\)[dt](?=frac)"
)


def leaks(reply: str, gold: str, known: str) -> bool:
    """Whether a helper's reply states the gold answer, where ``known`` (the question and what was asked) did not already. Linear time.

    Numbers are compared by value: 1,250.0 states 1250. A gold of one or two characters is everywhere by chance (``step 3``), so it
    counts only where it is presented as a result: alone in the reply, boxed, or after ``=``, ``:``, ``is`` or an arrow. That lets a
    short gold slip through in other wordings; the other error would mask most replies of a task with small answers.
    """
    gold = (last_box(gold) or only(gold))[: 2 * LONGEST]
    target = form if re.fullmatch(r"[\w .,/-]+", form := plain(gold), re.ASCII) else _DRESSED.sub("", gold).strip()
    short = len(target.lstrip("-")) <= 2
    tokens = re.findall(r"\\[A-Za-z]+|[A-Za-z0-9]+|\S", target)
    pattern = _numeral(written) if (written := number(form)) else r"(?<![\w\\])" + r"\s?".join(map(re.escape, tokens)) + r"(?!\w)"
    compiled = re.compile(pattern, re.ASCII if short or written else re.ASCII | re.IGNORECASE)
    return _states(reply, compiled, target, short) and not _states(known, compiled, target, short=False)


def _states(text: str, pattern: re.Pattern[str], target: str, short: bool) -> bool:
    text = _DRESSED.sub("", text)
    if len(text) < 2 * LONGEST and compact(text).strip("([{)]}. ") == compact(target):
        return True
    found = pattern.finditer(text)
    return any(not short or (_STATED.search(text, max(0, m.start() - 24), m.start()) and not _GOES_ON.match(text, m.end())) for m in found)


def _numeral(written: Number) -> str:
    """A pattern of a number in digits, as a decimal or a fraction, whatever zeros stand before and after."""
    top, bottom = abs(written.value.numerator), written.value.denominator
    forms = [rf"{top}\s?/\s?{bottom}", rf"\\frac\s?\{{{top}\}}\{{{bottom}\}}"]
    if places := next((str(n) for n in range(20) if 10**n % bottom == 0), ""):
        digits = str(top * 10 ** int(places) // bottom).zfill(int(places) + 1)
        whole, rest = digits[: len(digits) - int(places)], digits[len(digits) - int(places) :]
        forms.append(f"0*{whole if whole != '0' or not rest else ''}" + (rf"\.{rest}0*" if rest else r"(?:\.0*)?"))
    # A minus after a word or a bracket is one of a difference.
    sign = r"(?<![\w)}]-)(?<![\w)}] -)(?<=-)" if written.value < 0 else r"(?:(?<!-)|(?<=[\w)}]-)|(?<=[\w)}] -))"
    return rf"(?<![\w.,/]){sign}(?:{'|'.join(forms)})(?![\w/]|[.,]\d)"
