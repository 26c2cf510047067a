"""Runs graphs over problems: one trace, one group, an endless stream of groups. Every token is checked against the ledger."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from langgraph.errors import GraphRecursionError, InvalidUpdateError
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph

from aipo_graph.config import Config
from aipo_graph.errors import AgentError, ConfigError, ContextError, EngineError, GraphError, TaskError
from aipo_graph.load import call, find, load, model
from aipo_graph.rollout.agents import Agent
from aipo_graph.rollout.graph import Budget, Context, Graph
from aipo_graph.rollout.ledger import Ledger
from aipo_graph.rollout.prompts import Prompts
from aipo_graph.rollout.protocol import FEEDBACK, parse_request, writes_feedback
from aipo_graph.rollout.tokens import Tokenizer
from aipo_graph.tasks.grading import leaks
from aipo_graph.types import Engine, Problem, Reply, Request, Segment, Status, Task, Trace, TraceGroup, derive_seed

OnSegments = Callable[[tuple[Segment, ...]], None]
T = TypeVar("T")


def open_graph(path: str) -> Graph:
    """The compiled graph behind a path: a graph, or a function without arguments that returns one. Raises ConfigError."""
    found = load(path)
    graph = call(path, found) if callable(found) and not isinstance(found, (StateGraph, CompiledStateGraph)) else found
    if isinstance(graph, StateGraph):
        graph = graph.compile()
    if not isinstance(graph, CompiledStateGraph):
        raise ConfigError(f"{path}: a {type(graph).__name__} is not a LangGraph graph; name a StateGraph or a function that returns one")
    return graph


def open_agents(paths: Mapping[str, str], config: Config) -> dict[str, Agent]:
    """The agents by name, each built by its factory from the config. Raises ConfigError."""
    agents = {name: call(path, load(path), config) for name, path in paths.items()}
    for name, agent in agents.items():
        if not isinstance(agent, Agent):
            raise ConfigError(f"agents.use.{name}: {paths[name]} returned a {type(agent).__name__}, not an Agent")
        if name == FEEDBACK:
            raise ConfigError(f"agents.use.{name}: the tag <{FEEDBACK}> is that of every reply; give the agent another name")
    return {name: replace(agent, attempts=config.agents.attempts, timeout=config.agents.timeout) for name, agent in agents.items()}


@dataclass(frozen=True)
class Rollouts:
    """All that graph runs share: the two graphs, agents, prompts, tokenizer, task and engine.

    Args:
        temperature: of the policy; 0 is greedy.
    """

    config: Config
    engine: Engine
    task: Task
    tokenizer: Tokenizer
    graph: Graph
    solo: Graph
    agents: Mapping[str, Agent]
    prompts: Prompts
    temperature: float

    @classmethod
    def open(cls, config: Config, engine: Engine, task: Task) -> "Rollouts":
        """Loads everything that the config names. Raises ConfigError."""
        agents = open_agents(config.agents.use, config)
        return cls(
            config,
            engine,
            task,
            Tokenizer.load(model(config.policy.model), agents, engine.eos_ids),
            open_graph(config.rollout.graph),
            open_graph(config.rollout.solo),
            agents,
            Prompts.read(Path(find(config.rollout.prompts, "dir"))),
            config.rollout.temperature,
        )

    @cached_property
    def _budget(self) -> Budget:
        rollout = self.config.rollout
        return Budget(rollout.max_tokens, rollout.max_consults, self.config.agents.max_reply_tokens)

    async def _consult(self, agent: Agent, request: Request) -> Reply:
        with self.engine.busy():
            return await agent(request, self.prompts)

    async def run_trace(self, problem: Problem, *, seed: int, with_agents: bool, on_segments: OnSegments | None = None) -> Trace:
        """One graph run on one problem, scored.

        A fault of an agent, the engine or the grader, or a time-out, ends the trace with its partial segments and a reason;
        a bug in the graph raises GraphError.
        """
        trace = await self.run_graph(problem, seed=seed, with_agents=with_agents, on_segments=on_segments)
        if not trace.trained:
            return trace
        try:
            scores = dict(await self.task.score(problem, final_text(trace.segments)))
        except TaskError as error:
            return replace(trace, status="failed", error=f"TaskError: {error}")
        if with_agents and any(writes_feedback(text) for text in policy_texts(trace)):
            scores |= {"reward": 0.0, "violation": 1.0}
        return self._mark_leaks(replace(trace, scores=scores), problem)

    async def run_graph(self, problem: Problem, *, seed: int, with_agents: bool, on_segments: OnSegments | None = None) -> Trace:
        """Like `run_trace`, but not scored: for a problem whose answer is not known.

        Args:
            on_segments: called after each superstep with the segments that it appended.
        """
        ledger = Ledger(self.engine)
        context = Context(
            generate=ledger.generate,
            tokenizer=self.tokenizer,
            agents=self.agents,
            consult=self._consult,
            prompts=self.prompts,
            budget=self._budget,
            seed=seed,
            temperature=self.temperature,
        )
        graph = self.graph if with_agents else self.solo
        segments: tuple[Segment, ...] = ()
        path: list[str] = []
        status: Status = "done"
        reason: str | None = None
        try:
            async with asyncio.timeout(self.config.rollout.timeout) as clock:
                with self.engine.run(f"{problem.id}/{seed}"):
                    chunks: AsyncIterator[Any] = graph.astream(
                        {"problem": problem, "segments": ()},
                        {"recursion_limit": self.config.rollout.max_supersteps},
                        context=context,
                        stream_mode=["updates", "values"],
                    )
                    async for kind, chunk in chunks:
                        if kind == "values":
                            known, segments = len(segments), _segments(chunk)
                            if on_segments and len(segments) > known:
                                on_segments(segments[known:])
                        else:
                            path += _nodes(chunk)
        except GraphRecursionError:
            status, reason = "budget", f"more than {self.config.rollout.max_supersteps} supersteps"
        except TimeoutError as error:
            late = f"more than {self.config.rollout.timeout:g} s (rollout.timeout)"
            status, reason = "timeout", late if clock.expired() else f"a node ran into its own time-out: {error}"
        except ContextError as error:
            status, reason = ("length" if any(s.source == "policy" for s in segments) else "failed"), f"ContextError: {error}"
        except (AgentError, EngineError) as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
        except InvalidUpdateError as error:
            raise GraphError(f"a node's update is not usable ({str(error)[:120]}): return append(segment, ...)") from error
        except KeyError as error:  # LangGraph's own for a route that leads nowhere
            name = error.args[0] if error.args else None
            if name not in self.agents or name in graph.nodes:
                raise
            raise GraphError(
                f"the policy asked for agent {name!r}, but the graph has no node {name!r}: add one, or leave it out of agents.use"
            ) from error
        ledger.check(segments, complete=status in ("done", "budget"))
        if status == "done":
            status = self._ending(segments)
        return Trace(problem.id, seed, with_agents, segments, tuple(path), status, error=reason)

    def _ending(self, segments: tuple[Segment, ...]) -> Status:
        """Why a run that ended by itself did: out of tokens, refused a consult, or done."""
        sampled = [s for s in segments if s.source == "policy"]
        if not sampled or sampled[-1].token_ids[-1] in self.tokenizer.eos_ids:
            return "done"
        if sum(len(s.token_ids) for s in sampled) >= self._budget.tokens:
            return "length"
        return "budget" if parse_request(final_text(segments), self.agents) else "done"

    def _mark_leaks(self, trace: Trace, problem: Problem) -> Trace:
        """Counts replies that state the gold answer, and masks them or drops the trace as `agents.leak` says."""
        known = problem.question
        marked = []
        for segment in trace.segments:
            leaked = segment.source == "agent" and leaks(segment.text, problem.answer, known)
            marked.append(replace(segment, masked=True) if leaked and self.config.agents.leak == "mask" else segment)
            known += segment.text
            if leaked:
                trace = replace(trace, scores={**trace.scores, "leaks": trace.scores.get("leaks", 0.0) + 1})
        if self.config.agents.leak == "drop" and trace.scores.get("leaks"):
            return replace(trace, status="leaked", error="a reply gave the answer away")
        return replace(trace, segments=tuple(marked))

    async def run_group(self, problem: Problem, step: int) -> TraceGroup:
        """The G traces of one problem: first those with agents, then those alone."""
        rollout = self.config.rollout
        runs = [
            self.run_trace(
                problem, seed=derive_seed(self.config.run.seed, step, problem.id, sample), with_agents=sample < rollout.traces_with_agents
            )
            for sample in range(rollout.traces)
        ]
        return TraceGroup(problem, tuple(await gather(runs)))

    async def run_step(self, step: int) -> tuple[TraceGroup, ...]:
        """The groups of one training step: the task's training problems step * problems, step * problems + 1, …"""
        count = self.config.rollout.problems
        return tuple(await gather([self.run_group(self.task.train(step * count + i), step) for i in range(count)]))


