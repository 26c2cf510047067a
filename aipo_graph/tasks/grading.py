r"""Whether an untrusted answer equals the gold one, and whether a helper's reply gives the gold away.

Equal texts and integers are compared here; all else in a worker process that can be killed: letters and words as text, numbers exactly,
sequences and conditions part by part, and what is left by math-verify's parser and sympy. What the answer causes (out of CPU time or
memory, a crashed worker) is a wrong answer; what we cause is a TaskError: no score.
"""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.physics import units

from aipo_graph.errors import TaskError, ToolError
from aipo_graph.tools import sandbox
from aipo_graph.tools.notation import LONGEST, Number, Rules, compact, number, plain, rewritten, without_commas
from aipo_graph.tools.symbolic import RELATION, is_zero, parse

CPU_SECONDS = 1.0
EXACT_DIGITS = 3
"""A decimal gold of fewer significant digits is exact; one of more accepts what rounds to it."""
LONGEST_READ = 1 << 17
"""Characters at the end of a text that are searched for the gold answer: more than any budget of tokens lets one write."""
_BOX = re.compile(r".*\\(?:boxed|fbox)\s*\{", re.DOTALL)
_INTEGER = re.compile(r"[-+]?\d+", re.ASCII)
_CHOICE = re.compile(
    r"(?:(?:the )?(?:option|choice|(?:correct |final )?answer)(?: is|\s*:)?)?\s*(?:\(([A-J])\)[.:]?|([A-J])(?:[.:)]|$))\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_BASED = re.compile(r"(?=\w*\d|\w{2})([0-9A-Z]+)_\{?(\d{1,2}|[a-z]{3,7})\}?", re.IGNORECASE)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12, "sixteen": 16}
_NAMED = re.compile(
    r"((?:[A-Za-z]{1,3}|\\[a-z]+|[Α-ω])(?:_\{?\w+\}?)?(?:\([a-z\d]\))?|\\angle ?[A-Z]{1,3}|\([a-z](?:,\s?[a-z]){1,3}\))\s?[=∈]\s?"
)
"""What an answer may open with: ``x =``, ``f(x) =``, ``(x, y) =``, ``x ∈``."""
_SUM = re.compile(r"[a-z](?:\s?[-+]?\s?[a-z]){1,5}\s?=")
_VECTOR = re.compile(r"\\begin\{pmatrix\}([^&]*?|[^\\]*?)\\end\{pmatrix\}")
_MEMBER = re.compile(r"⦃\s?([A-Za-zα-ω])\s?(?:∈\s?ℝ\s?)?[|:]\s?(.*)⦄|(\\?[A-Za-zα-ω]+)\s?∈\s?(.*)")
_COMMAND = re.compile(r"\\[A-Za-z]+|pmatrix|cis")
_UNIT = re.compile(r"(.*?[\d})π.])(\s*)((?:[A-Za-zμΩÅ°%]+\.?(?:\^\{-?\d\})?|\s*[*/]\s*|\s+)+)", re.DOTALL)
_OF_UNITS: Rules = [
    (r"\\frac\{([A-Za-z*]+)\}\{([A-Za-z*]+(?:\^\{\d\})?)\}$|/\s?\(([A-Za-z* ]+)\)$", r" \1/\2\3"), (r"\bper\b", "/"),
    (r"\bsq(?:uare)?\.? ([A-Za-z]+)", r"\1^{2}"), (r"\bcu(?:bic)?\.? ([A-Za-z]+)", r"\1^{3}"),
    (r"(μ|[kMm](?=\s+Ω))\s+(?=[A-Za-zΩ])", r"\1"),
]  # fmt: skip
_UNITS = {name: unit for name, unit in vars(units).items() if type(unit) is units.Quantity} | {
    "mph": units.mile / units.hour, "kph": units.km / units.hour, "kmh": units.km / units.hour, "cc": units.cm**3, "mi": units.mile,
    "in": units.inch, "min": units.minute, "hr": units.hour, "sec": units.second, "Ω": units.ohm, "Å": units.angstrom,
    "°": units.degree, "%": units.percent,
}  # fmt: skip
_SCALES = {units.percent: sympy.Rational(1, 100), units.degree: sympy.pi / 180}


def last_box(text: str) -> str | None:
    r"""Finds what stands in the last ``\boxed{...}``; None if there is none, or if the last one is not closed within 4096 characters.

    >>> last_box(r"so \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    depth, start = 1, match.end() if (match := _BOX.match(text)) else len(text)
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
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return int(answer) == int(gold)
    failed = f"the grader failed on the gold answer {gold[:80]!r}"
    return bool(await judged(failed, _verdict, answer, gold, str(rounded_digits), workers=workers))


async def judged(
    failed: str, verdict: Callable[..., Any], *given: str, workers: sandbox.Workers = sandbox.SHARED, seconds: float = CPU_SECONDS
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
    return gold if match is None or match[1] in match[2] else match[2]


# What follows, down to `leaks`, runs in a worker only.


def _verdict(answer: str, gold: str, rounded: str) -> bool:
    return _same(plain(answer), plain(gold), int(rounded))


def _same(answer: str, gold: str, rounded: int) -> bool:
    one, two = compact(answer), compact(gold)
    if one == two:
        return True
    if choice := re.fullmatch(r"\(?([A-J])\)?", two):
        match = _CHOICE.fullmatch(answer.strip("* "))
        return match is not None and {(match[1] or match[2]).upper(), *re.findall(r"\b[A-J]\b", match[3])} == {choice[1]}
    bare = without_commas(answer), without_commas(gold)
    if bare != (answer, gold) and not re.search(r"[(\[⦃]", answer + gold) and _same(*bare, rounded):
        return True
    if based := _BASED.fullmatch(two):  # without its base a numeral is in the gold's, which the question names
        values = [int(m[1], int(_BASES.get(m[2].lower(), m[2]))) if m else -1 for m in (_BASED.fullmatch(one), based)]
        return values[0] == values[1] or one.upper() == based[1].upper()
    links, gold_links = _relations(answer), _relations(gold)
    if links and gold_links and _paired(links, gold_links, _same_tree):
        return True
    if re.search("[<>≤≥≠∈∪∩∖ℝ∅]", one + two) and (region := _region(answer)) and (gold_region := _region(gold)):
        return len(region[0] | gold_region[0]) < 2 and _same_tree(region[1], gold_region[1])
    if ("matrix" in answer) != ("matrix" in gold):  # a vector may be written as a tuple
        answer, gold = (_VECTOR.sub(lambda m: "(" + re.sub(r"&|\\\\", ",", m[1]) + ")", text) for text in (answer, gold))
    return _same_list(answer if "=" in gold else _SUM.sub("", answer, count=1), gold, rounded)  # m+n = 5 for 5


def _paired(ones: Iterable[Any], twos: Iterable[Any], same: Callable[[Any, Any], bool]) -> bool:
    """Whether each has its like on the other side."""
    table = [[same(one, two) for two in twos] for one in ones]
    return all(map(any, table)) and all(map(any, zip(*table, strict=True)))


def _split(text: str, separators: str) -> list[str]:
    """Splits at single characters outside of all brackets."""
    parts, depth = [""], 0
    for piece in re.findall(r"\\.|.", text, re.DOTALL):
        depth += (piece in "([{⦃") - (piece in ")]}⦄")
        if depth == 0 and piece in separators:
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts]


def _listed(text: str) -> tuple[str, set[str], list[str]]:
    """Brackets, names and values of a list: ``x=1, x=2`` is ("", {x}, [1, 2]) and ``y=3, x=2`` the point ("()", {x, y}, [2, 3])."""
    head = _NAMED.match(text)
    inner = text[head.end() :] if head else text
    enclosed = re.fullmatch(r"[(\[⦃].*[)\]⦄]", inner, re.DOTALL) is not None and len(_split(inner, ")]⦄")) == 2
    parts = [part for part in _split(inner[1:-1] if enclosed else text, ",;∧∨") if part] or [""]
    brackets = inner[0] + inner[-1] if enclosed and (len(parts) > 1 or inner[0] == "⦃") else ""
    signs = (("+", "-"), ("-", "+"))
    parts = [part.replace("±", s).replace("∓", t) for part in parts for s, t in signs[: 1 + bool(re.search("[±∓]", part))]]
    heads = [_NAMED.match(part) for part in parts]
    values = [part[match.end() if match else 0 :].lstrip("+ ") for part, match in zip(parts, heads, strict=True)]
    names = _split(head[1].strip("()"), ",") if head and enclosed else [re.sub("_.*", "", compact(match[1])) for match in heads if match]
    if 1 < len({*names}) == len(names) == len(values):
        brackets, values = "()", [value for _, value in sorted(zip(names, values, strict=True))]
    return brackets, {*names}, values


def _same_list(answer: str, gold: str, rounded: int) -> bool:
    (brackets, names, answers), (gold_brackets, gold_names, golds) = _listed(answer), _listed(gold)
    if names and gold_names and names != gold_names:
        return False
    if len(answers) == len(golds) == 1 and "⦃" not in brackets + gold_brackets:
        sides = [parse(side.strip()) for side in answers[0].split("=")]
        if None not in sides and all(is_zero(a - b, b) for a, b in pairwise(sides)):  # 2+2 = 4, but not 1 = 2 = 5
            answers = [answers[0].rpartition("=")[2].strip()]
        return _same_value(answers[0].removeprefix("≈").strip(), golds[0], rounded)
    if {brackets, gold_brackets} <= {"", "⦃⦄"}:
        repeats = len(answers) == len(golds) or {brackets, gold_brackets} != {""}
        return repeats and _paired(answers, golds, lambda a, b: _same(a, b, rounded))
    # A tuple may be written bare; an interval's brackets are part of it.
    like = brackets == gold_brackets or {brackets, gold_brackets} == {"()", ""}
    return like and len(answers) == len(golds) and all(_same(a, b, rounded) for a, b in zip(answers, golds, strict=True))


def _region(text: str) -> tuple[set[str], Any] | None:
    """The variable and the set of reals that a condition, an interval or a union of them states; None for anything else."""
    for signs, join in (("∨", sympy.Union), ("∧,", sympy.Intersection)):
        if len(parts := _split(text, signs)) > 1:
            found = [each for part in parts if (signs == "∨" or RELATION.search(part)) and (each := _region(part))]
            names = set().union(*(name for name, _ in found))
            return (names, join(*(each for _, each in found))) if len(found) == len(parts) and len(names) < 2 else None
    if match := _MEMBER.fullmatch(text):
        inner = _region(match[2] or match[4])
        return (set() if match[1] else {match[3]}, inner[1]) if inner and inner[0] <= {match[1] or match[3]} else None
    links = _relations(text)
    symbols = [{*map(str, each.free_symbols)} for each in links]
    if links and all(symbols) and len(set().union(*symbols)) == 1:
        return symbols[0], sympy.Intersection(*(each.as_set() for each in links))
    found = parse(text)
    return (set(), found.doit()) if isinstance(found, sympy.Set) and not found.free_symbols else None


def _relations(text: str) -> list[Any]:
    """The relations between numbers in a chain; none of anything else."""
    found = parse(text) if RELATION.search(text) else None
    links = found.args if isinstance(found, sympy.And) else [found]
    sides = [side for each in links for side in (each.args if isinstance(each, Relational) else [None])]
    return [*links] if all(isinstance(side, sympy.Expr) for side in sides) else []


def _same_tree(one: Any, two: Any) -> bool:
    """Whether two numbers, sets, matrices or relations are equal: numbers exactly, a relation as a multiple, the rest part by part."""
    if isinstance(one, Relational) and isinstance(two, Relational):
        one, two = (each.reversed if ">" in each.rel_op else each for each in (one, two))
        ratio = sympy.simplify((one.lhs - one.rhs) / (two.lhs - two.rhs)) if one.rel_op == two.rel_op else sympy.nan
        return bool(ratio.is_number and ratio.is_finite and (ratio > 0 if "<" in one.rel_op else ratio != 0))
    if isinstance(one, sympy.Expr) and isinstance(two, sympy.Expr) and not one.is_Matrix and not two.is_Matrix:
        return one == two if {one, two} & {sympy.oo, -sympy.oo} else bool(is_zero(one - two, two if two.is_number else 1))
    return one == two or (
        type(one).__name__ == type(two).__name__ and len(one.args) == len(two.args) > 0 and all(map(_same_tree, one.args, two.args))
    )


def _same_value(answer: str, gold: str, rounded: int) -> bool:
    (bare, unit), (gold_bare, gold_unit) = _without_unit(answer), _without_unit(gold)
    if _is_text(gold_bare):
        one, two = (re.sub(r"[\s.'-]+", "", re.sub(r"^(?:an?|the) (?=.)", "", text.casefold())) for text in (answer, gold))
        return one == two
    if unit is not None and gold_unit is not None:
        factors = [units.convert_to(unit / gold_unit, [units.meter, units.kilogram, units.second])]
    else:  # without its unit a number may be in it, or in none: 50 and 0.5 for 50 %, 60 and π/3 for 60°
        factors = [_SCALES.get(unit, sympy.Integer(1)) / _SCALES.get(gold_unit, sympy.Integer(1))]
        small = unit == units.percent and (written := number(gold_bare)) is not None and abs(written.value) <= 1
        factors += [sympy.Integer(1)] * (not small)  # 0.5 % is not a gold of 0.5
    return any(factor.is_number and _same_number(bare, gold_bare, factor, rounded) for factor in factors)


def _without_unit(text: str) -> tuple[str, Any]:
    """The rest of a text and its unit as sympy has it, unknown words as symbols; None where there is no unit."""
    match = _UNIT.fullmatch(rewritten(text, _OF_UNITS))
    if (
        match is None
        or (match[3] == "°" and re.search(r"\\[a-z]{3}(?<!\\fra)|cis", match[1]))  # of the argument
        or (re.fullmatch("[A-Za-zμ]", match[3]) and (not match[2] or re.search(r"(?<![\\A-Za-z])[A-Za-z]", match[1])))  # 5m, 2x m
    ):
        return text, None
    unit, over = sympy.Integer(1), 1
    for word, exponent in re.findall(r"(/|[A-Za-zμΩÅ°%]+)\.?(?:\^\{(-?\d)\})?", match[3]):
        names = (word, word.removesuffix("s"), word.lower(), word.lower().removesuffix("s"))
        known = next((_UNITS[name] for name in names if name in _UNITS), None)
        if word == "/":
            over = -1
        elif known is None and (len(word) == 1 or not match[2] or number(match[1]) is None):
            return text, None
        else:
            unit *= (known or sympy.Symbol(names[-1])) ** (over * int(exponent or 1))
    return match[1].strip(), unit


def _is_text(text: str) -> bool:
    """Whether a gold is a word: even, odd, no and nan are, products such as ab, xyz and mgh are not. In a formula only long words are."""
    runs = re.findall(r"[A-Za-z]{2,}", _COMMAND.sub(" ", text))
    words = [run for run in runs if ([*run] != sorted({*run}) or {*run.lower()} & {*"eio"}) and (not run.islower() or {*run} & {*"aeiouy"})]
    return any(len(word) > 3 or re.search(rf"(?:^|\s){word}(?:\s|$)", text) for word in words)


def _same_number(answer: str, gold: str, factor: Any, rounded: int) -> bool:
    letters, gold_letters = ({*re.findall(r"[a-df-hj-z]", _COMMAND.sub("", text.lower()))} for text in (answer, gold))
    x, y = parse(answer), parse(gold)
    if not isinstance(x, sympy.Expr) or not isinstance(y, sympy.Expr) or not letters <= gold_letters:
        return False  # a letter that comes to nothing, 0x10, is no number
    if x.is_Matrix or y.is_Matrix:
        return _same_tree(x, y)
    if _same_tree(x * factor, y):
        return True
    if not all(each.is_number and each.is_extended_real and each.is_finite for each in (x, y)):
        return False
    difference = abs((x * factor).evalf(60) - y.evalf(60))
    written, gold_written = (number(text) or Number(Fraction(0)) for text in (answer, gold))
    if gold_written.digits >= EXACT_DIGITS:
        # What the gold's own last digit leaves open. An answer with fewer digits is another rounding.
        return bool(difference <= gold_written.half and written.half <= gold_written.half)
    if not rounded or written.digits < rounded or gold_written.digits or (y.is_Rational and (y / written.half / 2).is_integer):
        return False  # 4.9999 is not 5: an exact gold with an expansion of that length is to be met exactly
    return bool(difference <= written.half)


# A pattern whose every branch begins with a letter is fast on any text.
_WORDS = "|".join(rf"{word}(?<!\w{word})" for word in ("is", "are", "get", "gives", "equals", "makes", "answer"))
_STATED = rf"(?:[=:]|->|\\to|boxed\s?\{{|{_WORDS})\s?+[\\{{(]*+\s?+"
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
    gold = (last_box(gold) or only(gold))[:LONGEST]
    target = form if re.fullmatch(r"[\w .,/-]+", form := plain(gold), re.ASCII) else _DRESSING.sub("", gold).strip()
    short = len(target.lstrip("-")) <= 2
    spelled = _spelled(target, number(form))
    result = rf"{_STATED}{spelled}(?!\s?[-+*/^=])|\A[\s([{{]*{spelled}[\s)\]}}.]*\Z"

    def states(text: str, pattern: str) -> bool:
        text = _DRESSING.sub("", text[-LONGEST_READ:])
        return re.search(pattern, text, re.ASCII if short else re.ASCII | re.IGNORECASE) is not None

    return target != "" and states(reply, result if short else spelled) and not states(known, spelled)


def _spelled(target: str, written: Number | None) -> str:
    """A pattern of how a text may write it: a number as a decimal or a fraction, anything else as it stands, however it is spaced."""
    if written is None:
        tokens = re.findall(r"\\[A-Za-z]+|[A-Za-z0-9]+|\S", target)
        return r"(?<![\w\\])" + r"\s?".join(map(re.escape, tokens)) + r"(?!\w)"
    top, bottom = abs(written.value.numerator), written.value.denominator
    forms = [rf"{top}\s?/\s?{bottom}", rf"frac\s?\{{{top}\}}\{{{bottom}\}}"]
    places = next((n for n in range(20) if 10**n % bottom == 0), None)
    if places is not None:
        whole, rest = divmod(top * 10**places // bottom, 10**places)
        forms.append(rf"{whole or '0?'}\.{rest:0{places}}0*" if rest else rf"{whole}(?:\.0*)?")
    # A minus after a word or a bracket is one of a difference.
    sign = r"(?<![\w)}])(?<![\w)}] )-" if written.value < 0 else r"(?:(?<!-)|(?<=[\w)}]-)|(?<=[\w)}] -))"
    return rf"(?<![\w.,/]){sign}(?:{'|'.join(forms)})(?![\w/]|[.,]\d)"
