"""The window of draws under way, over random times, discards and ends: how old a token may be, in which order steps come."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from rollout_world import Scribe, settings

from aipo_graph.config import Config
from aipo_graph.errors import GraphError
from aipo_graph.learn.batch import pack
from aipo_graph.rollout.collect import Draw
from aipo_graph.rollout.stream import Step, Stream, rollout_metrics
from aipo_graph.types import Problem, Segment, Trace, TraceGroup
from examples.operators import pretrain

RAW = pretrain.tokenizer()
Ending = Callable[[int], str]


@dataclass
class Source:
    """Groups that take a random number of event-loop turns, each token under the weights of its own moment. ``ending`` says of each problem
    whether it has a signal."""

    config: Config
    engine: Scribe
    rng: random.Random
    ending: Ending
    begun: list[int] = field(default_factory=list)

    def draw(self, cursor: int) -> Draw:
        index = cursor + (cursor % 3 == 1)  # some problems are passed over
        return Draw(index, Problem(str(index), "?", "!"))

    async def run_groups(self, draws: Sequence[Draw]) -> list[TraceGroup]:
        self.begun += [draw.index for draw in draws]
        return [await self._group(draw) for draw in draws]

    async def _group(self, draw: Draw) -> TraceGroup:
        for _ in range(int(self.rng.lognormvariate(1, 1.5))):
            await asyncio.sleep(0)
        ending, traces = self.ending(draw.index), []
        for number in range(2):
            prompt = Segment("context", "policy", (1,), "?")
            sampled = Segment("policy", "policy", (2, 3), "!", logprobs=(-1.0, -1.0), version=self.engine.version)
            scores, failed = {"reward": float(number * (ending == "signal"))}, ending == "long"
            error = "ContextError: the prompt has 9 tokens" if failed else None
            traces.append(Trace(draw.problem.id, 0, False, (prompt, sampled), (), "failed" if failed else "done", scores, error))
        return TraceGroup(draw.problem, tuple(traces))

    def probe_ids(self) -> tuple[int, ...]:
        return ()


@dataclass
class Counter:
    """A learner of a random number of event-loop turns."""

    rng: random.Random
    version: int = 0

    async def step(self) -> None:
        for _ in range(int(self.rng.lognormvariate(1, 1.5))):
            await asyncio.sleep(0)
        self.version += 1

    def weights(self) -> Iterable[tuple[str, object]]:
        return ()

    adapter = weights

    def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        return ()


async def consume(seed: int, ending: Ending, *, start: int = 0, steps: int, drawn: int = 0, in_flight: bool, **rollout: int) -> list[Step]:
    """What a learner sees of a stream, each step packed under the bound; a minute without an end is a deadlock."""
    rng = random.Random(seed)
    config = settings(rollout={"traces": 2, **rollout}, run={"device": "cpu", "checkpoint_every": 3})
    engine = Scribe(RAW, lambda text: "", version=start, in_flight=in_flight)
    source, learner = Source(config, engine, rng, ending), Counter(rng, start)
    stream, seen, passed = Stream(source, source.run_groups), [], 0
    async with asyncio.timeout(60):
        await stream.load_weights(learner)
        async for step in stream.steps(start, start + steps, drawn):
            seen.append(step)
            passed += len(step.discarded) + len(step.too_long)
            room = min(learner.version - start + 1 + config.rollout.max_lag, steps) * config.rollout.problems + passed
            assert len(source.begun) <= room + sum(ending(index) != "signal" for index in source.begun if index >= step.drawn)
            pack(step.groups, config.loss, learner.version - config.rollout.max_lag)
            metrics = rollout_metrics(step.groups, (), learner.version, step.discarded, step.too_long)
            assert metrics["lag"] <= metrics["lag_max"] <= config.rollout.max_lag
            assert stream.metrics["ahead"] <= config.rollout.max_lag * config.rollout.problems + passed
            await learner.step()
            await stream.load_weights(learner)
    return seen


def learned(steps: Iterable[Step]) -> list[int]:
    return [int(group.problem.id) for step in steps for group in step.groups]


def random_endings(seed: int, share: float) -> Ending:
    return lambda index: random.Random(f"{seed} {index}").choices(["signal", "equal", "long"], [1 - share, share / 2, share / 2])[0]


@given(
    seed=st.integers(0, 10**6),
    lag=st.sampled_from([0, 1, 2, 4]),
    problems=st.integers(1, 5),
    steps=st.integers(1, 8),
    redraws=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.3, 0.8]),
)
@examples(max_examples=30, deadline=None)
def test_tokens_are_no_older_than_the_bound_and_steps_come_in_order(
    seed: int, lag: int, problems: int, steps: int, redraws: int, share: float
) -> None:
    """And each draw is learned from, or passed over, once: none is skipped, none comes twice, wherever the run is resumed."""
    ending = random_endings(seed, share)
    drawing = {"max_lag": lag, "problems": problems, "redraws": redraws}
    whole = asyncio.run(consume(seed, ending, steps=steps, in_flight=True, **drawing))
    assert [len(step.groups) for step in whole] == [problems] * steps
    order = learned(whole)
    passed = sorted(int(group.problem.id) for step in whole for group in (*step.discarded, *step.too_long))
    assert order == sorted(order)
    assert sorted(order + passed) == [index for index in range(whole[-1].drawn) if index % 3 != 1]
    assert all(ending(index) != "signal" for index in passed)
    assert all(len(step.discarded) <= redraws * problems for step in whole)
    if cut := seed % steps:
        rest = asyncio.run(consume(seed + 1, ending, start=cut, steps=steps - cut, drawn=whole[cut - 1].drawn, in_flight=True, **drawing))
        assert learned(rest) == learned(whole[cut:])


@pytest.mark.parametrize("lag", [0, 1, 4])
@given(seed=st.integers(0, 10**6), problems=st.integers(1, 4), steps=st.integers(1, 8), redraws=st.integers(0, 2))
@examples(max_examples=10, deadline=None)
def test_an_engine_that_loads_between_steps_samples_each_step_under_one_version(
    lag: int, seed: int, problems: int, steps: int, redraws: int
) -> None:
    drawing = {"max_lag": lag, "problems": problems, "redraws": redraws}
    seen = asyncio.run(consume(seed, random_endings(seed, 0.4), steps=steps, in_flight=False, **drawing))
    for number, step in enumerate(seen):
        expected = max(number - lag, number - number % 3)  # not across a checkpoint
        groups = (*step.groups, *step.discarded, *step.too_long)
        assert {s.version for group in groups for trace in group.traces for s in trace.segments if s.source == "policy"} == {expected}


def test_a_full_pipeline_sits_at_the_bound_and_says_who_waits() -> None:
    """Sampling that is far faster than the learner is as old as it may be."""
    seen = asyncio.run(consume(0, lambda index: "signal", steps=9, in_flight=True, max_lag=2, problems=2))
    ages = [number - s.version for number, step in enumerate(seen) for g in step.groups for t in g.traces for s in t.segments[1:]]
    assert max(ages) == 2


def test_a_token_past_the_bound_is_refused() -> None:
    sampled = Segment("policy", "policy", (2, 3), "!", logprobs=(-1.0, -1.0), version=4)
    group = TraceGroup(Problem("p", "", ""), (Trace("p", 0, False, (sampled,), (), scores={"reward": 1.0}),) * 2)
    loss = settings().loss
    assert len(pack([group], loss, 4)) == 2
    with pytest.raises(GraphError, match="a policy token of weights 4 in a batch that takes none before 5"):
        pack([group], loss, 5)


async def test_an_error_ends_what_is_under_way_at_once() -> None:
    """Also where the group that fails is not the next one."""

    class Failing(Source):
        async def _group(self, draw: Draw) -> TraceGroup:
            if draw.index == 3:
                raise GraphError("a bug in a graph")
            return await asyncio.Event().wait()  # type: ignore[return-value]

    engine = Scribe(RAW, lambda text: "", in_flight=True)
    config = settings(rollout={"problems": 4, "max_lag": 1})
    source = Failing(config, engine, random.Random(0), lambda index: "signal")
    with pytest.raises(GraphError, match="a bug in a graph"):
        await anext(Stream(source, source.run_groups).steps(0, 3, 0))
    assert len(asyncio.all_tasks()) == 1
