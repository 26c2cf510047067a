"""Opens what a config names, and runs graphs over problems: one trace, one group, many. Every token is checked against the ledger."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, TypeVar

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphRecursionError, InvalidUpdateError
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import StreamMode
from langsmith import tracing_context

from aipo_graph.config import Config
from aipo_graph.errors import AgentError, AipoError, ConfigError, ContextError, EngineError, GraphError, RequestError, TaskError
from aipo_graph.load import call, find, load, model, nearest, own_place
from aipo_graph.messages import THOUGHTS, after_reasoning, read_tokenizer
from aipo_graph.rollout.agents import CLOCK, Agent, Clock, Prompts
from aipo_graph.rollout.chat import ChatRun, Misfit, OutOfTokens, with_threads
from aipo_graph.rollout.graph import Budget, Context, Graph
from aipo_graph.rollout.inputs import STORES, Inputs, apart, in_messages, said, unsolved, within
from aipo_graph.rollout.ledger import Ledger
from aipo_graph.rollout.tokens import FEEDBACK, Tokenizer, parse_request, writes_feedback
from aipo_graph.rollout.tools import check_alone
from aipo_graph.tasks.grading import leaks
from aipo_graph.tasks.rewards import Rewards
from aipo_graph.types import (
    TRAINED,
    Engine,
    Problem,
    Reply,
    Request,
    Segment,
    Status,
    Task,
    Trace,
    TraceGroup,
    derive_seed,
    differ,
    spelt,
)

# --- the graphs and agents that a config names by path


def open_graph(path: str) -> Graph:
    """The compiled graph behind a path: a graph, or a function without arguments that returns one. Raises ConfigError.

    Nothing that it keeps outlives a trace: see :func:`apart`, which raises GraphError.
    """
    found = load(path)
    graph = call(path, found) if callable(found) and not isinstance(found, (StateGraph, CompiledStateGraph)) else found
    if isinstance(graph, StateGraph):
        graph = graph.compile()
    if not isinstance(graph, CompiledStateGraph):
        raise ConfigError(f"{path}: a {type(graph).__name__} is not a LangGraph graph; name a StateGraph or a function that returns one")
    return apart(graph, path)


def without_tracers() -> None:
    """Turns off, for this process and those it starts, the tracers that LangChain's environment variables turn on: what they send is
    questions, token ids and replies. Values are set, not removed, so that a graph's own `load_dotenv()` does not bring them back.
    """
    ours = ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2")
    given = (name for name in os.environ if re.fullmatch(r"LANG(SMITH|CHAIN)_(\w+_)?TRACING(_V2)?", name))
    os.environ.update(dict.fromkeys((*ours, *given), "false"))
    os.environ.pop("LANGCHAIN_HANDLER", None)


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
    found = load(path) if path else Agent(name, model=chat)
    agent = found if isinstance(found, Agent) else call(path, found, config)
    if not isinstance(agent, Agent):
        raise ConfigError(f"agents.use.{name}: {path} returned a {type(agent).__name__}, not an Agent")
    if agent.name != name:
        raise ConfigError(f"agents.use.{name}: {path} is the agent {agent.name!r}; write Agent({name!r}, ...), or agents.use.{agent.name}")
    settings, chat = config.agents, chat or agent.model
    if chat is None:
        check_alone(name, agent.tools[0])
    return replace(
        agent,
        model=chat,
        attempts=settings.attempts,
        timeout=settings.timeout,
        max_tokens=settings.max_tokens * agent.max_turns,
        concurrency=settings.concurrency,
    )


# --- graph runs

OnSegments = Callable[[tuple[Segment, ...]], None]
T = TypeVar("T")
PROBE_TOKENS = 128
MOST_PASSED_OVER = 10_000
"""Problems in a row that `task.max_prompt_tokens` may pass over."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A problem and its number among the task's training problems: the step that seeds its traces is number // `rollout.problems`."""

    index: int
    problem: Problem
    again: int = 0
    """Earlier draws of the same problem for the same step, each of which has seeds of its own."""


