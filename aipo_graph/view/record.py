"""What a page is made of: one HTML text with everything inside; and what it is told of a trace, split at its tokens."""

import gzip
import html
import math
import os
import re
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer

from aipo_graph.errors import ConfigError
from aipo_graph.load import model
from aipo_graph.log import LoggedGroup
from aipo_graph.types import Learned, Segment

# --- the page: scripts and styles by their hashes, data as Base64 of gzip, nothing else allowed

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
    policy = page.partition('<meta http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    return f"{policy}; frame-ancestors 'none'"


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


# --- token ids to the pieces of text that they stand for

CUT = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""
LONGEST = 64
"""Tokens that may pass before a character is whole."""
FILE = "tokenizer.json"


class Pieces:
    """Splits the text of segments at their tokens. Raises ConfigError for a file that is no tokenizer."""

    def __init__(self, file: Path) -> None:
        try:
            # Not from_file: that one raises bare Exception. No class that a run's folder names is looked up, and no hub is asked.
            self._tokenizer = Tokenizer.from_buffer(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: no tokenizer that loads ({error})") from error
        self._known = cache(self._learn)

    def split(self, token_ids: Sequence[int], text: str) -> list[str] | None:
        """One piece per token, together ``text``; None where they do not make it.

        The token that completes a character has it as its piece, those before have "". What decoding puts before the text (a token for
        its beginning, SentencePiece's first blank) is left out.
        """
        try:
            known = [(self._known(token_id), token_id) for token_id in token_ids]
        except OverflowError:  # no id of any tokenizer
            return None
        pieces: list[str] = []
        for cut, found in groupby(known, key=lambda each: CUT in each[0]):
            texts, ids = zip(*found, strict=True)
            pieces += self._characters(ids) if cut else texts
        if not text.endswith(CUT):  # the beginning of a character, which nothing completed
            last = next((place for place in reversed(range(len(pieces))) if pieces[place]), 0)
            pieces[last:] = [piece.rstrip(CUT) for piece in pieces[last:]]
        surplus = sum(map(len, pieces)) - len(text)
        starts = accumulate(map(len, pieces), initial=0)
        pieces = [piece[max(0, surplus - start) :] for piece, start in zip(pieces, starts, strict=False)]
        return pieces if "".join(pieces) == text else None

    def _learn(self, token_id: int) -> str:
        """Its text after another token: SentencePiece decoders drop the blank before the first."""
        once, twice = self._decode([token_id]), self._decode([token_id, token_id])
        return CUT if CUT in once else twice[len(once) :]

    def _characters(self, token_ids: Sequence[int]) -> list[str]:
        """Pieces of tokens none of which is made of whole characters."""
        pieces, start, given = [], 0, ""
        for end in range(1, len(token_ids) + 1):
            text = self._decode(token_ids[start:end])
            whole = text if end == len(token_ids) or end - start == LONGEST else text.rstrip(CUT)
            pieces.append(whole[len(given) :])
            start, given = (end, "") if whole == text else (start, whole)
        return pieces

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def open_pieces(folder: Path, settings: Mapping[str, str]) -> Pieces:
    """By the tokenizer of a run's exported policy, else that of the model that it started from, where that is on this machine.

    Raises ConfigError where there is none.
    """
    name = settings.get("policy.model", "")
    if (folder / "policy" / FILE).is_file():
        return Pieces(folder / "policy" / FILE)
    path = Path(model(name)) / FILE if name else None
    if path and not path.is_file():
        try:
            cached = try_to_load_from_cache(name, FILE)
        except ValueError:  # no name that a hub would have
            cached = None
        path = Path(cached) if isinstance(cached, str) else None
    if path is None:
        raise ConfigError(f"neither {folder / 'policy'} nor policy.model = {name!r} has a {FILE} on this machine")
    return Pieces(path)


# --- traces

LINES = re.compile(r"(?<=\n)|(?=<[|｜])")
COLUMNS = ("logprobs", "ratios", "coefficients", "advantages")


TOLD = ("reward", "status", "with_agents", "tokens", "error", "consults", "advantage")
"""What the index says of a trace; ``advantage``: the mean over the tokens that were trained on."""


def rounded(value: Any) -> Any:
    """JSON with its numbers to 4 significant digits; whole ones stay as they are, and what is not finite is None.

    >>> rounded({"a": [0.123456, 12628.0, float("nan"), True]})
    {'a': [0.1235, 12628, None, True]}
    """
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.4g}")
    return value


def rows(logged: LoggedGroup) -> list[dict[str, Any]]:
    """Tells TOLD of each trace of a line."""
    found = []
    for index, trace in enumerate(logged.group.traces):
        learned = _learned(logged, index)
        advantages = [a for a in learned.advantages if a is not None and math.isfinite(a)] if learned else []
        values = (
            trace.reward if math.isfinite(trace.reward) else None,
            trace.status,
            int(trace.with_agents),
            sum(len(segment.token_ids) for segment in trace.segments),
            trace.error,
            Counter(segment.author for segment in trace.segments if segment.source == "agent"),
            rounded(sum(advantages) / len(advantages)) if advantages else None,
        )
        found.append(dict(zip(TOLD, values, strict=True)))
    return found


def trace_of(logged: LoggedGroup, index: int, pieces: Pieces | None) -> dict[str, Any]:
    """The ``index``-th trace of a line, token by token where its pieces are known."""
    trace, learned = logged.group.traces[index], _learned(logged, index)
    segments, start = [], 0
    for segment, tokens in zip(trace.segments, split(trace.segments, pieces), strict=True):
        end = start + len(segment.token_ids)
        columns = {name: _short(getattr(learned, name)[start:end]) for name in COLUMNS} if learned else {}
        segments.append(segment_json(segment, tokens, columns))
        start = end
    return {
        "problem": logged.group.problem.id,
        "step": logged.step,
        "seed": str(trace.seed),
        "with_agents": trace.with_agents,
        "status": trace.status,
        "reward": rounded(trace.reward),
        "scores": rounded(dict(trace.scores)),
        "error": trace.error,
        "path": trace.path,
        "segments": segments,
    }


def split(segments: Sequence[Segment], pieces: Pieces | None) -> list[list[str] | None]:
    """The pieces of each segment's text, None where its tokens do not make it. What the policy wrote in a row is split as one text."""
    found: list[list[str] | None] = [pieces.split(s.token_ids, s.text) if pieces else None for s in segments]
    order = sorted(range(len(segments)), key=lambda i: segments[i].thread)
    for (_, source), group in groupby(order, key=lambda i: (segments[i].thread, segments[i].source)):
        places = list(group)
        run = [segments[i] for i in places]
        if pieces and source == "policy" and len(run) > 1:
            ids, text = [token for s in run for token in s.token_ids], "".join(s.text for s in run)
            rest = iter(pieces.split(ids, text) or ())
            parts = [list(islice(rest, len(s.token_ids))) for s in run]
            if ["".join(part) for part in parts] == [s.text for s in run]:
                for i, part in zip(places, parts, strict=True):
                    found[i] = part
    return found


def segment_json(segment: Segment, tokens: list[str] | None, columns: Mapping[str, list[float | None]] = {}) -> dict[str, Any]:
    """A segment as the pages' `TraceTokens` takes it: by lines, and without numbers, where it could not be split into its ``tokens``."""
    known = tokens is not None and any(value is not None for values in columns.values() for value in values)
    return {
        "source": segment.source,
        "author": segment.author,
        "thread": segment.thread,
        "masked": segment.masked,
        "version": segment.version,
        "tokens": [part for part in LINES.split(segment.text) if part] or [""] if tokens is None else tokens,
        "logprobs": None if tokens is None or segment.logprobs is None else _short(segment.logprobs),
        "learned": columns if known else None,
    }


def _learned(logged: LoggedGroup, index: int) -> Learned | None:
    """None too where it does not fit the trace's tokens."""
    learned = logged.learned[index] if index < len(logged.learned) else None
    tokens = sum(len(segment.token_ids) for segment in logged.group.traces[index].segments)
    return learned if learned and all(len(getattr(learned, name)) == tokens for name in COLUMNS) else None


def _short(values: Sequence[float | None]) -> list[float | None]:
    """To 3 significant digits, as many as a hover shows: of a page they are the larger part."""
    return [float(f"{value:.3g}") if value is not None and math.isfinite(value) else None for value in values]
