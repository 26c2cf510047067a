"""Mathematical notation as text: one plain form, the numbers in it, and what is refused before any parser sees it.

Everything here is untrusted text handled as text: standard library only, nothing is evaluated, time is linear in the length.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 512
DEEPEST = 12
MOST_DIGITS = 200
MOST_LETTERS = 120

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "⁄": "/", "∕": "/", "÷": "/", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "√": r"\sqrt ", "°": " degree ", "θ": r"\theta ", "∈": r"\in ", "“": '"', "”": '"', "’": "'",
}  # fmt: skip
_TRANSLATE = str.maketrans(_SYMBOLS)
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\(?:displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[()\[\]]|\\!", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\{,\}", ","),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\{([^{}\\]*)\\over(?![A-Za-z])([^{}\\]*)\}", r"\\frac{\1}{\2}"),
        (r"\\varnothing(?![A-Za-z])|\\\{\s{0,9}\\\}", r"\\emptyset "),
        (r"\\leq?(?:slant)?(?![A-Za-z])", r"\\le "),
        (r"\\geq?(?:slant)?(?![A-Za-z])", r"\\ge "),
        (r"\\neq?(?![A-Za-z])", r"\\ne "),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\[lr]vert(?![A-Za-z])", "|"),
        (r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit|mathit|operatorname)\s{0,9}\{([^{}]*)\}", r" \1 "),
        (r"\^\s{0,9}(?:\{\s{0,9}\\circ\s{0,9}\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", " degree "),
        (r"\\%", "%"),
        (r"\s+(?:or|and)\s+", ", "),
        (r"(?<=[\w)}])\s{0,9}\*\*\s{0,9}(?=[\w({-])", "^"),
        (r"(?<=[\w)}])\s{1,9}\^", "^"),
        (r"\\frac\s{0,9}(\d)\s{0,9}(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s{0,9}(\d)\s{0,9}\{", r"\\frac{\1}{"),
        (r"(\\frac\{[^{}]*\})\s{0,9}(\d)", r"\1{\2}"),
        # TeX would end the root of \sqrt 51 after the 5; whoever writes it does not mean that.
        (r"\\sqrt\s{0,9}([0-9]{1,9}|[A-Za-z])", r"\\sqrt{\1}"),
    ]
]
_CURRENCY = {"$": "dollar", "£": "pound", "€": "euro"}
_COMMANDS = frozenset(
    re.findall(
        r"\w+",
        """frac sqrt cdot times pm mp pi infty le ge lt gt ne approx cup cap setminus in emptyset varnothing
        sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp binom mathbb lfloor rfloor lceil rceil begin end
        alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi omega""",
    )
)
_WORDS = r"[A-Za-z][A-Za-z.]*(?:\^(?:\{[23]\}|[23]))?"
_UNIT = re.compile(rf"(.*?[0-9}})%.])(\s*)((?:{_WORDS})(?:\s*/\s*{_WORDS}|\s+{_WORDS})*)", re.DOTALL)
_NOT_UNITS = frozenset(["pi", "e", "i", "or", "and", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "in"])
_UNIT_NAMES = {
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "kilometer": "km", "kilometre": "km",
    "gram": "g", "kilogram": "kg", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "foot": "ft", "feet": "ft",
    "inch": "in", "inches": "in", "mile": "mi", "liter": "l", "litre": "l", "milliliter": "ml", "yard": "yd", "dollar": "dollar",
    "usd": "dollar", "cent": "cent", "degree": "degree", "deg": "degree", "mph": "mi/h", "kph": "km/h",
}  # fmt: skip
UNITS = frozenset(_UNIT_NAMES) | frozenset(_UNIT_NAMES.values()) | frozenset(["lb", "oz", "units"])


def plain(text: str) -> str:
    r"""One plain form of an answer or a claim: ascii, no dollar signs, no spacing commands, ``\frac{a}{b}`` with braces.

    >>> plain("$\\dfrac12$."), plain("x²"), plain("1½ cm")
    ('\\frac{1}{2}', 'x^{2}', '1\\frac{1}{2} cm')
    """
    # Before NFKC, which turns x² into x2 and 1½ into 11⁄2.
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar, text)
    text = unicodedata.normalize("NFKC", text.translate(_TRANSLATE)).translate(_TRANSLATE)
    text = " ".join(text.split())
    if text.startswith("**") and text.endswith("**") and len(text) > 4:
        text = text[2:-2]
    text = re.sub(r"^\s*(?:\\?([$£€]))\s{0,9}(-?[\d.,]+)[.]?$", lambda m: f"{m[2].rstrip('.,')} {_CURRENCY[m[1]]}", text)
    text = text.replace(r"\$", "").replace("$", "")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).strip().rstrip(".,;:").strip()


def _vulgar(match: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def compact(text: str) -> str:
    """Without the spaces that separate nothing: equal compact strings say the same."""
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


def refusal(text: str) -> str:
    """Why a text in plain form is not given to a parser; empty if it may be. Saves time; safety rests on the sandbox.

    >>> refusal("9^{9^9}")
    'a power of a power'
    """
    if len(text) > LONGEST:
        return f"longer than {LONGEST} characters"
    if sum(c.isdigit() for c in text) > MOST_DIGITS:
        return f"more than {MOST_DIGITS} digits"
    if re.search(r"__|\*\*|[`'\"#;@]|::", text) or not text.isascii():
        return "characters that are not mathematics"
    if unknown := set(re.findall(r"\\([A-Za-z]+)", text)) - _COMMANDS:
        return f"\\{min(unknown)} is not supported"
    if sum(c.isalpha() for c in re.sub(r"\\[A-Za-z]+", "", text)) > MOST_LETTERS:
        return f"more than {MOST_LETTERS} letters"
    if re.search(r"[-+*/^|]{4,}", re.sub(r"\s", "", text)):
        return "a row of operators"
    if re.search(r"!\s*!|\d{4,}\s*!|\)\s*!|\}\s*!", text):
        return "a large factorial"
    return _nesting(text)


def _nesting(text: str) -> str:
    # An exponent lasts to the end of its brace group, or of its single token.
    depth, exponents, awaiting = 0, [], False
    for token in re.findall(r"\\[A-Za-z]+|\\.|[A-Za-z]|\d+|\S", text):
        if token in ("(", "[", "{", r"\{"):
            depth += 1
            if awaiting:
                exponents.append(depth)
            awaiting = False
        elif token in (")", "]", "}", r"\}"):
            if exponents and exponents[-1] == depth:
                exponents.pop()
                if not exponents:
                    awaiting = False
            depth -= 1
        elif token == "^":
            if exponents:
                return "a power of a power"
            awaiting = True
            continue
        elif exponents or awaiting:
            if len(token) > 4 and token.isdigit():
                return "a huge exponent"
            awaiting = awaiting and token in "+-"
        if depth > DEEPEST:
            return f"nested deeper than {DEEPEST}"
        if depth < 0:
            break
    if depth:
        return "brackets that do not match"
    return "a power of a power" if re.search(r"\^\s*(?:\{[^{}]*\}|\\?\w+)\s*\^", text) else ""


@dataclass(frozen=True, slots=True)
class Written:
    """A number as it was written: its exact value, and for a decimal its significant digits and the size of half its last place."""

    value: Fraction
    digits: int = 0
    half_place: Fraction = Fraction(0)
    percent: bool = False


_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)(?:
        (?:(?P<whole>{_INTEGER})\s?)?\\frac\{{(?P<top>-?{_INTEGER})\}}\{{(?P<bottom>-?{_INTEGER})\}}
      | (?:(?P<whole2>{_INTEGER})\s)?(?P<top2>{_INTEGER})\s?/\s?(?P<bottom2>{_INTEGER})
      | (?P<decimal>{_INTEGER}?(?:\.\d+)?)
        (?:[eE](?P<power>[-+]?\d{{1,3}})|\s?(?:\\times|\\cdot|\*)\s?10\s?\^\s?(?:\{{(?P<power2>-?\d{{1,3}})\}}|(?P<power3>\d)))?
    )\s?(?P<percent>%|percent|per\ cent)?""",
    re.VERBOSE,
)


