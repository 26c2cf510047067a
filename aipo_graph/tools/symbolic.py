"""Algebra in a worker that can be killed: what a model wrote, read, compared with a gold answer, or checked for the Verify agent.

Expressions are parsed by math-verify's parser: no text reaches ``sympify`` or ``parse_expr``, and what is parsed never leaves the worker.
"""

import functools
import re
from collections.abc import Callable, Collection
from fractions import Fraction
from itertools import pairwise
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from sympy.core.relational import Relational
from sympy.physics import units

from aipo_graph.tools import sandbox
from aipo_graph.tools.notation import LONGEST, Rules, compact, number, plain, rewritten, without_commas

_REFUSED = re.compile(
    r"__|[`'\"#:@%$≈]|\d\s+\d|\d_|\b0[xobe]"  # no mathematics
    # What would only run out of CPU time. Refusing it saves that; safety rests on the sandbox.
    r"|\^\{-?\d+\^\{?\d|\^\{[^{}]*\}\^|\d{6,}\}|\d{4,}\s?!|[)}!]\s?!|\\Gamma|\(\([^()]*\^[^()]*\)\^[^()]*\)\^|([-+*/^|] ?){4,}"
)
_FOR_THE_PARSER: Rules = [
    # Side by side the parser would read any whole number and fraction as a mixed number, (3)(4) as 7, π(3) as a value of a function.
    (r"((?<![_^.\w])(?:\d+\.\d+|\d+(?!\d|\s?\\frac\{\d+\}\{\d+\}))|\)|π)\s*(?=\(|\\(?!begin|end|r)[a-z])|(?<=\))(?=\d)", r"\1*"),
    (r"(\d+(?:\.\d+)?)°", r"(\1*\\frac{π}{180})"), (r"cis ?(\([^()]*\)+|\{[^{}]*\}|\S+)", r"(\\cos{\1}+i\\sin{\1})"),
    # Exact, where the parser would make a float.
    (r"(?<![\d.])(\d*)\.(\d+)", lambda m: f"(\\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}})"),
    ("∞", r"\\infty "), ("∈", r"\\in "), ("⦃", r"\\{"), ("⦄", r"\\}"), (";", ","),
]  # fmt: skip
# With the expression config it would reach parse_expr; with a timeout, set alarms.
_READER = math_verify.LatexExtractionConfig(normalization_config=NormalizationConfig(basic_latex=False, boxed="none"))


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Any:
    """Reads text in plain form as a sympy object; None for what is no mathematics. Symbols are real, ``i`` and ``e`` constants."""
    if written := number(text):
        return sympy.Rational(written[0])
    if len(text) > LONGEST or _REFUSED.search(text):
        return None
    text = rewritten(without_commas(text), _FOR_THE_PARSER)
    found, *_ = math_verify.parse(f"${text}$", [_READER], fallback_mode="no_fallback", parsing_timeout=None) or [None]
    if not hasattr(found, "free_symbols") or (isinstance(found, sympy.Expr) and re.search("[=<>≤≥≠≈]", text)):
        return None  # of what it cannot read it takes what follows the last equals sign
    found = found.subs({s: sympy.I if str(s) == "i" else sympy.Symbol(str(s), real=True) for s in found.free_symbols})
    return sympy.ImmutableMatrix(found) if getattr(found, "is_Matrix", False) else found


def is_zero(difference: Any) -> bool | None:
    """Whether an expression is zero, for all values of its variables; None where sympy cannot tell."""
    difference = sympy.nsimplify(difference.doit(), rational=True)
    # Most wrong answers are told apart by one value, long before anything is simplified.
    symbols = sorted(difference.free_symbols, key=str)
    value = difference.subs({symbol: sympy.Rational(37 + 10 * i, 29 + 3 * i) for i, symbol in enumerate(symbols)}).evalf(30)
    if value.is_number and value.is_finite and abs(value) > sympy.Float("1e-20"):
        return False
    if difference.has(sympy.I) and not symbols:
        difference = difference.expand(complex=True)  # a hundredth of the time of what follows
    return True if sympy.simplify(difference) == 0 else difference.equals(0)


