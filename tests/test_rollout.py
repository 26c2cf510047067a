"""Graph runs from end to end: real models in the real engine, real compiled graphs, and everything that can go wrong in one."""

import asyncio
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langgraph.graph import END, START, StateGraph
from rollout_world import NAMES, Exact, bpe, echo, run_step, sampling, settings, with_graph, world

from aipo_graph.engines.local import LocalEngine
from aipo_graph.errors import ConfigError, GraphError, TaskError, ToolError
from aipo_graph.learn.batch import pack
from aipo_graph.load import model
from aipo_graph.rollout import Agent, Context, State, agent_node, by_confidence, by_request, policy_node
from aipo_graph.rollout.collect import Rollouts, answer_text, gather, open_agents, open_graph
from aipo_graph.rollout.stream import Stream, rollout_metrics
from aipo_graph.tasks import operators
from aipo_graph.types import Problem, Segment, Trace, TraceGroup, derive_seed
from examples.operators import pretrain

PROBLEM = Problem("p", "what is p?", "1000")
ASK = "<verify>1=1</verify>"
SMALL: dict[str, Any] = {"rollout": {"prompts": "prompts/operators", "problems": 2, "traces": 4, "max_tokens": 60}}


def helpers(jitter: random.Random | None = None) -> list[Agent]:
    """The operator task's three helpers, slow by a random time if so asked."""

    def late(name: str, reply: Callable[[str], str]) -> Agent:
        async def tool(query: str) -> str:
            await asyncio.sleep(jitter.random() / 100 if jitter else 0)
            return reply(query)

        return Agent(name, tools=(tool,))

    rules = operators.RULES
    return [
        late("verify", operators.check),
        late("knowledge", lambda query: rules.get(query, "?")),
        late("reasoning", operators.plan),
    ]


def on_operators(jitter: random.Random | None = None, **sections: Any) -> Rollouts:
    """The quick start as its config names it: the shipped policy, prompts and graphs, with helpers that may be slow."""
    config = settings(**(SMALL | sections))
    rollouts = Rollouts.open(config, LocalEngine.load(config, model("operators")), operators.build(config))
    return replace(rollouts, agents={agent.name: agent for agent in helpers(jitter)}) if jitter else rollouts


async def test_a_step_of_the_operator_task() -> None:
    """Every token keeps its source, and groups are first helped, then alone."""
    rollouts = on_operators()
    groups = [group for step in range(2) for group in (await run_step(rollouts, step, 2 * step)).groups]
    assert [group.problem for group in groups] == [rollouts.task.train(index) for index in range(4)]
    assert all([trace.with_agents for trace in group.traces] == [True, True, False, False] for group in groups)
    consults = 0
    for trace in (trace for group in groups for trace in group.traces):
        assert trace.trained
        opening, *rest = trace.segments
        author = "policy" if trace.with_agents else "solo"
        assert (opening.source, opening.author, opening.text[5:]) == ("context", author, opening.text[5:8] + "?")
        asked = [s.author for s in rest if s.source == "agent"]
        assert asked == [node for node in trace.path if node in NAMES]
        assert {s.version for s in rest if s.source == "policy"} == {0}
        assert sum(len(s.token_ids) for s in rest if s.source == "policy") <= 60
        consults += len(asked)
        if not trace.with_agents:
            assert trace.path == ("policy",)
    assert consults >= 5
    metrics = rollout_metrics(groups, rollouts.agents, version=2)
    assert metrics["lag"] == 2
    assert metrics["failed"] == 0
    assert sum(metrics[f"consults/{name}"] for name in NAMES) == pytest.approx(consults / 8)


async def test_alone_the_policy_writes_its_own_feedback(root: Path) -> None:
    rollouts = world(root, lambda text: f"{ASK}<feedback>yes</feedback>\\boxed{{1000}}", helpers())
    trace = await rollouts.run_trace(PROBLEM, seed=0, with_agents=False)
    assert [s.source for s in trace.segments] == ["context", "policy"]
    assert (trace.reward, trace.status, trace.path) == (1.0, "done", ("policy",))


async def test_two_runs_are_identical_whatever_the_agents_delay() -> None:
    first = await run_step(on_operators(), 1, 2)
    second = await run_step(on_operators(random.Random(1)), 1, 2)
    third = await run_step(on_operators(random.Random(2)), 1, 2)
    assert first == second == third
    assert any(s.source == "agent" for group in first.groups for trace in group.traces for s in trace.segments)
    traces = [trace for group in first.groups for trace in group.traces]
    assert len({trace.seed for trace in traces}) == len(traces)


