"""A run's folder as the page is told of it: an index of its traces, and the traces in pages. Nothing of the folder is ever run."""

import errno
import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from pydantic_core import from_json, to_json

from aipo_graph import __version__
from aipo_graph.cli import read_yaml
from aipo_graph.errors import ConfigError
from aipo_graph.log import LOGGED_GROUP, LoggedGroup
from aipo_graph.types import TRAINED
from aipo_graph.view.record import Pieces, Row, open_pieces, rounded, rows, trace_of

# --- the picture of a graph as numbers: the trainer's graph.json, or one row made of the recorded paths

START, END = "__start__", "__end__"
WIDE, TALL, GAP, MARGIN, APART, LIFT = 110, 44, 70, 10, 7, 34
"""A box's width and height; between boxes; the rim; from an edge to its way back; an edge that passes over boxes, per box."""


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class _Node(_Form):
    name: str
    label: str
    role: Literal["policy", "agent", "tool", "end"]
    x: float
    y: float
    width: PositiveFloat
    height: PositiveFloat


class _Edge(_Form):
    source: str
    target: str
    conditional: bool
    points: Annotated[tuple[tuple[float, float], ...], Field(min_length=4, max_length=4)]


class _Graph(_Form):
    width: PositiveFloat
    height: PositiveFloat
    nodes: tuple[_Node, ...]
    edges: tuple[_Edge, ...]


def read_graph(text: bytes) -> dict[str, Any]:
    """What graph.json says. Raises ConfigError where it is damaged."""
    try:
        return _Graph.model_validate_json(text).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc'])) or 'graph'}: {first['msg']}") from error


def graph_of_paths(names: Iterable[str], moves: Iterable[tuple[str, str]], agents: Collection[str]) -> dict[str, Any]:
    """Nodes side by side in the given order, between start and end; an edge for each move that a trace made."""
    order = [START, *names, END]
    place = {name: i for i, name in enumerate(order)}
    edges = [(one, two) for one, two in moves if one in place and two in place]
    lift = max((LIFT * _over(place[one], place[two]) for one, two in edges), default=0)
    middle = MARGIN + lift + TALL / 2
    nodes = [
        {
            "name": name,
            "label": name.strip("_") if name in (START, END) else name,
            "role": "end" if name in (START, END) else "agent" if name in agents else "policy",
            "x": MARGIN + WIDE / 2 + i * (WIDE + GAP),
            "y": middle,
            "width": WIDE,
            "height": TALL,
        }
        for name, i in place.items()
    ]
    drawn = [{"source": a, "target": b, "conditional": True, "points": _points(place[a], place[b], middle)} for a, b in edges]
    return {"width": 2 * MARGIN + len(order) * (WIDE + GAP) - GAP, "height": 2 * middle, "nodes": nodes, "edges": drawn}


def _over(source: int, target: int) -> int:
    """How high an edge goes, in lifts: not at all between neighbours."""
    step = abs(target - source)
    return 0 if step == 1 else max(step, 1)


def _points(source: int, target: int, middle: float) -> list[list[float]]:
    """A cubic curve: straight to the next box, over the boxes for a longer way, under them for one back."""
    one, two = (MARGIN + WIDE / 2 + i * (WIDE + GAP) for i in (source, target))
    step = target - source
    if abs(step) == 1:
        y = middle - step * APART
        x0, x1 = one + step * WIDE / 2, two - step * WIDE / 2
        return [[x0, y], [x0, y], [x1, y], [x1, y]]
    side = -1 if step >= 0 else 1
    near, far = middle + side * TALL / 2, middle + side * (TALL / 2 + LIFT * _over(source, target))
    lean = WIDE / 4 if step == 0 else 0
    return [[one - lean, near], [one - 2 * lean, far], [two + 2 * lean, far], [two + lean, near]]


# --- files of lines that another process may still be writing

SEEN = 64
"""Bytes of the last line that must still be there for what follows them to be a continuation."""