# Whether an answer is the gold one.
_OPENING = r"(?i)^(?:(?:the )?(?:correct |final )?(?:answer|option|choice)(?: is| ?:)?(?![a-z])|[=≈]|\\therefore|\\implies) ?"
_BASED = re.compile(r"(?=\w*\d|\w{2})([0-9A-Z]+)_\{?(\d{1,2}|[a-z]{3,7})\}?", re.IGNORECASE)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12, "sixteen": 16}
_NAMED = re.compile(  # ``x = 1``, ``f(x) = 1``, ``(x, y) = (1, 2)``, ``x ∈ [1, 2]``, or the value alone
    r"(?:((?:[A-Za-z]{1,3}|\\[a-z]+|[Α-ω])(?:_\{?\w+\}?)?(?:\^\{-1\})?(?:\([a-z\d]\))?"
    r"|\\angle ?[A-Z]{1,3}|\(\\?[a-z]+(?:,\s?\\?[a-z]+){1,3}\))\s?[=∈]\s?)?[+ ]*(.*)", re.DOTALL)  # fmt: skip
_VECTOR = re.compile(r"\\begin\{pmatrix\}([^&]*?|[^\\]*?)\\end\{pmatrix\}")
_MEMBER = re.compile(r"⦃\s?(\\?[A-Za-zα-ω]+)\s?(?:∈\s?ℝ\s?)?[|:]\s?(.*)⦄|(\\?[A-Za-zα-ω]+)\s?∈\s?(.*)")
_COMMAND = re.compile(r"\\[A-Za-z]+|pmatrix|cis")
_UNIT = re.compile(r"(.*?[\d})π.])(\s*)((?=[\s/]*[A-Za-zμΩÅ°%])(?:[A-Za-zμΩÅ°%]+\.?(?:\^\{-?\d\})?|\s*[*/]\s*|\s+)+)", re.DOTALL)
_OF_UNITS: Rules = [
    (r"\\frac\{([A-Za-z*]+)\}\{([A-Za-z*]+(?:\^\{\d\})?)\}$|/\s?\(([A-Za-z* ]+)\)$", r" \1/\2\3"), (r"\bper\b", "/"),
    (r"\bsq(?:uare)?\.? ([A-Za-z]+)", r"\1^{2}"), (r"\bcu(?:bic)?\.? ([A-Za-z]+)", r"\1^{3}"),
    (r"(μ|[GkMmn](?=\s+Ω))\s+(?=[A-Za-zΩ])", r"\1"), ("° ?([CF])(?:elsius|ahrenheit)?$", r" °\1"),
]  # fmt: skip
_BASE = (units.meter, units.kilogram, units.second, units.ampere, units.kelvin, units.mole)
_SCALES = {units.percent: sympy.Rational(1, 100), units.degree: sympy.pi / 180}
_PREFIXES = {"k kilo": 3, "M mega": 6, "G giga": 9, "c centi": -2, "m milli": -3, "μ micro": -6, "n nano": -9, "": 0}
_NAMED_UNITS = {name: unit for name, unit in vars(units).items() if type(unit) is units.Quantity} | {
    "mph": units.mile / units.hour, "kph": units.km / units.hour, "kmh": units.km / units.hour, "cc": units.cm**3, "mi": units.mile,
    "in": units.inch, "min": units.minute, "hr": units.hour, "sec": units.second, "Ω": units.ohm, "Å": units.angstrom,
    "°": units.degree, "%": units.percent, "unit": sympy.Symbol("unit"), "Wh": units.watt * units.hour, "week": 7 * units.day,
    "metre": units.meter, "litre": units.liter, "lb": units.pound,
    "gallon": 231 * units.inch**3, "gal": 231 * units.inch**3,
}  # fmt: skip
_UNITS = {prefix + name: sympy.Integer(10) ** power * unit
          for prefixes, power in _PREFIXES.items() for prefix in prefixes.split(" ") for name, unit in _NAMED_UNITS.items()}  # fmt: skip