async def test_another_sample_step_or_seed_gives_another_trace() -> None:
    rollouts = replace(on_operators(), temperature=3.0)  # hot, so that no two agree by chance
    other = replace(rollouts, config=settings(**(SMALL | {"run": {"seed": 1, "device": "cpu"}})))
    problem = rollouts.task.train(0)
    groups = [await rollouts.run_group(problem, 0), await rollouts.run_group(problem, 1), await other.run_group(problem, 0)]
    assert len({trace.segments for group in groups for trace in group.traces}) == 12


class Few:
    """A task of two problems."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def train(self, index: int) -> Problem:
        return self._task.train(index % 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


async def test_a_problem_that_is_drawn_twice_for_a_step_is_sampled_anew() -> None:
    rollouts = on_operators(rollout=SMALL["rollout"] | {"problems": 5})
    rollouts = replace(rollouts, temperature=3.0, task=Few(rollouts.task))
    draws = [rollouts.draw(index) for index in range(7)]
    assert [draw.again for draw in draws] == [0, 0, 1, 1, 2, 0, 0]
    traces = [trace for group in await rollouts.run_groups(draws) for trace in group.traces]
    assert len({trace.seed for trace in traces}) == len({trace.segments for trace in traces}) == len(traces) == 28
    assert [trace.seed for trace in traces[:4]] == [derive_seed(0, 0, draws[0].problem.id, i) for i in range(4)]
    assert {trace.seed for trace in rollouts.lost_group(draws[2], "gone").traces} <= {trace.seed for trace in traces}


async def test_greedy_traces_of_one_problem_agree() -> None:
    greedy = replace(on_operators(), temperature=0.0)
    traces = await gather([greedy.run_trace(greedy.task.train(0), seed=seed, with_agents=False) for seed in range(3)])
    assert len({trace.segments for trace in traces}) == 1


class Scaler:
    """A learner that scales every weight, in a thread beside the sampling, and publishes without copying."""

    def __init__(self, engine: LocalEngine) -> None:
        self.version = 0
        self._weights = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}

    def step(self) -> None:
        for tensor in self._weights.values():
            tensor.mul_(1.25)
        self.version += 1

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self._weights.items()

    adapter = weights

    def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        raise AssertionError("the local engine is not probed")


async def consume(rollouts: Rollouts, steps: int) -> list[tuple[TraceGroup, ...]]:
    assert isinstance(rollouts.engine, LocalEngine)
    learner, stream, seen = Scaler(rollouts.engine), Stream(rollouts, rollouts.run_groups), []
    async for step in stream.steps(0, steps, 0):
        seen.append(step.groups)
        await asyncio.to_thread(learner.step)
        await stream.load_weights(learner)
    return seen


def versions(groups: tuple[TraceGroup, ...]) -> set[int]:
    return {s.version for group in groups for trace in group.traces for s in trace.segments if s.source == "policy"}


@pytest.mark.parametrize(("lag", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 3, 3]), (2, [0, 0, 0, 3, 3])])
async def test_streams_repeat_and_lag_as_told(lag: int, expected: list[int]) -> None:
    """As many steps ahead of the learner, but never across a checkpoint (here after 3 steps)."""
    sections = {
        "rollout": SMALL["rollout"] | {"max_lag": lag, "traces": 2, "max_tokens": 30},
        "run": {"device": "cpu", "checkpoint_every": 3},
    }
    first = await consume(on_operators(random.Random(1), **sections), 5)
    second = await consume(on_operators(random.Random(2), **sections), 5)
    assert [versions(groups) for groups in first] == [{version} for version in expected]
    assert first == second


async def test_groups_without_signal_make_way_for_new_problems(root: Path) -> None:
    """Problems 0 to 3 are solved by everybody, 4 by nobody: dynamic sampling goes on to where rewards differ, and counts its cost."""

    class Numbered(Exact):
        def train(self, index: int) -> Problem:
            return Problem(f"p{index}", f"{index}?", str(1000 + index))

    def write(text: str) -> str:
        helped, number = text.startswith("@"), int(text.strip("@").split("?")[0])
        right = number < 4 or (number > 4 and helped)
        return f"\\boxed{{{1000 + number if right else 0}}}"

    drawing = {"problems": 2, "traces": 2, "redraws": 5}
    rollouts = replace(world(root, write, helpers(), rollout=drawing), task=Numbered())
    rollouts = replace(rollouts, prompts=replace(rollouts.prompts, texts={"policy": "@{question}", "solo": "{question}"}))
    step = await run_step(rollouts, 0, 0)
    assert [group.problem.id for group in step.groups] == ["p5", "p6"]
    assert [group.problem.id for group in step.discarded] == ["p0", "p1", "p2", "p3", "p4"]
    assert step.drawn == 7
    metrics = rollout_metrics(step.groups, rollouts.agents, 0, step.discarded)
    assert metrics["discarded"] == 5 / 7
    assert metrics["tokens/policy"] > rollout_metrics(step.groups, rollouts.agents, 0)["tokens/policy"]
    last = await run_step(replace(rollouts, config=settings(rollout=drawing | {"redraws": 1})), 0, 0)
    assert [group.problem.id for group in last.groups] == ["p2", "p3"]  # the last round is kept as it is


async def test_questions_that_are_too_long_are_passed_over(root: Path) -> None:
    class Longer(Exact):
        def train(self, index: int) -> Problem:
            return Problem(f"p{index}", "1" * (2 + index % 3), "1")

    rollouts = replace(world(root, lambda text: "", helpers()), task=Longer())
    limited = replace(rollouts, config=settings(rollout={"problems": 3, "traces": 2}, task={"max_prompt_tokens": 3}))
    step = await run_step(limited, 0, 0)
    assert ([group.problem.id for group in step.groups], step.drawn) == (["p0", "p1", "p3"], 4)
    with pytest.raises(ConfigError, match="task.max_prompt_tokens = 1: each of 10000 problems in a row is longer; raise it"):
        await run_step(replace(rollouts, config=settings(task={"max_prompt_tokens": 1})), 0, 0)


async def test_leaving_a_stream_early_stops_the_step_ahead() -> None:
    rollouts = on_operators(rollout=SMALL["rollout"] | {"max_lag": 1})
    steps = Stream(rollouts, rollouts.run_groups).steps(0, 9, 0)
    await anext(steps)
    await steps.aclose()
    assert len(asyncio.all_tasks()) <= 2  # this test and at most the engine's loop, which has nothing left to do


# --- how a trace ends ------------------------------------------------------------------------------------------------------------


class Faulty(Exact):
    async def reward(self) -> float:  # type: ignore[override]
        raise TaskError("the grader's workers are gone")


def asks(text: str) -> str:
    """A policy that asks twice and then answers."""
    return ASK if text.count("<feedback>") < 2 else "\\boxed{1000}"


def failing(error: Exception) -> list[Agent]:
    def reply(query: str) -> str:
        raise error

    return [echo("verify", reply), *helpers()[1:]]


def hanging(timeout: float) -> list[Agent]:
    async def tool(query: str) -> str:
        await asyncio.sleep(3600)
        return ""

    return [Agent("verify", tools=(tool,), timeout=timeout, backoff=0.001), *helpers()[1:]]


async def ended(rollouts: Rollouts, with_agents: bool = True) -> tuple[Trace, dict[str, float]]:
    trace = await rollouts.run_trace(PROBLEM, seed=0, with_agents=with_agents)
    alone = await world(Path(), lambda text: "\\boxed{1000}", helpers()).run_trace(PROBLEM, seed=1, with_agents=False)
    group = TraceGroup(PROBLEM, (trace, alone))
    batch = pack([group], rollouts.config.loss)
    assert len(batch) == 1 + trace.trained  # an untrained trace has no row, so no gradient
    return trace, rollout_metrics([group], rollouts.agents, 0)


async def test_an_agents_fault(root: Path) -> None:
    trace, metrics = await ended(world(root, asks, failing(RuntimeError("no disk\ud83d"))))
    assert (trace.status, trace.trained, dict(trace.scores)) == ("failed", False, {})
    assert trace.error == "AgentError: agent 'verify': RuntimeError: no disk?"  # half a character cannot be logged
    assert [s.text for s in trace.segments] == ["what is p?", ASK]
    assert (metrics["failed"], metrics["ended/failed/AgentError"]) == (0.5, 0.5)


def test_a_reward_of_one_but_for_float_noise_is_solved() -> None:
    noisy, less = (Trace("p", 0, False, (), (), scores={"reward": reward}) for reward in (sum([0.1] * 10), 0.9999))
    assert noisy.reward < 1
    assert (noisy.solved, less.solved, replace(noisy, scores={}).solved) == (True, False, False)


async def test_a_tools_refusal_is_an_answer(root: Path) -> None:
    trace, metrics = await ended(world(root, asks, failing(ToolError("yes"))))
    assert (trace.status, trace.reward, metrics["consults/verify"]) == ("done", 1.0, 2.0)


async def test_an_agents_time_out(root: Path) -> None:
    trace, metrics = await ended(world(root, asks, hanging(timeout=0.05)))
    assert (trace.status, len(trace.segments)) == ("failed", 2)
    assert trace.error == "AgentError: agent 'verify': no answer in time (agents.timeout = 0.05 s for all tries)"
    assert metrics["ended/failed/AgentError"] == 0.5


async def test_the_traces_time_out(root: Path) -> None:
    trace, metrics = await ended(world(root, asks, hanging(timeout=600), rollout={"timeout": 0.3}))
    assert (trace.status, trace.trained, trace.error) == ("timeout", False, "more than 0.3 s (rollout.timeout)")
    assert [s.text for s in trace.segments] == ["what is p?", ASK]
    assert (metrics["failed"], metrics["ended/timeout"]) == (0.5, 0.5)


async def test_a_context_that_overflows_in_mid_trace(tmp_path: Path) -> None:
    """A reply fills the model's context: the engine refuses, what was sampled stays."""
    agents = [echo(name, lambda query: "1234" * 30) for name in NAMES]
    rollouts = sampling(tmp_path, pretrain.tokenizer(), agents, context=64, rollout={"max_tokens": 500})
    traces = await gather([rollouts.run_trace(PROBLEM, seed=seed, with_agents=True) for seed in range(12)])
    over = [trace for trace in traces if trace.error]
    assert over
    for trace in over:
        assert trace.error is not None
        assert trace.error.startswith("ContextError: the prompt has ")
        assert (trace.status, trace.trained, trace.reward) == ("length", True, 0.0)  # or overflow were a way out of the batch
        assert any(s.source == "policy" for s in trace.segments)


