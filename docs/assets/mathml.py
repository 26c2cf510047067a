"""A hook of mkdocs: formulas become MathML while the site is built, so that no script typesets them in the browser."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    return MATH.sub(lambda found: convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline"), content)
