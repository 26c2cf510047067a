"""A run's folder as the page is told of it: an index of its traces, and the traces in pages. Nothing of the folder is ever run."""

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from aipo_graph import __version__
from aipo_graph.cli import read_yaml
from aipo_graph.errors import ConfigError
from aipo_graph.log import LOGGED_GROUP, POINT, LoggedGroup, opened, records
from aipo_graph.types import spelt
from aipo_graph.view.record import TOLD, Pieces, open_pieces, rounded, rows, trace_of

# --- the picture of a graph as numbers, which the pages draw: boxes by their middles, edges as cubic curves of four points

START, END = "__start__", "__end__"
COLUMN, ROW, WIDE, SMALL, TALL, PORT, LOOP, MARGIN = 205, 67, 54, 33, 22, 14, 40, 10
"""Between the middles of columns and of rows; half a box's width, that of start and end, and half its height; between edges at its side;
height of a loop; the rim."""
Edge = tuple[str, str]


def layout(roles: Mapping[str, str], edges: Mapping[Edge, bool]) -> dict[str, Any]:
    """Places nodes in columns by their distance from the start, so that no edge skips one going right, `__end__` at the foot of its column.

    Args:
        roles: node -> policy, agent, tool or end.
        edges: (source, target) -> whether a router chose it.
    """
    column = _columns(roles, edges)
    y: dict[str, float] = {}
    for place in sorted(set(column.values())):
        names = sorted((name for name in roles if column[name] == place), key=lambda name: name == END)
        middle = (max(len(set(names) - {END}), 1) - 1) / 2
        y |= {name: (row - middle) * ROW for row, name in enumerate(names)}
    sides: dict[tuple[str, int], list[tuple[float, bool, Edge]]] = defaultdict(list)
    for one, two in edges:
        step = column[two] - column[one]
        if abs(step) == 1:
            sides[one, step].append((y[two], step < 0, (one, two)))
            sides[two, -step].append((y[one], step < 0, (one, two)))
    # Edges meet a side in the order of their other ends, so that they do not cross there.
    ports = {
        (name, edge): y[name] + (place - (len(ends) - 1) / 2) * PORT
        for (name, _), ends in sides.items()
        for place, (_, _, edge) in enumerate(sorted(ends))
    }
    boxes: dict[str, Any] = {
        name: {
            "name": name,
            "label": name.strip("_") if name in (START, END) else name,
            "role": role,
            "x": column[name] * COLUMN,
            "y": y[name],
            "width": 2 * (SMALL if name in (START, END) else WIDE),
            "height": max(2 * TALL, PORT * len(sides[name, -1]), PORT * len(sides[name, 1])),
        }
        for name, role in roles.items()
    }
    floor = max(box["y"] + box["height"] / 2 for box in boxes.values()) + ROW
    curves = {edge: _curve(edge, boxes[edge[0]], boxes[edge[1]], ports, floor) for edge in edges}
    points = [point for curve in curves.values() for point in curve]
    points += [(box["x"] + side * box["width"] / 2, box["y"] + side * box["height"] / 2) for box in boxes.values() for side in (-1, 1)]
    left, top = (min(values) - MARGIN for values in zip(*points, strict=True))
    right, bottom = (max(values) + MARGIN for values in zip(*points, strict=True))
    drawn = [
        {
            "source": one,
            "target": two,
            "conditional": conditional,
            "points": [[round(x - left, 1), round(y - top, 1)] for x, y in curves[one, two]],
        }
        for (one, two), conditional in edges.items()
    ]
    nodes = [box | {"x": round(box["x"] - left, 1), "y": round(box["y"] - top, 1)} for box in boxes.values()]
    return {"width": round(right - left, 1), "height": round(bottom - top, 1), "nodes": nodes, "edges": drawn}


def drawn(picture: Any) -> dict[str, Any]:
    """The picture in a graph.json, of which names, roles and edges are taken. Raises LookupError, TypeError, ValueError for others."""
    edges = {(str(edge["source"]), str(edge["target"])): bool(edge["conditional"]) for edge in picture["edges"]}
    return layout({str(node["name"]): str(node["role"]) for node in picture["nodes"]}, edges)


