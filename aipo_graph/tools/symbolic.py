"""Algebra in a worker that can be killed: expressions that a model wrote, and the Verify agent's claims on them.

Expressions are parsed by math-verify's parser: no text reaches ``sympify`` or ``parse_expr``, and what is parsed never leaves the worker.
"""

import functools
import re
from typing import Any

import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import LatexExtractionConfig
from math_verify import parse as read

from aipo_graph.tools import sandbox
from aipo_graph.tools.notation import LONGEST, Rules, number, plain, rewritten, without_commas

CPU_SECONDS = 1.0
LONGEST_RESULT = 200
RELATION = re.compile("([=<>≤≥≠≈])")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:[pbv]?matrix|mathbb)\b)(?:[A-Za-z]{4,}|cm|mm|km|kg|ft|in|min)(?![A-Za-z])")
_REFUSED = re.compile(
    r"__|[`'\"#:@%$≈]|\d\s+\d|\b0[xob]\w"  # no mathematics
    # What would only run out of CPU time. Refusing it saves that; safety rests on the sandbox.
    r"|\^\{-?\d+\^\{?\d|\^\{[^{}]*\}\^|\d{6,}\}|\d{4,}\s?!|[)}!]\s?!|\\Gamma|\(\([^()]*\^[^()]*\)\^[^()]*\)\^|([-+*/^|] ?){4,}"
)
_CLAIM: Rules = [
    (r"(?<=[%\d}])\s+of\s+", "*"), (r"(?<![\d.,])(\d[\d,]*(?:\.\d+)?)\s?%(?!\s*[\d(])", r"(\1/100)"),
]  # fmt: skip
_TOWER: Rules = [
    (r"\^\{([^{}]*)\}\^\{([^{}]*)\}", r"^{\1^{\2}}"),
    *[(r"\^\{(-?)(\d\d?)\^\{(\d\d?)\}\}", lambda m: f"^{{{m[1]}{int(m[2]) ** int(m[3])}}}")] * 3,
]  # fmt: skip
_FOR_THE_PARSER: Rules = [
    # Side by side the parser would read any whole number and fraction as a mixed number, (3)(4) as 7.
    (r"((?<![_^.\w])(?:\d+\.\d+|\d+(?!\d|\s?\\frac\{\d+\}\{\d+\}))|\))\s*(?=\(|\\(?!begin|end|r)[a-z])|(?<=\))(?=\d)", r"\1*"),
    (r"(\d+(?:\.\d+)?)°", r"(\1*\\frac{π}{180})"), (r"cis ?(\([^()]*\)+|\{[^{}]*\}|\S+)", r"(\\cos{\1}+i\\sin{\1})"),
    # Exact, where the parser would make a float.
    (r"(?<![\d.])(\d*)\.(\d+)", lambda m: f"(\\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}})"),
    ("∞", r"\\infty "), ("∈", r"\\in "), ("⦃", r"\\{"), ("⦄", r"\\}"), (";", ","),
]  # fmt: skip
# With the expression config it would reach parse_expr; with a timeout, set alarms.
_READER = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=NormalizationConfig(basic_latex=False, boxed="none"))


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
    if len(text) > LONGEST:
        return f"cannot {what}: it is longer than {LONGEST} characters"
    try:
        return str(await sandbox.SHARED.run(_answered, what, text, timeout=CPU_SECONDS))
    except sandbox.InputFault as fault:
        return f"cannot {what}: {fault}"


# What follows runs in a worker only: parsing and simplifying can take any time and any memory.


def warm_up() -> None:
    """Fills the parser's tables before the first call's CPU time is counted."""
    is_zero(parse(r"x^{2}-\sqrt{1}") - parse(r"(x-1)(x+\frac{2}{2})"))


def _answered(what: str, text: str) -> str:
    try:
        text = rewritten(plain(text.rstrip("? \n")), _CLAIM)
        if "%" in text:
            raise ValueError("whether % means percent or remainder is not clear")
        if word := _WORD.search(text):
            raise ValueError(f"{word[0]!r} is not mathematics")
        if what == "evaluate":
            return _value(text.rstrip("= "))
        first, *rest = RELATION.split(text)
        if not rest:
            raise ValueError("there is no = < > in it")
        links = zip([first, *rest[1::2]], rest[::2], rest[1::2], strict=False)
        return "yes" if all(_holds(*link) for link in links) else "no"
    except ValueError as error:
        return f"cannot {what}: {error}"


def _holds(left: str, sign: str, right: str) -> bool:
    a, b = _parsed(left), _parsed(right)
    if (a.is_Symbol or b.is_Symbol) and a.free_symbols != b.free_symbols:
        raise ValueError(f"what {(left if a.is_Symbol else right).strip()} is, is not known here")
    if sign == "≈":
        written = number(right.strip())
        return bool(abs(a - b) <= (sympy.Rational(str(written.half)) if written and written.half else abs(b) / 100))
    zero = is_zero(a - b, b if b.is_number else 1)
    if zero is None or not (zero or sign in "=≠" or (a - b).is_comparable):
        raise ValueError("undecided: only real numbers have an order")
    return bool(zero) == (sign in "=≤≥") if zero or sign in "=≠" else bool((a - b).evalf(30) < 0) == (sign in "<≤")


def _value(expression: str) -> str:
    value = sympy.simplify(_parsed(expression))
    if (value.is_Rational and max(abs(value.p), value.q) >= 10**LONGEST_RESULT) or len(written := str(value)) > LONGEST_RESULT:
        raise ValueError("the result is too long")
    return f"{written} = {value.evalf(6)}" if value.is_number and not value.is_Rational else written


def _parsed(text: str) -> Any:
    found = parse(text.strip())
    if found is None or not hasattr(found, "evalf"):
        raise ValueError("it does not parse" if text.strip() else "it is empty")
    if (found := found.doit()).has(sympy.nan, sympy.zoo):
        raise ValueError("division by zero")
    return found


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Any:
    """Reads text in plain form as a sympy object; None for what is no mathematics. Symbols are real, ``i`` and ``e`` constants."""
    if written := number(text):
        return sympy.Rational(written.value.numerator, written.value.denominator)
    text = rewritten(text, _TOWER)
    if len(text) > LONGEST or _REFUSED.search(text):
        return None
    found, *_ = read(
        f"${rewritten(without_commas(text), _FOR_THE_PARSER)}$", [_READER], fallback_mode="no_fallback", parsing_timeout=None
    ) or [None]
    if not hasattr(found, "free_symbols") or (isinstance(found, sympy.Expr) and RELATION.search(text)):
        return None  # of what it cannot read it takes what follows the last equals sign
    found = found.subs({s: sympy.I if str(s) == "i" else sympy.Symbol(str(s), real=True) for s in found.free_symbols})
    return sympy.ImmutableMatrix(found) if getattr(found, "is_Matrix", False) else found


def is_zero(difference: Any, scale: Any = 1) -> bool | None:
    """Whether an expression is zero, for all values of its variables; None where sympy cannot tell."""
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
