"""An endless stream of training steps: which problems are under way, and where new weights enter and are seen to have taken effect."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, EngineError
from aipo_graph.rollout.collect import Draw, has_signal, too_long
from aipo_graph.types import Engine, TraceGroup

# --- did a weight load take effect? The engine's logprobs of a fixed text are compared with the learner's

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest mean gap between two implementations of one model. In bfloat16 their roundings differ in every layer."""
MOVED = 1e-4
"""A learner's logprob that changed by more has changed."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A text and the learner's logprobs of its tokens but the first, at temperature 1."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class SyncCheck:
    """Compares after each load, and with the load before: an engine that still says the very same has not taken new weights."""

    def __init__(self, dtype: str) -> None:
        self._tolerance = TOLERANCE[dtype]
        self._before: tuple[Probe, tuple[float, ...]] | None = None

    def __call__(self, probe: Probe, found: Sequence[float], version: int) -> dict[str, float]:
        """The mean and the largest gap, for the log. Raises EngineError if the engine does not sample with the learner's weights."""
        gaps = [abs(ours - theirs) for ours, theirs in zip(probe.logprobs, found, strict=True)]
        mean, largest = sum(gaps) / len(gaps), max(gaps)
        if not mean <= self._tolerance:
            raise EngineError(
                f"weights {version} did not reach the engine: its logprobs of a probe text differ from the learner's by {mean:.2g} on "
                f"average (at most {self._tolerance:g}); restart the server with the policy's model and dtype, then run the same command"
            )
        if self._before is not None:
            old, answer = self._before
            moved = max(abs(a - b) for a, b in zip(probe.logprobs, old.logprobs, strict=True))
            if moved > MOVED and answer == tuple(found):
                raise EngineError(
                    f"weights {version} did not reach the engine: the learner's logprobs of a probe text moved by {moved:.2g}, the "
                    "engine's did not move at all; restart the server, then run the same command"
                )
        self._before = probe, tuple(found)
        return {"sync_gap": mean, "sync_gap_max": largest}


# --- the stream

MOST_TOO_LONG = 1000
"""Problems in a row whose prompts may fill the context."""


class Sampling(Protocol):
    """What makes groups of problems: :class:`Rollouts` in this process, or others'."""

    @property
    def engine(self) -> Engine: ...

    def draw(self, cursor: int) -> Draw: ...

    async def run_groups(self, draws: Sequence[Draw]) -> list[TraceGroup]: ...

    def probe_ids(self) -> tuple[int, ...]: ...