def same(answer: str, gold: str, rounded: int) -> bool:
    """Whether two texts in plain form state the same; a decimal of ``rounded`` digits, if not 0, may also round an exact gold."""
    answer = re.sub(_OPENING, "", answer)
    one, two = compact(answer), compact(gold)
    if one == two:
        return True
    if choice := re.fullmatch(r"\(?([A-J])\)?", two):
        match = re.fullmatch(r"(?is)\(?([A-J])(?:\)[.:]?|[.:]|$) ?(.*)", answer)
        return match is not None and {match[1].upper(), *re.findall(r"\b[A-J]\b", match[2])} == {choice[1]}
    bare = without_commas(answer), without_commas(gold)
    if bare != (answer, gold) and not re.search(r"[(\[⦃]", answer + gold) and same(*bare, rounded):
        return True
    if based := _BASED.fullmatch(two):  # without its base a numeral is in the gold's, which the question names
        values = [int(m[1], int(_BASES.get(m[2].lower(), m[2]))) if m else -1 for m in (_BASED.fullmatch(one), based)]
        return values[0] == values[1] or one.upper() == based[1].upper()
    if re.search(r"[:/]|\\frac", gold):  # 3:4 is 3/4; 6:30 is a time
        answer, gold = (re.sub(r"^(\d+) ?: ?(\d|\d{3,})$", r"\1/\2", text) for text in (answer, gold))
    if (links := _relations(answer)) and (gold_links := _relations(gold)) and _paired(links, gold_links, _same_tree):
        return True
    if re.search("[<>≤≥≠∈∪∩∖ℝ∅]", one + two) and (region := _region(answer)) and (gold_region := _region(gold)):
        return ("" in (region[0], gold_region[0]) or region[0] == gold_region[0]) and _same_tree(region[1], gold_region[1])
    if ("matrix" in answer) != ("matrix" in gold):  # a vector may be written as a tuple
        answer, gold = (_VECTOR.sub(lambda m: "(" + re.sub(r"&|\\\\", ",", m[1]) + ")", text) for text in (answer, gold))
    if "=" not in gold:  # m+n = 5 for 5
        answer = re.sub(r"^[a-z](?:\s?[-+]?\s?[a-z]){1,5}\s?=", "", answer)
    (brackets, names, answers), (gold_brackets, gold_names, golds) = _listed(answer), _listed(gold)
    if names and gold_names and names != gold_names:
        return False
    if len(answers) == len(golds) == 1 and "⦃" not in brackets + gold_brackets:
        sides = [parse(side.strip()) for side in answers[0].split("=")] if "=" in answers[0] else []
        if sides and None not in sides and all(is_zero(a - b) for a, b in pairwise(sides)):  # 2+2 = 4, but not 1 = 2 = 5
            answers = [answers[0].rpartition("=")[2].strip()]
        return _same_value(answers[0], golds[0], rounded)
    if {brackets, gold_brackets} <= {"", "⦃⦄"}:
        repeats = len(answers) == len(golds) or {brackets, gold_brackets} != {""}
        return repeats and _paired(answers, golds, lambda a, b: ("⦃" in a) == ("⦃" in b) and same(a, b, rounded))
    # A tuple may be written bare, but not with "and"; an interval's brackets are part of it.
    like = brackets == gold_brackets or ({brackets, gold_brackets} == {"()", ""} and not re.search("[∧∨]", answer + gold))
    return like and len(answers) == len(golds) and all(same(a, b, rounded) for a, b in zip(answers, golds, strict=True))


def _paired(ones: Collection[Any], twos: Collection[Any], like: Callable[[Any, Any], bool]) -> bool:
    """Whether each has its like on the other side."""
    table = [[like(one, two) for two in twos] for one in ones]
    return all(map(any, table)) and all(map(any, zip(*table, strict=True)))


def _split(text: str, separators: str) -> list[str]:
    """Splits at single characters outside of all brackets."""
    marked, depth = "", 0
    for piece in re.findall(r"\\.|.", text, re.DOTALL):
        depth += (piece in "([{⦃") - (piece in ")]}⦄")
        marked += "\0" if depth == 0 and piece in separators else piece
    return [part.strip() for part in marked.split("\0")]


def _listed(text: str) -> tuple[str, set[str], list[str]]:
    """Brackets, names and values of a list: ``x=1, x=2`` is ("", {x}, [1, 2]) and ``y=3, x=2`` the point ("()", {x, y}, [2, 3])."""
    (head, inner), *_ = _NAMED.findall(text)
    enclosed = re.fullmatch(r"[(\[⦃].*[)\]⦄]", inner, re.DOTALL) is not None and len(_split(inner, ")]⦄")) == 2
    parts = [_NAMED.findall(part)[0] for part in _split(inner[1:-1] if enclosed else text, ",;∧∨") if part]
    brackets = inner[0] + inner[-1] if enclosed and (len(parts) > 1 or inner[0] == "⦃") else ""
    names = _split(re.sub(r"[()\\]", "", head), ",") if head and enclosed else [re.sub("_.*", "", compact(name)) for name, _ in parts]
    names, values = [name for name in names if name], [value for _, value in parts] or [""]
    if 1 < len({*names}) == len(names) == len(values):
        brackets, values = "()", [value for _, value in sorted(zip(names, values, strict=True))]
    return brackets, {*names}, values


