"""An endless stream of training steps: which problems are under way, where new weights enter and are seen to have taken effect, and what a
step's traces say."""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aipo_graph.errors import ConfigError, EngineError
from aipo_graph.rollout.collect import Draw, MakeGroups, Rollouts, has_signal, too_long
from aipo_graph.tasks.rewards import COUNTED
from aipo_graph.types import Trace, TraceGroup

# --- did a weight load take effect? The engine's logprobs of a fixed text are compared with the learner's

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest mean gap between two implementations of one model. In bfloat16 their roundings differ in every layer."""
MOVED = 1e-4
"""A learner's logprob that changed by more has changed."""


class SyncCheck:
    """Compares after each load, and with the load before: an engine that still says the very same has not taken new weights."""

    def __init__(self, dtype: str) -> None:
        self._tolerance = TOLERANCE[dtype]
        self._before: tuple[Sequence[float], tuple[float, ...]] | None = None

    def __call__(self, logprobs: Sequence[float], found: Sequence[float], version: int) -> dict[str, float]:
        """The mean and the largest gap of the learner's logprobs and those found, for the log. Raises EngineError if the engine does not
        sample with the learner's weights."""
        gaps = [abs(ours - theirs) for ours, theirs in zip(logprobs, found, strict=True)]
        mean, largest = sum(gaps) / len(gaps), max(gaps)
        if not mean <= self._tolerance:
            raise EngineError(
                f"weights {version} did not reach the engine: its logprobs of a probe text differ from the learner's by {mean:.2g} on "
                f"average (at most {self._tolerance:g}); restart the server with the policy's model and dtype, then run the same command"
            )
        if self._before is not None:
            old, answer = self._before
            moved = max(abs(a - b) for a, b in zip(logprobs, old, strict=True))
            if moved > MOVED and answer == tuple(found):
                raise EngineError(
                    f"weights {version} did not reach the engine: the learner's logprobs of a probe text moved by {moved:.2g}, the "
                    "engine's did not move at all; restart the server, then run the same command"
                )
        self._before = logprobs, tuple(found)
        return {"sync_gap": mean, "sync_gap_max": largest}


# --- the stream

MOST_TOO_LONG = 1000
"""Problems in a row whose prompts may fill the context."""


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
        rollouts: draw the problems; theirs is the engine.
        run_groups: makes the groups, theirs or other processes'.
    """

    def __init__(self, rollouts: Rollouts, run_groups: MakeGroups) -> None:
        self._rollouts, self._run_groups, self._engine = rollouts, run_groups, rollouts.engine
        self.metrics: dict[str, float] = {}
        """Of the step last given, and of the last load's probe."""
        self._config = config = rollouts.config
        # The local engine copies the tensors themselves: nothing to prove there.
        self._probe_ids = rollouts.probe_ids() if config.engine.kind != "local" else ()
        self._check = SyncCheck(config.policy.dtype)
        self._published: tuple[Iterable[tuple[str, Any]], int, Sequence[float]] | None = None
        self._version = 0
        self._under_way: deque[tuple[Draw, asyncio.Task[list[TraceGroup]], int]] = deque()
        """In order; each with the call that makes its group, and the group's place in what that returns."""
        self._running: set[asyncio.Task[list[TraceGroup]]] = set()
        self._idle_since = time.monotonic()
        self._idle = 0.0

    async def load_weights(self, learner: Any) -> None:
        """Publishes the weights of a learner, here or in a cluster: an engine that can takes them at once, another before it starts on the
        next step.

        What is not `local` says what it makes of a probe text afterwards; EngineError if the load took no effect.
        """
        weights = learner.adapter() if self._engine.takes == "adapter" else learner.weights()
        expected = await asyncio.to_thread(learner.logprobs, self._probe_ids) if self._probe_ids else ()
        self._published = (weights, learner.version, expected)
        if self._engine.in_flight:
            await self._take()
            if self._under_way:
                self._admit()

    async def _take(self) -> None:
        """Loads what was published, before the learner goes on to change it."""
        if self._published is not None:
            (weights, version, expected), self._published = self._published, None
            await self._engine.load_weights(weights, version)
            if expected:
                self.metrics |= self._check(expected, await self._engine.logprobs(self._probe_ids), version)
            self._version = version

    def whole(self, version: int) -> bool:
        """Whether nothing that is under way after this many steps would be sampled otherwise by a run that resumes there."""
        return self._engine.in_flight or not self._config.rollout.max_lag or version % self._config.run.checkpoint_every == 0

    async def steps(self, start: int, steps: int, drawn: int) -> AsyncGenerator[Step, None]:
        """Steps start … steps-1 in order, from training problem ``drawn`` on; the caller publishes weights after each.

        Raises the first error of any group under way.
        """
        self._start = self._number = start
        self._steps, self._cursor, self._started, self._passed = steps, drawn, 0, 0
        self._failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        in_flight = self._engine.in_flight
        lag = min(self._config.rollout.max_lag, 1) if in_flight else self._config.rollout.max_lag  # the window itself goes further
        ahead: deque[asyncio.Task[Step]] = deque()
        try:
            for number in range(start, steps):
                for later in range(number + len(ahead), min(number + lag + 1, steps)):
                    if ahead and not in_flight and self.whole(later):
                        break
                    if ahead:
                        await asyncio.wait({ahead[-1]})
                    await self._take()
                    self._number = later
                    ahead.append(asyncio.create_task(self._assemble()))
                step = await ahead.popleft()
                if not self._running:
                    await self._engine.sleep()
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
        rollout, in_flight = self._config.rollout, self._engine.in_flight
        if not in_flight and self._under_way:
            return
        until = min(self._version + rollout.max_lag + 1, self._steps) if in_flight else self._number + 1
        draws = []
        for _ in range((until - self._start) * rollout.problems + self._passed - self._started):
            draws.append(self._rollouts.draw(self._cursor))
            self._cursor = draws[-1].index + 1
        self._started += len(draws)
        for share in [[draw] for draw in draws] if in_flight else filter(None, [draws]):
            if not self._running:
                self._idle += time.monotonic() - self._idle_since
            call = asyncio.create_task(self._run_groups(share))
            self._running.add(call)
            call.add_done_callback(self._ended)
            self._under_way += [(draw, call, place) for place, draw in enumerate(share)]

    def _ended(self, call: "asyncio.Task[list[TraceGroup]]") -> None:
        self._running.discard(call)
        if not self._running:
            self._idle_since = time.monotonic()
        if not call.cancelled() and (error := call.exception()) and not self._failed.done():
            self._failed.set_result(error)