async def test_a_graders_fault_gives_no_score(root: Path) -> None:
    trace, metrics = await ended(replace(world(root, asks, helpers()), task=Faulty()))
    assert (trace.status, trace.trained, dict(trace.scores)) == ("failed", False, {})
    assert trace.error == "TaskError: the grader's workers are gone"
    assert len(trace.segments) == 10
    assert metrics["ended/failed/TaskError"] == 0.5


@dataclass
class Says(Exact):
    """A task that says this of each trace."""

    scores: Any = None

    def reward(self) -> Any:  # type: ignore[override]
        return self.scores() if callable(self.scores) else self.scores


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1.0), (True, 1.0), (-0.5, -0.5), (Decimal("0.25"), 0.25), (Fraction(1, 3), 1 / 3), (np.float32(0.5), 0.5),
        (np.bool_(False), 0.0), (np.array([2.0]), 2.0), (torch.tensor(0.5, requires_grad=True), 0.5), (torch.tensor([3]), 3.0),
    ],
)  # fmt: skip
async def test_scores_are_numbers_of_any_library(root: Path, given: Any, expected: float) -> None:
    trace, _ = await ended(replace(world(root, asks, helpers()), task=Says({"reward": given, "style": given, "odd": math.nan})))
    assert {name: type(value) for name, value in trace.scores.items()} == dict.fromkeys(trace.scores, float)
    assert (trace.reward, trace.scores["style"], trace.trained) == (expected, expected, True)  # a side score without a value costs nothing
    assert math.isnan(trace.scores["odd"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "returned None, which is no number; return a number, or a mapping"),
        ("yes", "returned 'yes', which is no number; return a number, or a mapping"),
        ([("reward", 1.0)], r"returned \[\('reward', 1.0\)\], which is no number; return a number, or a mapping"),
        ({}, r"gave no 'reward', only \[\]"),
        ({"accuracy": 1.0}, r"gave no 'reward', only \['accuracy'\]"),
        ({"reward": None}, "gave reward = None, which is no number"),
        ({"reward": "1.0"}, "gave reward = '1.0', which is no number"),
        ({"reward": np.str_("1")}, "gave reward = .*, which is no number"),
        ({"reward": np.array(["1"])}, "gave reward = .*, which is no number"),
        ({"reward": 1j}, "gave reward = 1j, which is no number"),
        ({"reward": 10**400}, "gave reward = 1000.*, which is no number"),
        ({"reward": [1.0]}, r"gave reward = \[1.0\], which is no number"),
        ({"reward": torch.zeros(2, 2)}, "gave reward = tensor.*, which is no number"),
        ({"reward": 1.0, "style": None}, "gave style = None, which is no number"),
        ({"reward": 1.0, 3: 1.0}, "gave a score named 3; name it by a text"),
        ({"reward": 1.0, "leaks": 1.0}, "gave a score named 'leaks'; name it by a text other than leaks"),
    ],
)  # fmt: skip
async def test_what_is_no_score_is_one_line_that_names_it(root: Path, given: Any, said: str) -> None:
    rollouts = replace(world(root, asks, helpers(), task={"name": "mine.py:build"}), task=Says(given))
    with pytest.raises(ConfigError, match=rf"^reward\(\) of task mine\.py:build, problem 'p': {said}") as caught:
        await rollouts.run_trace(PROBLEM, seed=0, with_agents=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


async def test_a_reward_of_nan_is_dropped_and_counted_and_in_no_average(root: Path) -> None:
    found = iter([math.nan, 1.0, 0.0])
    rollouts = replace(world(root, asks, helpers()), task=Says(lambda: {"reward": next(found)}))
    group = TraceGroup(PROBLEM, tuple([await rollouts.run_trace(PROBLEM, seed=seed, with_agents=True) for seed in range(3)]))
    assert len(pack([group], rollouts.config.loss)) == 2
    assert group.traces[0].error == "TaskError: reward() of task operators, problem 'p': the reward is nan"
    assert rollout_metrics([group], rollouts.agents, 0)["reward"] == 0.5


@pytest.mark.parametrize(
    ("rewards", "redrawn"),
    [([0.1 + 0.2, 0.3], True), ([math.nan, 0.3], True), ([0.3, 0.4], False), ([math.nan, math.nan], False)],
)
async def test_a_group_without_signal_is_drawn_again(root: Path, rewards: list[float], redrawn: bool) -> None:
    found = itertools.cycle(rewards)
    rollouts = world(root, asks, helpers(), rollout={"problems": 1, "traces": 2, "redraws": 1})
    step = await run_step(replace(rollouts, task=Says(lambda: {"reward": next(found)})), 0, 0)
    assert len(step.discarded) == redrawn


@pytest.mark.parametrize(
    ("sections", "status", "error", "sources"),
    [
        ({"rollout": {"max_supersteps": 4}}, "budget", "more than 4 supersteps", "cpcacpcac"),
        ({"rollout": {"max_consults": 1}}, "budget", None, "cpcacp"),
        ({"rollout": {"max_consults": 0}}, "budget", None, "cp"),
        ({"rollout": {"max_tokens": 7}}, "length", None, "cpcacp"),
        ({"rollout": {"max_tokens": 3}}, "length", None, "cp"),
    ],
)
async def test_budgets_are_the_policys_own_doing(root: Path, sections: Any, status: str, error: str | None, sources: str) -> None:
    trace, metrics = await ended(world(root, asks, helpers(), **sections))
    assert (trace.status, trace.error, trace.trained, trace.reward) == (status, error, True, 0.0)
    assert "".join(s.source[0] for s in trace.segments) == sources
    assert (metrics["failed"], metrics[f"ended/{status}"]) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("leak", "status", "masked"), [("mask", "done", [True, True]), ("allow", "done", [False, False]), ("drop", "leaked", [])]
)
async def test_a_reply_that_gives_the_answer_away(root: Path, leak: str, status: str, masked: list[bool]) -> None:
    replies = iter(["it is 1000", "right, 1000"] * 2)
    agents = [echo("verify", lambda query: next(replies)), *helpers()[1:]]
    trace, metrics = await ended(world(root, asks, agents, bpe(), agents={"leak": leak}))
    assert (trace.status, trace.trained, trace.scores["leaks"]) == (status, leak != "drop", 2.0)
    if leak == "drop":
        assert (trace.error, metrics["ended/leaked"], metrics["failed"]) == ("a reply gave the answer away", 0.5, 0.5)
    else:
        assert [s.masked for s in trace.segments if s.source == "agent"] == masked
        assert metrics["leaks"] == 2.0
    assert not any(s.masked for s in trace.segments if s.source != "agent")


