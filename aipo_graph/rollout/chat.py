"""The policy as a LangChain chat model: a graph written with messages and `bind_tools` trains without being rewritten.

A run reaches its chat models through a context variable, not through LangGraph's run context: that one has the graph's own schema, and
does not reach a sub-agent that a tool invokes; a context variable is copied into tasks and into LangChain's threads.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeVar
from uuid import UUID

from jsonschema import Draft202012Validator
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, BaseCallbackHandler, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    InvalidToolCall,
    ToolCall,
    ToolMessage,
    convert_to_messages,
    message_chunk_to_message,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.config import get_config
from langgraph.errors import GraphBubbleUp, ParentCommand
from langgraph.types import Command
from pydantic import model_validator

from aipo_graph.errors import GraphError
from aipo_graph.messages import ChatFormat
from aipo_graph.rollout.ledger import Ledger
from aipo_graph.types import Completion, Reply, Segment, derive_seed

Schema = Mapping[str, Any]
T = TypeVar("T")


ROLES = frozenset({"human", "user", "ai", "assistant", "system", "developer"})
"""What a message may be called that is no object yet."""
THREADS = 1024
"""Plain nodes at once: each waits in a thread of its own while the policy writes, and an engine may wait for all of them to have asked."""


@lru_cache(maxsize=64)
def with_threads(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """The loop, with room for its graphs' plain nodes: asyncio's own few threads would wait for each other for ever."""
    loop.set_default_executor(ThreadPoolExecutor(THREADS, "graph"))
    return loop


Said = tuple[str, str]
"""A message's type, and which call it answers, if one, with its text."""


def _said(message: BaseMessage) -> Said:
    return message.type, f"{getattr(message, 'tool_call_id', '')}\n{message.text}"


class OutOfTokens(GraphBubbleUp):
    """The trace's token budget is used up. LangGraph's retries and LangChain's middleware let a GraphBubbleUp pass."""


class Misfit(GraphBubbleUp):
    """A reply is not what the graph asked for, such as a call of a given tool: the policy's own doing."""


class Heard(NamedTuple):
    """A part of a prompt."""

    segment: Segment
    of: str = ""
    """Of a helper's words: which message they are."""


@dataclass(eq=False, slots=True)
class Turn:
    """One reply of the policy, or a tool's result that it writes itself, and what it was sampled from."""

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
    added: tuple[Heard, ...]
    """The prompt after the parent's reply, or all of it."""
    rewritten: bool = False
    """Goes on from an earlier reply whose exact tokens could not be kept: one of the same node, or with the same first message."""
    prompt_ids: tuple[int, ...] = field(init=False)
    origin: tuple[tuple[str, ...], ...] = ()
    """Its tasks, outermost first, each as node and place among its superstep's tasks: unlike `ns` the same in every repetition."""
    seed: int = 0
    completion: Completion | None = None
    message: AIMessage | None = None
    text: str = ""
    thread: str | None = None

    def __post_init__(self) -> None:
        before = (*self.parent.prompt_ids, *self.parent.completion.token_ids) if self.parent and self.parent.completion else ()
        self.prompt_ids = (*before, *(token for part in self.added for token in part.segment.token_ids))

    @property
    def task(self) -> str:
        return self.ns.partition("|")[0]