def opened(path: Path) -> BinaryIO:
    """For its bytes. Raises OSError for what is no file: one would wait for a pipe without end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file")
    return path.open("rb")


class Growing:
    """Gives every whole line of a growing file once. No file is an empty one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.forget()

    def forget(self) -> None:
        """Start again with the first line."""
        self.lines = self._offset = 0
        self.rest = False
        """Whether something without an end follows the last line."""
        self.fault = ""
        """Why the file cannot be read."""
        self._seen = b""

    def rewritten(self) -> bool:
        """Whether what was read is no longer there: a run that goes on cuts off what came after its checkpoint."""
        if not self._offset:
            return False
        try:
            with opened(self.path) as file:
                file.seek(self._offset - len(self._seen))
                return file.read(len(self._seen)) != self._seen
        except OSError:
            return True

    def read(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of each line that is new; ``lines`` is the number of the last one, from 1."""
        self.rest, self.fault = False, ""
        try:
            with opened(self.path) as file:
                file.seek(self._offset)
                for line in file:
                    self.rest = not line.endswith(b"\n")
                    if self.rest:
                        return
                    start, self._offset, self._seen = self._offset, self._offset + len(line), line[-SEEN:]
                    self.lines += 1
                    yield start, line
        except FileNotFoundError:
            return
        except OSError as error:
            self.fault = error.strerror or str(error)


# --- a run

PAGE_TRACES, PAGE_BYTES = 50, 256_000
"""A page holds no more traces, and is closed by the one with which its lines are this long."""
TITLE = 200
"""Characters of a question in the list of traces."""
NAMED = 5
"""Damaged lines that a note names one by one."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of traces.jsonl: where it is, and what the index says of it."""

    offset: int
    size: int
    step: int
    group: int
    """How many readable ones came before."""
    problem: str
    kind: str
    question: str
    rows: tuple[Row, ...]


class ViewedRun:
    """A run that may still be written: ``refresh`` reads what is new, ``index`` and ``page`` tell of what was read.

    Args:
        traces: shown at most, but for those of the first and the last step.
        live: pages hold every trace that was read, and none changes once it is there. Otherwise they hold the shown ones.
    """

    def __init__(self, folder: Path, traces: int = 2000, *, live: bool = False) -> None:
        self.folder, self.name = folder, _spelt(folder.resolve().name)
        self.state = "stopped"
        self._most, self._live = traces, live
        self._metrics, self._traces = Growing(folder / "metrics.jsonl"), Growing(folder / "traces.jsonl")
        self._marks: dict[str, object] = {}
        self._notes: dict[str, str] = {}
        self._settings: dict[str, str] = {}
        self._graph: dict[str, Any] | None = None
        self._summary: dict[str, Any] | None = None
        self._pieces: Pieces | None = None
        self._pages: list[list[tuple[Line, int]]] = []
        self._starts = 0
        self._forget()

    @property
    def pages(self) -> int:
        return len(self._pages)

    def _forget(self) -> None:
        """Start over. Pages keep their numbers, so that nobody takes an old one for a new one."""
        self._starts += 1
        self._pages = [[] for _ in self._pages]
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        self._lines: list[Line] = []
        self._points: list[dict[str, Any]] = []
        self._nodes: dict[str, None] = {}
        self._writers = set[str]()
        self._moves: dict[tuple[str, str], None] = {}
        self._damaged: dict[Growing, list[int]] = {self._metrics: [], self._traces: []}
        for growing in self._damaged:
            growing.forget()

    # --- reading

    def refresh(self, progress: Callable[[int], None] = lambda size: None) -> bool:
        """Reads what was written since the last time; ``progress`` is told each line's bytes. Returns whether anything changed."""
        before = self._version()
        self._read_small()
        if any(growing.rewritten() for growing in self._damaged):
            self._forget()
        known = len(self._lines)
        for growing, take in ((self._metrics, self._take_point), (self._traces, self._take_group)):
            for offset, line in growing.read():
                if not take(offset, line):
                    self._damaged[growing].append(growing.lines)
                progress(len(line))
        if self._lines and self._pieces is None:
            self._open_pieces()
        if not self._live:
            self._pages, self._places = [], {}
        self._place(self._lines[known:] if self._live else self._shown())
        return self._version() != before

    def _version(self) -> tuple[object, ...]:
        files = [(growing.lines, growing.rest, growing.fault) for growing in self._damaged]
        return self.state, dict(self._marks), dict(self._notes), self._starts, files

    def _read_small(self) -> None:
        readers = {"config.yaml": self._read_settings, "graph.json": self._read_graph, "summary.json": self._read_summary}
        for name, read in readers.items():
            path = self.folder / name
            mark = _mark(path)
            if mark == self._marks.get(name, ()):
                continue
            self._marks[name] = mark
            self._notes.pop(name, None)
            try:
                read(path if mark else None)
            except (OSError, TypeError, ValueError, ConfigError) as error:  # TypeError: a date as a key in a list
                self._notes[name] = f"{name} is not shown: {' '.join(str(error).split())}"
        self.state = "running" if _locked(self.folder) else "finished" if self._marks["summary.json"] else "stopped"

    def _read_settings(self, path: Path | None) -> None:
        self._settings = {}
        if path is None:
            raise ConfigError("there is no such file")
        self._settings = dict(_flat(read_yaml(path)[0]))

    def _read_graph(self, path: Path | None) -> None:
        self._graph = None
        self._graph = read_graph(path.read_bytes()) if path else None

    def _read_summary(self, path: Path | None) -> None:
        self._summary = None
        summary = from_json(path.read_bytes()) if path else None
        if path and not isinstance(summary, dict):
            raise ConfigError("not an object")
        self._summary = rounded(summary)

    def _open_pieces(self) -> None:
        try:
            self._pieces = open_pieces(self.folder, self._settings)
            self._notes.pop("pieces", None)
        except (ConfigError, OSError, RuntimeError) as error:  # policy.model may be no name of a file, ~nobody too
            self._notes["pieces"] = f"texts are shown whole, without the numbers of their tokens: {error}"

    def _take_point(self, offset: int, line: bytes) -> bool:
        try:
            point = from_json(line)
        except ValueError:
            return False
        if not isinstance(point, dict) or not _is_step(point.get("step")):
            return False
        self._points.append(point)
        return True

    def _take_group(self, offset: int, line: bytes) -> bool:
        try:
            logged = LOGGED_GROUP.validate_json(line)
        except ValidationError:
            return False
        if not _is_step(logged.step):
            return False
        problem = logged.group.problem
        self._lines.append(
            Line(offset, len(line), logged.step, len(self._lines), problem.id, problem.kind, problem.question[:TITLE], rows(logged))
        )
        for trace in logged.group.traces:
            self._nodes |= dict.fromkeys(trace.path)
            self._writers |= {segment.author.partition("/")[0] for segment in trace.segments if segment.source == "policy"}
            stops = (START, *trace.path, END) if trace.status in TRAINED else (START, *trace.path)
            self._moves |= dict.fromkeys(pairwise(stops))
        return True

    # --- pages

    def _shown(self) -> list[Line]:
        """By step: all, or those of as many evenly spaced steps as may be shown, the first and the last among them."""
        lines = sorted(self._lines, key=lambda line: (line.step, line.group))
        sizes = Counter[int]()
        for line in lines:
            sizes[line.step] += len(line.rows)
        if sizes.total() <= self._most:
            return lines
        steps, kept = list(sizes), set[int]()
        for count in range(max(2, len(steps) * self._most // sizes.total() + 1), 1, -1):
            kept = {steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}
            if sum(sizes[step] for step in kept) <= self._most:
                break
        return [line for line in lines if line.step in kept]

    def _place(self, lines: Sequence[Line]) -> None:
        """On new pages, so that those that somebody may have read stay as they are."""
        size = PAGE_BYTES
        for line in lines:
            for index in range(len(line.rows)):
                if size >= PAGE_BYTES or len(self._pages[-1]) >= PAGE_TRACES:
                    self._pages.append([])
                    size = 0
                self._places[line.group, index] = len(self._pages) - 1, len(self._pages[-1])
                self._pages[-1].append((line, index))
                size += line.size // len(line.rows)

    def page(self, number: int) -> bytes:
        """One page as JSON. Raises KeyError for one that is not there, or no longer."""
        if not 0 <= number < len(self._pages) or not self._pages[number]:
            raise KeyError(number)
        problems, traces = {}, []
        last: Line | None = None
        for line, index in self._pages[number]:
            if line is not last:
                logged, last = self._load(line), line
                problem = logged.group.problem
                problems[problem.id] = {"question": problem.question, "answer": problem.answer, "kind": problem.kind}
            traces.append(trace_of(logged, index, line.group, self._pieces))
        return to_json({"problems": problems, "traces": traces}, inf_nan_mode="null")

    def _load(self, line: Line) -> LoggedGroup:
        try:
            with self._traces.path.open("rb") as file:
                file.seek(line.offset)
                return LOGGED_GROUP.validate_json(file.read(line.size))
        except (OSError, ValidationError) as error:
            raise KeyError(line.group) from error  # cut off since

    # --- the index

    def index(self) -> dict[str, Any]:
        """What a page shows before any trace is opened."""
        shown = [(line, index, entry) for line in self._shown() for index, entry in enumerate(line.rows)]
        problems = {line.problem: {"id": line.problem, "kind": line.kind, "question": line.question} for line, _, _ in shown}
        place = {name: i for i, name in enumerate(problems)}
        columns: dict[str, list[Any]] = {
            "step": [line.step for line, _, _ in shown],
            "group": [line.group for line, _, _ in shown],
            "problem": [place[line.problem] for line, _, _ in shown],
            "reward": [entry.reward for _, _, entry in shown],
            "status": [entry.status for _, _, entry in shown],
            "with_agents": [int(entry.with_agents) for _, _, entry in shown],
            "tokens": [entry.tokens for _, _, entry in shown],
            "error": [entry.error for _, _, entry in shown],
            "consults": [entry.consults for _, _, entry in shown],
            "advantage": [entry.advantage for _, _, entry in shown],
            "page": [self._places[line.group, index][0] for line, index, _ in shown],
            "row": [self._places[line.group, index][1] for line, index, _ in shown],
        }
        agents = [key.removeprefix("agents.use.") for key in self._settings if key.startswith("agents.use.")]
        agents = list(dict.fromkeys([*agents, *(name for line in self._lines for entry in line.rows for name in entry.consults)]))
        steps = self._settings.get("train.steps", "")
        return {
            "name": self.name,
            "folder": _spelt(str(self.folder)),
            "state": self.state,
            "notes": self._all_notes(),
            "shown": len(shown),
            "recorded": sum(len(line.rows) for line in self._lines),
            "settings": self._settings,
            "steps": int(steps) if steps.isdecimal() and len(steps) < 10 else max((point["step"] for point in self._points), default=0),
            "metrics": self._columns(),
            "summary": self._summary,
            "graph": self._picture(agents),
            "agents": agents,
            "problems": list(problems.values()),
            "traces": columns,
            "pages": self.pages,
        }

    def _picture(self, agents: Sequence[str]) -> dict[str, Any] | None:
        """The graph, in which a node that ran without a word of the policy's is not drawn as the policy."""
        graph = self._graph or (graph_of_paths(self._nodes, self._moves, agents) if self._nodes else None)
        silent = self._nodes.keys() - self._writers
        for node in graph["nodes"] if graph else ():
            node["role"] = "tool" if node["role"] == "policy" and node["name"] in silent else node["role"]
        return graph

    def _columns(self) -> dict[str, list[float | None]]:
        keys = dict.fromkeys(["step", *(key for point in self._points for key in point)])
        return {key: [_number(point.get(key)) for point in self._points] for key in keys}

    def _all_notes(self) -> list[str]:
        notes = list(self._notes.values())
        for growing, damaged in self._damaged.items():
            name = growing.path.name
            if growing.fault:
                notes.append(f"{name} cannot be read: {growing.fault}")
            # A line that is being written has no end yet.
            lines = [*damaged, growing.lines + 1] if growing.rest and self.state != "running" else damaged
            if lines:
                which = ", ".join(f"line {number}" for number in lines[:NAMED]) + (", …" if len(lines) > NAMED else "")
                what = "1 line could not be read and is" if len(lines) == 1 else f"{len(lines):,} lines could not be read and are"
                notes.append(f"{name}: {what} left out ({which})")
        if not self._lines:
            none = self._settings.get("run.trace_groups") == "0"
            notes.append("no trace is recorded (run.trace_groups = 0)" if none else "no trace is recorded yet")
        return notes


def read_run(folder: Path, traces: int = 2000, progress: Callable[[int], None] = lambda size: None) -> ViewedRun:
    """A run as it is now."""
    viewed = ViewedRun(folder, traces)
    viewed.refresh(progress)
    return viewed


def index_of(runs: Sequence[ViewedRun]) -> bytes:
    """The index of a page as JSON. Runs of one name are told apart by their folders."""
    told = [viewed.index() for viewed in runs]
    if len({entry["name"] for entry in told}) < len(told):
        told = [entry | {"name": entry["folder"]} for entry in told]
    return to_json({"version": __version__, "runs": told}, inf_nan_mode="null")


def _locked(folder: Path) -> bool:
    """Whether a trainer has the folder. Asked for by a shared lock, given back at once."""
    try:
        lock = os.open(folder / "lock", os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(lock)
    return False


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes when the file does; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    if not S_ISREG(stat.st_mode):
        return None
    return stat.st_mtime_ns, stat.st_size


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return rounded(value) if isinstance(value, float) else value if abs(value) < 2**53 else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every setting."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield _spelt(f"{prefix}{key}"), _spelt(text)


def _spelt(text: str) -> str:
    """Without lone surrogates, which YAML and names of files can hold and JSON cannot: they become question marks."""
    return text.encode(errors="replace").decode()
