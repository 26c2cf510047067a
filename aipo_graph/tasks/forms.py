r"""Answers that say one thing in several forms, brought to one: sequences, matrices, conditions as sets of reals, units.

All of it is handed text in plain form (`tools.notation.plain`), in a worker process.
"""

import re
from collections.abc import Sequence
from typing import Any

from aipo_graph.tools.notation import number
from aipo_graph.tools.symbolic import RELATION, is_zero, parse

NAMED = re.compile(
    r"((?:[A-Za-z]{1,3}|\\[a-z]+|[Α-ω])(?:_\{?\s?\w+\s?\}?)?(?:\([a-z\d]\))?|\\angle ?[A-Z]{1,3}|\([a-z](?:,\s?[a-z]){1,3}\)"
    r"|[a-z](?:\s?[-+]?\s?[a-z]){1,5}(?=\s?=))\s?[=∈]\s?"
)
"""What an answer may open with: ``x =``, ``f(x) =``, ``(x, y) =``, ``m+n =``, ``x ∈``."""
_MATRIX = re.compile(r"(.*?)[(\[]?\s?\\begin\{\s?([pbB]?matrix)\s?\}(.*?)\\end\{\s?\2\s?\}\s?[)\]]?", re.DOTALL)
_BUILDER = re.compile(r"⦃\s?([A-Za-zΑ-ω])\s?(?:∈\s?ℝ\s?)?[|:,]\s?(.*)⦄")
_WORD = r"[A-Za-zμΩ°]+\.?(?:\^\{?\s?-?\d\s?\}?)?"
_UNIT = re.compile(rf"(.*?[\d}})π.])(\s*)({_WORD}(?:(?:\s*[*/]\s*|\s+){_WORD})*)", re.DOTALL)
_ALIASES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "cc": "cm^3", "sq": "square", "cu": "cubic"}
_NAMES = {"mi": "mile", "in": "inch", "min": "minute", "hr": "hour", "sec": "second", "Ω": "ohm", "°": "degree"}


def split(text: str, separators: str) -> list[str]:
    """Splits at single characters outside of all brackets."""
    parts, depth = [""], 0
    for piece in re.findall(r"\\.|.", text, re.DOTALL):
        depth += (piece in "([{⦃") - (piece in ")]}⦄")
        if depth == 0 and piece in separators:
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts]


def sequence(text: str) -> tuple[str, list[str]]:
    """Splits into brackets and elements: ``("(]", ["1", "2"])``, ``("⦃⦄", …)`` for a set, ``("", …)`` for a bare list or no sequence."""
    brackets, inner = "", text
    if text[:1] in ("(", "[", "⦃") and text[-1:] in (")", "]", "⦄") and _balanced(text[1:-1]):
        brackets, inner = text[0] + text[-1], text[1:-1].strip()
    parts = [part for part in split(inner, ",;∧∨") if part] or [inner]
    if len(parts) == 1 and brackets in ("()", "[]"):
        brackets = ""
    signs = (("+", "-"), ("-", "+"))
    spread = [(part, s, t) for part in parts for s, t in signs[: 1 + bool(re.search("[±∓]", part))]]
    return brackets, [part.replace("±", s).replace("∓", t).lstrip("+ ") for part, s, t in spread]


def _balanced(text: str) -> bool:
    depths = [0]
    for letter in text:
        depths.append(depths[-1] + (letter in "([{⦃") - (letter in ")]}⦄"))
    return min(depths) == 0 == depths[-1]


def matrix(text: str) -> list[list[str]] | None:
    """The rows of a matrix, each element times the number that stands before it; None for anything else."""
    if (match := _MATRIX.fullmatch(text)) is None:
        return None
    scalar = match[1].strip("* ")
    scale = f"({'-1' if scalar == '-' else scalar})*" if scalar else ""
    return [[f"{scale}({cell})" if scale else cell.strip() for cell in row.split("&")] for row in match[3].split(r"\\") if row.strip()]


def region(text: str) -> tuple[str, Any] | None:
    """The name of the variable and the set of reals that a condition, an interval or a union of them states; None for anything else."""
    import sympy

    text = re.sub(r"^(?:-∞\s?<|∞\s?>)\s?|\s?(?:<\s?∞|>\s?-∞)$", "", text.strip())
    for signs, join in (
        ("∨", sympy.Union),
        ("∧,", sympy.Intersection),
        ("∪", sympy.Union),
        ("∩", sympy.Intersection),
        ("∖", sympy.Complement),
    ):
        if len(parts := split(text, signs)) > 1:
            opening = re.match(r"[^=<>≤≥≠∈]+≠", text)  # x ≠ 0, 1 is x ≠ 0 and x ≠ 1
            parts = [part if RELATION.search(part) or not opening else opening[0] + part for part in parts]
            found = [each for part in parts if (signs != "∧," or RELATION.search(part)) and (each := region(part))]
            names = {name for name, _ in found} - {""}
            return None if len(found) < len(parts) or len(names) > 1 else ("".join(names), join(*(each for _, each in found)))
    for pattern in (_BUILDER, r"(\\?[A-Za-zΑ-ω]+)\s?∈\s?(.*)"):
        if match := re.fullmatch(pattern, text):
            inner = region(match[2])
            return None if inner is None or inner[0] not in ("", match[1]) else (match[1], inner[1])
    if text in ("ℝ", "∅"):
        return "", sympy.Reals if text == "ℝ" else sympy.EmptySet
    if re.fullmatch("[A-Za-zα-ω]", text):
        return text, sympy.Reals  # of -∞ < x < ∞
    if RELATION.search(text):
        return _solved(text)
    brackets, parts = sequence(text)
    ends = [parse(part) for part in parts]
    if not brackets or not all(isinstance(end, sympy.Expr) and end.is_extended_real for end in ends):
        return None
    if brackets == "⦃⦄":
        return "", sympy.FiniteSet(*ends)
    closed = any(end.is_infinite and bracket in "[]" for end, bracket in zip(ends, brackets, strict=False))
    return (
        ("", sympy.Interval(*ends, brackets[0] == "(", brackets[1] == ")")) if len(ends) == 2 and not closed and ends[0] < ends[1] else None
    )