MakeGroups = Callable[[Sequence[Draw]], Coroutine[Any, Any, list[TraceGroup]]]  # such as Rollouts.run_groups


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
        if not config.run.tracing:
            without_tracers()
        agents = open_agents(config.agents.use, config, chats)
        rollouts = cls(
            config,
            engine,
            task,
            Tokenizer(read_tokenizer(model(config.policy.model)), agents, engine.eos_ids, thinking=config.policy.thinking),
            open_graph(config.rollout.graph),
            open_graph(config.rollout.solo),
            agents,
            Prompts.read(Path(find(config.rollout.prompts, "dir"))),
            config.rollout.temperature,
        )
        _ = rollouts._rewards, rollouts.inputs
        return rollouts

    @cached_property
    def _rewards(self) -> Rewards:
        """Raises ConfigError for a reward that cannot be used."""
        rewards = Rewards(self.config, self.task)
        for path, graph in ((self.config.rollout.graph, self.graph), (self.config.rollout.solo, self.solo)):
            if "messages" in rewards.names and "messages" not in graph.channels:
                raise ConfigError(f"task.reward names `messages`, which the state of {path} does not have; name reply, state or trace")
        return rewards

    @cached_property
    def inputs(self) -> tuple[Inputs, Inputs]:
        """What the graph and the solo one are given of a problem. Raises ConfigError for a name that the graph does not have."""
        rollout = self.config.rollout
        if rollout.helpers and not in_messages(self.graph):
            raise ConfigError(
                f"rollout.helpers = {', '.join(rollout.helpers)}: {rollout.graph} is no graph of messages; name them in agents.use"
            )
        if rollout.output and rollout.output not in self.graph.channels:
            keys = [key for key in self.graph.channels if key.isidentifier()]
            raise ConfigError(f"rollout.output: the state of {rollout.graph} has no {rollout.output!r}{nearest(rollout.output, keys)}")
        return (
            Inputs.open(rollout.inputs, self.graph, rollout.graph),
            Inputs.open(rollout.inputs, self.solo, rollout.solo, partly=True),
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
        a bug in the graph raises GraphError, scores that are none ConfigError.
        """
        trace, state = await self._run(problem, seed=seed, with_agents=with_agents, on_segments=on_segments)
        if not trace.trained:
            return trace
        if trace.scores.get("misfits"):
            return self._mark_leaks(replace(trace, scores={**trace.scores, "reward": 0.0}), problem)
        given = {
            "question": problem.question,
            "answer": problem.answer,
            "row": dict(problem.meta),
            "reply": trace.reply,
            "messages": state.get("messages"),
            "state": state,
            "trace": trace,
            "problem": problem,
        }
        try:
            scores = {**trace.scores, **await self._rewards(given)}
        except TaskError as error:
            return replace(trace, status="failed", error=f"TaskError: {error}")
        own = ("".join(s.text if s.source == "policy" else "\n" for s in row) for row in trace.rows())
        if with_agents and self.agents and any(map(writes_feedback, own)):
            scores |= {"reward": 0.0, "violation": 1.0}
        return self._mark_leaks(replace(trace, scores=scores), problem)

    async def run_graph(self, problem: Problem, *, seed: int, with_agents: bool, on_segments: OnSegments | None = None) -> Trace:
        """Like `run_trace`, but not scored: for a problem whose answer is not known.

        Args:
            on_segments: called after each superstep with the segments that it appended.
        """
        return (await self._run(problem, seed=seed, with_agents=with_agents, on_segments=on_segments))[0]

    async def _run(
        self, problem: Problem, *, seed: int, with_agents: bool, on_segments: OnSegments | None
    ) -> tuple[Trace, Mapping[str, Any]]:
        """The trace without scores, and the graph's last state."""
        rollout = self.config.rollout
        with_threads(asyncio.get_running_loop())
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
        chat = self._chat(ledger, seed, alone=not with_agents) if in_messages(graph) else None
        segments: tuple[Segment, ...] = ()
        state: Mapping[str, Any] = {}
        path: list[str] = []
        status: Status = "done"
        reason: str | None = None
        ended = False
        try:
            async with asyncio.timeout(rollout.timeout) as limit:
                with (
                    within(CLOCK, Clock(limit)),
                    self.engine.run(f"{problem.id}/{seed}"),
                    within(STORES, {}),
                    nullcontext() if self.config.run.tracing else tracing_context(enabled=False),
                    chat.active() if chat else nullcontext(),
                ):
                    async for kind, chunk in self._stream(graph, self.inputs[not with_agents].of(problem), problem, context, chat):
                        if kind == "values":
                            state = chunk
                            known, segments = len(segments), chat.settle() if chat else tuple(chunk["segments"])
                            if on_segments and len(segments) > known:
                                on_segments(segments[known:])
                        else:
                            path += _nodes(chunk, chat is not None)
            ended = True
        except GraphRecursionError:
            status, reason, ended = "budget", f"more than {rollout.max_supersteps} supersteps", True
        except TimeoutError as error:
            late = f"more than {rollout.timeout:g} s (rollout.timeout)"
            status, reason = "timeout", late if limit.expired() else f"a node ran into its own time-out: {error}"
        except (OutOfTokens, Misfit) as end:
            status = "length" if isinstance(end, OutOfTokens) else "done"
        except ContextError as error:
            segments = chat.settle() if chat else segments
            status, reason = ("length" if any(s.source == "policy" for s in segments) else "failed"), f"ContextError: {error}"
        except RequestError as error:
            status, reason = "budget", f"RequestError: {error}"
        except (AgentError, EngineError) as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
        except InvalidUpdateError as error:
            remedy = "return what the state declares" if chat else "return append(segment, ...)"
            raise GraphError(f"a node's update is not usable ({str(error)[:120]}): {remedy}") from error
        except AipoError:
            raise
        except Exception as error:  # the tool boundary of a graph of messages: its tools run on what the policy wrote
            name = error.args[0] if error.args else None
            if isinstance(error, KeyError) and name in self.agents and name not in graph.nodes:  # LangGraph's, for a route to nowhere
                raise GraphError(
                    f"the policy asked for agent {name!r}, but the graph has no node {name!r}: add one, or leave it out of agents.use"
                ) from error
            if chat is None:
                if place := own_place(error):
                    what = f"{type(error).__name__} in {place}: {' '.join(str(error)[:300].split())}"
                    raise GraphError(f"the graph raised {what}; see its nodes and routes") from error
                raise
            status, reason = "failed", f"{type(error).__name__}: {' '.join(str(error)[:300].split())}"
        if chat:
            segments = chat.settle()
        ledger.check(segments, complete=ended)
        if status == "done":
            status = self._ending(segments, chat)
        if status in TRAINED and not any(s.source == "policy" for s in segments):
            why = reason or (f"its nodes asked {', '.join(sorted(chat.strangers))}" if chat and chat.strangers else "no node asked it")
            status, reason = "failed", f"NoTokens: the graph ended without a word of the policy ({why}); see its routes"
        reply = "" if chat and chat.unanswered else self._reply(segments, graph, status)
        if (key := rollout.output) in graph.channels:
            found = said(state, key)
            reply = self.tokenizer.without_specials(found or "")
            if found is None and status == "done":
                status, reason = "failed", f"NoOutput: the graph ended without {key!r} in its state (rollout.output); see its routes"
        counted = ("rewrites", "invalid_calls", "misfits") if chat else ()
        scores = {name: float(getattr(chat, name)) for name in counted}
        return Trace(problem.id, seed, with_agents, segments, tuple(path), status, scores, reason and spelt(reason), spelt(reply)), state

    def _chat(self, ledger: Ledger, seed: int, *, alone: bool) -> ChatRun:
        return ChatRun(
            ledger,
            self.tokenizer.chat,
            budget=self._budget.tokens,
            seed=seed,
            temperature=self.temperature,
            helpers=self.config.rollout.helpers,
            longest=self._budget.reply_tokens,
            alone=alone,
        )

    def _stream(
        self, graph: Graph, given: Sequence[dict[str, Any]], problem: Problem, context: Context, chat: ChatRun | None
    ) -> AsyncIterator[Any]:
        """The run's chunks. A graph of messages gets the question as a human message, and not our context but its own schema's."""
        state, own, configurable = given
        begun = state if chat else {"problem": unsolved(problem), "segments": (), **state}
        settings: RunnableConfig = {
            "recursion_limit": self.config.rollout.max_supersteps,
            "configurable": configurable,
            "callbacks": [chat] if chat else None,
        }
        modes: list[StreamMode] = ["updates", "values"]
        return graph.astream(begun, settings, context=own if chat else context, stream_mode=modes)

    def _reply(self, segments: Sequence[Segment], graph: Graph, status: Status) -> str:
        """What stands after the reasoning and before the end of the turn, without control tokens; of a message, its content, or of one
        that ends a run by a call the call's arguments.
        """
        text = answer_text(segments, [self.tokenizer.decode([token]) for token in self.tokenizer.eos_ids])
        return self.tokenizer.chat.said(text, calls=status == "done") if in_messages(graph) else self.tokenizer.without_specials(text)

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
        before: Segment | None = None
        for segment in trace.segments:
            leaked = segment.source == "agent" and leaks(segment.text, problem.answer, known)
            marked.append(replace(segment, masked=True) if leaked and self.config.agents.leak == "mask" else segment)
            if not trace.scores.get("leaks") and not leaked:  # what is said after a leak may come from it
                goes_on = before is not None and (before.source, before.thread) == ("policy", segment.thread) and segment.source == "policy"
                known += segment.text if goes_on else f"\n{segment.text}"
            before = segment
            if leaked:
                trace = replace(trace, scores={**trace.scores, "leaks": trace.scores.get("leaks", 0.0) + 1})
        if self.config.agents.leak == "drop" and trace.scores.get("leaks"):
            return replace(trace, status="leaked", error="a reply gave the answer away")
        return replace(trace, segments=tuple(marked))

    async def run_group(self, problem: Problem, step: int, again: int = 0) -> TraceGroup:
        """The G traces of one problem, of which the step has ``again`` groups already: first those with agents, then those alone."""
        runs = [self.run_trace(problem, seed=seed, with_agents=w) for seed, w in self._members(problem, step, again)]
        return TraceGroup(problem, tuple(await gather(runs)))

    def _members(self, problem: Problem, step: int, again: int) -> list[tuple[int, bool]]:
        """Seed of each trace of a group, and whether it runs with agents."""
        rollout, seed, more = self.config.rollout, self.config.run.seed, [again] if again else []
        return [(derive_seed(seed, step, problem.id, i, *more), i < rollout.traces_with_agents) for i in range(rollout.traces)]

    async def run_groups(self, draws: Sequence[Draw]) -> list[TraceGroup]:
        """The group of each draw, all at once. The first error ends them all."""
        return await gather([self.run_group(draw.problem, draw.index // self.config.rollout.problems, draw.again) for draw in draws])

    def lost_group(self, draw: Draw, error: str) -> TraceGroup:
        """What stands for a group that could not be run: its traces, failed."""
        return TraceGroup(
            draw.problem,
            tuple(
                Trace(draw.problem.id, *member, (), (), "failed", {}, error)
                for member in self._members(draw.problem, draw.index // self.config.rollout.problems, draw.again)
            ),
        )

    def probe_ids(self) -> tuple[int, ...]:
        """A text to compare logprobs on: the first training problems' questions, up to PROBE_TOKENS tokens."""
        return self.tokenizer.plain(" ".join(self.task.train(index).question for index in range(8)), PROBE_TOKENS)[0]

    @cached_property
    def _train(self) -> Callable[[int], Problem]:
        """The task's, which may take its time and is asked again for the steps under way."""
        return lru_cache(4096)(self.task.train)

    def draw(self, cursor: int) -> Draw:
        """The first training problem from number ``cursor`` on that is short enough. Raises ConfigError where none comes."""
        limit, problems = self.config.task.max_prompt_tokens, self.config.rollout.problems
        for index in range(cursor, cursor + MOST_PASSED_OVER + 1):
            problem = self._train(index)
            if not limit or len(self.tokenizer.plain(problem.question, limit + 1)[0]) <= limit:
                return Draw(index, problem, sum(self._train(i).id == problem.id for i in range(index - index % problems, index)))
        raise ConfigError(f"task.max_prompt_tokens = {limit}: each of {MOST_PASSED_OVER} problems in a row is longer; raise it")


def too_long(group: TraceGroup) -> bool:
    """Whether a trace could not even begin, since its prompt fills the context."""
    return any(trace.status == "failed" and (trace.error or "").startswith("ContextError") for trace in group.traces)


def has_signal(group: TraceGroup) -> bool:
    """Whether rewards differ. A group that failed as a whole says nothing of the problem; it stays, to be counted as failed."""
    rewards = [trace.reward for trace in group.traces if trace.trained]
    return not rewards or differ(rewards)


async def gather(runs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs all at once; the first error cancels the rest and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run) for run in runs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def dealt(draws: Sequence[Draw], makers: Sequence[MakeGroups]) -> list[TraceGroup]:
    """The groups of the draws, in order: draw i is made by maker i mod n, in one call to each, so that their batches repeat."""
    shares = [draws[i :: len(makers)] for i in range(len(makers))]
    found = await gather([make(share) for make, share in zip(makers, shares, strict=True) if share])
    return [found[i % len(found)][i // len(found)] for i in range(len(draws))]


def final_text(segments: Sequence[Segment]) -> str:
    """What the policy wrote last, after any helper's words: the only text in which an answer counts."""
    thread = next((s.thread for s in reversed(segments) if s.source == "policy"), None)
    run = takewhile(lambda s: s.source == "policy", (s for s in reversed(segments) if s.thread == thread))
    return "".join(s.text for s in reversed([*run]))


def answer_text(segments: Sequence[Segment], ends: Sequence[str] = ()) -> str:
    """What `final_text` says after its reasoning part and before the end of the turn, be it a token or spelt out as one of ``ends``."""
    final = final_text(segments)
    sampled = [s for s in segments if s.source == "policy"]
    row = [s for s in segments if sampled and s.thread == sampled[-1].thread]
    before = "".join(s.text for s in row if s.source == "policy").removesuffix(final)
    for end in filter(str.strip, ends):
        final, before = final.partition(end)[0], before.rpartition(end)[2]  # of earlier turns nothing is open
    prompts = [s.text for s, later in pairwise(row) if s.source != "policy" and later.source == "policy"] or [""]
    prompt = prompts[0 if before else -1].rstrip()
    opened = next((opening for opening, _ in THOUGHTS if prompt.endswith(opening)), "")
    return after_reasoning(final, opened + before)


def _nodes(updates: Mapping[str, Any], in_chat: bool) -> list[str]:
    """The nodes named by one chunk of updates. Raises GraphError for a node that waits for a person or, of segments, wrote nothing."""
    if "__interrupt__" in updates:
        raise GraphError("the graph was interrupted, and nobody is there to resume it: leave out interrupt(), interrupt_before and _after")
    for node, update in updates.items():
        if update is None and not in_chat:
            raise GraphError(f"node {node!r} returned nothing that the state knows: return append(segment, ...), or append() for nothing")
    return list(updates)