_REPEATING = re.compile(r"(?<![\d.,}])(\d{0,9})\.(\d{0,9})\\(?:overline|bar)\s?\{(\d{1,9})\}(?![\d.,{])")


def _as_fraction(match: re.Match[str]) -> str:
    # 0.1\overline{6} is (16 - 1)/90.
    whole, fixed, period = match.groups()
    top = int(whole + fixed + period) - int(whole + fixed or "0")
    return rf"\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def number(text: str) -> Written | None:
    r"""The number that a text in plain form is, or None: integers, decimals, fractions, mixed and scientific numbers, percent.

    >>> number("1,250.5").value, number(r"-2\frac{1}{2}").value, number("15%").value
    (Fraction(2501, 2), Fraction(-5, 2), Fraction(3, 20))
    """
    if len(text) > LONGEST or sum(c.isdigit() for c in text) > MOST_DIGITS:
        return None
    return _number(text)


@functools.lru_cache(maxsize=8192)
def _number(text: str) -> Written | None:
    text = _REPEATING.sub(_as_fraction, text)
    match = _NUMBER.fullmatch(re.sub(r"^\((.*)\)$", r"\1", text.strip()).strip())
    if match is None or not (match["top"] or match["top2"] or re.search(r"\d", match["decimal"] or "")):
        return None
    percent, half, digits = bool(match["percent"]), Fraction(0), 0
    top, bottom, whole = (match[name] or match[name + "2"] for name in ("top", "bottom", "whole"))
    if top:
        if not int(bottom.replace(",", "")):
            return None
        value = Fraction(int(top.replace(",", "")), int(bottom.replace(",", ""))) + int((whole or "0").replace(",", ""))
    else:
        decimal = match["decimal"].replace(",", "")
        scale = Fraction(10) ** int(match["power"] or match["power2"] or match["power3"] or 0)
        value = Fraction(decimal) * scale
        if "." in decimal:
            digits = max(1, len(decimal.replace(".", "").lstrip("0")))
            half = scale * Fraction(10) ** -len(decimal.partition(".")[2]) / 2
    if percent:
        value, half = value / 100, half / 100
    return Written(-value if match["sign"] == "-" else value, digits, half, percent)