def _columns(names: Mapping[str, Any], edges: Mapping[Edge, bool]) -> dict[str, int]:
    """Each node's distance from the start; one that cannot be reached stands behind all others."""
    column, reached = {START: 0}, [START]
    for name in reached:  # it grows meanwhile
        new = [two for one, two in edges if one == name and two not in column]
        column |= dict.fromkeys(new, column[name] + 1)
        reached += new
    return dict.fromkeys(names, column[reached[-1]] + 1) | column


def _curve(edge: Edge, one: Any, two: Any, ports: Mapping[tuple[str, Edge], float], floor: float) -> list[tuple[float, float]]:
    """From side to side; over the top for a loop, up or down within a column, below all boxes for a long way back."""
    x0, x1, step = one["x"], two["x"], (two["x"] - one["x"]) // COLUMN
    if abs(step) == 1:
        x0, x1 = x0 + step * one["width"] / 2, x1 - step * two["width"] / 2
        y0, y1 = ports[edge[0], edge], ports[edge[1], edge]
        return [(x0, y0), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), (x1, y1)]
    if one is two:
        y0 = one["y"] - one["height"] / 2
        return [(x0 - 22, y0), (x0 - 38, y0 - LOOP), (x0 + 38, y0 - LOOP), (x0 + 22, y0)]
    if step == 0:
        down = 1 if two["y"] > one["y"] else -1
        x, y0, y1 = x0 + 13 * down, one["y"] + down * one["height"] / 2, two["y"] - down * two["height"] / 2
        return [(x, y0), (x, y0), (x, y0), (x, y1)]
    return [(x0, one["y"] + one["height"] / 2), (x0, floor), (x1, floor), (x1, two["y"] + two["height"] / 2)]


# --- files of lines that another process may still be writing

T = TypeVar("T")
SEEN = 64
"""Bytes of the last line that must still be there for what follows them to be a continuation."""


@dataclass
class Growing(Generic[T]):
    """Gives every whole line of a growing file once, as ``form`` reads it. No file is an empty one."""

    path: Path
    form: TypeAdapter[T]
    lines: int = 0
    damaged: list[int] = field(default_factory=list)
    """Numbers of the lines that are not of the form, from 1."""
    rest: bool = False
    """Whether something without an end follows the last line."""
    fault: str = ""
    """Why the file cannot be read."""
    _offset: int = 0
    _seen: bytes = b""

    def rewritten(self) -> bool:
        """Whether what was read is no longer there: a run that goes on cuts off what came after its checkpoint."""
        try:
            with opened(self.path) as file:
                file.seek(self._offset - len(self._seen))
                return file.read(len(self._seen)) != self._seen
        except OSError:
            return self._offset > 0

    def read(self) -> Iterator[tuple[int, int, T]]:
        """(offset, bytes, record) of each line that is new. ``lines`` is the number of the last."""
        self.rest, self.fault = False, ""
        try:
            for offset, line, record in records(self.path, self.form, self._offset):
                self.rest = not line.endswith(b"\n")
                if self.rest:
                    return
                self.lines += 1
                self._offset, self._seen = offset + len(line), line[-SEEN:]
                if record is None:
                    self.damaged.append(self.lines)
                else:
                    yield offset, len(line), record
        except FileNotFoundError:
            return
        except OSError as error:
            self.fault = error.strerror or str(error)


# --- a run

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
    problem: str
    kind: str
    question: str
    rows: Sequence[Mapping[str, Any]]


