"""Processes that sample with engines of their own: held-out problems for `evaluate.py`, into a file that survives a kill, and groups of
training traces beside those of `train.py`."""

import asyncio
import functools
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic_core import to_json

from aipo_graph import cli, loops
from aipo_graph.config import Config
from aipo_graph.errors import AipoError, ConfigError, ContextError, EngineError
from aipo_graph.evaluation.samples import Key, Part, Sample, ballot
from aipo_graph.load import objects
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Problem, Task, Trace, TraceGroup, derive_seed

if TYPE_CHECKING:  # only workers wait for torch: the parent of an evaluation starts (and refuses) without
    from aipo_graph.rollout.collect import Draw, Rollouts

GRACE = 15
"""Seconds in which a worker that was asked to end must have ended."""
RETRIED = frozenset({"failed", "timeout"})
"""Statuses without a verdict on the policy, which another try may change."""
MEASURED = 8
"""Problems per part, those with the longest questions, whose prompts are measured."""
Report = Callable[[int, int, int], None]
"""Called as samples come, with how many are done, of how many, and how many of them failed."""
Unit = tuple[int, list[tuple[int, int]]]
"""A part's index, and (problem index, sample number) of the traces that run together."""


def processes(config: Config) -> int:
    """How many sample: `engine.workers` of the local engine. vLLM batches what one sends, and objects that a call gave reach no other."""
    return config.engine.workers if config.engine.kind == "local" and not objects() else 1


# On Linux one process imports torch and the rest, and all workers are forked from it; elsewhere forking is not safe.
FORKS: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
FORKS.set_forkserver_preload(["aipo_graph.engines", "aipo_graph.rollout.collect", "transformers.models.llama.modeling_llama"])


