"""Runs graphs over problems: one trace, one group, an endless stream of groups. Every token is checked against the ledger."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphRecursionError, InvalidUpdateError
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import StreamMode

from aipo_graph.config import Config
from aipo_graph.errors import AgentError, ConfigError, ContextError, EngineError, GraphError, TaskError
from aipo_graph.load import call, find, load, model
from aipo_graph.rollout.agents import Agent
from aipo_graph.rollout.chat import ChatRun, OutOfTokens
from aipo_graph.rollout.graph import Budget, Context, Graph
from aipo_graph.rollout.ledger import Ledger
from aipo_graph.rollout.prompts import Prompts
from aipo_graph.rollout.protocol import FEEDBACK, parse_request, writes_feedback
from aipo_graph.rollout.sync import Probe, SyncCheck
from aipo_graph.rollout.tokens import Tokenizer
from aipo_graph.tasks.grading import leaks
from aipo_graph.types import Engine, Problem, Reply, Request, Segment, Status, Task, Trace, TraceGroup, derive_seed

OnSegments = Callable[[tuple[Segment, ...]], None]
T = TypeVar("T")
PROBE_TOKENS = 128
MOST_PASSED_OVER = 10_000
"""Problems in a row that `task.max_prompt_tokens` may pass over."""


def open_graph(path: str) -> Graph:
    """The compiled graph behind a path: a graph, or a function without arguments that returns one. Raises ConfigError."""
    found = load(path)
    graph = call(path, found) if callable(found) and not isinstance(found, (StateGraph, CompiledStateGraph)) else found
    if isinstance(graph, StateGraph):
        graph = graph.compile()
    if not isinstance(graph, CompiledStateGraph):
        raise ConfigError(f"{path}: a {type(graph).__name__} is not a LangGraph graph; name a StateGraph or a function that returns one")
    return graph


def open_agents(paths: Mapping[str, str], config: Config, chats: Mapping[str, BaseChatModel] | None = None) -> dict[str, Agent]:
    """The agents by name, each built by its factory from the config, with its language model where ``chats`` has one.

    An empty path is a model alone. Raises ConfigError.
    """
    return {name: _open_agent(name, path, config, (chats or {}).get(name)) for name, path in paths.items()}


def _open_agent(name: str, path: str, config: Config, chat: BaseChatModel | None) -> Agent:
    if name == FEEDBACK:
        raise ConfigError(f"agents.use.{name}: the tag <{FEEDBACK}> is that of every reply; give the agent another name")
    if not path and chat is None:
        raise ConfigError(f"agents.use.{name} is empty, a model alone, but agents.models names none; add agents.models.{name}")
    agent = call(path, load(path), config) if path else Agent(name, model=chat)
    if not isinstance(agent, Agent):
        raise ConfigError(f"agents.use.{name}: {path} returned a {type(agent).__name__}, not an Agent")
    settings = config.agents
    return replace(
        agent,
        model=chat or agent.model,
        attempts=settings.attempts,
        timeout=settings.timeout,
        max_tokens=settings.max_tokens * agent.max_turns,
        concurrency=settings.concurrency,
    )


@dataclass(frozen=True, slots=True)
class Step:
    """What one training step was given: the groups to learn from, those discarded for lack of signal, and the data cursor after them."""

    groups: tuple[TraceGroup, ...]
    discarded: tuple[TraceGroup, ...]
    drawn: int


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
    def open(cls, config: Config, engine: Engine, task: Task, chats: Mapping[str, BaseChatModel] | None = None) -> "Rollouts":
        """Loads everything that the config names; ``chats`` are the language models of agents, by name. Raises ConfigError."""
        agents = open_agents(config.agents.use, config, chats or {})
        return cls(
            config,
            engine,
            task,
            Tokenizer.load(model(config.policy.model), agents, engine.eos_ids, thinking=config.policy.thinking),
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
            scores = {**trace.scores, **await self.task.score(problem, self._answer(trace))}
        except TaskError as error:
            return replace(trace, status="failed", error=f"TaskError: {error}")
        if with_agents and self.agents and any(writes_feedback(text) for text in policy_texts(trace)):
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
        graph = self._graph(with_agents)
        chat = self._chat(ledger, seed) if in_messages(graph) else None
        segments: tuple[Segment, ...] = ()
        path: list[str] = []
        status: Status = "done"
        reason: str | None = None
        try:
            async with asyncio.timeout(self.config.rollout.timeout) as clock:
                with self.engine.run(f"{problem.id}/{seed}"), chat.active() if chat else nullcontext():
                    async for kind, chunk in self._stream(graph, problem, context, chat):
                        if kind == "values":
                            known, segments = len(segments), chat.settle() if chat else _segments(chunk)
                            if on_segments and len(segments) > known:
                                on_segments(segments[known:])
                        else:
                            path += chunk if chat else _nodes(chunk)
        except GraphRecursionError:
            status, reason = "budget", f"more than {self.config.rollout.max_supersteps} supersteps"
        except TimeoutError as error:
            late = f"more than {self.config.rollout.timeout:g} s (rollout.timeout)"
            status, reason = "timeout", late if clock.expired() else f"a node ran into its own time-out: {error}"
        except OutOfTokens:
            status, segments = "length", chat.settle() if chat else segments
        except ContextError as error:
            segments = chat.settle() if chat else segments
            status, reason = ("length" if any(s.source == "policy" for s in segments) else "failed"), f"ContextError: {error}"
        except (AgentError, EngineError) as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
        except InvalidUpdateError as error:
            remedy = "return what the state declares" if chat else "return append(segment, ...)"
            raise GraphError(f"a node's update is not usable ({str(error)[:120]}): {remedy}") from error
        except KeyError as error:  # LangGraph's own for a route that leads nowhere
            name = error.args[0] if error.args else None
            if name not in self.agents or name in graph.nodes:
                raise
            raise GraphError(
                f"the policy asked for agent {name!r}, but the graph has no node {name!r}: add one, or leave it out of agents.use"
            ) from error
        if chat and status in ("done", "budget"):
            segments = chat.settle()
        ledger.check(segments, complete=status in ("done", "budget"))
        if status == "done":
            status = self._ending(segments, chat)
        scores = {"rewrites": float(chat.rewrites)} if chat else {}
        return Trace(problem.id, seed, with_agents, segments, tuple(path), status, scores, reason)

    def _graph(self, with_agents: bool) -> Graph:
        return self.graph if with_agents else self.solo

    def _chat(self, ledger: Ledger, seed: int) -> ChatRun:
        return ChatRun(ledger, self.tokenizer.chat, budget=self._budget.tokens, seed=seed, temperature=self.temperature)

    def _stream(self, graph: Graph, problem: Problem, context: Context, chat: ChatRun | None) -> AsyncIterator[Any]:
        """The run's chunks. A graph of messages gets the question as a human message, and none of our context: it may have its own."""
        settings: RunnableConfig = {"recursion_limit": self.config.rollout.max_supersteps}
        modes: list[StreamMode] = ["updates", "values"]
        if chat is None:
            return graph.astream({"problem": problem, "segments": ()}, settings, context=context, stream_mode=modes)
        settings["callbacks"] = [chat]
        return graph.astream({"messages": [HumanMessage(problem.question)]}, settings, stream_mode=modes)

    def _answer(self, trace: Trace) -> str:
        """The text in which an answer counts; of a message, what it says without its reasoning and control tokens."""
        text = final_text(trace.segments)
        return str(self.tokenizer.chat.parse(text).content) if in_messages(self._graph(trace.with_agents)) else text

    def _ending(self, segments: tuple[Segment, ...], chat: ChatRun | None) -> Status:
        """Why a run that ended by itself did: out of tokens, refused a consult, or done."""
        if chat:
            return "length" if chat.cut else "done"
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
            if not trace.scores.get("leaks") and not leaked:  # what is said after a leak may come from it
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

    async def run_step(self, step: int, drawn: int) -> Step:
        """The groups of one training step, from the task's training problem ``drawn`` on.

        Groups without signal make way for new problems up to `rollout.redraws` times; the last round's are kept as they are.
        """
        count = self.config.rollout.problems
        groups: list[TraceGroup] = []
        discarded: list[TraceGroup] = []
        for redraws_left in range(self.config.rollout.redraws, -1, -1):
            problems, drawn = self._draw(drawn, count - len(groups))
            for group in await gather([self.run_group(problem, step) for problem in problems]):
                (groups if redraws_left == 0 or _has_signal(group) else discarded).append(group)
            if len(groups) == count:
                break
        return Step(tuple(groups), tuple(discarded), drawn)

    def probe_ids(self) -> tuple[int, ...]:
        """A text to compare logprobs on: the first training problems' questions, up to PROBE_TOKENS tokens."""
        return self.tokenizer.plain(" ".join(self.task.train(index).question for index in range(8)), PROBE_TOKENS)[0]

    def _draw(self, drawn: int, count: int) -> tuple[list[Problem], int]:
        """The next ``count`` training problems that are short enough, and the cursor after them."""
        limit, start = self.config.task.max_prompt_tokens, drawn
        problems: list[Problem] = []
        while len(problems) < count:
            problem, drawn = self.task.train(drawn), drawn + 1
            if not limit or len(self.tokenizer.plain(problem.question, limit + 1)[0]) <= limit:
                problems.append(problem)
            elif drawn - start > MOST_PASSED_OVER + count and not problems:
                raise ConfigError(f"task.max_prompt_tokens = {limit}: each of {MOST_PASSED_OVER} problems in a row is longer; raise it")
        return problems, drawn