# --- what one step's traces say, as flat numbers for the log

ALARM = 0.1
"""Share of a step's traces that carry no gradient from which on a run warns."""


def rollout_metrics(
    groups: Sequence[TraceGroup],
    agents: Iterable[str],
    version: int,
    discarded: Sequence[TraceGroup] = (),
    too_long: Sequence[TraceGroup] = (),
) -> dict[str, float]:
    """Reward, solve rate, calls and tokens per agent, failures by reason, and lag, over one step's groups.

    Means are over trained traces; `failed` is the share of the others. `consults/<agent>` is per trace with agents. `lag` is the mean
    number of updates by which policy segments were sampled behind ``version``, `lag_max` the largest. Groups ``discarded`` for lack of
    signal count in `discarded` (their share of all that were sampled) and in the token counts alone, those of prompts ``too_long`` for
    the context in `prompts/too_long` (their number) and in the token counts. `rewrites`, per trace of a graph of messages: replies that
    could not go on from an earlier one's exact tokens; `calls/invalid`, of those too: tool calls that could not be read; `misfits`:
    replies that were not the call that the graph asked for.
    `score/<name>`: each other score of the reward functions.
    """
    everything = [trace for group in (*groups, *discarded, *too_long) for trace in group.traces]
    traces = [trace for group in groups for trace in group.traces]
    kept = [trace for trace in traces if trace.trained]
    alone = [trace for trace in kept if not trace.with_agents]
    helped = [trace for trace in kept if trace.with_agents]
    lags = [version - s.version for t in kept for s in t.segments if s.source == "policy"]
    metrics = {
        "reward": _mean(t.reward for t in kept),
        "reward/alone": _mean(t.reward for t in alone),
        "reward/with_agents": _mean(t.reward for t in helped),
        "solved": _mean(float(any(t.trained and t.solved for t in group.traces)) for group in groups),
        "violations": _mean(t.scores.get("violation", 0.0) for t in helped),
        "leaks": _mean(t.scores.get("leaks", 0.0) for t in helped),
        "failed": 1 - len(kept) / len(traces),
        "alarm": float(len(traces) - len(kept) >= ALARM * len(traces)),
        "length/alone": _mean(_tokens(t, "policy") for t in alone),
        "length/with_agents": _mean(_tokens(t, "policy") for t in helped),
        "tokens/policy": float(sum(_tokens(t, "policy") for t in everything)),
        "tokens/agent": float(sum(_tokens(t, "agent") for t in everything)),
        "lag": _mean(lags),
        "lag_max": float(max(lags, default=0)),
    }
    for name, score in (("rewrites", "rewrites"), ("calls/invalid", "invalid_calls"), ("misfits", "misfits")):
        if counts := [t.scores[score] for t in kept if score in t.scores]:
            metrics[name] = _mean(counts)
    for name in sorted({name for trace in kept for name in trace.scores} - {"reward", *COUNTED}):
        metrics[f"score/{name}"] = _mean(t.scores[name] for t in kept if name in t.scores)
    if discarded:
        metrics["discarded"] = len(discarded) / len((*groups, *discarded))
    if too_long:
        metrics["prompts/too_long"] = float(len(too_long))
    for agent in agents:
        metrics[f"consults/{agent}"] = _mean(sum(s.source == "agent" and s.author == agent for s in t.segments) for t in helped)
    for kind in sorted({group.problem.kind for group in groups if group.problem.kind}):
        metrics[f"reward/alone/{kind}"] = _mean(
            t.reward for g in groups if g.problem.kind == kind for t in g.traces if t.trained and not t.with_agents
        )
    for reason, count in Counter(_reason(t) for t in traces if t.status != "done").items():
        metrics[f"ended/{reason}"] = count / len(traces)
    return metrics


def exclusions(groups: Sequence[TraceGroup]) -> list[dict[str, Any]]:
    """Of each problem that lost traces: how many of how many, how many for which reason, and what the first of each said."""
    found = []
    for group in groups:
        if lost := [trace for trace in group.traces if not trace.trained]:
            reasons = dict(Counter(map(_reason, lost)))
            errors = {_reason(trace): (trace.error or "")[:300] for trace in reversed(lost)}
            found.append({"problem": group.problem.id, "lost": len(lost), "of": len(group.traces), "reasons": reasons, "errors": errors})
    return found


def _reason(trace: Trace) -> str:
    """How a trace ended, a failed one with the class of its error: `failed/AgentError`."""
    return f"failed/{(trace.error or '').partition(':')[0]}" if trace.status == "failed" else trace.status


def _tokens(trace: Trace, source: str) -> int:
    return sum(len(s.token_ids) for s in trace.segments if s.source == source)


def _mean(values: Iterable[float]) -> float:
    found = [value for value in values if math.isfinite(value)]
    return sum(found) / len(found) if found else float("nan")
