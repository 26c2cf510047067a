"""GitHub Markdown from text that may hold anything, and pages by hand with places for it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from aipo_graph import cli
from aipo_graph.errors import ConfigError


def plain(text: object) -> str:
    """Text that cannot be markup, in a cell of a table or elsewhere: names in the stored files are anybody's."""
    return re.sub(r"[^\w .,;:@%/+=()…×–-]", lambda found: f"&#{ord(found[0])};", cli.printable(str(text)))


def listed(names: Iterable[object]) -> str:
    return ", ".join(map(plain, names))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """From cells that are safe already; all but the first ``left`` columns to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def filled(page: Path, parts: Mapping[str, str]) -> str:
    """The page with each part between ``<!-- NAME -->`` and ``<!-- end -->``. Raises ConfigError where that place is not once, OSError."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        before, *rest = re.split(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", text)
        if len(rest) != 1:
            raise ConfigError(f"{page}: the place from '<!-- {name} -->' to '<!-- end -->' stands {len(rest)} times; it must stand once")
        text = f"{before}\n{part}\n\n{rest[0]}"
    return text