async def test_every_trace_of_a_group_failing_is_still_a_group(root: Path) -> None:
    rollouts = world(root, asks, failing(RuntimeError("down")), rollout={"with_agents": 1, "traces": 4})
    group = await rollouts.run_group(PROBLEM, 0)
    metrics = rollout_metrics([group], rollouts.agents, 0)
    assert metrics["failed"] == metrics["ended/failed/AgentError"] == 1.0
    assert metrics["solved"] == 0.0
    assert len(pack([group], rollouts.config.loss)) == 0


# --- routes and graphs ----------------------------------------------------------------------------------------------------------


def offering(threshold: float, tokens: int) -> Any:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy_node(segment_tokens=tokens))
    for name in NAMES:
        graph.add_node(name, agent_node(name))
        graph.add_edge(name, "policy")
    graph.add_edge(START, "policy")
    graph.add_conditional_edges("policy", by_confidence(threshold, "reasoning"), ["policy", *NAMES, END])
    return graph.compile()


def mean(segment: Segment) -> float:
    return sum(segment.logprobs or ()) / len(segment.token_ids)


async def test_a_consult_is_offered_exactly_where_the_policy_is_stuck(tmp_path: Path) -> None:
    """A random model is near uniform: about half of what it writes is below a threshold of one over the vocabulary."""
    tokenizer = pretrain.tokenizer()
    threshold = -math.log(len(tokenizer))
    rollouts = sampling(tmp_path, tokenizer, helpers(), rollout={"max_tokens": 60, "max_consults": 100})
    offered = with_graph(rollouts, offering(threshold, tokens=3))
    traces = await gather([offered.run_trace(PROBLEM, seed=seed, with_agents=True) for seed in range(16)])
    counts = {True: 0, False: 0}
    for trace in traces:
        written = ""
        for segment, after in pairwise(trace.segments):
            written = written + segment.text if segment.source == "policy" else ""
            if segment.source == "policy" and not any(f"</{name}>" in written for name in NAMES):
                stuck = mean(segment) < threshold
                assert (after.text == "<feedback>") == stuck
                counts[stuck] += 1
        assert [s.author for s in trace.segments if s.source == "agent"] == [node for node in trace.path if node in NAMES]
    assert min(counts.values()) >= 10


