"""What the page is told of a trace: a row of the index, and the trace itself."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from aipo_graph.log import LoggedGroup
from aipo_graph.types import Learned, Segment, Status

from .pieces import Pieces

LINES = re.compile(r"(?<=\n)|(?=<[|｜])")
COLUMNS = ("logprobs", "ratios", "coefficients", "advantages")


@dataclass(frozen=True, slots=True)
class Row:
    """What the index says of one trace."""

    reward: float | None
    status: Status
    with_agents: bool
    tokens: int
    consults: Mapping[str, int]
    error: str | None
    advantage: float | None
    """Mean over the tokens that were trained on."""


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


def rows(logged: LoggedGroup) -> tuple[Row, ...]:
    """Of each trace of a line."""
    found = []
    for index, trace in enumerate(logged.group.traces):
        learned = _learned(logged, index)
        advantages = [a for a in learned.advantages if a is not None and math.isfinite(a)] if learned else []
        found.append(
            Row(
                reward=rounded(trace.reward),
                status=trace.status,
                with_agents=trace.with_agents,
                tokens=sum(len(segment.token_ids) for segment in trace.segments),
                consults=Counter(segment.author for segment in trace.segments if segment.source == "agent"),
                error=trace.error,
                advantage=rounded(sum(advantages) / len(advantages)) if advantages else None,
            )
        )
    return tuple(found)


def trace_of(logged: LoggedGroup, index: int, group: int, pieces: Pieces | None) -> dict[str, Any]:
    """The ``index``-th trace of line number ``group``, token by token where its pieces are known."""
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
        "group": group,
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
    runs: dict[str, list[int]] = {}
    for place, segment in enumerate(
        (*segments, *(Segment("context", "", (), "", thread=thread) for thread in {s.thread for s in segments}))
    ):
        if segment.source == "policy":
            runs.setdefault(segment.thread, []).append(place)
        elif pieces and len(run := runs.pop(segment.thread, [])) > 1:
            ids, text = [token for i in run for token in segments[i].token_ids], "".join(segments[i].text for i in run)
            rest = iter(pieces.split(ids, text) or ())
            parts = [list(islice(rest, len(segments[i].token_ids))) for i in run]
            if ["".join(part) for part in parts] == [segments[i].text for i in run]:
                for i, part in zip(run, parts, strict=True):
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
