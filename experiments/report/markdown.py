"""GitHub Markdown from text that may hold anything."""

import html
import re
from collections.abc import Iterable, Sequence

from aipo_graph import cli


def plain(text: object) -> str:
    """Text that cannot be markup, in a cell of a table or elsewhere: names in the stored files are anybody's."""
    return re.sub(r"[^\w .,;:@%/+=()…×–-]", lambda found: f"&#{ord(found[0])};", cli.printable(str(text)))


def listed(names: Iterable[object]) -> str:
    return ", ".join(map(plain, names))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """From cells that are safe already; all but the first ``left`` columns to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def verbatim(lines: Iterable[str]) -> str:
    return "\n".join(["<pre>", *(html.escape(cli.printable(line)) for line in lines), "</pre>"])


def fold(title: str, *parts: str) -> str:
    return "\n\n".join([f"<details><summary>{title}</summary>", *parts, "</details>"])