async def test_an_offer_stays_within_the_budget_of_consults() -> None:
    rollouts = on_operators(rollout=SMALL["rollout"] | {"max_tokens": 40, "max_consults": 2})
    stuck = with_graph(rollouts, offering(0.0, tokens=4))
    trace = await stuck.run_trace(rollouts.task.train(0), seed=3, with_agents=True)
    assert sum(s.source == "agent" for s in trace.segments) <= 2


async def test_an_offered_consult_is_asked_what_the_policy_just_wrote(root: Path) -> None:
    queries: list[str] = []
    agents = [echo(name, lambda query: queries.append(query) or "go on") for name in NAMES]  # type: ignore[func-returns-value]
    rollouts = with_graph(world(root, lambda text: "1234567", agents), offering(-0.1, tokens=4))
    await rollouts.run_trace(PROBLEM, seed=0, with_agents=True)
    assert queries[0] == "1234"


async def test_a_route_before_any_policy_is_a_bug_of_the_graph(root: Path) -> None:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("verify", agent_node("verify"))
    graph.add_edge(START, "verify")
    graph.add_conditional_edges("verify", by_request, [END])
    rollouts = with_graph(world(root, asks, helpers()), graph.compile())
    with pytest.raises(GraphError, match="ran before any policy node"):
        await rollouts.run_trace(PROBLEM, seed=0, with_agents=True)


