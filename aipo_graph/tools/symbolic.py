"""Algebra in a worker that can be killed: expressions that a model wrote, and the Verify agent's claims on them.

Expressions are parsed by math-verify: no text reaches ``sympify`` or ``parse_expr``, and what is parsed never leaves the worker.
"""

import functools
import re
import unicodedata
from typing import Any

from aipo_graph.tools import sandbox
from aipo_graph.tools.notation import FUNCTIONS, LONGEST, number, plain, repeating, without_commas

CPU_SECONDS = 1.0
LONGEST_RESULT = 200
RELATION = re.compile("([=<>≤≥≠≈])")
_NO_MATHEMATICS = re.compile(r"__|[`'\"#;@%&$=<>≤≥≠≈∈∪∩∖]|\d\s+\d|\b0[xob]\w")
_BOMB = re.compile(r"\^\{[^{}]*\^|\^\S\^|\d{6,}\}|\^\d{6,}|\d{4,}\s?!|[)}!]\s?!|\\Gamma|\(\([^()]*\^[^()]*\)\^[^()]*\)\^|([-+*/^|] ?){4,}")
"""What would only run out of CPU time. Refusing it saves that; safety rests on the sandbox."""


async def check(claim: str) -> str:
    r"""Judges a claim such as ``3*(4+5) = 27``, ``\frac12 > 0.3`` or ``x^2-1 = (x-1)(x+1)``: ``yes``, ``no`` or ``cannot check: reason``.

    An equation with variables is a claim that it holds for all of them. A chain ``a = b = c`` claims each of its links.
    Raises ToolError if the sandbox failed.
    """
    return await _ask("check", claim)


async def evaluate(expression: str) -> str:
    r"""Works out an expression, exactly where it is rational: ``3*(4+5)`` gives ``27``, ``1/3+1/6`` gives ``1/2``.

    Otherwise gives its simplified form, with six digits where it is a number, or ``cannot evaluate: reason``.
    Raises ToolError if the sandbox failed.
    """
    return await _ask("evaluate", expression)


async def _ask(what: str, text: str) -> str:
    try:
        return str(await sandbox.SHARED.run(_answered, what, text[: 4 * LONGEST + 1], timeout=CPU_SECONDS))
    except sandbox.InputFault as fault:
        return f"cannot {what}: {fault}"


# What follows runs in a worker only: parsing and simplifying can take any time and any memory.


def warm_up() -> None:
    """Pays for imports and the parser's tables before the first call's CPU time is counted."""
    import sympy.physics.units  # noqa: F401  # of answers with units

    is_zero(parse(r"x^{2}-\sqrt{1}") - parse(r"(x-1)(x+\frac{2}{2})"))


def _answered(what: str, text: str) -> str:
    try:
        longer = len(text) > 4 * LONGEST
        text = re.sub(r"(?<=[%\d}])\s+of\s+", "*", plain(text.rstrip("? \n")))
        text = re.sub(r"(?<![\d.,])(\d[\d,]*(?:\.\d+)?)\s?%(?!\s*[\d(])", r"(\1/100)", text)
        if longer or len(text) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST} characters")
        if "%" in text:
            raise ValueError("whether % means percent or remainder is not clear")
        if word := re.search(r"(?<![\\A-Za-z])(?!(?:[pbv]?matrix|mathbb)\b)(?:[A-Za-z]{4,}|cm|mm|km|kg|ft|in|min)(?![A-Za-z])", text):
            raise ValueError(f"{word[0]!r} is not mathematics")
        return _judged(text) if what == "check" else _value(text.rstrip("= "))
    except ValueError as error:
        return f"cannot {what}: {error}"


def _judged(claim: str) -> str:
    sides, signs = [part.strip() for part in RELATION.split(claim)[::2]], RELATION.findall(claim)
    if not signs:
        raise ValueError("there is no = < > in it")
    if not all(sides):
        raise ValueError("one side is empty")
    held = [_holds(a, sign, b) for a, sign, b in zip(sides, signs, sides[1:], strict=False)]
    return "yes" if all(held) else "no"


def _value(expression: str) -> str:
    import sympy

    if not expression:
        raise ValueError("it is empty")
    value = sympy.simplify(_parsed(expression).doit())
    if (value.is_Rational and max(abs(value.p), value.q) >= 10**LONGEST_RESULT) or len(written := str(value)) > LONGEST_RESULT:
        raise ValueError("the result is too long")
    return f"{written} = {value.evalf(6)}" if value.is_number and not value.is_Rational else written


