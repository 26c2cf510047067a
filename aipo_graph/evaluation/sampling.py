"""Samples held-out problems in worker processes, into a file that survives a kill: the engine room of `evaluate.py`."""

import asyncio
import errno
import fcntl
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from aipo_graph.config import Config
from aipo_graph.errors import AipoError, ConfigError, EngineError
from aipo_graph.types import TRAINED, Problem, Trace, derive_seed

Mode = Literal["alone", "with_agents"]
GRACE = 15
"""Seconds in which a worker that was asked to end must have ended."""
RETRIED = frozenset({"failed", "timeout"})
"""Statuses without a verdict on the policy, which another try may change."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the things that an evaluation samples: a kind of problem, alone or with agents, at T or greedily."""

    kind: str
    mode: Mode
    samples: int
    """Per problem; 1 where greedy."""
    problems: tuple[Problem, ...]
    greedy: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.mode}" + "/greedy" * self.greedy


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of samples.jsonl: what a trace came to. ``consults``: agent -> (calls, tokens of its replies)."""

    part: str
    problem: str
    sample: int
    status: str
    solved: bool
    tokens: int
    """Sampled by the policy."""
    consults: Mapping[str, tuple[int, int]]
    error: str | None = None

    @property
    def scored(self) -> bool:
        return self.status in TRAINED


SAMPLE = TypeAdapter(Sample)
Key = tuple[str, str, int]
Report = Callable[[int, int, int], None]
"""Called as samples come, with how many are done, of how many, and how many of them failed."""
Unit = tuple[int, list[tuple[int, int]]]
"""A part's index, and (problem index, sample number) of the traces that run together."""


class Store:
    """samples.jsonl of one evaluation: its settings in the first line, then a line per sample. Held by one process.

    Raises ConfigError where another process has it, or it was made with other settings (the first differing key is named).
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / "samples.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"{folder} cannot hold an evaluation: {error.strerror}; choose another --out") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check(to_json({"settings": settings}) + b"\n")
        except BlockingIOError:
            self.close()
            raise ConfigError(f"{folder}: another process is evaluating there; wait for it, or choose another --out") from None
        except ConfigError:
            self.close()
            raise

    def _check(self, header: bytes) -> None:
        """Drops a half line at the end, then compares the first line with this evaluation's."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        first, _, rest = data[:whole].partition(b"\n")
        if first + b"\n" == header:
            os.ftruncate(self._file, whole)
            return
        try:
            before, now = json.loads(first or b'{"settings": {}}')["settings"], json.loads(header)["settings"]
            different = next((key for key in [*now, *before] if before.get(key) != now.get(key)), "settings")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self.path}:1: not the first line of an evaluation; choose another --out") from error
        if rest:
            raise ConfigError(
                f"{self.path.parent} holds an evaluation with {different} = {before.get(different)!r}, not {now.get(different)!r}; "
                "choose another --out, or delete it"
            )
        os.ftruncate(self._file, 0)
        append(self._file, header)

    def read(self) -> dict[Key, Sample]:
        """The samples so far. Lines that cannot be read are left out, so that theirs are drawn again."""
        found: dict[Key, Sample] = {}
        with self.path.open("rb") as lines:
            for line in lines:
                try:
                    sample = SAMPLE.validate_json(line)
                except ValidationError:
                    continue
                found[sample.part, sample.problem, sample.sample] = sample
        return found

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def append(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def model_digest(model: str) -> str:
    """SHA-256 over a model directory's JSON and safetensors files; of a hub model, its name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def units(parts: Sequence[Part], done: Mapping[Key, Sample], size: int) -> list[Unit]:
    """What is left to sample, in units of at most ``size`` traces.

    The cut depends on the parts alone, never on what is done or on the workers: a unit is one closed batch of the engine, so
    its traces come out bit by bit the same wherever and whenever it runs.
    """
    left: list[Unit] = []
    for index, part in enumerate(parts):
        traces = [(problem, sample) for problem in range(len(part.problems)) for sample in range(part.samples)]
        for start in range(0, len(traces), size):
            missing = [
                (problem, sample)
                for problem, sample in traces[start : start + size]
                if (old := done.get((part.name, part.problems[problem].id, sample))) is None or old.status in RETRIED
            ]
            if missing:
                left.append((index, missing))
    return left


class Sampling:
    """Worker processes that sample units until none is left; in the background until `finish` is called.

    A context manager: leaving it ends the workers. They also end by themselves when this process does, however it does.
    """

    def __init__(self, config: Config, parts: Sequence[Part], todo: Sequence[Unit], path: Path) -> None:
        self.total = sum(len(traces) for _, traces in todo)
        self._done = self._failed = 0
        self._workers: dict[Connection, Any] = {}
        spawn = multiprocessing.get_context("spawn")
        self._taken = spawn.Value("q", 0)  # kept: it must outlive the workers' start
        # Workers are born with SIGINT blocked: Ctrl-C reaches the whole group, and this process decides what it means.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            workers = config.evaluate.workers if config.engine.kind == "local" else 1  # vLLM batches what one process sends
            for _ in range(min(workers, len(todo))):
                ours, theirs = spawn.Pipe(duplex=False)
                # A daemon may have no children; vLLM in the process has.
                daemon = config.engine.kind != "vllm"
                worker = spawn.Process(target=_work, args=(config, parts, todo, self._taken, path, theirs), daemon=daemon)
                worker.start()
                theirs.close()
                self._workers[ours] = worker
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def finish(self, report: Report | None = None) -> None:
        """Waits for the workers. Raises what a worker raised, EngineError if one died."""
        while self._workers:
            for connection in wait(list(self._workers)):
                assert isinstance(connection, Connection)
                message = self._receive(connection)
                if isinstance(message, Exception):
                    self.close()
                    raise message
                if message is None:
                    self._workers.pop(connection).join()
                    continue
                self._done += message[0]
                self._failed += message[1]
                if report:
                    report(self._done, self.total, self._failed)

    def _receive(self, connection: Connection) -> tuple[int, int] | Exception | None:
        try:
            message: tuple[int, int] | Exception | None = connection.recv()
            return message
        except EOFError:
            worker = self._workers[connection]
            worker.join()
            hint = "out of memory?" if worker.exitcode == -signal.SIGKILL else "what it said stands above"
            return EngineError(f"an evaluation worker ended with exit code {worker.exitcode} ({hint}); run the same command to go on")

    def close(self) -> None:
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.terminate()
        for connection, worker in workers.items():
            worker.join(GRACE)
            if worker.is_alive():
                worker.kill()
                worker.join()
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- in a worker


def _work(config: Config, parts: Sequence[Part], todo: Sequence[Unit], taken: Any, path: Path, parent: Connection) -> None:
    """A worker's life: take the next unit, sample it, write it, tell the parent how many; None at the end."""
    if config.engine.kind == "vllm":  # it has processes of its own, which would be left behind
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        asyncio.run(_sample_all(config, parts, todo, taken, path, parent))
        parent.send(None)
    except (AipoError, OSError) as error:
        parent.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)