async def test_a_node_for_an_agent_that_nobody_named(root: Path) -> None:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy_node())
    graph.add_node("search", agent_node("search"))
    graph.add_edge(START, "policy")
    graph.add_edge("policy", "search")
    rollouts = with_graph(world(root, asks, helpers()), graph.compile())
    with pytest.raises(ConfigError, match="a node for agent 'search', but agents.use names only verify, knowledge, reasoning"):
        await rollouts.run_trace(PROBLEM, seed=0, with_agents=True)


def test_what_open_graph_and_open_agents_refuse(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def build(): return 4\ndef agent(config): return 'me'\n")
    with pytest.raises(ConfigError, match=r"mine\.py:build: a int is not a LangGraph graph"):
        open_graph(f"{tmp_path}/mine.py:build")
    with pytest.raises(ConfigError, match=r"agents\.use\.verify: .*mine\.py:agent returned a str, not an Agent"):
        open_agents({"verify": f"{tmp_path}/mine.py:agent"}, settings())


async def test_the_shipped_policy_solves_with_helpers_what_it_cannot_alone() -> None:
    rollouts = on_operators(rollout={"prompts": "prompts/operators"})
    problems = rollouts.task.heldout(8)
    seeds = [(problem, derive_seed(problem.id)) for problem in problems]
    traces = await gather([rollouts.run_trace(p, seed=seed, with_agents=helped) for helped in (True, False) for p, seed in seeds])
    helped, alone = traces[:8], traces[8:]
    assert all(trace.trained for trace in traces)
    assert sum(trace.reward for trace in helped) >= 3 > sum(trace.reward for trace in alone)
    assert {s.author for trace in helped for s in trace.segments if s.source == "agent"} == set(NAMES)


async def test_a_problem_whose_prompt_fills_the_context_makes_way(tmp_path: Path) -> None:
    """Every third problem is too long: passed over and counted at each step, not failed; where none fits, one line says so."""

    class Long(Exact):
        every = 3

        def train(self, index: int) -> Problem:
            return Problem(f"p{index}", "1+1?" * (1 if index % self.every else 40), "2")

    drawing = {"problems": 4, "traces": 2, "max_tokens": 8}
    rollouts = replace(sampling(tmp_path, pretrain.tokenizer(), (), context=64, rollout=drawing), task=Long())
    step = await run_step(rollouts, 0, 0)
    assert [group.problem.id for group in step.groups] == ["p1", "p2", "p4", "p5"]
    assert [group.problem.id for group in step.too_long] == ["p0", "p3"]
    assert step.drawn == 6
    metrics = rollout_metrics(step.groups, (), 0, step.discarded, step.too_long)
    assert (metrics["prompts/too_long"], metrics["failed"]) == (2, 0)
    assert (await run_step(rollouts, 1, step.drawn)).groups[0].problem.id == "p7"
    Long.every = 1
    with pytest.raises(ConfigError, match=r"the prompt has 1\d\d tokens, .* none fits"):
        await run_step(replace(rollouts), 2, 0)


@pytest.mark.parametrize(
    ("prompt", "text", "said"),
    [
        ("q", "6*7 is 42", "6*7 is 42"),
        ("q", "<think>perhaps 42, but", ""),
        ("q", "<think>perhaps 42</think>I cannot say", "I cannot say"),
        ("q", "<think>no</think>42</think>", ""),
        ("q<think>\n", "perhaps 42", ""),
        ("q<think>\n", "no</think>42", "42"),
        ("q<think></think>\n", "42", "42"),
        ("q", "[THINK]41[/THINK]42", "42"),
        ("q[THINK]", "42", ""),
        ("q", "<|channel|>analysis<|message|>41<|end|><|channel|>final<|message|>42", "<|channel|>final<|message|>42"),
        ("q", "41</s>42", "41"),
        ("q", "<think>no</s></think>42", ""),
    ],
)
def test_an_answer_counts_after_the_reasoning_and_before_the_end_of_the_turn(prompt: str, text: str, said: str) -> None:
    segments = (Segment("context", "policy", (1,), prompt), Segment("policy", "policy", (2,), text, logprobs=(-1.0,), version=0))
    assert answer_text(segments, ["</s>"]) == said


def test_a_thought_that_a_consult_broke_off_goes_on_after_it() -> None:
    def policy(text: str) -> Segment:
        return Segment("policy", "policy", (2,), text, logprobs=(-1.0,), version=0)

    begun = (Segment("context", "policy", (1,), "q"), policy("<think>hm <verify>1</verify>"), Segment("agent", "verify", (3,), "yes"))
    assert answer_text((*begun, policy("so 42"))) == ""
    assert answer_text((*begun, policy("so</think>42"))) == "42"