def _has_signal(group: TraceGroup) -> bool:
    """Whether rewards differ. A group that failed as a whole says nothing of the problem; it stays, to be counted as failed."""
    return len({trace.reward for trace in group.traces if trace.trained}) != 1


class LocalRollouts:
    """Rollouts in this process, one step after the other or, with `max_lag = 1`, one step ahead of the learner.

    ``synced`` holds what the last load's probe said, for the log.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        if rollouts.config.rollout.max_lag > 1:
            raise ConfigError(
                f"rollout.max_lag = {rollouts.config.rollout.max_lag}: the local engine samples at most 1 step ahead; use 0 or 1"
            )
        self._rollouts = rollouts
        self._published: tuple[Iterable[tuple[str, Any]], int, Probe | None] | None = None
        self._check = SyncCheck(rollouts.config.policy.dtype)
        self.synced: dict[str, float] = {}

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, probe: Probe | None = None) -> None:
        """Publishes new weights: an engine that can takes them at once, another before it starts on the next step.

        With a ``probe`` the engine's logprobs are compared with the learner's afterwards; EngineError if the load took no effect.
        """
        self._published = (weights, version, probe)
        if self._rollouts.engine.in_flight:
            await self._take()

    async def stream(self, start: int, steps: int, drawn: int) -> AsyncIterator[Step]:
        """Steps start … steps-1 in order, from training problem ``drawn`` on.

        With `max_lag = 1` step s+1 is sampled while the caller learns from step s, except across a checkpoint, so that a resumed
        run samples with just the weights that the undisturbed one did.
        """
        config = self._rollouts.config
        ahead: asyncio.Task[Step] | None = None
        try:
            for number in range(start, steps):
                if ahead is None:
                    await self._take()
                step = await (ahead or self._rollouts.run_step(number, drawn))
                ahead, drawn = None, step.drawn
                if config.rollout.max_lag and number + 1 < steps and (number + 1) % config.run.checkpoint_every:
                    await self._take()
                    ahead = asyncio.create_task(self._rollouts.run_step(number + 1, drawn))
                yield step
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.wait({ahead})

    async def _take(self) -> None:
        """Loads what was published: while the caller of `stream` waits, unless the engine loads in flight; nobody changes weights."""
        if self._published is not None:
            (weights, version, probe), self._published = self._published, None
            await self._rollouts.engine.load_weights(weights, version)
            if probe is not None:
                self.synced = self._check(probe, await self._rollouts.engine.logprobs(probe.token_ids), version)


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


def in_messages(graph: Graph) -> bool:
    """Whether a graph is one of chat messages: its state has `messages`, and no `segments`."""
    return "messages" in graph.channels and "segments" not in graph.channels


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
