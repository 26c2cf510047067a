"""A graph that loses, edits or invents tokens is stopped with a clear line; retries and fan-out are not mistaken for that."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Overwrite, RetryPolicy
from rollout_world import sampling, with_graph

from aipo_graph.errors import AgentError, ConfigError, GraphError
from aipo_graph.evaluation.samples import Part
from aipo_graph.rollout import Agent, Context, State, append, policy_node
from aipo_graph.rollout.collect import Graph, Rollouts, gather
from aipo_graph.types import Problem, Request, Segment, Trace
from aipo_graph.workers import _check_context
from examples.operators import pretrain

Node = Callable[[State, Runtime[Context]], Awaitable[Any]]
PROBLEM = Problem("p", "@1234ABC?", "1234")
write = policy_node()


@pytest.fixture
def rollouts(tmp_path: Path) -> Rollouts:
    return sampling(tmp_path, pretrain.tokenizer(), [], rollout={"max_tokens": 12})


def chain(*nodes: Node, retry: RetryPolicy | None = None) -> Graph:
    graph = StateGraph(State, context_schema=Context)
    names = [f"node{index}" for index in range(len(nodes))]
    for name, node in zip(names, nodes, strict=True):
        graph.add_node(name, node, retry_policy=retry)
    for edge in zip([START, *names], [*names, END], strict=True):
        graph.add_edge(*edge)
    return graph.compile()


async def run(rollouts: Rollouts, graph: Graph, seed: int = 1) -> Trace:
    return await with_graph(rollouts, graph).run_trace(PROBLEM, seed=seed, with_agents=True)


def changed(change: Callable[[Segment, Segment], Any]) -> Node:
    """A node that samples as it should and then returns something else."""

    async def node(state: State, runtime: Runtime[Context]) -> Any:
        opening, sampled = (await write(state, runtime))["segments"]
        return change(opening, sampled)

    return node


async def forgetful(state: State, runtime: Runtime[Context]) -> Any:
    """Samples from a shorter prompt than the one that it continues."""
    ids = state["segments"][0].token_ids
    completion = await runtime.context.generate(ids, seed=3, max_tokens=4)
    return append(Segment("policy", "node1", completion.token_ids, "", logprobs=completion.logprobs, version=completion.version))


async def best_of_two(state: State, runtime: Runtime[Context]) -> Any:
    opening, first = (await write(state, runtime))["segments"]
    completion = await runtime.context.generate(opening.token_ids, seed=77, max_tokens=12)
    second = replace(first, token_ids=completion.token_ids, logprobs=completion.logprobs)
    return append(opening, max(first, second, key=lambda s: sum(s.logprobs or ()) / len(s.token_ids)))


async def rewrite(state: State, runtime: Runtime[Context]) -> Any:
    opening, sampled = state["segments"]
    return {"segments": Overwrite((replace(opening, token_ids=opening.token_ids[1:]), sampled))}


async def inventive(state: State, runtime: Runtime[Context]) -> Any:
    return append(Segment("policy", "node0", (5, 6), "", logprobs=(-0.1, -0.1), version=0))


LOST = "1 of . completions were sampled but are not in the trace .*: a node must return append"
EDITED = r"policy segment of node '\w+' \(thread 'main', \d+ tokens\) is not what the engine sampled: a node changed its tokens or logprobs"
MOVED = r"policy segment of node '\w+' \(thread '\w+', \d+ tokens\) does not follow the prompt it was sampled from: a node edited"
NOTHING = r"node 'node0' returned nothing that the state knows: return append\(segment"
FAULTS: dict[str, tuple[tuple[Node, ...], str]] = {
    "drops": ((changed(lambda opening, sampled: append(opening)),), LOST),
    "twice": ((changed(lambda opening, sampled: append(opening, sampled, sampled)),), "or appended it twice"),
    "ids": ((changed(lambda o, s: append(o, replace(s, token_ids=(0,) * len(s.token_ids)))),), EDITED),
    "logprobs": ((changed(lambda o, s: append(o, replace(s, logprobs=(-0.5,) * len(s.token_ids)))),), EDITED),
    "cut": ((changed(lambda o, s: append(o, replace(s, token_ids=s.token_ids[:-1], logprobs=s.logprobs[:-1]))),), EDITED),
    "version": ((changed(lambda o, s: append(o, replace(s, version=7))),), EDITED),
    "order": ((changed(lambda opening, sampled: append(sampled, opening)),), MOVED),
    "prompt": ((changed(lambda opening, sampled: append(sampled)),), MOVED),
    "thread": ((changed(lambda o, s: append(o, replace(s, thread="critic"))),), MOVED),
    "relabelled": ((changed(lambda o, s: append(o, Segment("agent", "node0", s.token_ids, s.text))),), LOST),
    "forgets": ((write, forgetful), MOVED),
    "best of two": ((best_of_two,), LOST),
    "rewrites history": ((write, rewrite), MOVED),
    "invents": ((inventive,), EDITED),
    "unknown key": ((changed(lambda opening, sampled: {"segmentz": (opening, sampled)}),), NOTHING),
    "none": ((changed(lambda opening, sampled: None),), NOTHING),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_graph_that_tampers_is_named(rollouts: Rollouts, fault: str) -> None:
    nodes, message = FAULTS[fault]
    rollouts = replace(rollouts, config=rollouts.config.model_copy(update={"rollout": rollouts.config.rollout}))
    graph = chain(*(policy_node(segment_tokens=4) if node is write and len(nodes) > 1 else node for node in nodes))
    with pytest.raises(GraphError, match=message):
        await run(rollouts, graph)


async def test_a_graph_that_does_not_passes(rollouts: Rollouts) -> None:
    trace = await run(rollouts, chain(policy_node(segment_tokens=4), policy_node(segment_tokens=4), policy_node()))
    sampled = [s for s in trace.segments if s.source == "policy"]
    assert [len(s.token_ids) for s in sampled][:2] == [4, 4]
    assert trace.path == ("node0", "node1", "node2")


async def test_one_bad_graph_ends_the_whole_group(rollouts: Rollouts) -> None:
    bad = with_graph(rollouts, chain(changed(lambda opening, sampled: append(opening))))
    with pytest.raises(GraphError, match="completions were sampled"):
        await bad.run_group(PROBLEM, step=0)


async def test_a_retried_node_may_lose_its_first_completion(rollouts: Rollouts) -> None:
    attempts = []

    async def flaky(state: State, runtime: Runtime[Context]) -> Any:
        update = await write(state, runtime)
        attempts.append(update["segments"][-1].token_ids)
        if len(attempts) < 3:
            raise ConnectionError("after sampling")
        return update

    retry = RetryPolicy(max_attempts=3, initial_interval=0.001, retry_on=(ConnectionError,))
    trace = await run(rollouts, chain(flaky, retry=retry))
    assert trace.status in ("done", "length")
    assert [s.token_ids for s in trace.segments if s.source == "policy"] == attempts[-1:]
    assert attempts[0] == attempts[2]  # the seed is the state's, so a retry samples the same again


async def test_a_retry_that_loses_its_last_completion_is_named(rollouts: Rollouts) -> None:
    attempts = []

    async def flaky(state: State, runtime: Runtime[Context]) -> Any:
        opening, _ = (await write(state, runtime))["segments"]
        attempts.append(1)
        if len(attempts) < 2:
            raise ConnectionError("after sampling")
        return append(opening)

    with pytest.raises(GraphError, match="1 of 2 completions"):
        await run(rollouts, chain(flaky, retry=RetryPolicy(initial_interval=0.001, retry_on=(ConnectionError,))))


def fan_out(*nodes: Node) -> Graph:
    graph = StateGraph(State, context_schema=Context)
    for index, node in enumerate(nodes):
        graph.add_node(f"node{index}", node)
        graph.add_edge(START, f"node{index}")
        graph.add_edge(f"node{index}", END)
    return graph.compile()


def late(node: Node, rng: random.Random) -> Node:
    """The node after a consult of a random length."""

    async def wait(query: str) -> str:
        await asyncio.sleep(rng.random() / 50)
        return ""

    async def waiting(state: State, runtime: Runtime[Context]) -> Any:
        await runtime.context.consult(Agent("wait", tools=(wait,)), Request("wait", ""))
        return await node(state, runtime)

    return waiting


async def test_fan_out_on_two_threads_repeats_bit_for_bit(rollouts: Rollouts) -> None:
    async def several(jitter: int) -> list[Trace]:
        rng = random.Random(jitter)
        graph = fan_out(late(policy_node("plan"), rng), late(policy_node("critic"), rng))
        return await gather([run(rollouts, graph, seed) for seed in range(6)])

    first, second = await several(1), await several(2)
    assert first == second
    assert len({trace.segments for trace in first}) == 6
    for trace in first:
        assert trace.threads == ("plan", "critic")
        plan, critic = (row[-1] for row in trace.rows())
        assert (plan.author, critic.author) == ("plan", "critic")
        assert plan.token_ids != critic.token_ids


async def test_a_prompt_after_a_consult_is_measured(tmp_path: Path) -> None:
    """An evaluation that follows a protocol asks for the longest prompt, of a graph that consults before it samples, too."""
    rollouts = sampling(tmp_path, pretrain.tokenizer(), [], rollout={"max_tokens": 600})
    graph = chain(late(write, random.Random(0)))
    with pytest.raises(ConfigError, match=r"is 512 tokens, the longest prompt has \d+ and rollout.max_tokens is 600"):
        await _check_context(with_graph(rollouts, graph), [Part("", "with_agents", 1, (PROBLEM,))])


async def test_a_failed_superstep_loses_its_siblings_without_blame(rollouts: Rollouts) -> None:
    sampled = asyncio.Event()

    async def sibling(state: State, runtime: Runtime[Context]) -> Any:
        update = await policy_node("critic")(state, runtime)
        sampled.set()
        return update

    async def fails(state: State, runtime: Runtime[Context]) -> Any:
        await sampled.wait()
        raise AgentError("agent 'verify': gone")

    graph = StateGraph(State, context_schema=Context)
    for name, node in {"first": policy_node(segment_tokens=4), "sibling": sibling, "fails": fails}.items():
        graph.add_node(name, node)
    graph.add_edge(START, "first")
    graph.add_edge("first", "sibling")
    graph.add_edge("first", "fails")
    trace = await run(rollouts, graph.compile())
    assert (trace.status, trace.error, trace.trained) == ("failed", "AgentError: agent 'verify': gone", False)
    assert [s.author for s in trace.segments if s.source == "policy"] == ["policy"]


async def test_even_a_failed_trace_must_not_be_edited(rollouts: Rollouts) -> None:
    async def fails(state: State, runtime: Runtime[Context]) -> Any:
        raise AgentError("gone")

    nodes, message = FAULTS["ids"]
    with pytest.raises(GraphError, match=message):
        await run(rollouts, chain(*nodes, fails))
