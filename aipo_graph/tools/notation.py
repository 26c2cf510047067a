r"""Mathematical notation as text: one plain form of what a model or a data set wrote, and the numbers in it.

In plain form an operator or a relation is one character (``≤ ∈ ∪ ∞ π *``), a set stands in ``⦃ ⦄``, *and* is ``∧``, *or* is ``∨``; fonts,
colours, spacing and separators of thousands are gone. Untrusted text handled as text: standard library only; callers bound its length.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from fractions import Fraction

LONGEST = 512
_WORDS = {ord("ℝ"): r"\mathbb{R}", ord("√"): r"\sqrt ", ord("或"): " or ", ord("且"): " and "}
_ALIKE = str.maketrans("−‐‑–—⁄∕÷×·⋅∙∗⩽≦⩾≧≃≅’‘ʼ′“”∣∶⟨⟩º⌀、。", "-----///*****≤≤≥≥≈≈''''\"\"|:()°∅,.") | _WORDS
_SIGNS = r"""
≤ \le \leq \leqslant \leqq; ≥ \ge \geq \geqslant \geqq; ≠ \ne \neq; < \lt; > \gt; ≈ \approx; ∈ \in; ± \pm; ∓ \mp; / \div; : \colon;
* \cdot \times \ast; | \mid \vert \lvert \rvert; ∪ \cup \bigcup; ∩ \cap \bigcap; ∖ \setminus \smallsetminus \backslash; Å \AA \angstrom;
∨ \lor \vee or OR; ∧ \land \wedge \& and AND; ⦃ \{ \lbrace; ⦄ \} \rbrace; # \#; _ \_; ( \langle; ) \rangle; [ \lbrack; ] \rbrack;
π \pi \uppi pi; ∞ \infty infinity Infinity infty inf oo; μ \mu \upmu \textmu; Ω \Omega \upOmega \textohm \ohm; % \% percent; i \imath;
° \circ \degree \textdegree degree degrees; ∅ \emptyset \varnothing \empty; \frac \dfrac \tfrac \cfrac \nicefrac \sfrac; \\ \cr;
\sqrt sqrt; \arcsin arcsin; \arccos arccos; \arctan \arctg arctg arctan; \sinh sinh; \cosh cosh; \tanh tanh; \sin sin; \cos cos;
\tan \tg tg tan; \cot cot; \csc csc; \log \lg lg log; \ln ln; \exp exp; \lcm lcm; \gcd gcd"""
_MEANINGS = {name: sign for sign, *names in map(str.split, _SIGNS.split(";")) for name in names}
_UPPER, _LOWER = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
_BRACED = r"(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})"
_GAP = r"(?:(?:\\(?:mathord|text[a-z]*))?\{[, ]\}|'|\s)+"
_BLOCK = r"\s*\{[^{}]*\}"
Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]
_COMMANDS: Rules = [
    (r"(?:US)?\\?[$£€¢¥₩₹₽]|\\(?:euro|pounds)(?![A-Za-z])", ""), (r"^\s*(\*\*?|__?)(.+)\1\W*$", r"\2"),
    (r"\\(?:left|right|middle|[Bb]igg?[lr]?)(?![A-Za-z])\s?\.?|(?<=\d,)\\[,:;!]\s?(?=\d{3}(?!\d))|(?<!\\)\\[!/]", ""),
    (rf"\\(?:(?:text)?color(?:box)?|raisebox)\s*(?:\[[^\]]*\])?{_BLOCK}|\\(?:fcolorbox|fontsize){_BLOCK}{_BLOCK}", ""),
    # Switches of font, size and style, and what takes space.
    (r"\\(?:(?:bf|it|rm|sf|tt|sl|sc|md|up)(?:series|shape|family)?|(?:normal|select)font|[a-z]*(?:style|size)|boldmath|tiny|small|centering"
     r"|(?i:large|huge)|q?quad|(?:thin|med|thick|en)space|(?:math)?strut|hfill?)(?![A-Za-z])|\\[hm]?(?:kern|skip)\s?-?[\d.]+ ?[a-z]{2}"
     rf"|\\[hvm]?(?:space|phantom)\*?{_BLOCK}|(?<!\\)\\[,:;> ()[\]]|~|\s+", " "),
    (r"\\?[A-Za-z]+|\\[{}&%#_]", lambda m: _MEANINGS.get(m[0], m[0])),
    # Digits in groups of three, before the point and after it.
    (rf"(?<![\d.\\])\d{{1,3}}(?:{_GAP}\d{{3}})+(?!\d)|(?<=\d\.)\d{{3}}(?:{_GAP}\d{{3}})*{_GAP}\d{{1,3}}(?!\d)",
     lambda m: re.sub(r"\D", "", m[0])),
    (r"\\mathbb ?\{? ?R ?\}?", "ℝ"), (r"\\mathring ?\{?A\}?", "Å"), (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"^ ?\{(?!\d{1,3}(?:,\d{3})+\})([^{}]*,[^{}]*)\}$", r"⦃\1⦄"), (r"\\\\ ?\[[\d.]+ ?[a-z]{2}\]", r"\\\\"),
    (r"\\(begin|end) ?\{(?:array|(?:small|[pbB])?matrix)\}(?: ?\{[lcr| ]*\})?", r"\\\1{pmatrix}"),
    # Fonts and boxes around something, quantities of siunitx.
    (r"\\(?:text|math(?!bb\W*[A-Z]))[a-z]*\s*|\\(?:operatorname\*?|(?:[hmf]|frame)box|boxed|boldsymbol|bm|pmb|bold|emph|u(?:nder)?line"
     r"|underbrace|ensuremath|smash|vec|num|SI|si|qty|unit)(?![A-Za-z])\s*", "\0"),
]  # fmt: skip
_WRITTEN: Rules = [
    (r"\^\s?(?:\{\s?°\s?\}|°)", "°"), (r"\s+(?=[\^_°%}])|(?<=[\^_{])\s+", ""), (r"(?<=[\w)}])\s?\*\*\s?(?=[\w({-])", "^"),
    (r"\^\(([^()]*)\)", r"^{\1}"), (r"\^(-?(?:\d*\.)?\d+|[A-Za-zπ])", r"^{\1}"), (r"\\log_(\w)\s?", r"\\log_{\1}"),
    ("<=|=<", "≤"), (">=|=>", "≥"), (r"(?<![\d)}!])!=|\\not ?=", "≠"), ("==", "="),
    (r"(?<![\\A-Za-z])(max|min|sec)(?= ?[({⦃\\xθα])", r"\\\1 "), (r"⦃ ?⦄", "∅"), (r"ℝ\^(?:\{\*\}|\*)", "ℝ∖⦃0⦄"),
    # TeX would end the root of \sqrt 51 after the 5; whoever writes it does not mean that.
    (r"\\sqrt ?(\[\w+\])? ?(?:\(([^()]*)\)|(\d+|[A-Za-zπ]))", r"\\sqrt\1{\2\3}"),
    (r"\\(frac|binom)\s*([\dA-Za-zπ])", r"\\\1{\2}"), (rf"\\(frac|binom)\s*{_BRACED}\s*([\dA-Za-zπ])", r"\\\1\2{\3}"),
    (r"\\(max|min|gcd|lcm) *[⦃(]([^⦃⦄()]*)[⦄)]", lambda m: rf"\{m[1]}({m[2].replace(',', ', ')})"),
    (r"(?<=[ℝ⦄)\]]) ?- ?(?=⦃)", "∖"), (r"(?<=[)\]⦄]) ?U ?(?=[(\[⦃])", "∪"),
    (r"(?<=.)[,;(] ?[a-z] ?∈ ?(?:\\mathbb)? ?\{? ?[ZN] ?\}? ?\)?$", ""),
    # ]0,1[ is (0,1).
    (r"(?:^|(?<=[∪∩∖∈∧∨=])) ?\]", "("), (r"\[ ?(?=[∪∩∖∧∨]|$)", ")"), (r"^(?:[a-z] ?∈ ?)?all real(?:s| numbers)$", "ℝ"),
    (r"(?<![^,;|:⦃⦄∧∨])[^,;|:⦃⦄∧∨±∓]*[±∓][^,;|:⦃⦄∧∨]*", lambda m: f"{m[0].translate(_UPPER)}, {m[0].translate(_LOWER)}"),
    # Towers: what stands in an exponent of two small numbers is worked out.
    (r"\^\{([^{}]*)\}\^\{([^{}]*)\}", r"^{\1^{\2}}"),
    *[(r"\^\{(-?)(\d\d?)\^\{(\d\d?)\}\}", lambda m: f"^{{{m[1]}{int(m[2]) ** int(m[3])}}}")] * 3,
    # x ≠ 0, 1 is x ≠ 0 and x ≠ 1.
    (r"^([^=<>≤≥≠∈,]+≠)([^=<>≤≥≠∈]+)$", lambda m: m[1] + m[2].replace(",", "∧" + m[1])),
    (r"(?i)\b(negative|minus|positive|plus) (?=[∞\d\\])", lambda m: "-" if m[1].lower() in ("negative", "minus") else "+"),
]  # fmt: skip


def plain(text: str) -> str:
    r"""Brings an answer or a claim to its plain form.

    >>> plain(r"$\dfrac12$."), plain("x²"), plain("1½ cm"), plain(r"\boldsymbol{12\,345}\text{ and }+\infty")
    ('\\frac{1}{2}', 'x^{2}', '1 1/2 cm', '12345 ∧ +∞')
    """
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf" and letter != "\ufe0f")
    # Before NFKC, which turns x² into x2 and 1½ into 11⁄2.
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+", r"^{\g<0>}", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text.translate(_ALIKE)))
    text = unicodedata.normalize("NFKC", text).translate(_ALIKE)
    text = " ".join(_ungrouped(rewritten(text, _COMMANDS)).split())
    return " ".join(rewritten(text, _WRITTEN).split()).rstrip(".,;:\\ ")


def rewritten(text: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _ungrouped(text: str) -> str:
    """Takes out the braces that are no argument of a command, an exponent or an index: those of fonts (marked by a zero) and bare ones."""
    while (match := re.search(r"(\\[A-Za-z]+ ?|[\^_\2\]] ?)?\{([^{}]*)\}", text)) is not None:
        group = f"{match[1].rstrip()}\1{match[2]}\2" if match[1] else f"\0{match[2]}\0"
        text = text[: match.start()] + group + text[match.end() :]
    return re.sub(r"(?<=\d)\0+(?=\d)", "", text).translate({0: " ", 1: "{", 2: "}"})


def compact(text: str) -> str:
    """Drops the spaces that separate nothing: equal compact strings say the same."""
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


def without_commas(text: str) -> str:
    """Reads commas between groups of three digits as separators of thousands, anywhere in a text in plain form."""
    return re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\S)", lambda m: m[0].replace(",", ""), text)


_NUMBER = re.compile(
    r"(?a)([-+]?) ?(?:(?:(\d+) )? ?(-?\d+) ?/ ?(-?0*[1-9]\d*)"
    r"|(?=\d|\.[\d\\])(\d*)\.?(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\})?(?:[eE]([-+]?\d{1,3}))?)"
)


def number(text: str) -> tuple[Fraction, Fraction] | None:
    r"""Reads a text in plain form as one number, and half of a decimal's last place, else 0; None for anything else.

    >>> number("1,250.5")[0], number(r"-2\frac{1}{2}")[0], number("1.5*10^{3}")[1], number(r"0.1\overline{6}")[0]
    (Fraction(2501, 2), Fraction(-5, 2), Fraction(50, 1), Fraction(1, 6))
    """
    text = re.sub(r"\\frac\{(-?\d+)\}\{(-?\d+)\}", r" \1/\2", without_commas(re.sub(r"^\((.*)\)$", r"\1", text))).strip()
    match = _NUMBER.fullmatch(re.sub(r" ?\* ?10\^\{?(-?\d+)\}?$", r"e\1", text))
    if match is None or len(text) > LONGEST:
        return None
    sign, mixed, top, bottom, whole, places, period, power = match.groups(default="")
    last = Fraction(10) ** (int(power or 0) - len(places))
    if bottom:
        value = Fraction(int(top), int(bottom)) + int(mixed or 0)
    else:
        value = (int(whole + places or 0) + Fraction(int(period or 0), 10 ** len(period or "1") - 1)) * last
    return -value if sign == "-" else value, last / 2 if places and not period else Fraction(0)
