"""Exact arithmetic and algebra on claims and expressions that a model wrote: the Verify agent's tool.

Numbers are worked out in this process, exactly and bounded. Everything else is parsed by latex2sympy2_extended, in a worker:
no text reaches ``sympify`` or ``parse_expr``, and a parsed expression never leaves the worker, nor its ``repr`` the call.
"""

import ast
import logging
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from aipo_graph.tools import sandbox
from aipo_graph.tools.notation import LONGEST, UNITS, latex, plain, refusal

log = logging.getLogger(__name__)

CPU_SECONDS = 1.0
LONGEST_TEXT = 4 * LONGEST  # before spacing and dollar signs are taken out
MOST_BITS = 4096
LONGEST_RESULT = 200
_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    r"\le": operator.le,
    r"\ge": operator.ge,
    r"\ne": operator.ne,
}
_SIGNS = {"==": "=", "<=": r"\le", ">=": r"\ge", "!=": r"\ne", "/=": r"\ne"}
# A ! that touches its number is a factorial.
_RELATION = re.compile(r"(==|<=|>=|(?<=\s)!=|/=|=|<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|\\approx(?![A-Za-z]))")
_ARITHMETIC = re.compile(r"[0-9+\-*/^(). ]+")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


async def check(claim: str) -> str:
    r"""``yes``, ``no`` or ``cannot check: reason`` for a claim such as ``3*(4+5) = 27``, ``\frac12 > 0.3`` or ``x^2-1 = (x-1)(x+1)``.

    An equation with variables is a claim that it holds for all of them. A chain ``a = b = c`` claims each of its links.
    Raises ToolError if the sandbox failed.
    """
    text = _claim(claim).rstrip("?").strip()
    if reason := _unreadable(text):
        return f"cannot check: {reason}"
    parts = [part.strip() for part in _RELATION.split(text)]
    sides, signs = parts[::2], [_SIGNS.get(sign, sign) for sign in parts[1::2]]
    if not signs:
        return "cannot check: there is no = < > in it"
    if not all(sides):
        return "cannot check: one side is empty"
    values = [exact(side) for side in sides]
    if None not in values:
        links = zip(values, signs, values[1:], sides[1:], strict=False)
        return "yes" if all(_holds(a, sign, b, side) for a, sign, b, side in links) else "no"  # type: ignore[arg-type]
    verdicts = []
    for a, sign, b in zip(sides, signs, sides[1:], strict=False):
        verdicts.append(await _in_worker(_link, latex(a), sign, latex(b)))
    return "no" if "no" in verdicts else next((v for v in verdicts if v != "yes"), "yes")


async def evaluate(expression: str) -> str:
    r"""The value of an expression, exact where it is rational: ``3*(4+5)`` gives ``27``, ``1/3+1/6`` gives ``1/2``.

    Otherwise its simplified form, with six digits where it is a number, or ``cannot evaluate: reason``.
    Raises ToolError if the sandbox failed.
    """
    text = _claim(expression).rstrip("=?").strip()
    reason = _unreadable(text) or ("it is empty" if not text else "")
    if reason:
        return f"cannot evaluate: {reason}"
    value = exact(text)
    if value is not None and max(value.numerator.bit_length(), value.denominator.bit_length()) < 600:
        return str(value)
    verdict = await _in_worker(_value, latex(text))
    return verdict.replace("cannot check", "cannot evaluate")


async def _in_worker(function: Callable[..., str], *args: str) -> str:
    try:
        return str(await sandbox.SHARED.run(function, *args, timeout=CPU_SECONDS))
    except sandbox.InputFault as fault:
        log.debug("sandbox: %s for %r", fault, args)
        return f"cannot check: {fault}"


def _claim(text: str) -> str:
    if len(text) > LONGEST_TEXT:
        return text  # too long to be admitted
    text = re.sub(r"(?<=[%\d}])\s+of\s+", "*", plain(text))
    return re.sub(r"(?<![\d.,])(\d[\d,]*(?:\.\d+)?)\s?%(?!\s*[\d(])", r"(\1/100)", text)


def _unreadable(text: str) -> str:
    if reason := refusal(text):
        return reason
    if re.search(r"%\s*[\d(]", text):
        return "whether % means percent or remainder is not clear"
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\(?:begin|end|mathbb)\{[A-Za-z]*\}", "", latex(text)))
    word = next((word for word in words if len(word) > 3 or word.lower() in UNITS), None)
    return f"{word!r} is not mathematics" if word else ""