@functools.lru_cache(maxsize=256)
def _region(text: str) -> tuple[str, Any] | None:
    """The variable, "" if none is named, and the set of reals that a condition, an interval or a union of them states; None for others."""
    for signs, join in (("∨", sympy.Union), ("∧,", sympy.Intersection)):
        if len(parts := _split(text, signs)) > 1:
            found = [each for part in parts if (each := _region(part)) and (each[0] or signs == "∨")]
            names = {name for name, _ in found} - {""}
            whole = len(found) == len(parts) and len(names) < 2
            return (min(names, default=""), join(*(each for _, each in found))) if whole else None
    if match := _MEMBER.fullmatch(text):
        name, inner = (match[1] or match[3]).lstrip("\\"), _region(match[2] or match[4])
        return (name if match[3] else "", inner[1]) if inner and inner[0] in ("", name) else None
    names, links = {str(each) for each in getattr(parse(text), "free_symbols", ())}, _relations(text)
    if links and len(names) == 1 and all(each.free_symbols for each in links):
        return min(names), sympy.Intersection(*(each.as_set() for each in links))
    return ("", parse(text).doit()) if isinstance(parse(text), sympy.Set) and not names else None


def _relations(text: str) -> Collection[Any]:
    """The relations between numbers in a chain; none of anything else."""
    links = sympy.And.make_args(parse(text)) if re.search("[=<>≤≥≠]", text) else ()
    return links if all(isinstance(each, Relational) and not each.has(sympy.Set, sympy.Tuple) for each in links) else ()


def _same_tree(one: Any, two: Any) -> bool:
    """Whether two numbers, sets, matrices or relations are equal: numbers exactly, a relation as a multiple, the rest part by part."""
    if isinstance(one, Relational) and isinstance(two, Relational):
        one, two = (each.reversed if ">" in each.rel_op else each for each in (one, two))
        ratio = sympy.simplify((one.lhs - one.rhs) / (two.lhs - two.rhs)) if one.rel_op == two.rel_op else sympy.nan
        return bool(ratio.is_number and ratio.is_finite and (ratio > 0 if "<" in one.rel_op else ratio != 0))
    if isinstance(one, sympy.Expr) and isinstance(two, sympy.Expr) and not one.is_Matrix and not two.is_Matrix:
        return one == two if {one, two} & {sympy.oo, -sympy.oo} else bool(is_zero(one - two))
    alike = type(one).__name__ == type(two).__name__ and len(one.args) == len(two.args) > 0
    return one == two or (alike and all(map(_same_tree, one.args, two.args)))


def _same_value(answer: str, gold: str, rounded: int) -> bool:
    """Whether two numbers, quantities, formulas or words are the same, a decimal within what its last digit leaves open."""
    whole = answer, gold
    (answer, unit), (gold, gold_unit) = map(_without_unit, whole)
    # A gold is a word: even, odd, no and nan are, products such as ab, xyz and mgh are not. In a formula only long words are.
    runs = re.findall(r"[A-Za-z]{2,}", _COMMAND.sub(" ", gold))
    words = [run for run in runs if ([*run] != sorted({*run}) or {*run.lower()} & {*"eio"}) and (not run.islower() or {*run} & {*"aeiouy"})]
    if any(len(word) > 3 or re.search(rf"(?:^|\s){word}(?:\s|$)", gold) for word in words):
        one, two = (re.sub(r"[\s.'-]+", "", re.sub(r"^(?:an?|the) (?=.)", "", text.casefold())) for text in whole)
        return one == two
    x, y = parse(answer), parse(gold)
    letters, gold_letters = ({*re.findall(r"[a-df-hj-z]", _COMMAND.sub("", text.lower()))} for text in (answer, gold))
    if not isinstance(x, sympy.Expr) or not isinstance(y, sympy.Expr) or not letters <= gold_letters:
        return False  # a letter that comes to nothing, 0x10, is no number
    if unit is not None and gold_unit is not None:
        factor = units.convert_to(unit / gold_unit, _BASE)
        values = {x * factor} if factor.is_number else set()
    else:  # without its unit a number may be in it, or in none: 50 and 0.5 for 50 %, 60 and π/3 for 60°; but 0.5 % is not a gold of 0.5
        small = unit == units.percent and y.is_Rational and abs(y) <= 1
        values = {x * _SCALES.get(unit, 1) / _SCALES.get(gold_unit, 1), *([] if small else [x])}
    if any(_same_tree(value, y) for value in values):
        return True
    (shown, half), (gold_shown, gold_half) = (number(text) or (Fraction(0), Fraction(0)) for text in (answer, gold))
    if gold_half:  # a decimal of three digits or more accepts what rounds to it; an answer with fewer digits is another rounding
        half = gold_half if half <= gold_half <= abs(gold_shown) / 200 else Fraction(0)
    elif not rounded or abs(shown) < 2 * half * 10 ** (rounded - 1) or (half and y.is_Rational and (y / half / 2).is_integer):
        return False  # 4.9999 is not 5: an exact gold with an expansion of that length is to be met exactly
    return bool(half) and y.is_comparable and any(x.is_comparable and abs(x.evalf(60) - y.evalf(60)) <= half for x in values)


