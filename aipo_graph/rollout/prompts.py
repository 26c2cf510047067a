"""Prompt files: one Markdown file per name, plain text with `{field}` places (a literal brace is doubled)."""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aipo_graph.errors import ConfigError
from aipo_graph.load import text

FIELDS = ("question", "query", "transcript")
"""What a prompt may ask for: the problem's question, the consult's query, the thread so far."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompt files of one folder, by name without `.md`."""

    folder: Path
    texts: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> "Prompts":
        """Reads and checks every `*.md` of a folder. Raises ConfigError for an unknown field or a stray brace."""
        texts = {path.stem: text(path).rstrip("\n") for path in sorted(folder.glob("*.md"))}
        for name, written in texts.items():
            try:
                fields = _fields(written)
            except ValueError as error:
                raise ConfigError(f"{folder / name}.md: {error}; write a literal brace as {{{{ or }}}}") from None
            for field in fields:
                if field not in FIELDS:
                    raise ConfigError(
                        f"{folder / name}.md: unknown field {{{field}}}; known are {', '.join(FIELDS)} (a literal brace is doubled)"
                    )
        return cls(folder, texts)

    @classmethod
    def empty(cls) -> "Prompts":
        """No prompts: for agents that are tools alone."""
        return cls(Path(), {})

    def fields(self, name: str) -> tuple[str, ...]:
        """The fields that one prompt asks for, in the order of FIELDS."""
        return tuple(sorted(set(_fields(self._text(name))), key=FIELDS.index))

    def render(self, name: str, **fields: str) -> str:
        """The text of one prompt with its fields filled in; values are never parsed again."""
        return self._text(name).format_map(dict.fromkeys(FIELDS, "") | fields)

    def _text(self, name: str) -> str:
        if name not in self.texts:
            raise ConfigError(f"no prompt {name!r} in {self.folder}: add {name}.md (there are: {', '.join(self.texts) or 'none'})")
        return self.texts[name]


def _fields(text: str) -> list[str]:
    """Raises ValueError for a stray brace."""
    return [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