def exact(text: str) -> Fraction | None:
    r"""The value of plain arithmetic, or None: digits, ``+ - * / ^``, brackets, ``\frac`` and ``\cdot``; never more than 4096 bits.

    >>> exact(r"\frac{1}{2}+0.25*2^3")
    Fraction(5, 2)
    """
    text = re.sub(r"(?<![\d.^{])(\d+)\s?\\frac\{(\d+)\}\{(\d+)\}", r"(\1+(\2)/(\3))", text)
    for _ in range(text.count(r"\frac")):
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"\\(?:cdot|times)(?![A-Za-z])", "*", text).replace("{", "(").replace("}", ")")
    text = re.sub(r"(?<![\d,.])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda m: m[0].replace(",", ""), text)
    if not _ARITHMETIC.fullmatch(text):
        return None
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip())  # Python reads no 007
    text = re.sub(r"(?<=[\d)])\s?(?=\()|(?<=\))\s?(?=\d)", "*", text)
    try:
        return _fraction(ast.parse(text.replace("^", "**"), mode="eval").body, text.replace("^", "**"))
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError, ValueError):
        return None


def _fraction(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            value = Fraction(source[node.col_offset : node.end_col_offset])
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            value = _fraction(operand, source)
            value = -value if isinstance(node.op, ast.USub) else value
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, power = _fraction(left, source), _fraction(right, source)
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if power.denominator != 1 or abs(power) * size > MOST_BITS:
                raise ValueError
            value = base ** int(power)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_fraction(left, source), _fraction(right, source))
        case _:
            raise ValueError
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise ValueError
    return value


def _holds(a: Fraction, sign: str, b: Fraction, written: str) -> bool:
    if sign == r"\approx":
        return abs(a - b) <= _rounding(written, b)
    return _TESTS[sign](a, b)


def _rounding(written: str, value: Fraction) -> Fraction:
    # Half the last place as it was written; a hundredth of the value where there is no decimal point.
    places = re.search(r"\.(\d+)\s*$", written)
    return Fraction(1, 2 * 10 ** len(places[1])) if places else abs(value) / 100


# What follows runs in a worker only: parsing and simplifying can take any time and any memory.


def warm_up() -> None:
    """Pay for imports and the parser's tables before the first call's CPU time is counted."""
    is_zero(parse(r"x^{2}-\sqrt{1}") - parse(r"(x-1)(x+\frac{2}{2})"))


def parse(text: str) -> Any:
    """A sympy object, or None where the text is not read as mathematics."""
    import sympy
    from math_verify import LatexExtractionConfig, parse

    # With a timeout it would set alarms, and answer [] for them; with the expression config it would reach parse_expr.
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if re.fullmatch(r"[^({\[]*", text) else text
    text = re.sub(r"(\^\s?)?(?<![\d.])(\d*)\.(\d+)", _as_fraction, text)  # exact, where the parser would make a float
    found = parse(f"${text}$", [LatexExtractionConfig(boxed_match_priority=-1)], fallback_mode="no_fallback", parsing_timeout=None)
    if found and isinstance(found[0], sympy.Expr):
        return found[0].subs({symbol: sympy.I for symbol in found[0].free_symbols if str(symbol) == "i"})
    return found[0] if found else None


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
    known = value.is_number and value.is_finite
    if known and abs(value) > size * sympy.Float("1e-20") + sympy.Float("1e-300"):
        return False
    if sympy.simplify(difference) == 0:
        return True
    verdict = difference.equals(0)
    return None if verdict is None else bool(verdict)


def _link(left: str, sign: str, right: str) -> str:
    import sympy

    a, b = parse(left), parse(right)
    if a is None or b is None or not (hasattr(a, "evalf") and hasattr(b, "evalf")):
        return "cannot check: it does not parse"
    if (a.is_Symbol or b.is_Symbol) and a.free_symbols != b.free_symbols:
        return f"cannot check: what {left if a.is_Symbol else right} is, is not known here"
    a, b = a.doit(), b.doit()
    if a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        return "cannot check: division by zero"
    difference = a - b
    if sign == r"\approx":
        a, b = (Fraction(str(x.evalf(30))) for x in (a, b))
        return "yes" if _holds(a, sign, b, right) else "no"
    if sign in ("=", r"\ne"):
        zero = is_zero(difference, b if b.is_number else 1)
        if zero is None:
            return "cannot check: undecided"
        return "yes" if zero == (sign == "=") else "no"
    if difference.free_symbols or not difference.is_extended_real:
        return "cannot check: the order is only checked of real numbers"
    if is_zero(difference, b):
        return "yes" if sign in (r"\le", r"\ge") else "no"
    return "yes" if _TESTS[sign](difference.evalf(30), 0) else "no"


def _value(text: str) -> str:
    import sympy

    value = parse(text)
    if value is None:
        return "cannot check: it does not parse"
    value = sympy.simplify(value.doit())
    written = str(value)
    if len(written) > LONGEST_RESULT:
        return "cannot check: the result is too long"
    if getattr(value, "is_number", False) and not value.is_Rational:
        return f"{written} = {value.evalf(6)}"
    return written
