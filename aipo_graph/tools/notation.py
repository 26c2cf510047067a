r"""Mathematical notation as text: one plain form of what a model or a data set wrote, and the numbers in it.

In plain form an operator or a relation is one character (``≤ ∈ ∪ ∞ π *``), a set stands in ``⦃ ⦄``, *and* is ``∧``, *or* is ``∨``; fonts,
colours, spacing and separators of thousands are gone. Untrusted text handled as text: standard library only; callers bound its length.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

LONGEST = 512
FUNCTIONS = "sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|lcm|gcd"

_UNSEEN = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_ALIKE = str.maketrans(
    dict(zip("−‐‑‒–—⁄∕÷×·⋅∙∗⩽≦⩾≧≃≅’‘ʼ′“”∣∶⟨⟩〈〉º⌀\u2800", "------///*****≤≤≥≥≈≈''''\"\"|:()()°∅ ", strict=True))
    | {"ℝ": r"\mathbb{R}", "√": r"\sqrt "}
)
_COMMANDS = {
    name: meaning
    for names, meaning in {
        "le leq leqslant leqq": "≤", "ge geq geqslant geqq": "≥", "ne neq": "≠", "lt": "<", "gt": ">", "approx simeq": "≈", "in": "∈", "pm": "±",  # noqa: E501
        "cdot times ast": "*", "div": "/", "mp": "∓", "infty": "∞", "pi uppi": "π", "mu upmu": "μ", "Omega upOmega": "Ω", "degree": "°",
        "cup bigcup": "∪", "cap bigcap": "∩", "setminus smallsetminus backslash": "∖", "emptyset varnothing": "∅", "lor vee": "∨", "land wedge": "∧",  # noqa: E501
        "lbrace": "⦃", "rbrace": "⦄", "langle": "(", "rangle": ")", "lbrack": "[", "rbrack": "]", "mid vert lvert rvert": "|", "colon": ":",
        "dfrac tfrac cfrac sfrac nicefrac": r"\frac", "tg": r"\tan ", "ctg": r"\cot ", "arctg": r"\arctan ", "imath": "i", "jmath": "j",
        "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr negthinspace nobreak limits nolimits": "",
        """quad qquad space nobreakspace displaystyle textstyle scriptstyle scriptscriptstyle bf it rm sf tt sl sc em cal
        bfseries itshape rmfamily sffamily ttfamily mdseries upshape normalfont boldmath centering nonumber notag
        strut mathstrut relax hfill tiny scriptsize footnotesize small normalsize large Large LARGE huge Huge""": " ",
    }.items()
    for name in names.split()
}  # fmt: skip
_FONT = (
    r"\\(?:text(?:rm|bf|it|sf|tt|up|md|sc|sl|normal)?|math(?:rm|bf|it|sf|tt|cal|scr|normal|ord|op|bin|rel)|[mhf]box|boxed|operatorname\*?"
    r"|boldsymbol|bm|pmb|bold|emph|uline|underline|ensuremath|smash)\s*\{|\{\s*\\(?:rm|bf|it|sf|tt)(?![A-Za-z])"
)
_HARD = r"(?:\{[, ]\}|'|\s)"
_THOUSANDS = re.compile(
    rf"(?<![\d.\\])(?:\d{{1,3}}(?:{_HARD}\d{{3}})+(?!\d)(?:\.\d{{3}}(?:{_HARD}\d{{1,3}})+(?!\d))?|\d+\.\d{{3}}(?:{_HARD}\d{{3}})+(?!\d))"
)
_BRACED = r"(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})"
_END, _BEGIN = "(?![A-Za-z])", r"(?<![\\A-Za-z])"


def _rules(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_SPACING = _rules(
    (r"\\(?:text|page|f)?color(?:box)?\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}(?:\s*\{[A-Za-z!\d]*\}(?=\s*\{))?|\\[!/]\s?|\\(?:left|right)\s*\.", ""),  # noqa: E501
    (r"(?<!\\)\\[,:;> ]|~|\\(?:thin|med|thick|en)space(?![a-z])|\\[hv]space\*?\s*\{[^{}]*\}|\\(?:[hm]skip|m?kern)\s*-?[\d.]+\s?[a-z]{2}", " "),  # noqa: E501
    (r"\\[hv]?phantom\s*\{[^{}]*\}|(?<!\\)\\[()\[\]]", " "), (r"\s+", " "),
)  # fmt: skip
_COMMANDED = _rules(
    (rf"\^\s*(?:\{{\s*(?:\\circ|°)\s*\}}|\\circ{_END}|°)", "°"), (r"\\mathbb\s*\{?\s*R\s*\}?", "ℝ"), (r"\\\{", "⦃"), (r"\\\}", "⦄"),
    (r"\\([%&#_])", r"\1"), (rf"\\not\s?(?==|\\in{_END})=?", "≠"), (r"(?<=\d)\{[.,]\}(?=\d)", "."),
    (r"\\(begin|end)\s*\{array\}(?:\s*\{[lcr| ]*\})?", r"\\\1{matrix}"), (rf"\{{([^{{}}\\]*)\\over{_END}([^{{}}\\]*)\}}", r"\\frac{\1}{\2}"),  # noqa: E501
    (_FONT, "\0{"),
)  # fmt: skip
_WRITTEN = _rules(
    (rf"{_BEGIN}({FUNCTIONS}){_END}", r"\\\1 "), (rf"{_BEGIN}(max|min)(?=\s?[({{])", r"\\\1"), (r"\\log_(\w)\s?", r"\\log_{\1} "),
    (rf"{_BEGIN}(?:infinity|infty|inf){_END}", "∞"), (rf"{_BEGIN}pi{_END}", "π"), (rf"{_BEGIN}(?:percent|per cent){_END}", "%"),
    (rf"{_BEGIN}degrees?{_END}", "°"), (rf"\s*[,;]?\s*{_BEGIN}or{_END}\s*", " ∨ "), (rf"\s*[,;]?\s*{_BEGIN}and{_END}\s*", " ∧ "),
    (r"(?<=[\w)}])\s?\*\*\s?(?=[\w({-])", "^"), (r"\s+(?=[\^_°%])|(?<=[\^_])\s+", ""), (r"\^\s?\(([^()]*)\)", r"^{\1}"),
    (r"\^(-?\d{2,}|-\d|[A-Za-z])", r"^{\1}"), (r"<=|=<", "≤"), (r">=|=>", "≥"), (r"(?:(?<![\w)}!])|(?<=\s)|(?<=[A-Za-z]))!=|/=", "≠"), ("==", "="),  # noqa: E501
    (r"(\\(?:frac|sqrt|binom)|(?<=\\frac)\{[^{}]*\})\s+", r"\1"), (r"\\frac([\dA-Za-zπ])", r"\\frac{\1}"),
    (rf"\\frac{_BRACED}\s?([\dA-Za-zπ])", r"\\frac\1{\2}"), (r"\\sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}"),
    # TeX would end the root of \sqrt 51 after the 5; whoever writes it does not mean that.
    (r"\\sqrt(\d+|[A-Za-zπ])", r"\\sqrt{\1}"), (r"(^|[(\[{⦃,;:|=<>≤≥≠≈∈∨∧∪*/])\s*\+\s*(?=[\w(\\∞π.])", r"\1"),
    (r"^(?:[a-z] ?∈ ?)?all real(?:s| numbers)$", "ℝ"), (r"⦃\s*⦄", "∅"),
)  # fmt: skip


def plain(text: str) -> str:
    r"""Brings an answer or a claim to its plain form.

    >>> plain(r"$\dfrac12$."), plain("x²"), plain("1½ cm"), plain(r"\boldsymbol{12\,345}\text{ and }+\infty")
    ('\\frac{1}{2}', 'x^{2}', '1\\frac{1}{2} cm', '12345 ∧∞')
    """
    text = _UNSEEN.sub("", text)
    # Before NFKC, which turns x² into x2 and 1½ into 11⁄2.
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: "\\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", m[0]).split("⁄")), text)  # noqa: UP031
    text = unicodedata.normalize("NFKC", text.translate(_ALIKE)).translate(_ALIKE)
    text = re.sub(r"^\s*\*\*(.+)\*\*\s*$", r"\1", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # they delimit mathematics; an odd one, or one after a backslash, is money
        text = re.sub(r"(?<!\\)\$", "", text)
    text, money = re.subn(r"(?:US)?\\?[$£€]\s*", "", text)
    text = _applied(_SPACING, text)
    text = _applied(_COMMANDED, _THOUSANDS.sub(lambda m: re.sub(r"[^\d.]", "", m[0]), text))
    text = _ungrouped(re.sub(r"\\([A-Za-z]+)\s?", lambda m: _COMMANDS.get(m[1], m[0]), text))
    text = " ".join(_applied(_WRITTEN, text).split()).rstrip(".,;: ")
    return f"{text} dollar" if money == 1 and text[-1:].isdigit() else text


def _applied(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _ungrouped(text: str) -> str:
    """Takes out the braces that are no argument of a command, an exponent or an index: those of fonts (marked by a zero) and bare ones."""
    while (group := re.search(r"\0?\{([^{}]*)\}", text)) is not None:
        before = re.search(r"(\\(?:frac|binom))\s*$|\\[A-Za-z]+\s*$|\\sqrt\s?\[[^\]]*\]\s*$|[\^_\3]\s*$", text[: group.start()])
        # An argument's closing brace is kept as \2, or as \3 where one more argument is to come.
        held = f" {group[1]} " if before is None else f"\1{group[1]}{chr(3) if before[1] else chr(2)}"
        text = text[: group.start()].rstrip(" " if before else "") + held + text[group.end() :]
    return text.replace("\0", "").replace("\1", "{").replace("\2", "}").replace("\3", "}")


def compact(text: str) -> str:
    """Drops the spaces that separate nothing: equal compact strings say the same."""
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


def without_commas(text: str) -> str:
    """Reads commas between groups of three digits as separators of thousands, anywhere in a text in plain form."""
    return re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)


_FRACTION = re.compile(r"(-?)\s?(?:(\d+)\s?)?(?:\\frac\{\s?(-?\d+)\s?\}\{\s?(-?\d+)\s?\}|(?:(?<!\d)|(?<=\s))(\d+)\s?/\s?(\d+))")
_DECIMAL = re.compile(r"(-?)\s?(?:(?=\.?\d)(\d*)\.?(\d*)(?:(?:[eE]|\s?\*\s?10\^)\{?([-+]?\d{1,3})\}?)?|10\^\{?(-?\d{1,3})\}?)")
_REPEATING = re.compile(r"(?<![\d.,}])(\d{0,9})\.(\d{0,9})\\(?:overline|bar|dot)\s?\{(\d{1,9})\}(?![\d.,{])")


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written: its value, and for a decimal its significant digits and half of its last place."""

    value: Fraction
    digits: int = 0
    half: Fraction = Fraction(0)


