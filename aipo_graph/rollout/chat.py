"""The policy as a LangChain chat model: a graph written with messages and `bind_tools` trains without being rewritten.

A run reaches its chat models through a context variable, not through LangGraph's run context: that one has the graph's own schema, and
does not reach a sub-agent that a tool invokes; a context variable is copied into tasks and into LangChain's threads.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from weakref import WeakSet

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, BaseCallbackHandler, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.config import get_config
from langgraph.errors import GraphBubbleUp

from aipo_graph.errors import GraphError
from aipo_graph.messages import ChatFormat
from aipo_graph.rollout.ledger import Ledger
from aipo_graph.types import Completion, Segment, derive_seed

Schema = Mapping[str, Any]
T = TypeVar("T")


THREADS = 1024
"""Plain nodes at once: each waits in a thread of its own while the policy writes, and an engine may wait for all of them to have asked."""
_LOOPS: WeakSet[asyncio.AbstractEventLoop] = WeakSet()


def _with_threads(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """The loop, with room for its graphs' plain nodes: asyncio's own few threads would wait for each other for ever."""
    if loop not in _LOOPS:
        _LOOPS.add(loop)
        loop.set_default_executor(ThreadPoolExecutor(THREADS, "graph"))
    return loop


class OutOfTokens(GraphBubbleUp):
    """The trace's token budget is used up. LangGraph's retries and LangChain's middleware let a GraphBubbleUp pass."""


@dataclass(eq=False, slots=True)
class Turn:
    """One reply of the policy and what it was sampled from."""

    node: str
    """The graph's node that asked for it; of a sub-graph's, the path of nodes: ``researcher/model``."""
    ns: str
    """LangGraph's checkpoint namespace: the running tasks, outermost first."""
    template: str
    """The template's text of the messages, earlier replies as the template writes them."""
    tools: tuple[Schema, ...]
    messages: tuple[BaseMessage, ...]
    parent: "Turn | None"
    """The earlier reply whose exact tokens the prompt goes on from."""
    added: Segment
    """The prompt after the parent's reply, or all of it."""
    prompt_ids: tuple[int, ...]
    rewritten: bool
    """Goes on from an earlier reply whose exact tokens could not be kept: one of the same node, or with the same first message."""
    origin: tuple[tuple[str, ...], ...] = ()
    """Its tasks, outermost first, each as node and place among its superstep's tasks: unlike `ns` the same in every repetition."""
    seed: int = 0
    completion: Completion | None = None
    message: AIMessage | None = None
    text: str = ""
    thread: str | None = None

    @property
    def task(self) -> str:
        return self.ns.partition("|")[0]

    @property
    def tokens(self) -> int:
        return len(self.completion.token_ids) if self.completion else 0