class ViewedRun:
    """A run that may still be written: ``refresh`` reads what is new, ``index`` and ``page`` tell of what was read.

    Args:
        traces: shown at most, but for those of the first and the last step.
    """

    def __init__(self, folder: Path, traces: int = 2000) -> None:
        self.folder, self.name = folder, spelt(folder.resolve().name)
        self.state = "stopped"
        self._most = traces
        self._marks: dict[str, object] = {}
        self._notes: list[str] = []
        self._whole: dict[str, Any] = {}
        """What the small files hold, read by WHOLE."""
        self._pieces: Pieces | None = None
        self._forget()

    def _forget(self) -> None:
        """Starts over with the lines."""
        self._metrics, self._traces = (Growing(self.folder / "metrics.jsonl", POINT), Growing(self.folder / "traces.jsonl", LOGGED_GROUP))
        self._files: tuple[Growing[Any], ...] = (self._metrics, self._traces)
        self._lines: list[Line] = []
        self._points: list[Mapping[str, Any]] = []
        self._visited = set[str]()
        self._writers = set[str]()

    # --- reading

    def refresh(self) -> bool:
        """Reads what was written since the last time. Returns whether anything changed."""
        files = (*WHOLE, *(growing.path.name for growing in self._files))
        before, self._marks = self._marks, {name: _mark(self.folder / name) for name in files}
        self._marks["lock"] = running = _locked(self.folder)
        self.state = "running" if running else "finished" if self._marks["summary.json"] else "stopped"
        if self._marks == before:
            return False
        self._read_small()
        if any(growing.rewritten() for growing in self._files):
            self._forget()
        self._points += [point for _, _, point in self._metrics.read()]
        for offset, size, logged in self._traces.read():
            self._take(offset, size, logged)
        if self._lines:
            try:
                self._pieces = self._pieces or open_pieces(self.folder, self._settings)
            except (ConfigError, OSError) as error:  # policy.model may be no name of a file
                self._notes.append(f"texts are shown whole, without the numbers of their tokens: {error}")
        return True

    @property
    def _settings(self) -> dict[str, str]:
        return self._whole["config.yaml"] or {}

    def _read_small(self) -> None:
        self._whole, self._notes = dict.fromkeys(WHOLE), []
        for name, read in WHOLE.items():
            try:
                if self._marks[name] is not None:
                    self._whole[name] = read(self.folder / name)
                elif name == "config.yaml":
                    raise ConfigError("there is no such file")
            except (OSError, TypeError, ValueError, LookupError, ConfigError) as error:  # TypeError: a date as a key in a list
                lacks = "it lacks " if isinstance(error, LookupError) else ""
                self._notes.append(f"{name} is not shown: {lacks}{' '.join(str(error).split())}")

    def _take(self, offset: int, size: int, logged: LoggedGroup) -> None:
        problem = logged.group.problem
        self._lines.append(Line(offset, size, logged.step, problem.id, problem.kind, problem.question[:TITLE], rows(logged)))
        for trace in logged.group.traces:
            self._visited |= set(trace.path)
            self._writers |= {segment.author.partition("/")[0] for segment in trace.segments if segment.source == "policy"}

    def shown(self) -> list[int]:
        """The numbers of the groups by step: all, or of as many evenly spaced steps as may be shown, the first and the last among them."""
        steps = sorted({line.step for line in self._lines})
        traces = sum(len(line.rows) for line in self._lines)
        if traces > self._most:
            count = max(2, len(steps) * self._most // traces)
            steps = [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
        kept = set(steps)
        return sorted((number for number, line in enumerate(self._lines) if line.step in kept), key=lambda n: (self._lines[n].step, n))

    def page(self, number: int) -> bytes:
        """The traces of one group as JSON. Raises LookupError for one that is not there, or no longer."""
        line = self._lines[number]
        try:
            with self._traces.path.open("rb") as file:
                file.seek(line.offset)
                logged = LOGGED_GROUP.validate_json(file.read(line.size))
        except (OSError, ValidationError) as error:
            raise KeyError(number) from error  # cut off since
        problem = logged.group.problem
        about = {"question": problem.question, "answer": problem.answer, "kind": problem.kind}
        traces = [trace_of(logged, index, self._pieces) for index in range(len(line.rows))]
        return to_json({"about": about, "traces": traces}, inf_nan_mode="null")

    # --- the index

    def index(self) -> dict[str, Any]:
        """What a page shows before any trace is opened."""
        shown = [(number, self._lines[number], entry) for number in self.shown() for entry in self._lines[number].rows]
        problems = {line.problem: {"id": line.problem, "kind": line.kind, "question": line.question} for _, line, _ in shown}
        place = {name: i for i, name in enumerate(problems)}
        columns: dict[str, list[Any]] = {
            "step": [line.step for _, line, _ in shown],
            "group": [number for number, _, _ in shown],
            "problem": [place[line.problem] for _, line, _ in shown],
            **{name: [entry[name] for _, _, entry in shown] for name in TOLD},
        }
        agents = [key.removeprefix("agents.use.") for key in self._settings if key.startswith("agents.use.")]
        agents = list(dict.fromkeys([*agents, *(name for line in self._lines for entry in line.rows for name in entry["consults"])]))
        metrics = dict.fromkeys(["step", *(key for point in self._points for key in point)])
        steps = self._settings.get("train.steps", "")
        return {
            "name": self.name,
            "folder": spelt(str(self.folder)),
            "state": self.state,
            "notes": self._all_notes(),
            "shown": len(shown),
            "recorded": sum(len(line.rows) for line in self._lines),
            "settings": self._settings,
            "steps": int(steps) if steps.isdecimal() and len(steps) < 10 else max((point["step"] for point in self._points), default=0),
            "metrics": {key: [_number(point.get(key)) for point in self._points] for key in metrics},
            "summary": self._whole["summary.json"],
            "graph": self._picture(),
            "agents": agents,
            "problems": list(problems.values()),
            "traces": columns,
        }

    def _picture(self) -> dict[str, Any] | None:
        """The graph, in which a node that ran without a word of the policy's is not drawn as the policy."""
        graph: dict[str, Any] | None = self._whole["graph.json"]
        silent = self._visited - self._writers
        for node in graph["nodes"] if graph else ():
            node["role"] = "tool" if node["role"] == "policy" and node["name"] in silent else node["role"]
        return graph

    def _all_notes(self) -> list[str]:
        notes = [*self._notes]
        for growing in self._files:
            name = growing.path.name
            if growing.fault:
                notes.append(f"{name} cannot be read: {growing.fault}")
            # A line that is being written has no end yet.
            lines = [*growing.damaged, growing.lines + 1] if growing.rest and self.state != "running" else growing.damaged
            if lines:
                which = ", ".join(f"line {number}" for number in lines[:NAMED]) + (", …" if len(lines) > NAMED else "")
                what = "1 line could not be read and is" if len(lines) == 1 else f"{len(lines):,} lines could not be read and are"
                notes.append(f"{name}: {what} left out ({which})")
        if not self._lines:
            none = self._settings.get("run.trace_groups") == "0"
            notes.append("no trace is recorded (run.trace_groups = 0)" if none else "no trace is recorded yet")
        return notes


def index_of(runs: Sequence[ViewedRun]) -> bytes:
    """The index of a page as JSON. Runs of one name are told apart by their folders."""
    told = [viewed.index() for viewed in runs]
    if len({entry["name"] for entry in told}) < len(told):
        told = [entry | {"name": entry["folder"]} for entry in told]
    return to_json({"version": __version__, "runs": told}, inf_nan_mode="null")


def _locked(folder: Path) -> bool:
    """Whether a trainer has the folder. Asked for by a shared lock, given back at once."""
    try:
        # A pipe is not waited for.
        with open(folder / "lock", "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # there is none, or the file system has no locks
        return isinstance(error, BlockingIOError)
    return False


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes when the file does; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size) if S_ISREG(stat.st_mode) else None


WHOLE: Mapping[str, Callable[[Path], Any]] = {
    "config.yaml": lambda path: dict(_flat(read_yaml(path)[0])),
    "graph.json": lambda path: drawn(from_json(path.read_bytes())),
    "summary.json": lambda path: rounded(dict(from_json(path.read_bytes()))),
}
"""How the small files are read."""


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
            yield spelt(f"{prefix}{key}"), spelt(text)