def _without_unit(text: str) -> tuple[str, Any]:
    """The rest of a text and its unit in those of the SI, unknown words as symbols; None where there is no unit."""
    match = _UNIT.fullmatch(rewritten(text, _OF_UNITS))
    if (
        match is None
        or (match[3] == "°" and re.search(r"\\[a-z]{3}(?<!\\fra)|cis", match[1]))  # of the argument
        or (  # 5m, 2x m
            re.fullmatch("[A-Za-zμ]", match[3])
            and (not match[2] or (number(match[1]) is None and re.search(r"(?<![\\A-Za-z])[A-Za-z]", match[1])))
        )
    ):
        return text, None
    unit, over = sympy.Integer(1), 1
    for slash, word, exponent in re.findall(r"(/?)\s*([A-Za-zμΩÅ°%]+)\.?(?:\^\{(-?\d)\})?", match[3]):
        names = (word[:2] + word[2:].removesuffix("s"), word, word.lower(), word.lower().removesuffix("s"))  # ms, but not cms
        known = next((_UNITS[name] for name in names if name in _UNITS), None)
        if known is None and (len(word) == 1 or not match[2] or number(match[1]) is None):
            return text, None
        over = -1 if slash else over
        unit *= (known or sympy.Symbol(names[-1])) ** (over * int(exponent or 1))
    return match[1].strip(), unit


# Claims of the agents.
_CLAIM: Rules = [(r"(?<=[%\d}])\s+of\s+", "*"), (r"(?<![\d.,])(\d[\d,]*(?:\.\d+)?)\s?%(?!\s*[\d(])", r"(\1/100)")]
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:[pbv]?matrix|mathbb)\b)(?:[A-Za-z]{4,}|cm|mm|km|kg|ft|in|min)(?![A-Za-z])")


async def check(claim: str) -> str:
    r"""Judges a claim such as ``3*(4+5) = 27``, ``\frac12 > 0.3`` or ``x^2-1 = (x-1)(x+1)``: ``yes``, ``no`` or ``cannot check: reason``.

    An equation with variables is a claim that it holds for all of them. A chain ``a = b = c`` claims each of its links.
    Raises ToolError if the sandbox failed.
    """
    if len(claim) > LONGEST:
        return f"cannot check: it is longer than {LONGEST} characters"
    try:
        return str(await sandbox.SHARED.run(_checked, claim))
    except sandbox.InputFault as fault:
        return f"cannot check: {fault}"


def _checked(claim: str) -> str:
    try:
        claim = rewritten(plain(claim.rstrip("? \n")), _CLAIM)
        if "%" in claim:
            raise ValueError("whether % means percent or remainder is not clear")
        if word := _WORD.search(claim):
            raise ValueError(f"{word[0]!r} is not mathematics")
        sides = re.split("([=<>≤≥≠≈])", claim)
        if len(sides) == 1:
            raise ValueError("there is no = < > in it")
        return "yes" if all(_holds(*sides[at : at + 3]) for at in range(0, len(sides) - 1, 2)) else "no"
    except ValueError as error:
        return f"cannot check: {error}"


def _holds(left: str, sign: str, right: str) -> bool:
    """Whether one link of a claim is true. Raises ValueError where that is not known."""
    a, b = (parse(side.strip()) for side in (left, right))
    if not (hasattr(a, "evalf") and hasattr(b, "evalf")):
        raise ValueError("it does not parse" if left.strip() and right.strip() else "it is empty")
    a, b = a.doit(), b.doit()
    if a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        raise ValueError("division by zero")
    if (a.is_Symbol or b.is_Symbol) and a.free_symbols != b.free_symbols:
        raise ValueError(f"what {(left if a.is_Symbol else right).strip()} is, is not known here")
    if sign == "≈":
        written = number(right.strip())
        return bool(abs(a - b) <= (sympy.Rational(written[1]) if written and written[1] else abs(b) / 100))
    zero = is_zero(a - b)
    if zero is None or not (zero or sign in "=≠" or (a - b).is_comparable):
        raise ValueError("undecided: only real numbers have an order")
    return bool(zero) == (sign in "=≤≥") if zero or sign in "=≠" else bool((a - b).evalf(30) < 0) == (sign in "<≤")