class LocalRollouts:
    """Rollouts in this process, one step after the other or, with `max_lag = 1`, one step ahead of the learner."""

    def __init__(self, rollouts: Rollouts) -> None:
        if rollouts.config.rollout.max_lag > 1:
            raise ConfigError(
                f"rollout.max_lag = {rollouts.config.rollout.max_lag}: the local engine samples at most 1 step ahead; use 0 or 1"
            )
        self._rollouts = rollouts
        self._published: tuple[Iterable[tuple[str, Any]], int] | None = None

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Publishes new weights; the engine takes them before it starts on another step."""
        self._published = (weights, version)

    async def stream(self, start: int, steps: int) -> AsyncIterator[tuple[TraceGroup, ...]]:
        """The groups of steps start … steps-1, in order.

        With `max_lag = 1` step s+1 is sampled while the caller learns from step s, except across a checkpoint, so that a resumed
        run samples with just the weights that the undisturbed one did.
        """
        config = self._rollouts.config
        ahead: asyncio.Task[tuple[TraceGroup, ...]] | None = None
        try:
            for step in range(start, steps):
                if ahead is None:
                    self._take()
                groups = await (ahead or self._rollouts.run_step(step))
                ahead = None
                if config.rollout.max_lag and step + 1 < steps and (step + 1) % config.run.checkpoint_every:
                    self._take()
                    ahead = asyncio.create_task(self._rollouts.run_step(step + 1))
                yield groups
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.wait({ahead})

    def _take(self) -> None:
        """Loads what was published; called while the caller of `stream` waits, so that no learner is changing the weights meanwhile."""
        if self._published is not None:
            self._rollouts.engine.load_weights(*self._published)
            self._published = None


async def gather(runs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs all at once; the first error cancels the rest and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run) for run in runs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def policy_texts(trace: Trace) -> list[str]:
    """The text of each unbroken run of policy segments."""
    runs = (run for row in trace.rows() for source, run in groupby(row, key=lambda s: s.source) if source == "policy")
    return ["".join(s.text for s in run) for run in runs]


def final_text(segments: Sequence[Segment]) -> str:
    """What the policy wrote last, after any helper's words: the only text in which an answer counts."""
    sampled = [i for i, s in enumerate(segments) if s.source == "policy"]
    if not sampled:
        return ""
    row = [s for s in segments if s.thread == segments[sampled[-1]].thread]
    start = max((i + 1 for i, s in enumerate(row) if s.source != "policy"), default=0)
    return "".join(s.text for s in row[start:])


def _segments(state: Mapping[str, Any]) -> tuple[Segment, ...]:
    if "segments" not in state:
        raise GraphError("the graph's state has no `segments`: build it as StateGraph(State, context_schema=Context)")
    return tuple(state["segments"])


def _nodes(updates: Mapping[str, Any]) -> list[str]:
    """The nodes named by one chunk of updates. Raises GraphError for a node that wrote nothing that the state knows."""
    for node, update in updates.items():
        if update is None:
            raise GraphError(f"node {node!r} returned nothing that the state knows: return append(segment, ...), or append() for nothing")
    return list(updates)
