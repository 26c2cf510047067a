"""Extensions of mkdocstrings' reader, for what Markdown or a reader would not understand."""

import re
from typing import Any

from griffe import Attribute, Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)


class Doctests(Extension):
    """Examples (`>>>`) become fenced code, which Markdown would take for quotations."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)


class Choices(Extension):
    """A setting whose type is a name for choices, such as `Algorithm`, shows the choices."""

    def on_attribute(self, *, attr: Attribute, **_: Any) -> None:
        named = attr.module.members.get(str(attr.annotation))
        if isinstance(named, Attribute) and str(named.value).startswith("Literal["):
            attr.annotation = named.value