class ChatRun(BaseCallbackHandler):
    """What the chat models of one graph run sampled. As a callback handler it learns which LangGraph task starts, and starts again.

    Rows: a prompt that goes on from an earlier reply continues its row with exactly the sampled ids. Any other prompt opens a row: a new
    conversation, a second branch of one, or one whose history the template or the graph rewrote, which `rewrites` counts. `invalid_calls`
    counts tool calls that could not be read, `misfits` replies that were not what the graph asked for.

    Words of ``helpers``, the first time that the policy reads them, are agent segments: the tokens that stand wholly inside the message's
    content. Where ``alone``, no tool among the helpers runs: the policy goes on in the tool's turn and writes the result.

    Seeds depend on the asking node, the prompt, and how many equal requests came before, not on who came first. Order does not either:
    a superstep's replies are sorted by its tasks once it has ended; within one task they stand as they were asked for.
    """

    run_inline = True

    def __init__(
        self,
        ledger: Ledger,
        chat: ChatFormat,
        *,
        budget: int,
        seed: int,
        temperature: float,
        helpers: Collection[str] = (),
        longest: int = 256,
        alone: bool = False,
    ) -> None:
        self.segments: tuple[Segment, ...] = ()
        self.rewrites = 0
        self.invalid_calls = 0
        self.misfits = 0
        self.unanswered = False
        """The run ended within a result that the policy wrote, or before the reply to it."""
        self.strangers: set[str] = set()
        """Chat models that are not the policy."""
        self._helpers = frozenset(helpers)
        self._longest = longest
        self._alone = alone
        self._helping: dict[UUID, tuple[str, frozenset[Said]]] = {}
        """A helper's node that runs -> its name, and the messages that it was given."""
        self._said: dict[Said, str] = {}
        """What helpers' nodes wrote -> whose."""
        self._known: set[str] = set()
        """Messages whose words are agent segments already."""
        self._own: dict[str, tuple[BaseMessage, ...]] = {}
        """Reply id -> what the policy said before it and the graph did not see: calls, and their results by itself."""
        self._ledger = ledger
        self._chat = chat
        self._budget = budget
        self._seed = seed
        self._temperature = temperature
        self._loop = asyncio.get_running_loop()
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

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        *_, name = (serialized or {}).get("id") or ["?"]
        if name != PolicyChatModel.__name__:
            self.strangers.add(str(name))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A helper's node has ended: what it wrote are its words."""
        name, given = self._helping.pop(run_id, ("", frozenset()))
        for said in {*map(_said, _messages(outputs if name else ()))} - given:
            self._said[said] = min(name, self._said.get(said, name))  # whoever of two that say the same ends first

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A helper's node has failed, or handed over to its parent's graph with what it wrote."""
        self.on_chain_end(error.args[0] if isinstance(error, ParentCommand) else (), run_id=run_id)

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, tags: list[str] | None = None, **kwargs: Any) -> None:
        """A node's task starts. Where it does so again, LangGraph retries it: what the failed attempt sampled is no part of the trace."""
        if not any(tag.startswith("graph:step:") for tag in tags or ()):
            return
        metadata = kwargs.get("metadata") or {}
        if (node := metadata.get("langgraph_node")) in self._helpers:
            self._helping[run_id] = str(node), frozenset(map(_said, _messages(inputs)))
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

    async def reply(
        self, messages: Sequence[BaseMessage], tools: Sequence[Schema], stop: Sequence[str], limit: int | None, choice: Any = None
    ) -> AIMessage:
        """Samples the next reply.

        Raises OutOfTokens, EngineError, Misfit where it is not the call that ``choice`` wants, and GraphError once the run is over:
        a thread may outlive it.
        """
        ns = str(get_config()["metadata"].get("langgraph_checkpoint_ns", ""))
        shown = tuple(self._shortened(message) for message in messages)
        turn = self._prompt(shown, tuple(tools), ns)
        message = self._finish(turn, await self._sample(turn, stop, limit))
        before: tuple[BaseMessage, ...] = ()
        offered = self._helpers.intersection(map(_name, tools)) if self._alone else ()
        while calls := self._calls(message, offered):
            self.unanswered = True
            results, turn = await self._by_itself((*turn.messages, message), calls, turn)
            before += (message, *results)
            message = self._finish(turn, await self._sample(turn, stop, limit))
            self.unanswered = False
        self._own[str(message.id)] = before
        asked = next((m for m in before if isinstance(m, AIMessage)), message)
        if not _fits(asked if _wanted(choice) in self._helpers else message, tools, choice):
            self.misfits += 1
            raise Misfit
        return message.model_copy(deep=True)

    async def _sample(self, turn: Turn, stop: Sequence[str] = (), limit: int | None = None) -> Completion:
        if self._ended:
            raise GraphError("PolicyChatModel was called after its run had ended: await or join what a node starts")
        # Of what runs beside it nothing counts before its superstep has ended: who is faster must not matter.
        counting = (old for i, old in enumerate(self._turns) if i < self._settled or old.task == turn.task)
        left = self._budget - sum(len(old.completion.token_ids) for old in counting if old.completion)
        if left <= 0:
            self._refused = True
            raise OutOfTokens
        running = accumulate(turn.ns.split("|"), "{}|{}".format)  # the namespaces of the running tasks, outermost first
        turn.origin = tuple(self._tasks[ns] for ns in running if ns in self._tasks)
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
        if gone := turn not in self._turns:  # its attempt has failed meanwhile
            self._ledger.forget([completion])
        turn.completion, turn.text = completion, self._chat.decode(completion.token_ids)
        if gone and turn.parent is not None and self._alone:
            raise asyncio.CancelledError  # nobody waits for what would follow
        return completion

    def _calls(self, message: AIMessage, offered: Collection[str]) -> list[ToolCall]:
        """The calls of helpers in a reply. Beside other calls they cannot be answered by the policy, and are invalid."""
        calls = [call for call in message.tool_calls if call["name"] in offered]
        if calls and len(calls) < len(message.tool_calls):
            message.tool_calls = [call for call in message.tool_calls if call not in calls]
            message.invalid_tool_calls += [
                InvalidToolCall(
                    type="invalid_tool_call",
                    name=call["name"],
                    args=json.dumps(str(call["args"])),
                    id=call["id"],
                    error="alone, a helper cannot be called beside other tools",
                )
                for call in calls
            ]
            return []
        return calls

    async def _by_itself(self, messages: tuple[BaseMessage, ...], calls: Sequence[ToolCall], turn: Turn) -> tuple[list[ToolMessage], Turn]:
        """The results of a reply's calls as the policy writes them, one turn each, and the turn of the reply that follows."""
        results = [ToolMessage("", tool_call_id=call["id"] or "", name=call["name"]) for call in calls]
        between = self._chat.turn_of(messages, results, turn.template, turn.text, turn.tools)
        if between is None:
            raise GraphError(
                f"the chat template does not write {calls[0]['name']}'s results as they are: the policy cannot answer its own call; "
                "name a graph without this tool as rollout.solo"
            )
        opening, *closings = between
        if not all(map(self._chat.closing, closings)):
            raise GraphError(f"the chat template writes nothing after {calls[0]['name']}'s results: nobody could tell where one ends")
        for result, after in zip(results, closings, strict=True):
            end = self._chat.closing(after)
            turn = self._after(turn, opening, result.name or turn.node)
            if (await self._sample(turn, (end,), self._longest)).stop == "length":
                self._refused = True
                raise OutOfTokens
            said, opening = self._chat.written(turn.text, after, end)
            result.content = said
        last = self._after(turn, opening, turn.node)
        last.messages = (*messages, *results)
        last.template = self._chat.render(last.messages, turn.tools)
        return results, last

    def _after(self, turn: Turn, text: str, author: str) -> Turn:
        """The turn that goes on from another's exact tokens with this text of the template."""
        added = Heard(Segment("context", author, self._chat.encode(text), text))
        return Turn(turn.node, turn.ns, turn.template, turn.tools, turn.messages, turn, (added,))

    def _finish(self, turn: Turn, completion: Completion) -> AIMessage:
        message = self._chat.parse(turn.text, turn.tools, seed=turn.seed)
        message.id = f"aipo-{turn.seed:016x}"
        message.response_metadata = {"model_name": "policy", "finish_reason": completion.stop}
        read, written = len(turn.prompt_ids), len(completion.token_ids)
        message.usage_metadata = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
        turn.message = message
        return message

    def _prompt(self, messages: tuple[BaseMessage, ...], tools: tuple[Schema, ...], ns: str) -> Turn:
        """What to sample from: after the newest of our replies its exact tokens, and only the text in between tokenized."""
        node = "/".join(part.partition(":")[0] for part in ns.split("|") if ":" in part)
        messages = tuple(each for message in messages for each in (*self._own.get(str(message.id), ()), message))
        template = self._chat.render(messages, tools)
        ours = {turn.message.id: turn for turn in self._turns if turn.message}
        known = [(index, ours[message.id]) for index, message in enumerate(messages) if message.id in ours]
        parent, text, start = None, template, -1
        for index, turn in reversed(known):
            between = self._chat.follow(messages, index, turn.template, turn.text, tools) if _same(messages[index], turn.message) else None
            if between is not None:
                parent, text, start = turn, between, index
                break
        rewritten = any(turn.node == node or turn.messages[0] == messages[0] for index, turn in known if index > start)

        def write(shown: Sequence[BaseMessage]) -> str | None:
            if parent is None:
                return self._chat.render(shown, tools)
            return self._chat.follow(shown, start, parent.template, parent.text, tools)

        author = self._author(messages[start + 1 :], tools, node) if parent else node
        added = self._heard(text, messages, start + 1, author, write)
        return Turn(node, ns, template, tools, messages, parent, added, rewritten)

    def _author(self, messages: Sequence[BaseMessage], tools: Sequence[Schema], node: str) -> str:
        """Of what stands between two replies: one tool's results are the tool's, if it is not a name that the policy made up."""
        names = {message.name if isinstance(message, ToolMessage) else None for message in messages}
        known = {tool.get("function", {}).get("name") for tool in tools}
        return (names.pop() if len(names) == 1 and names <= known else None) or node

    def _helper(self, message: BaseMessage) -> str | None:
        """Whose words a message holds, if a helper's."""
        if str(message.id) in self._own or (isinstance(message, ToolMessage) and (self._alone or message.status == "error")):
            return None  # alone, no helper's tool runs: the policy wrote it
        return message.name if message.name in self._helpers else self._said.get(_said(message))

    def _shortened(self, message: BaseMessage) -> BaseMessage:
        """A helper's message as the policy reads it: no longer than `agents.max_reply_tokens`."""
        name = self._helper(message) if self._helpers else None
        if not name:
            return message
        text = self._chat.cut(str(message.text), self._longest)
        shown = message if text == message.text else message.model_copy(update={"content": text})
        self._said.setdefault(_said(shown), name)
        return shown

    def _heard(
        self, text: str, messages: Sequence[BaseMessage], start: int, author: str, write: Callable[[Sequence[BaseMessage]], str | None]
    ) -> tuple[Heard, ...]:
        """The template's text as segments, in which helpers' words among ``messages[start:]`` stand by themselves."""
        heard = [index for index, message in enumerate(messages) if index >= start and str(message.text).strip()]
        whose = {index: name for index in heard if (name := self._helper(messages[index]))}
        if not whose:
            return (Heard(Segment("context", author, self._chat.encode(text), text)),)
        places = self._chat.places(text, messages, tuple(whose), write)
        if places is None:
            raise GraphError(
                f"the chat template does not write the words of {', '.join(sorted(set(whose.values())))} as they are, so that they cannot "
                "be told from its own: leave these names out of rollout.helpers"
            )
        spans = [(str(index), first, last) for index, (first, last) in zip(whose, places, strict=True)]
        parts = []
        for ids, words, index in self._chat.pieces(text, spans):
            if index is None:
                parts.append(Heard(Segment("context", author, ids, words)))
                continue
            message = messages[int(index)]
            reply = message.response_metadata.get("reply")
            mu = reply.logprobs if isinstance(reply, Reply) and reply.token_ids == ids else None
            key = str(getattr(message, "tool_call_id", None) or message.id or (message.type, words))
            parts.append(Heard(Segment("agent", whose[int(index)], ids, words, logprobs=mu), key))
        return tuple(parts)

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

    def _written(self, turn: Turn) -> tuple[Segment, ...]:
        """A turn as segments, on its parent's row unless another went on there before."""
        completion = turn.completion
        assert completion is not None
        parent, added = turn.parent, list(turn.added)
        if parent is not None and parent.thread is not None and self._last[parent.thread] is parent:
            turn.thread = parent.thread
        else:
            self._names[turn.node] += 1
            count = self._names[turn.node]
            turn.thread = turn.node if count == 1 else f"{turn.node}/{count}"
            if parent is not None:
                added = added if any(part.of for part in added) else []
                new = sum(len(part.segment.token_ids) for part in added)
                ids = turn.prompt_ids[: len(turn.prompt_ids) - new]
                added.insert(0, Heard(Segment("context", turn.node, ids, self._chat.decode(ids))))
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
        return (*(self._first(part, turn.thread) for part in added), sampled)

    def _first(self, part: Heard, thread: str) -> Segment:
        """The part on its row. A helper's words are learned from once: in another branch, or a history told anew, they are context."""
        again = part.of in self._known
        self._known |= {part.of} - {""}
        segment = replace(part.segment, thread=thread)
        return replace(segment, source="context", logprobs=None) if again else segment

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

    Sampling is the run's: its temperature, token budget and seeds; any other setting is a GraphError. `bind_tools` shows the policy the
    tools through its chat template. Nothing forces it to call one, since the learner could not know the probabilities of constrained
    sampling: with a `tool_choice`, as `with_structured_output` and `response_format` set it, a reply without such a call, or with
    arguments that do not fit, ends the trace with 0, and the policy learns from that. In async nodes `ainvoke` and `astream`; in plain
    ones `invoke`. A reply is streamed once it is whole, in one chunk.

    A tool or a node that raises fails its trace: let a tool answer a bad call with a text, which the policy can learn from.
    """

    cache: Literal[False] = False
    """Never LangChain's cache of answers: each trace samples its own."""
    max_tokens: int | None = None
    """Longest reply; the trace's budget ends it in any case."""

    @model_validator(mode="before")
    @classmethod
    def _no_other(cls, given: Any) -> Any:
        _refuse({name for name in given if name not in cls.model_fields} if isinstance(given, dict) else ())
        return given

    @property
    def _llm_type(self) -> str:
        return "aipo-policy"

    def bind_tools(
        self, tools: Sequence[dict[str, Any] | type | Callable[..., Any] | Any], *, tool_choice: str | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], tool_choice=tool_choice, **kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        *,
        tools: Sequence[Schema] = (),
        tool_choice: Any = None,
        **settings: Any,
    ) -> ChatResult:
        _refuse(settings)
        message = await _current().reply(messages, tools, stop or (), self.max_tokens, tool_choice)
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


