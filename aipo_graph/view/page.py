"""One HTML text with everything inside: scripts and styles by their hashes, data as Base64 of gzip, nothing else allowed."""

import gzip
import html
import os
import re
import sys
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

STATIC = Path(__file__).parent / "static"
SCRIPTS = (
    "vendor/htm-preact.umd.js",
    "vendor/uplot.iife.min.js",
    "start.js",
    "source.js",
    "tokens.js",
    "graph.js",
    "filters.js",
    "list.js",
    "compare.js",
    "traces.js",
    "panels.js",
    "dashboard.js",
    "viewer.js",
)
STYLES = ("vendor/uplot.css", "style.css", "viewer.css", "dashboard.css")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
{styles}
</head>
<body data-source="{source}">
<main id="app"></main>
<noscript>This page draws itself with JavaScript, which is turned off.</noscript>
{data}
{scripts}
</body>
</html>
"""


def assemble(
    title: str, scripts: Sequence[str], styles: Sequence[str], data: Iterable[tuple[str, bytes]] = (), *, live: bool = False
) -> str:
    """The page. The same arguments give the same text.

    Args:
        scripts: files below ``static/``, or absolute paths, run in this order; so the styles.
        data: (NAME, entry) becomes the element ``data-NAME``, which nothing of the entry can end. Packed one by one.
        live: may ask the server that it came from.
    """
    run = [_text(name) for name in scripts]
    shown = [_text(name) for name in styles]
    policy = [
        "default-src 'none'",
        " ".join(["script-src", *map(_hash, run)]),
        " ".join(["style-src", *map(_hash, shown)]),
        "img-src data:",
        *(["connect-src 'self'"] if live else []),
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return PAGE.format(
        policy="; ".join(policy),
        title=html.escape(title),
        styles="\n".join(f"<style>{text}</style>" for text in shown),
        source="live" if live else "static",
        data="\n".join(_data(name, content) for name, content in data),
        scripts="\n".join(f"<script>{text}</script>" for text in run),
    )


def csp(page: str) -> str:
    """The policy of such a page as a header, which may also say that no other page frames it."""
    found = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    if found is None:
        raise ValueError("a page without a Content-Security-Policy")
    return f"{found[1]}; frame-ancestors 'none'"


def _text(name: str) -> str:
    """A script or style to stand inside its element. Raises ValueError for one that would end it."""
    text = (STATIC / name).read_text(encoding="utf-8")
    if re.search(r"</(script|style)|<!--", text, re.IGNORECASE):
        raise ValueError(f"{name} holds what ends its own element: write it in two parts")
    return text


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _data(name: str, content: bytes) -> str:
    packed = b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="data-{html.escape(name)}">{packed}</script>'


def has_display() -> bool:
    """Without one, webbrowser would start a browser that draws in the terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
