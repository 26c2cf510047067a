"""RunLog: one folder per run, held by one process, and what a person sees while it runs."""

import errno
import fcntl
import json
import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Self, TextIO, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_json
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from typing_extensions import TypedDict

from aipo_graph.cli import flat, printable, read_yaml, write_whole, write_yaml
from aipo_graph.config import Config, may_change
from aipo_graph.errors import ConfigError, install
from aipo_graph.types import Learned, TraceGroup

CONFIG, FILES, CHANGES = "config.yaml", "files.json", "changes.jsonl"
PLACES = ("run.name", "run.dir")
"""Where a run lies is nothing of it."""


Step = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
"""A number that JavaScript can write, as an integer: a step's in a file."""


@dataclass(frozen=True, slots=True)
class LoggedGroup:
    """One line of traces.jsonl."""

    step: Step
    group: TraceGroup
    learned: tuple[Learned | None, ...] = ()
    """Of each trace, where the learner said it."""


T = TypeVar("T")
LOGGED_GROUP = TypeAdapter(LoggedGroup)


class Point(TypedDict):
    """What a line of every file has."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    step: Step


POINT = TypeAdapter(Point)


class RunLog:
    """``runs/NAME/``: config.yaml, files.json, changes.jsonl, trackers.json, graph.json, metrics.jsonl, traces.jsonl, excluded.jsonl,
    tensorboard/, summary.json.

    Entering it takes the folder's lock and starts the display; leaving it gives both back. Log a step before its checkpoint is
    saved, so that a run killed in between logs it once more instead of never.
    """

    def __init__(
        self, config: Config, console: Console | None = None, *, files: Mapping[str, str] | None = None, force: bool = False
    ) -> None:
        self.config = config
        self._files, self._force = files or {}, force
        self.folder = Path(config.run.dir) / config.run.name
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._interactive = self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.no_color
        self._live: _LiveView | None = None
        self._trackers: dict[str, Any] = {}
        self._changed: dict[str, tuple[Any, Any]] = {}
        """Setting or file -> its value or digest before and now, in a begun run that goes on."""
        self._forced: list[str] = []
        """Those of them that --force alone lets through."""
        self._broken: set[str] = set()
        self._alarmed: set[str] = set()

    def __enter__(self) -> Self:
        """Raises ConfigError where another process has the folder, what changes learning has changed, or a tracker cannot be opened."""
        self._lock = hold(self.folder, "run folder", "--run.name or --run.dir")
        # A forked worker that outlives a killed run would keep the lock with its copy of the file descriptor.
        os.register_at_fork(after_in_child=self._lock.close)
        try:
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            self._begin()
            for name in self.config.run.trackers:
                self._trackers[name] = _open(name, self.config, self.folder)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pause()
        for name, tracker in self._trackers.items():
            self._attempt(name, tracker.finish, Exception)
        self._lock.close()

    def _begin(self) -> None:
        """Writes config.yaml and files.json of a new run, one without a checkpoint, or compares them with a begun one's.

        A setting that config.yaml lacks had its default. Raises ConfigError in one line where something has changed that changes
        learning, unless it is forced.
        """
        if not (self.folder / CONFIG).exists() or not any(self.folder.glob("checkpoints/step-*")):  # what is not learned yet is not lost
            self._write_settings()
            return
        before = flat(Config().model_dump(mode="json")) | flat(read_yaml(self.folder / CONFIG)[0])
        now = flat(self.config.model_dump(mode="json"))
        self._changed = {key: (before[key], value) for key, value in now.items() if before[key] != value and key not in PLACES}
        try:
            old, new = dict(json.loads((self.folder / FILES).read_text(encoding="utf-8"))), self._files
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self.folder / FILES}: damaged ({error}); choose another --run.name") from error
        self._changed |= {key: (old[key], new[key]) for key in new if old.get(key, new[key]) != new[key]}
        self._forced = [key for key in self._changed if key in new or not may_change(key)]
        if self._forced and not self._force:
            key, (was, given) = self._forced[0], self._changed[self._forced[0]]
            more = f" (and {len(self._forced) - 1} more: {', '.join(self._forced[1:4])})" if len(self._forced) > 1 else ""
            what = f"{key} has changed since{more}; restore it" if key in new else f"it has {key} = {was!r}, not {given!r}{more}; keep it"
            raise ConfigError(
                f"run folder {self.folder} is of a begun run: {what}, choose another --run.name, or say --force to go on with the change "
                "from here"
            )

    def _write_settings(self) -> None:
        write_whole(self.folder / FILES, json.dumps(self._files, indent=1) + "\n")
        write_whole(self.folder / CONFIG, write_yaml(self.config))

    def resume_at(self, step: int) -> None:
        """The run goes on after ``step`` (0: from the start): what was logged past it, and a half-written line, are cut off. What has
        changed since is noted, recorded in changes.jsonl, and the run's own from here on.
        """
        if self._changed:
            _append(self.folder / CHANGES, json.dumps({"step": step, "changed": self._changed, "forced": self._forced}).encode())
        self._write_settings()
        for key, (before, now) in self._changed.items():
            self.note(f"{key} has changed" if key in self._files else f"{key} = {now!r} from here on, {before!r} before")
        if "train.steps" in self._changed and self.config.optimizer.schedule == "cosine":
            self.note(f"the learning rate's cosine ends at step {self.config.train.steps} now: from here on it is another one")
        self._changed = {}  # said and written once, however often a learner is lost and comes back
        self.pause()
        for name in ("metrics.jsonl", "traces.jsonl", "excluded.jsonl"):
            _cut(self.folder / name, step)
        if self._interactive:
            self._live = _LiveView(self.console, self.config.train.steps, step)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[TraceGroup] = (),
        learned: Sequence[tuple[Learned | None, ...]] = (),
    ) -> None:
        """Log step number ``step`` (1, 2, …), with groups of its traces and what was learned from each. A disk that is full is said once,
        and the run goes on.
        """
        finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"step": step, **{key: finite.get(key) for key in metrics}})
        self._attempt("metrics.jsonl", lambda: _append(self.folder / "metrics.jsonl", line.encode()))
        for i, group in enumerate(groups):
            record = to_json(LoggedGroup(step, group, learned[i] if learned else ()), inf_nan_mode="strings")
            self._attempt("traces.jsonl", lambda record=record: _append(self.folder / "traces.jsonl", record))  # type: ignore[misc]
        for name, tracker in self._trackers.items():
            self._attempt(name, lambda tracker=tracker: tracker.log(finite, step=step), Exception)  # type: ignore[misc]
        self._show(step, finite)

    def excluded(self, step: int, problems: Sequence[Mapping[str, Any]], *, alarm: bool) -> None:
        """Log which problems lost traces in a step, and why; an ``alarm`` is a warning, once for each kind of reason."""
        for problem in problems:
            line = json.dumps({"step": step, **problem}).encode()
            self._attempt("excluded.jsonl", lambda line=line: _append(self.folder / "excluded.jsonl", line))  # type: ignore[misc]
        kinds = dict.fromkeys(kind for problem in problems for kind in problem["reasons"] if alarm and kind not in self._alarmed)
        self._alarmed |= kinds.keys()
        for kind in kinds:
            lost = [problem for problem in problems if kind in problem["reasons"]]
            count = sum(problem["reasons"][kind] for problem in lost)
            self.note(
                f"step {step} lost {count} traces of {len(lost)} problems as {kind}, and learns nothing from them; the first: "
                f"{lost[0]['problem']}, {lost[0]['errors'][kind] or kind}; excluded.jsonl has all"
            )

    def note(self, text: str) -> None:
        """A warning line, above the live display where there is one."""
        self.console.print(Text.assemble(("note: ", "yellow"), printable(text)), soft_wrap=True)

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write summary.json, or graph.json: what the compiled graph looks like, so that nobody has to run its code to show a trace."""
        self._attempt(name, lambda: write_whole(self.folder / name, json.dumps(values, indent=2) + "\n"))

    def pause(self) -> None:
        """End the live display, to print tables below it. The next step starts a new one."""
        if self._live:
            self._live.live.stop()
            self._live = None

    def _attempt(self, what: str, write: Callable[[], Any], faults: type[Exception] = OSError) -> None:
        """Writes a file of the folder, or to a tracker: another's code and server, which may fail in any way, but fail no run."""
        try:
            write()
        except faults as error:
            if what not in self._broken:
                self._broken.add(what)
                why = getattr(error, "strerror", None) or f"{type(error).__name__}: {printable(str(error))[:300]}"
                failed = f"cannot write {what} in {self.folder}" if faults is OSError else f"{what} failed"
                self.note(f"{failed} ({why}); the run goes on without it")

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._interactive:
            # One short line, for files and pipes; metrics.jsonl has the rest.
            steps = self.config.train.steps
            shown = [entry for entry in HEADLINE if entry[1] in metrics and (entry[1] != "failed" or metrics["failed"])]
            line = f"step {step:>{len(str(steps))}}/{steps}: " + ", ".join(f"{label} {metrics[key]:{form}}" for label, key, form in shown)
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        self._live = self._live or _LiveView(self.console, self.config.train.steps, step)
        self._live.update(step, metrics)