async def _sample_all(config: Config, parts: Sequence[Part], todo: Sequence[Unit], taken: Any, path: Path, parent: Connection) -> None:
    # Imported here because only workers need them: the parent starts (and refuses) without waiting for torch.
    import torch
    from transformers.utils.logging import disable_progress_bar

    from aipo_graph.engines.chat import open_chats
    from aipo_graph.engines.open import open_engine
    from aipo_graph.rollout.collect import Rollouts
    from aipo_graph.tasks.open import open_task

    torch.set_num_threads(config.run.threads)
    disable_progress_bar()
    if all(part.mode == "alone" for part in parts):  # helpers need not be up for what runs without them
        config = config.model_copy(update={"agents": config.agents.model_copy(update={"use": {}, "models": {}})})
    engine = await open_engine(config, config.policy.model)
    try:
        rollouts = Rollouts.open(config, engine, open_task(config), await open_chats(config, engine))
        await _sample_units(rollouts, parts, todo, taken, path, parent)
    finally:
        await engine.close()


async def _sample_units(rollouts: Any, parts: Sequence[Part], todo: Sequence[Unit], taken: Any, path: Path, parent: Connection) -> None:
    from aipo_graph.rollout.collect import Rollouts, gather

    config: Config = rollouts.config
    closed = config.engine.kind == "local" and config.engine.deterministic
    gc.freeze()  # what is loaded stays: collections need not walk it
    file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(samples: Sequence[Sample]) -> None:
        append(file, b"".join(to_json(sample) + b"\n" for sample in samples))
        parent.send((len(samples), sum(not sample.scored for sample in samples)))

    while True:
        with taken.get_lock():
            index, taken.value = taken.value, taken.value + 1
        if index >= len(todo):
            return
        part = parts[todo[index][0]]
        runner = replace(rollouts, temperature=0.0) if part.greedy else rollouts

        async def one(problem: Problem, number: int, part: Part = part, runner: Rollouts = runner) -> Sample:
            draw = "greedy" if part.greedy else number
            seed = derive_seed(config.run.seed, "evaluate", problem.id, part.mode, draw)
            trace = await runner.run_trace(problem, seed=seed, with_agents=part.mode == "with_agents")
            sample = _sample_of(trace, part, number)
            if not closed:
                write([sample])
            return sample

        samples = await gather([one(part.problems[problem], number) for problem, number in todo[index][1]])
        if closed:
            write(samples)  # a unit that was written in part would be batched in another way when it is resumed


def _sample_of(trace: Trace, part: Part, number: int) -> Sample:
    consults: dict[str, tuple[int, int]] = {}
    for segment in trace.segments:
        if segment.source == "agent":
            calls, tokens = consults.get(segment.author, (0, 0))
            consults[segment.author] = (calls + 1, tokens + len(segment.token_ids))
    return Sample(
        part.name,
        trace.problem_id,
        number,
        trace.status,
        trace.reward >= 1,
        sum(len(segment.token_ids) for segment in trace.segments if segment.source == "policy"),
        consults,
        trace.error and trace.error[:500],
    )