class ChatRun(BaseCallbackHandler):
    """What the chat models of one graph run sampled. As a callback handler it learns which LangGraph task starts, and starts again.

    Rows: a prompt that goes on from an earlier reply continues its row with exactly the sampled ids. Any other prompt opens a row: a new
    conversation, a second branch of one, or one whose history the template or the graph rewrote, which `rewrites` counts. `invalid_calls`
    counts tool calls that could not be read.

    Seeds depend on the asking node, the prompt, and how many equal requests came before, not on who came first. Order does not either:
    a superstep's replies are sorted by its tasks once it has ended; within one task they stand as they were asked for.
    """

    run_inline = True

    def __init__(self, ledger: Ledger, chat: ChatFormat, *, budget: int, seed: int, temperature: float) -> None:
        self.segments: tuple[Segment, ...] = ()
        self.rewrites = 0
        self.invalid_calls = 0
        self._ledger = ledger
        self._chat = chat
        self._budget = budget
        self._seed = seed
        self._temperature = temperature
        self._loop = _with_threads(asyncio.get_running_loop())
        self._bridged: set[Future[Any]] = set()
        self._tasks: dict[str, tuple[str, ...]] = {}
        self._turns: list[Turn] = []
        """Settled ones first."""
        self._settled = 0
        self._step = 0
        self._refused = False
        self._ended = False
        self._last: dict[str, Turn] = {}
        self._names: Counter[str] = Counter()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, chat models belong to this run."""
        token = _RUN.set(self)
        try:
            yield
        finally:
            _RUN.reset(token)
            self._ended = True
            for future in self._bridged:
                future.cancel()

    def on_chain_start(self, serialized: Any, inputs: Any, *, tags: list[str] | None = None, **kwargs: Any) -> None:
        """A node's task starts. Where it does so again, LangGraph retries it: what the failed attempt sampled is no part of the trace."""
        if not any(tag.startswith("graph:step:") for tag in tags or ()):
            return
        metadata = kwargs.get("metadata") or {}
        ns, step = str(metadata.get("langgraph_checkpoint_ns", "")), int(metadata.get("langgraph_step", 0))
        if "|" not in ns and step != self._step:
            self.settle()
            self._step = step
        path = tuple(f"{part!s:>12}" for part in metadata.get("langgraph_path", ()))
        if ns in self._tasks:
            failed = [turn for turn in self._turns[self._settled :] if f"{turn.ns}|".startswith(f"{ns}|")]
            self._turns = [turn for turn in self._turns if turn not in failed]
            self._ledger.forget(turn.completion for turn in failed if turn.completion)
        self._tasks[ns] = (str(metadata.get("langgraph_node", "")), *path)

    async def reply(self, messages: Sequence[BaseMessage], tools: Sequence[Schema], stop: Sequence[str], limit: int | None) -> AIMessage:
        """Samples the next reply. Raises OutOfTokens, EngineError, and GraphError once the run is over: a thread may outlive it."""
        if self._ended:
            raise GraphError("PolicyChatModel was called after its run had ended: await or join what a node starts")
        ns = str(get_config()["metadata"].get("langgraph_checkpoint_ns", ""))
        turn = self._prompt(tuple(messages), tuple(tools), ns)
        # Of what runs beside it nothing counts before its superstep has ended: who is faster must not matter.
        left = self._budget - sum(old.tokens for i, old in enumerate(self._turns) if i < self._settled or old.task == turn.task)
        if left <= 0:
            self._refused = True
            raise OutOfTokens
        turn.origin = tuple(self._tasks[prefix] for prefix in _prefixes(ns) if prefix in self._tasks)
        same = sum((old.origin, old.prompt_ids) == (turn.origin, turn.prompt_ids) for old in self._turns)
        turn.seed = derive_seed(self._seed, str(turn.origin), str(turn.prompt_ids), same)
        self._turns.append(turn)
        try:
            completion = await self._ledger.generate(
                turn.prompt_ids,
                seed=turn.seed,
                max_tokens=min(left, limit or left),
                stop=tuple(stop),
                temperature=self._temperature,
            )
        except BaseException:
            self._turns = [old for old in self._turns if old is not turn]
            raise
        if turn not in self._turns:  # its attempt has failed meanwhile
            self._ledger.forget([completion])
        return self._finish(turn, completion)

    def _finish(self, turn: Turn, completion: Completion) -> AIMessage:
        turn.completion, turn.text = completion, self._chat.decode(completion.token_ids)
        message = self._chat.parse(turn.text, turn.tools, seed=turn.seed)
        message.id = f"aipo-{turn.seed:016x}"
        message.response_metadata = {"model_name": "policy", "finish_reason": completion.stop}
        read, written = len(turn.prompt_ids), len(completion.token_ids)
        message.usage_metadata = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
        turn.message = message
        return message.model_copy(deep=True)

    def _prompt(self, messages: tuple[BaseMessage, ...], tools: tuple[Schema, ...], ns: str) -> Turn:
        """What to sample from: after the newest of our replies its exact tokens, and only the text in between tokenized."""
        node = "/".join(part.partition(":")[0] for part in ns.split("|") if ":" in part)
        template = self._chat.render(messages, tools)
        ours = {turn.message.id: turn for turn in self._turns if turn.message}
        known = [(index, ours[message.id]) for index, message in enumerate(messages) if message.id in ours]
        start, added, parent = -1, None, None
        for index, turn in reversed(known):
            if _same(messages[index], turn.message):
                text = self._chat.follow(messages, index, turn.template, turn.text, tools)
                if text is not None:
                    start, parent, added = index, turn, self._between(messages[index + 1 :], tools, node, text)
                    break
        rewritten = any(turn.node == node or turn.messages[0] == messages[0] for index, turn in known if index > start)
        if parent is None or added is None or parent.completion is None:
            added = Segment("context", node, self._chat.encode(template), template)
            return Turn(node, ns, template, tools, messages, None, added, added.token_ids, rewritten)
        prompt_ids = (*parent.prompt_ids, *parent.completion.token_ids, *added.token_ids)
        return Turn(node, ns, template, tools, messages, parent, added, prompt_ids, rewritten)

    def _between(self, messages: Sequence[BaseMessage], tools: Sequence[Schema], node: str, text: str) -> Segment:
        """What stands between two replies; where that is one tool's results, the tool is the author: not a name that the policy made up."""
        names = {message.name if isinstance(message, ToolMessage) else None for message in messages}
        known = {tool.get("function", {}).get("name") for tool in tools}
        author = names.pop() if len(names) == 1 and names <= known else None
        return Segment("context", author or node, self._chat.encode(text), text)

    def settle(self) -> tuple[Segment, ...]:
        """All segments, those of the superstep that has just ended included."""
        new = [turn for turn in self._turns[self._settled :] if turn.completion]
        waiting = [turn for turn in self._turns[self._settled :] if not turn.completion]
        new.sort(key=lambda turn: self._tasks.get(turn.task, ()))
        for turn in new:
            self.segments += self._written(turn)
        self._turns = [*self._turns[: self._settled], *new, *waiting]
        self._settled += len(new)
        return self.segments

    def _written(self, turn: Turn) -> tuple[Segment, Segment]:
        """A turn as segments, on its parent's row unless another went on there before."""
        completion = turn.completion
        assert completion is not None
        parent, context = turn.parent, turn.added
        if parent is not None and parent.thread is not None and self._last[parent.thread] is parent:
            turn.thread = parent.thread
        else:
            self._names[turn.node] += 1
            count = self._names[turn.node]
            turn.thread = turn.node if count == 1 else f"{turn.node}/{count}"
            if parent is not None:
                context = Segment("context", turn.node, turn.prompt_ids, self._chat.decode(turn.prompt_ids))
        self._last[turn.thread] = turn
        self.rewrites += turn.rewritten
        self.invalid_calls += len(turn.message.invalid_tool_calls) if turn.message else 0
        sampled = Segment(
            "policy",
            author=turn.node,
            token_ids=completion.token_ids,
            text=turn.text,
            logprobs=completion.logprobs,
            version=completion.version,
            updates=completion.updates,
            thread=turn.thread,
        )
        return Segment("context", context.author, context.token_ids, context.text, thread=turn.thread), sampled

    @property
    def cut(self) -> bool:
        """Whether the last reply was cut short (by the budget, the model's context, the chat model's own limit) or refused."""
        last = self._turns[self._settled - 1].completion if self._settled else None
        return self._refused or (last is not None and last.stop == "length")

    def bridge(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the run's event loop for a thread that waits. Raises GraphError on the event loop itself."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        else:
            coroutine.close()
            raise GraphError("PolicyChatModel.invoke() would block the event loop: await ainvoke(), or make the node a plain function")
        self._bridged.add(future)
        try:
            return future.result()
        finally:
            self._bridged.discard(future)


_RUN: ContextVar[ChatRun | None] = ContextVar("chat_run", default=None)


def _current() -> ChatRun:
    run = _RUN.get()
    if run is None:
        raise GraphError(
            "PolicyChatModel was called outside a run: it samples from the policy in training, so name its graph as rollout.graph and "
            "use `python -m aipo_graph.train`, evaluate or demo"
        )
    return run


class PolicyChatModel(BaseChatModel):
    """The policy as a chat model, for graphs in which a run's question is the first human message.

    Sampling is the run's: its temperature, token budget and seeds. `bind_tools` shows the policy the tools through its chat template;
    nothing forces it to call one, so a `tool_choice` other than "auto" is a GraphError, as is any other setting. In async nodes
    `ainvoke` and `astream`; in plain ones `invoke`. A reply is streamed once it is whole, in one chunk.

    A tool or a node that raises fails its trace: let a tool answer a bad call with a text, which the policy can learn from.
    """

    cache: Literal[False] = False
    """Never LangChain's cache of answers: each trace samples its own."""
    max_tokens: int | None = None
    """Longest reply; the trace's budget ends it in any case."""

    @property
    def _llm_type(self) -> str:
        return "aipo-policy"

    def bind_tools(
        self, tools: Sequence[dict[str, Any] | type | Callable[..., Any] | Any], *, tool_choice: str | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        if tool_choice not in (None, "auto"):
            raise GraphError(f"tool_choice = {tool_choice!r}: nothing forces the policy to call a tool; leave it out, or say 'auto'")
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        *,
        tools: Sequence[Schema] = (),
        **settings: Any,
    ) -> ChatResult:
        if settings:
            raise GraphError(f"PolicyChatModel has no {next(iter(settings))!r}: sampling is the run's, see the `rollout` settings")
        message = await _current().reply(messages, tools, stop or (), self.max_tokens)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _current().bridge(self._agenerate(messages, stop, **kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        message = (await self._agenerate(messages, stop, **kwargs)).generations[0].message
        chunk = AIMessageChunk(**message.model_dump(exclude={"type"}), chunk_position="last")
        yield ChatGenerationChunk(message=chunk)


def _prefixes(ns: str) -> list[str]:
    """The namespaces of the running tasks, outermost first.

    >>> _prefixes("a:1|b:2")
    ['a:1', 'a:1|b:2']
    """
    parts = ns.split("|")
    return ["|".join(parts[: end + 1]) for end in range(len(parts))]


def _same(message: BaseMessage, ours: AIMessage | None) -> bool:
    """Whether a message still says what our reply said."""

    def said(reply: AIMessage) -> tuple[Any, ...]:
        return (
            reply.content,
            reply.tool_calls,
            [call["args"] for call in reply.invalid_tool_calls],
            reply.additional_kwargs.get("reasoning_content"),
        )

    return isinstance(message, AIMessage) and ours is not None and said(message) == said(ours)