# --- files


def opened(path: Path) -> BinaryIO:
    """For its bytes. Raises OSError for what is no file: one would wait for a pipe without end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file")
    return path.open("rb")


def records(path: Path, form: TypeAdapter[T], offset: int = 0) -> Iterator[tuple[int, bytes, T | None]]:
    """(offset of its first byte, line, record) of each line from ``offset`` on, None for what is damaged or has no end. Raises OSError."""
    with opened(path) as lines:
        lines.seek(offset)
        for line in lines:
            try:
                record = form.validate_json(line) if line.endswith(b"\n") else None
            except ValidationError:
                record = None
            yield offset, line, record
            offset += len(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, damaged ones left out; no file, no lines."""
    return [dict(point) for *_, point in records(path, POINT) if point is not None] if path.exists() else []


def read_traces(path: Path) -> tuple[list[LoggedGroup], int]:
    """The groups of a traces.jsonl, and how many lines could not be read. Raises ConfigError where there is no file."""
    try:
        found = [logged for *_, logged in records(path, LOGGED_GROUP)]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    groups = [logged for logged in found if logged is not None]
    return groups, len(found) - len(groups)


def _cut(path: Path, step: int) -> None:
    """Truncate before the first line that is damaged or later than ``step``."""
    with suppress(FileNotFoundError):
        for offset, _, record in records(path, POINT):
            if record is None or record["step"] > step:
                os.truncate(path, offset)
                return