def number(text: str) -> Number | None:
    r"""Reads a text in plain form as one number: an integer, decimal, fraction, mixed or scientific number; None for anything else.

    >>> number("1,250.5").value, number(r"-2\frac{1}{2}").value, number("1.5*10^{3}").half
    (Fraction(2501, 2), Fraction(-5, 2), Fraction(50, 1))
    """
    text = repeating(without_commas(re.sub(r"^\((.*)\)$", r"\1", text.strip()[: LONGEST + 1])))
    if len(text) > LONGEST:
        return None
    if match := _FRACTION.fullmatch(text):
        top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
        found = Number(Fraction(top, bottom) + int(match[2] or 0)) if bottom else None
    elif match := _DECIMAL.fullmatch(text):
        _, whole, places, power, ten = match.groups(default="")
        scale = Fraction(10) ** (int(power or ten or 0) - len(places))
        found = Number(int(whole + places or 1) * scale)
        if places:
            found = replace(found, digits=max(1, len((whole + places).lstrip("0"))), half=scale / 2)
    else:
        return None
    return replace(found, value=-found.value) if found and match[1] else found


def repeating(text: str) -> str:
    r"""Writes repeating decimals as fractions: ``0.1\overline{6}`` is 15/90."""

    def fraction(match: re.Match[str]) -> str:
        whole, fixed, period = match.groups()
        return f"\\frac{{{int(whole + fixed + period) - int(whole + fixed or 0)}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"

    return _REPEATING.sub(fraction, text)
