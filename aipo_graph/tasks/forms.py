r"""Answers that say one thing in several forms, brought to one: ``x>3`` and ``(3,\infty)``, a column and a tuple, ``2+2 = 4`` and ``4``.

Untrusted text handled as text, on plain forms (`tools.notation.plain`); what is not recognised is left as it is.
"""

import re

from aipo_graph.tools.notation import LONGEST, compact
from aipo_graph.tools.symbolic import exact

NAMED = re.compile(r"((?:[A-Za-z]|\\[a-z]+)(?:_\{?\w\}?)?(?:\([a-z]\))?|\([a-z](?:,\s?[a-z]){1,3}\))\s?(?:=|\\in(?![a-z]))\s?")
"""What an answer may open with: ``x =``, ``f(x) =``, ``(x, y) =``, ``x \\in``."""
_SUM = re.compile(r"[a-z](?:\s?[-+]?\s?[a-z]){1,5}\s?=\s?")
_BASED = re.compile(r"([0-9A-Z]+)\s?_\s?(?:(\d)|\{\s?(\d{1,2}|[a-z]+)\s?\})", re.IGNORECASE | re.ASCII)
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "twelve": "12"}
_REALS = frozenset([r"\mathbb{R}", "all real numbers", "all reals"])
_ORDER = re.compile(r"(<|>|\\[lg]e(?![A-Za-z]))")
_MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_COLUMN = re.compile(r"\\begin\{[pb]matrix\}([^&]*)\\end\{[pb]matrix\}")


def based(text: str) -> tuple[str, str] | None:
    r"""Digits and base of a numeral such as ``2516_8`` or ``2516_{eight}``: two bases are two numbers, whatever the digits.

    >>> based("2516_{8}"), based("0BEE_{16}"), based("x_1")
    (('2516', '8'), ('BEE', '16'), None)
    """
    match = _BASED.fullmatch(text)
    if match is None or (not match[1][0].isdigit() and len(match[1]) == 1):
        return None
    base = match[2] or match[3].lower()
    return match[1].upper().lstrip("0"), _BASES.get(base, base)


def without_names(answer: str, gold: str) -> tuple[str, str]:
    """``x = 5`` for ``5`` and the other way round, ``m+n = 5`` for ``5``. Anything else with an equals sign, 1=2=5, keeps it."""
    one, two = NAMED.match(answer), NAMED.match(gold)
    if one and two and (compact(one[0]) != compact(two[0]) or ("," in answer and "," in gold)):
        return answer, gold
    if one and (two or not re.search(r"=|\\in(?![a-z])", gold)):
        answer = answer[one.end() :]
    if two and (one or not re.search(r"=|\\in(?![a-z])", answer)):
        gold = gold[two.end() :]
    if "=" not in gold:
        answer = _last_of_chain(_SUM.sub("", answer, count=1) if _SUM.match(answer) else answer)
    return answer.strip(), gold.strip()


def _last_of_chain(text: str) -> str:
    # 6*7 = 42 says 42: each side is worked out exactly, so that a chain with a wrong link keeps its equals sign.
    sides = text.removeprefix(r"\approx ").split("=")
    values = [exact(side.strip()) for side in sides] if 1 < len(sides) <= 4 and len(text) <= LONGEST else [None]
    return sides[-1] if None not in values and len(set(values)) == 1 else "=".join(sides)


def names(parts: list[str]) -> list[str]:
    """The names in a list such as ``a=2, b=3``; empty unless every element has one."""
    found = [compact(match[1]) for part in parts if (match := NAMED.match(part))]
    return found if len(found) == len(parts) else []


def in_one_form(answer: str, gold: str) -> tuple[str, str]:
    r"""An inequality beside an interval becomes one, a column beside a tuple a tuple; the reals are ``(-\infty,\infty)``."""
    answer, gold = (r"(-\infty,\infty)" if text in _REALS else text for text in (answer, gold))
    return _like(answer, gold), _like(gold, answer)


def _like(text: str, other: str) -> str:
    if len(text) > LONGEST or other[:1] not in ("(", "[") or other[-1:] not in (")", "]") or "," not in other:
        return text
    if (column := _COLUMN.fullmatch(text)) and other[0] == "(":
        return "(" + ",".join(row.strip() for row in column[1].strip().removesuffix(r"\\").split(r"\\")) + ")"
    # (2,7) may be a point; with infinity or a square bracket it is none.
    return (_interval(text) or text) if r"\infty" in other or "[" in other or "]" in other else text


def _interval(text: str) -> str | None:
    parts = [part.strip() for part in _ORDER.split(text)]
    if parts[1:2] in ([">"], [r"\ge"]):
        parts = [_MIRRORED.get(part, part) for part in reversed(parts)]
    sides, signs = parts[::2], parts[1::2]
    if not set(signs) <= {"<", r"\le"} or not all(sides):
        return None
    match [len(side) == 1 and side.isalpha() for side in sides]:
        case [True, False]:
            sides, signs = [r"-\infty", *sides], ["<", *signs]
        case [False, True]:
            sides, signs = [*sides, r"\infty"], [*signs, "<"]
        case [False, True, False]:
            pass
        case _:
            return None
    return f"{'(' if signs[0] == '<' else '['}{sides[0]},{sides[2]}{')' if signs[1] == '<' else ']'}"