def _holds(left: str, sign: str, right: str) -> bool:
    import sympy

    a, b = _parsed(left), _parsed(right)
    if (a.is_Symbol or b.is_Symbol) and a.free_symbols != b.free_symbols:
        raise ValueError(f"what {left if a.is_Symbol else right} is, is not known here")
    a, b = a.doit(), b.doit()
    if a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        raise ValueError("division by zero")
    if sign == "≈":
        half = written.half if (written := number(right)) else 0
        return bool(abs(a - b) <= (sympy.Rational(half.numerator, half.denominator) if half else abs(b) / 100))
    zero = is_zero(a - b, b if b.is_number else 1)
    if sign in "=≠":
        if zero is None:
            raise ValueError("undecided")
        return zero == (sign == "=")
    if not (a - b).is_extended_real or (a - b).free_symbols:
        raise ValueError("the order is only checked of real numbers")
    return sign in "≤≥" if zero else bool((a - b).evalf(30) < 0) == (sign in "<≤")


def _parsed(text: str) -> Any:
    found = parse(text)
    if found is None or not hasattr(found, "evalf"):
        raise ValueError("it does not parse")
    return found


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Any:
    """Reads text in plain form as a sympy object; None for what is no mathematics. Symbols are real, ``i`` and ``e`` constants."""
    import sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    text = text.strip()
    if written := number(text):
        return sympy.Rational(written.value.numerator, written.value.denominator)
    if text in ("∞", "-∞"):
        return sympy.oo if text == "∞" else -sympy.oo
    text = re.sub(r"(?<![\d.^_{/])(\d+)(?:\s?(\\frac\{\d+\}\{\d+\})|\s(\d+\s?/\s?\d+))", r"(\1+\2\3)", repeating(text))
    if len(text) > LONGEST or _BOMB.search(text) or _NO_MATHEMATICS.search(text):
        return None
    # Side by side it would read a whole number and a fraction as a mixed number, (3)(4) as 7.
    text = re.sub(
        rf"((?<![_^.\w])\d+(?:\.\d+)?|\))\s*(?=\(|\\(?:frac|binom|{FUNCTIONS})(?![a-z]))|(?<=\))(?=\d)", r"\1*", without_commas(text)
    )
    text = re.sub(
        r"cis ?(\([^()]*\)+|\{[^{}]*\}|\S+)", r"(\\cos{\1}+i\\sin{\1})", re.sub(r"(\d+(?:\.\d+)?)°", r"(\1*\\frac{π}{180})", text)
    )
    text = re.sub(r"(\^\s?)?(?<![\d.])(\d*)\.(\d+)", _as_fraction, text)  # exact, where the parser would make a float
    text = re.sub("[α-ωΑ-Ω]", lambda m: f"\\{_greek(m[0])} ", text).replace("*", r"\cdot ").replace("∞", r"\infty ")
    # With a timeout it would set alarms, and answer [] for them; with the expression config it would reach parse_expr.
    settings = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=NormalizationConfig(basic_latex=False, boxed="none"))
    found = parse(f"${text}$", [settings], fallback_mode="no_fallback", parsing_timeout=None)
    if not found or not hasattr(found[0], "free_symbols"):
        return None
    return found[0].subs({s: sympy.I if str(s) == "i" else sympy.Symbol(str(s), real=True) for s in found[0].free_symbols})


def _greek(letter: str) -> str:
    *_, size, _, name = unicodedata.name(letter).replace("LAMDA", "LAMBDA").replace("FINAL ", "").split()
    return name.lower() if size == "SMALL" else name.title()


def _as_fraction(match: re.Match[str]) -> str:
    fraction = rf"\frac{{{int(match[2] + match[3])}}}{{{10 ** len(match[3])}}}"
    return f"^{{{fraction}}}" if match[1] else fraction


def is_zero(difference: Any, scale: Any = 1) -> bool | None:
    """Whether an expression is zero, for all values of its variables; None where sympy cannot tell."""
    import sympy

    difference = sympy.nsimplify(difference.doit(), rational=True)
    if difference.is_Rational:
        return bool(difference == 0)
    # Most wrong answers are told apart by one value, long before anything is simplified.
    symbols = sorted(difference.free_symbols, key=str)
    value = difference.subs({symbol: sympy.Rational(37 + 10 * i, 29 + 3 * i) for i, symbol in enumerate(symbols)}).evalf(30)
    size = sympy.Float(1) if symbols else abs(sympy.sympify(scale).evalf(30))
    if value.is_number and value.is_finite and abs(value) > size * sympy.Float("1e-20") + sympy.Float("1e-300"):
        return False
    return True if sympy.simplify(difference) == 0 else difference.equals(0)