def _solved(text: str) -> tuple[str, Any] | None:
    import sympy

    if "±" in text:
        return region(f"{text.replace('±', '')}∧{text.replace('±', '-')}") if "≠" in text else None
    linked = links(text) or []
    symbols = [expr.free_symbols for _, expr in linked]
    if not linked or len(set().union(*symbols)) != 1 or set() in symbols or len(linked) > 1 + all(sign in "<≤" for sign, _ in linked):
        return None
    relations = {"<": sympy.Lt, "≤": sympy.Le, "≠": sympy.Ne, "=": sympy.Eq}
    return str(*symbols[0]), sympy.Intersection(*(relations[sign](expr, 0).as_set() for sign, expr in linked))


def links(text: str) -> list[tuple[str, Any]] | None:
    """The relations of a chain or a list, each as a sign and an expression that stands so to 0; ``>`` and ``≥`` are turned round."""
    import sympy

    found = []
    for chain in split(text, ",;∧"):
        sides, signs = [parse(side) for side in RELATION.split(chain)[::2]], RELATION.findall(chain)
        if (
            not signs
            or "≈" in signs
            or not all(isinstance(side, sympy.Expr) for side in sides)
            or ({*"<≤"} & {*signs} and {*">≥"} & {*signs})
        ):
            return None
        for left, sign, right in zip(sides, signs, sides[1:], strict=False):
            found.append(({">": "<", "≥": "≤"}[sign], right - left) if sign in ">≥" else (sign, left - right))
    return found


def same_region(one: Any, two: Any) -> bool:
    """Whether two sets are equal: as sympy has them, else part by part, their ends compared exactly."""
    import sympy

    if one == two or sympy.EmptySet in (one, two):
        return bool(one == two)
    parts = [sorted(each.args if isinstance(each, sympy.Union) else [each], key=lambda part: float(part.inf)) for each in (one, two)]
    ends = [[(type(part), *part.args) for part in each] for each in parts]
    if [*map(len, ends[0])] != [*map(len, ends[1])]:
        return False
    pairs = [pair for a, b in zip(*ends, strict=True) for pair in zip(a, b, strict=True)]
    return all(x == y or bool(isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr) and is_zero(x - y, y)) for x, y in pairs)


def same_links(one: Sequence[tuple[str, Any]], two: Sequence[tuple[str, Any]]) -> bool:
    """Whether each relation of one is a multiple of one of the other, and the other way round: an inequality a positive one."""
    import sympy

    def multiple(a: tuple[str, Any], b: tuple[str, Any]) -> bool:
        ratio = sympy.simplify(a[1] / b[1]) if a[0] == b[0] else sympy.nan
        return bool(ratio.is_number and ratio.is_finite and (ratio > 0 if a[0] in "<≤" else ratio != 0))

    return (
        len(one) == len(two) and all(any(multiple(a, b) for b in two) for a in one) and all(any(multiple(a, b) for a in one) for b in two)
    )


def without_unit(text: str) -> tuple[str, Any]:
    """The rest of a text and its unit as sympy has it, unknown words as symbols; None where there is no unit."""
    import sympy
    from sympy.physics import units

    text = re.sub(r"(μ|[kMm](?=\s+Ω))\s+(?=[A-Za-zΩ])", r"\1", re.sub(r"/\s?\(([A-Za-z* ]+)\)$", r"/\1", text))
    match = _UNIT.fullmatch(text)
    if match is None or (match[3] == "°" and re.search(r"\\[a-z]{3}(?<!\\fra)|cis", match[1])):
        return text, None
    unit, power, over = sympy.Integer(1), 1, 1
    written = re.sub(r"[A-Za-z]+", lambda m: _ALIASES.get(m[0], m[0]), match[3])
    words = re.findall(r"(/|[A-Za-zμΩ°]+)\.?(?:\^\{?\s?(-?\d))?", written)
    if len(match[3]) == 1 and match[3] not in "°Ω" and (not match[2] or re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", match[1])):
        return text, None  # 5m, 2x m: a variable
    for word, exponent in words:
        if word in ("/", "per"):
            over = -1
        elif word in ("square", "cubic"):
            power = 2 + (word == "cubic")
        else:
            names = [_NAMES.get(name, name) for name in (word, word.removesuffix("s"), word.lower(), word.lower().removesuffix("s"))]
            known = next((found for name in names if type(found := getattr(units, name, None)) is units.Quantity), None)
            if known is None and (len(word) == 1 or not match[2] or number(match[1]) is None):
                return text, None
            if names[-1] != "unit":
                unit *= (known or sympy.Symbol(names[-1])) ** (over * power * int(exponent or 1))
            power = 1
    return match[1].strip(), unit


def ratio(unit: Any, other: Any) -> Any:
    """How many of the other unit one is; None for units of different kinds."""
    from sympy.physics import units

    found = units.convert_to(unit / other, [units.meter, units.kilogram, units.second])
    return found if found.is_number else None
