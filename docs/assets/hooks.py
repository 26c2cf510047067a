"""Hooks of mkdocs: the settings become tables, and formulas MathML, so that no script typesets them in the browser."""

import html
import json
import re
from typing import Any, Literal, get_args, get_origin

from latex2mathml.converter import convert
from pydantic.fields import FieldInfo

from aipo_graph.config import Config

MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("<!-- settings -->", "\n\n".join(table(name, field) for name, field in Config.model_fields.items()))


def on_page_content(content: str, **_: Any) -> str:
    return MATH.sub(lambda found: convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline"), content)


def table(section: str, field: FieldInfo) -> str:
    """The settings of a section with their defaults, as YAML takes them, and their ``--help``."""
    fields: dict[str, FieldInfo] = field.annotation.model_fields  # type: ignore[union-attr]
    values = json.loads(field.get_default(call_default_factory=True).model_dump_json())
    rows = [f"| <a id='{section}.{key}'></a>`{key}` | {shown(values[key])} | {told(one)} |" for key, one in fields.items()]
    return "\n".join([f"## {section}", "", "| setting | default | |", "| --- | --- | --- |", *rows])


def shown(value: Any) -> str:
    return "" if value in (None, "") else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def told(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    found = choices(field.annotation)
    return f"{text} One of {', '.join(f'`{one}`' for one in found)}." if len(found) > 1 else text


def choices(annotation: Any) -> list[str]:
    found = get_args(annotation)
    return list(map(str, found)) if get_origin(annotation) is Literal else [name for one in found for name in choices(one)]