def without_unit(text: str) -> tuple[str, str]:
    """A text in plain form as (the rest, its unit in one spelling); the unit is empty if there is none.

    >>> without_unit("5 meters"), without_unit("12 red apples"), without_unit("5x")
    (('5', 'm'), ('12', 'red apple'), ('5x', ''))
    """
    match = _UNIT.fullmatch(text) if len(text) <= LONGEST else None
    if match is None:
        return text, ""
    words = [_spelling(word) for word in re.split(r"[\s/]+", match[3].lower())]
    if any(word in _NOT_UNITS for word in re.split(r"[\s/]+", match[3].lower()) if word != "in" or len(words) > 1):
        return text, ""
    known = all(word.partition("^")[0] in UNITS or word in ("square", "cubic", "per") for word in words)
    spaced_words = bool(match[2]) and number(match[1]) is not None and len(words[0].partition("^")[0]) > 1
    if not spaced_words and not (known and (match[2] or len(words[0]) > 1)):
        return text, ""
    if words[0] in ("square", "cubic", "sq") and len(words) == 2:
        words = [words[1] + ("^3" if words[0] == "cubic" else "^2")]
    return match[1].strip(), ("/".join(words) if "/" in match[3] else " ".join(words)).replace(" per ", "/")


def _spelling(word: str) -> str:
    base, caret, power = word.strip(".").partition("^")
    if base in _UNIT_NAMES:
        name = _UNIT_NAMES[base]
    else:
        singular = base[:-1] if base.endswith("s") and len(base) > 2 else base
        name = _UNIT_NAMES.get(singular, singular)
    return name + (caret + power.strip("{}") if caret else "")


_FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|log|ln|exp|pi|infty)(?![A-Za-z])")


def latex(text: str) -> str:
    r"""A text in plain form with ascii functions written as LaTeX: the one grammar that workers parse.

    >>> latex("2*sqrt(3)/pi")
    '2\\cdot \\sqrt{3}/\\pi '
    """
    text = _FUNCTIONS.sub(r"\\\1 ", text).replace("*", r"\cdot ")
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    return re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