def _append(path: Path, line: bytes) -> None:
    """Add one line, whole or not at all."""
    with path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            rest = line + b"\n"
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(start)
            raise


def hold(folder: Path, what: str, option: str) -> TextIO:
    """Makes a folder and takes its lock, as long as the file is open. Raises ConfigError where another has it or it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{what} {folder}: {error.strerror}; choose another {option}") from error
    lock.seek(0)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with lock:
            holder = lock.read(200).strip() or "another process"
        raise ConfigError(f"{what} {folder} is in use by {holder}; wait for it, or choose another {option}") from None
    lock.truncate()
    print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
    return lock


# --- what a person sees


HEADLINE = (
    ("reward", "reward", ".3f"),
    ("with agents", "reward/with_agents", ".3f"),
    ("alone", "reward/alone", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("failed", "failed", ".1%"),
    ("tokens/s", "tokens_per_second", ",.0f"),
)
PER_AGENT = (
    ("consults", "consults", ".2f"),
    ("mean ratio", "agent_ratio_mean", ".3f"),
    ("at floor", "floor_hit", ".0%"),
    ("at ceiling", "ceiling_hit", ".0%"),
    ("effective sample", "agent_ess", ".0%"),
)


class _LiveView:
    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=3600,  # a step may take minutes
        )
        self.task = self.progress.add_task("", total=steps, completed=done)
        self.live = Live(self.progress, console=console, refresh_per_second=2)
        self.live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.progress.update(self.task, completed=step)
        shown = [entry for entry in HEADLINE if entry[1] in metrics]
        headline = _table([label for label, _, _ in shown])
        headline.add_row(*[f"{metrics[key]:{form}}" for _, key, form in shown])
        agents = _table(["agent", *(label for label, _, _ in PER_AGENT)])
        agents.columns[0].justify, agents.columns[0].style = "left", "cyan"
        prefixes = tuple(f"{key}/" for _, key, _ in PER_AGENT)
        for agent in dict.fromkeys(key.partition("/")[2] for key in metrics if key.startswith(prefixes)):
            cells = [f"{metrics[f'{key}/{agent}']:{form}}" if f"{key}/{agent}" in metrics else "" for _, key, form in PER_AGENT]
            agents.add_row(agent, *cells)
        self.live.update(Group(self.progress, headline, agents))


def _table(labels: Sequence[str]) -> Table:
    return Table(*[Column(label, justify="right", header_style="dim") for label in labels], box=None, expand=True)


# --- where metrics go besides metrics.jsonl

IDS = "trackers.json"
"""In the run folder: which run of each tracker is this one."""


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # three seconds that `--help` and readers of logs are spared

            # Points from this step on, left by a run that was killed, are hidden.
            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _open(name: str, config: Config, folder: Path) -> Any:
    """A tracker, with the run that it had before where this one goes on; later faults of it are noted, once each.

    Raises ConfigError for one that is not installed or cannot be opened.
    """
    if name == "tensorboard":
        return _TensorBoard(folder)
    try:
        ids = json.loads((folder / IDS).read_text(encoding="utf-8")) if (folder / IDS).exists() else {}
        settings = config.model_dump(mode="json")
        if name == "wandb":
            import wandb

            run = ids.setdefault(name, secrets.token_hex(4))
            opened = wandb.init(
                project="aipo_graph", name=config.run.name, id=run, resume="allow", dir=str(folder), config=settings, allow_val_change=True
            )
        else:
            import trackio

            # Another run of this name may be there: only our own is gone on with.
            resume = "allow" if name in ids else "never"
            opened = trackio.init(project="aipo_graph", name=ids.get(name, config.run.name), resume=resume, config=settings)
            ids[name] = opened.name
        (folder / IDS).write_text(json.dumps(ids) + "\n", encoding="utf-8")
    except ImportError as error:
        raise ConfigError(f"run.trackers: {name} is not installed; {install('trackers')}") from error
    except Exception as error:
        why = f"{type(error).__name__}: {printable(str(error))[:300]}"
        raise ConfigError(f"run.trackers: {name} cannot be opened ({why}); log in, work offline, or leave it out") from error
    return opened