def _refuse(settings: Iterable[str]) -> None:
    for name in settings:
        raise GraphError(f"PolicyChatModel has no {name!r}: sampling is the run's, see the `rollout` settings")


def _fits(message: AIMessage, tools: Sequence[Schema], choice: Any) -> bool:
    """Whether a reply has the call that a `tool_choice` wants, in any provider's form, with arguments that the tool takes."""
    if choice in (None, False, "auto", "none") or (isinstance(choice, dict) and choice.get("type") in ("auto", "none")):
        return True
    named = _wanted(choice)
    schemas = {_name(tool): tool.get("function", {}).get("parameters") or {} for tool in tools}
    made = [call for call in message.tool_calls if call["name"] in schemas and named in (None, call["name"])]
    return bool(made) and all(Draft202012Validator(schemas[call["name"]]).is_valid(call["args"]) for call in made)


def _wanted(choice: Any) -> str | None:
    """The tool that a `tool_choice` names, if it does."""
    named = choice.get("function", choice).get("name") if isinstance(choice, dict) else choice
    return named if isinstance(named, str) and named not in ("any", "required", "auto", "none") else None


def _name(tool: Schema) -> str:
    return str(tool.get("function", tool).get("name"))


def _messages(outputs: Any) -> Iterator[BaseMessage]:
    """The messages in what a node returned."""
    match outputs:
        case BaseMessage():
            yield message_chunk_to_message(outputs)
        case Command():
            yield from _messages(outputs.update)
        case dict():
            if {"role", "content"} <= outputs.keys() and outputs["role"] in ROLES:
                yield from convert_to_messages([outputs])
            else:
                for value in outputs.values():
                    yield from _messages(value)
        case (str() as role, str()) if role in ROLES:
            yield from convert_to_messages([outputs])
        case list() | tuple():
            for value in outputs:
                yield from _messages(value)


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