class Publisher(Protocol):
    """The learner, as its samplers see it. ``version``: training steps done."""

    version: int

    def weights(self) -> Iterable[tuple[str, Any]]: ...

    def adapter(self) -> Iterable[tuple[str, Any]]: ...

    def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What one training step was given: the groups to learn from, those discarded for lack of signal, the data cursor after them, and
    those passed over since a prompt of theirs fills the context."""

    groups: tuple[TraceGroup, ...]
    discarded: tuple[TraceGroup, ...]
    drawn: int
    too_long: tuple[TraceGroup, ...] = ()


class Stream:
    """Training steps in the order of their draws, none of whose tokens is older than `rollout.max_lag` updates when it is learned from.

    Draws start in order, and only as long as at most (max_lag + 1) steps' worth of them are between their start and the published update
    that learned from them; one that is passed over makes room for another. An engine that loads in flight gets weights as they are
    published. Another gets them between whole steps, each of which one version samples, and never works ahead across a checkpoint, so that
    a resumed run samples with just the weights that the undisturbed one did.

    Args:
        sample: makes the groups.
    """

    def __init__(self, sample: Sampling, config: Config) -> None:
        self.sample = sample
        self.metrics: dict[str, float] = {}
        """Of the step last given, and of the last load's probe."""
        self._config = config
        # The local engine copies the tensors themselves: nothing to prove there.
        self._probe_ids = sample.probe_ids() if config.engine.kind != "local" else ()
        self._check = SyncCheck(config.policy.dtype)
        self._published: tuple[Iterable[tuple[str, Any]], int, Probe | None] | None = None
        self._version = 0
        self._under_way: deque[tuple[Draw, asyncio.Task[list[TraceGroup]], int]] = deque()
        """In order; each with the call that makes its group, and the group's place in what that returns."""
        self._running: set[asyncio.Task[list[TraceGroup]]] = set()
        self._idle_since = time.monotonic()
        self._idle = 0.0

    async def load_weights(self, learner: Publisher) -> None:
        """Publishes the learner's weights: an engine that can takes them at once, another before it starts on the next step.

        What is not `local` says what it makes of a probe text afterwards; EngineError if the load took no effect.
        """
        weights = learner.adapter() if self.sample.engine.takes == "adapter" else learner.weights()
        probe = Probe(self._probe_ids, await asyncio.to_thread(learner.logprobs, self._probe_ids)) if self._probe_ids else None
        self._published = (weights, learner.version, probe)
        if self.sample.engine.in_flight:
            await self._take()
            if self._under_way:
                self._admit()

    async def _take(self) -> None:
        """Loads what was published, before the learner goes on to change it."""
        if self._published is not None:
            (weights, version, probe), self._published = self._published, None
            await self.sample.engine.load_weights(weights, version)
            if probe is not None:
                self.metrics |= self._check(probe, await self.sample.engine.logprobs(probe.token_ids), version)
            self._version = version

    def whole(self, version: int) -> bool:
        """Whether nothing that is under way after this many steps would be sampled otherwise by a run that resumes there."""
        return self.sample.engine.in_flight or not self._config.rollout.max_lag or version % self._config.run.checkpoint_every == 0

    async def steps(self, start: int, steps: int, drawn: int) -> AsyncGenerator[Step, None]:
        """Steps start … steps-1 in order, from training problem ``drawn`` on; the caller publishes weights after each.

        Raises the first error of any group under way.
        """
        self._start = self._number = start
        self._steps, self._cursor, self._started, self._passed = steps, drawn, 0, 0
        self._failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        engine = self.sample.engine
        lag = min(self._config.rollout.max_lag, 1) if engine.in_flight else self._config.rollout.max_lag  # the window itself goes further
        ahead: deque[asyncio.Task[Step]] = deque()
        try:
            for number in range(start, steps):
                for later in range(number + len(ahead), min(number + lag + 1, steps)):
                    if ahead and not engine.in_flight and self.whole(later):
                        break
                    if ahead:
                        await asyncio.wait({ahead[-1]})
                    ahead.append(await self._begin(later))
                step = await ahead.popleft()
                if not self._running:
                    await engine.sleep()
                self.metrics |= {"ahead": float(sum(call.done() for _, call, _ in self._under_way)), "seconds/wait_learner": self._idle}
                self._idle = 0.0
                yield step
        finally:
            tasks = {*self._running, *ahead}
            self._under_way.clear()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._failed.cancel()

    async def _begin(self, number: int) -> "asyncio.Task[Step]":
        await self._take()
        self._number = number
        return asyncio.create_task(self._assemble())

    async def _assemble(self) -> Step:
        """The next groups in order. Those without signal are replaced, up to `rollout.redraws` times their number; then all are kept."""
        rollout = self._config.rollout
        kept: list[TraceGroup] = []
        discarded: list[TraceGroup] = []
        passed_over: list[TraceGroup] = []
        drawn = 0
        while len(kept) < rollout.problems:
            self._admit()
            draw, call, place = self._under_way[0]
            either: set[asyncio.Future[Any]] = {call, self._failed}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                raise self._failed.result()
            self._under_way.popleft()
            group, drawn = call.result()[place], draw.index + 1
            if too_long(group):
                passed_over.append(group)
            elif len(discarded) < rollout.redraws * rollout.problems and not has_signal(group):
                discarded.append(group)
            else:
                kept.append(group)
                continue
            self._passed += 1
            if len(passed_over) > MOST_TOO_LONG and not kept and not discarded:
                raise ConfigError(f"{group.traces[-1].error}; so it was with each of {len(passed_over)} problems: none fits")
        return Step(tuple(kept), tuple(discarded), drawn, tuple(passed_over))

    def _admit(self) -> None:
        """Starts the draws that may start: one by one, or all of a step in one call to an engine whose batches must repeat."""
        rollout, in_flight = self._config.rollout, self.sample.engine.in_flight
        if not in_flight and self._under_way:
            return
        until = min(self._version + rollout.max_lag + 1, self._steps) if in_flight else self._number + 1
        draws = []
        for _ in range((until - self._start) * rollout.problems + self._passed - self._started):
            draws.append(self.sample.draw(self._cursor))
            self._cursor = draws[-1].index + 1
        self._started += len(draws)
        for share in [[draw] for draw in draws] if in_flight else filter(None, [draws]):
            if not self._running:
                self._idle += time.monotonic() - self._idle_since
            call = asyncio.create_task(self.sample.run_groups(share))
            self._running.add(call)
            call.add_done_callback(self._ended)
            self._under_way += [(draw, call, place) for place, draw in enumerate(share)]

    def _ended(self, call: "asyncio.Task[list[TraceGroup]]") -> None:
        self._running.discard(call)
        if not self._running:
            self._idle_since = time.monotonic()
        if not call.cancelled() and (error := call.exception()) and not self._failed.done():
            self._failed.set_result(error)