class Worker:
    """A process that awaits ``target(config, task, *arguments, parent)``, where ``parent`` is its end of a pipe. It ends by itself when
    this one does, however that does; Ctrl-C is this one's to deal with."""

    def __init__(self, target: Callable[..., Coroutine[Any, Any, None]], config: Config, *arguments: Any, daemon: bool = True) -> None:
        self.pipe, theirs = FORKS.Pipe()
        self._process = FORKS.Process(target=_live, args=(dict(os.environ), target, config, *arguments, theirs), daemon=daemon)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _main_unseen():
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()

    def receive(self) -> Any:
        """What it sends next. Raises what it raised, EngineError if it died."""
        try:
            found = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            hint = "out of memory?" if code == -signal.SIGKILL else "what it said stands above"
            raise EngineError(f"a worker ended with exit code {code} ({hint}); run the same command to go on") from None
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.join(GRACE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


def _live(environment: Mapping[str, str], target: Callable[..., Coroutine[Any, Any, None]], config: Config, *arguments: Any) -> None:
    """A worker's life: the target's, in the environment that its parent has now. None at its end, or what it raised."""
    gc.set_threshold(cli.SELDOM)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.getLogger("aipo_graph").setLevel(logging.ERROR)  # the parent has read the same data, and said what it warns of
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a worker that is terminated would leave behind
    try:
        asyncio.run(target(config, open_task(config), *arguments))
        arguments[-1].send(None)  # the loop has ended, too: whoever is told may end this process
    except (AipoError, OSError) as error:
        with suppress(OSError):  # nobody asks any more
            arguments[-1].send(error)


def end_with_parent() -> None:
    """For a thread of a worker: ends the worker when its parent has ended, however it did."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)


_MAIN = threading.Lock()


@contextmanager
def _main_unseen() -> Iterator[None]:
    """A child that starts within does not run the caller's script again, which need not guard itself with `if __name__ == "__main__"`."""
    with _MAIN:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


# --- groups of training traces


class Workers(ExitStack):
    """Makes groups here and in the processes beside this one, if there are any, which end with the context; each samples with the weights
    that the engine here has."""

    def __init__(self, rollouts: "Rollouts", path: str) -> None:
        super().__init__()
        self._rollouts = rollouts
        self._versions: dict[Worker, int] = {}  # of the weights in each
        self._threads = self.enter_context(ThreadPoolExecutor(processes(rollouts.config)))  # which wait; those of the loop have work
        for _ in range(processes(rollouts.config) - 1):
            worker = self.enter_context(closing(Worker(_make_groups, rollouts.config, path)))
            self._versions[worker] = 0

    async def run_groups(self, draws: Sequence["Draw"]) -> list[TraceGroup]:
        from aipo_graph.rollout.collect import dealt

        return await dealt(draws, [self._rollouts.run_groups, *(functools.partial(self._ask, worker) for worker in self._versions)])

    async def _ask(self, worker: Worker, draws: Sequence["Draw"]) -> list[TraceGroup]:
        def asked() -> Any:
            with suppress(ConnectionError):  # of one that died; receiving says so
                worker.pipe.send_bytes(sent)
            return worker.receive()

        engine: Any = self._rollouts.engine
        weights, version = None, engine.version
        if self._versions[worker] != version:
            weights = {name: tensor.cpu() for name, tensor in engine.model.state_dict().items()}
        sent = pickle.dumps(([draw.index for draw in draws], weights, version))  # by itself a pipe would share the tensors' memory
        self._versions[worker] = version
        found = await asyncio.get_running_loop().run_in_executor(self._threads, asked)
        return [TraceGroup(draw.problem, traces) for draw, traces in zip(draws, found, strict=True)]


async def _make_groups(config: Config, task: Task, path: str, parent: Connection) -> None:
    """A worker's life: the traces of the draws whose numbers it is sent, with the weights that come with them."""
    async with _opened(config, task, path) as rollouts:
        while True:
            try:
                indices, weights, version = pickle.loads(await asyncio.to_thread(parent.recv_bytes))
            except (EOFError, ConnectionError):  # nobody asks any more
                return
            if weights:
                await rollouts.engine.load_weights(weights.items(), version)
            groups = await rollouts.run_groups([rollouts.draw(index) for index in indices])
            parent.send([group.traces for group in groups])


# --- samples of held-out problems


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


def sample(
    config: Config,
    task: Task,
    parts: Sequence[Part],
    todo: Sequence[Unit],
    path: Path,
    report: Report | None = None,
    *,
    whole: bool = False,
) -> None:
    """Samples units until none is left, in processes that end with the call, and by themselves when this one does, however it does.

    Objects that a call gave reach no other process: with them this one samples. Raises what a worker raised, EngineError if one died.

    Args:
        whole: refuse a model whose context cannot hold the longest prompt and all of `rollout.max_tokens`.
    """
    done, failed, total = 0, 0, sum(len(traces) for _, traces in todo)

    def tell(more: int, bad: int) -> None:
        nonlocal done, failed
        done, failed = done + more, failed + bad
        if report:
            report(done, total, failed)

    if objects():
        if total:
            loops.run(_sample_all(config, task, parts, iter(todo), path, whole, tell))
        return
    left = iter(todo)
    daemon = config.engine.kind != "vllm"  # a daemon may have no children; vLLM in the process has
    with ExitStack() as stack:
        workers: dict[Any, Worker] = {}
        for _ in range(min(processes(config), len(todo))):
            worker = stack.enter_context(closing(Worker(_work, config, parts, path, whole, daemon=daemon)))
            workers[worker.pipe] = worker
        while workers:
            for pipe in wait(list(workers)):
                message = workers[pipe].receive()
                if message is None:
                    del workers[pipe]
                elif message:
                    tell(*message)
                else:
                    workers[pipe].pipe.send(next(left, None))


async def _work(config: Config, task: Task, parts: Sequence[Part], path: Path, whole: bool, parent: Connection) -> None:
    """A worker's life: ask the parent for a unit (), sample it, write it, say how many, until there is none."""
    if config.engine.kind == "vllm":  # it has processes of its own, which would be left behind
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    def ask() -> Unit | None:
        parent.send(())
        return parent.recv()

    await _sample_all(config, task, parts, iter(ask, None), path, whole, lambda done, failed: parent.send((done, failed)))


@asynccontextmanager
async def _opened(config: Config, task: Task, path: str) -> AsyncIterator["Rollouts"]:
    """Graph runs over an engine of this process, which end with the context."""
    import torch

    from aipo_graph.engines import open_engine
    from aipo_graph.engines.chat import open_chats
    from aipo_graph.rollout.collect import Rollouts

    torch.set_num_threads(config.run.threads)
    engine = await open_engine(config, path)
    try:
        rollouts = Rollouts.open(config, engine, task, await open_chats(config))
        gc.freeze()  # what is loaded stays: collections need not walk it
        yield rollouts
    finally:
        gc.unfreeze()
        await engine.close()


async def _sample_all(
    config: Config, task: Task, parts: Sequence[Part], left: Iterator[Unit], path: Path, whole: bool, tell: Callable[[int, int], None]
) -> None:
    """``tell`` is called with how many more are done, and how many of these failed."""
    from aipo_graph.rollout.collect import gather

    if all(part.mode == "alone" for part in parts):  # helpers need not be up for what runs without them
        config = config.model_copy(update={"agents": config.agents.model_copy(update={"use": {}, "models": {}})})
    closed = config.engine.kind == "local" and config.engine.deterministic

    def write(samples: Sequence[Sample]) -> None:
        with path.open("ab") as file:
            file.write(b"".join(to_json(sample) + b"\n" for sample in samples))
        tell(len(samples), sum(not sample.scored for sample in samples))

    async with _opened(config, task, config.policy.model) as rollouts:
        if whole:
            await _check_context(rollouts, parts)
        for index, traces in left:
            part = parts[index]
            runner = replace(rollouts, temperature=0.0) if part.greedy else rollouts

            async def one(problem: Problem, number: int, part: Part = part, runner: "Rollouts" = runner) -> Sample:
                draw = "greedy" if part.greedy else number
                seed = derive_seed(config.run.seed, "evaluate", problem.id, part.mode, draw)
                trace = await runner.run_trace(problem, seed=seed, with_agents=part.mode == "with_agents")
                sample = _sample_of(trace, part, number)
                if not closed:
                    write([sample])
                return sample

            samples = await gather([one(part.problems[problem], number) for problem, number in traces])
            if closed:
                write(samples)  # a unit that was written in part would be batched in another way when it is resumed


def _sample_of(trace: Trace, part: Part, number: int) -> Sample:
    from aipo_graph.tasks.grading import last_box

    consults: dict[str, tuple[int, int]] = {}
    for segment in trace.segments:
        if segment.source == "agent":
            calls, tokens = consults.get(segment.author, (0, 0))
            consults[segment.author] = (calls + 1, tokens + len(segment.token_ids))
    answered = trace.trained and trace.scores.get("answered", 1.0)  # a task may know that the box is not where an answer counts
    return Sample(
        part.name,
        trace.problem_id,
        number,
        trace.status,
        trace.solved,
        sum(len(segment.token_ids) for segment in trace.segments if segment.source == "policy"),
        consults,
        trace.error and trace.error[:500],
        answer=ballot(last_box(trace.reply)) if answered else "",
        leaks=int(trace.scores.get("leaks", 0)),
        violation=bool(trace.scores.get("violation")),
    )


class _Ruler:
    """An engine that measures each run's first prompt and samples nothing."""

    longest = 0

    async def generate(self, prompt_ids: Sequence[int], **_: object) -> NoReturn:
        self.longest = max(self.longest, len(prompt_ids))
        raise ContextError("measured")

    @contextmanager
    def run(self, key: str = "") -> Iterator[None]:
        yield

    busy = run


async def _check_context(rollouts: Any, parts: Sequence[Part]) -> None:
    """Raises ConfigError where the context cannot hold the longest prompt and `rollout.max_tokens`: samples would be cut short."""
    ruler, budget, context = _Ruler(), rollouts.config.rollout.max_tokens, rollouts.engine.max_context
    measured = replace(rollouts, engine=ruler)
    for part in parts:
        for problem in sorted(part.problems, key=lambda problem: len(problem.question))[-MEASURED:]:
            await measured.run_graph(problem, seed=0, with_agents=part.mode == "with_agents")
    if (room := context - ruler.longest) < budget:
        remedy = f"give --rollout.max_tokens {room}" if room > 0 else "there is no room for an answer"
        limit = "engine.max_context" if rollouts.config.engine.max_context else f"{rollouts.config.policy.model}: its context"
        raise ConfigError(
            f"{limit} is {context} tokens, the longest prompt has {ruler.longest} and rollout.max_tokens is {budget}; "
            f"{remedy}, or take a model with a longer context"
        )
