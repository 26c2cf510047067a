"""Helper agents: what a consult reaches. An agent is an instance: a name, tools, and a chat model with a prompt or none."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.error import URLError

import tenacity
from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAuthenticationError,
    ModelError,
    ModelNotFoundError,
    ModelPermissionDeniedError,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import StructuredTool

from aipo_graph.errors import AgentError, AipoError, ConfigError, EngineError, ToolError
from aipo_graph.rollout.prompts import FIELDS, Prompts
from aipo_graph.types import Reply, Request, derive_seed

Tool = Callable[[str], Awaitable[str]]
"""An async function of the query; its name and docstring are what a chat model sees of it. Raises ToolError with a text for the agent."""


class BadBody(Exception):
    """A client could not read what its server answered with status 200: a proxy's page, JSON of another shape."""


TRANSIENT_STATUS = frozenset({408, 409, 429})
TRANSIENT = (TimeoutError, ConnectionError, json.JSONDecodeError, HTTPException, URLError, BadBody)
TRANSIENT_NAMES = frozenset(
    {
        *("TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError", "DecodingError"),  # httpx
        *("APIConnectionError", "APIResponseValidationError"),  # openai, anthropic
        *("ConnectionError", "Timeout", "ChunkedEncodingError", "ContentDecodingError"),  # requests
        *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
    }
)
"""Classes of clients that we do not import, their subclasses included."""


def is_transient(error: BaseException) -> bool:
    """Whether another try may help: time-outs, resets, bad bodies, HTTP 408, 409, 429 and 5xx, whichever client raised them."""
    status = _status(error)
    if status is not None and status >= 400:
        return status in TRANSIENT_STATUS or status >= 500
    if isinstance(error, ModelError):
        return error.is_retryable
    if isinstance(error, EngineError):
        return error.__cause__ is not None and is_transient(error.__cause__)
    return isinstance(error, TRANSIENT) or not TRANSIENT_NAMES.isdisjoint(cls.__name__ for cls in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries, itself or on its response."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return int(value)
    return None


def retry_after(error: BaseException | None) -> float:
    """The seconds for which the server asked to be left alone (Retry-After: seconds or a date), else 0."""
    for holder in (getattr(error, "response", None), error):
        headers = getattr(holder, "headers", None)
        value = str(headers.get("retry-after") or "") if headers is not None and hasattr(headers, "get") else ""
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            return float(value)
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            continue
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return 0.0


_OVERFLOW = re.compile(r"context.?(?:length|window)|maximum context|prompt is too long", re.IGNORECASE)
_FILTERED = re.compile(r"content.?(?:filter|management)", re.IGNORECASE)


def remedy(error: BaseException, name: str) -> str:
    """What to do about a provider's lasting refusal of agent ``name``'s request; nothing where we do not know."""
    status, text = _status(error), f"{error} {getattr(error, 'body', '')}"
    if status == 401 or isinstance(error, ModelAuthenticationError):
        return "; set the provider's API key in the environment (such as OPENAI_API_KEY)"
    if status == 403 or isinstance(error, ModelPermissionDeniedError):
        return f"; the key may not use this model: name another in agents.models.{name}, or another key"
    if status == 404 or isinstance(error, ModelNotFoundError):
        return f"; the provider has no such model or address: correct agents.models.{name}"
    if isinstance(error, ContextOverflowError) or (status in (400, 413, 422) and _OVERFLOW.search(text)):
        return f"; too long for the model: shorten the agent's prompt file, lower agents.max_tokens, or change agents.models.{name}"
    if status == 400 and _FILTERED.search(text):
        return f"; the provider filters this content: name another model in agents.models.{name}"
    return ""


BREAK_AFTER = 5
"""Failed consults in a row after which an agent is spared."""


@dataclass
class Breaker:
    """Spares an agent that is down: once BREAK_AFTER consults in a row have failed, one per pause is let through, until one succeeds."""

    failed: int = 0
    reason: str = ""
    closed_until: float = 0.0

    def admit(self, name: str, pause: float) -> None:
        """Raises AgentError for a consult that is not let through."""
        if self.failed < BREAK_AFTER:
            return
        wait = self.closed_until - time.monotonic()
        if wait > 0:
            raise AgentError(
                f"agent {name!r}: not asked, its last {self.failed} consults failed; the next try is in {wait:.0f} s (last: {self.reason})"
            )
        self.closed_until = time.monotonic() + pause

    def record(self, error: AgentError | None, pause: float) -> None:
        self.failed, self.reason = (0, "") if error is None else (self.failed + 1, str(error))
        if self.failed == BREAK_AFTER:
            self.closed_until = time.monotonic() + pause


@dataclass(frozen=True)
class Agent:
    """A helper. Without a model its first tool answers the query; with one, the model does, calling tools as it likes.

    >>> async def lookup(query: str) -> str:
    ...     "Looks a term up."
    ...     return {"B": "2695-"}[query]
    >>> asyncio.run(Agent("knowledge", tools=(lookup,))(Request("knowledge", "B"), Prompts.empty())).text
    '2695-'
    """

    name: str
    tools: tuple[Tool, ...] = ()
    model: BaseChatModel | None = None
    prompt: str | None = None
    """Prompt file of the model's system message; default: the agent's name."""
    max_turns: int = 4
    """Model calls per consult, tool turns included."""
    max_tokens: int = 4096
    """Tokens that the model may write per consult, thinking included, as far as it counts them. In a run, `agents.max_tokens` times
    ``max_turns`` replaces it."""
    concurrency: int = 64
    """Consults at once; the others wait, and the time that they wait is not part of their ``timeout``. In a run, `agents.concurrency`
    replaces it. An agent serves one event loop."""
    attempts: int = 3
    timeout: float = 90.0
    """Seconds per consult, retries included. Each try has an equal share, so that one that hangs leaves time for the next.
    In a run, `agents.attempts` and `agents.timeout` replace both."""
    backoff: float = 0.5
    """Seconds: the shortest wait between two tries. Waits double, with jitter, up to 16 times this; Retry-After is honoured."""
    pause: float = 10.0
    """Seconds between tries of an agent that is down."""
    _breaker: Breaker = field(default_factory=Breaker, init=False, repr=False, compare=False)
    _room: asyncio.Semaphore = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.tools and self.model is None:
            raise AgentError(f"agent {self.name!r} has neither a tool nor a model: give it one")
        object.__setattr__(self, "_room", asyncio.Semaphore(self.concurrency))

    async def __call__(self, request: Request, prompts: Prompts) -> Reply:
        """Answers one request. Raises AgentError when the tries or the time are used up, or while an agent that is down is spared."""
        async with self._room:
            self._breaker.admit(self.name, self.pause)
            try:
                reply = await self._answer(request, prompts)
            except AgentError as error:
                answered = isinstance(error.__cause__, AgentError)  # to no avail, but it is up
                self._breaker.record(None if answered else error, self.pause)
                raise
            self._breaker.record(None, self.pause)
            return reply

    async def _answer(self, request: Request, prompts: Prompts) -> Reply:
        jitter = tenacity.wait_random_exponential(multiplier=2 * self.backoff, min=self.backoff, max=16 * self.backoff)
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_before_delay(self.timeout),
            wait=lambda state: max(jitter(state), retry_after(state.outcome.exception() if state.outcome else None)),
            retry=tenacity.retry_if_exception(is_transient),
            reraise=True,
        )
        try:
            async with asyncio.timeout(self.timeout):
                return await retrying(self._try, request, prompts)
        except ConfigError:
            raise
        except TimeoutError as error:
            raise AgentError(f"agent {self.name!r}: no answer in time (agents.timeout = {self.timeout:g} s for all tries)") from error
        except AipoError as error:
            raise AgentError(f"agent {self.name!r}: {error}") from error
        except Exception as error:  # the agent boundary
            raise AgentError(f"agent {self.name!r}: {type(error).__name__}: {_line(error)}{remedy(error, self.name)}") from error

    async def _try(self, request: Request, prompts: Prompts) -> Reply:
        async with asyncio.timeout(self.timeout / self.attempts):
            if self.model is not None:
                return await self._converse(self.model, request, prompts)
            try:
                return Reply(await self.tools[0](request.query))
            except ToolError as error:
                return Reply(str(error))

    async def _converse(self, model: BaseChatModel, request: Request, prompts: Prompts) -> Reply:
        tools = {tool.__name__: tool for tool in self.tools}
        bound = model.bind_tools([StructuredTool.from_function(coroutine=tool) for tool in self.tools]) if tools else model
        asked = {name: FOREIGN.sub(" ", getattr(request, name)) for name in FIELDS}
        system = prompts.render(self.prompt or self.name, **asked)
        messages: list[BaseMessage] = [SystemMessage(system), HumanMessage(asked["query"].strip() or "?")]  # some refuse an empty one
        seeded = getattr(model, "seed", None) is not None
        used = 0
        for turn in range(self.max_turns):
            answer = await _call(bound, messages, {"seed": derive_seed(request.seed, turn)} if seeded else {})
            messages.append(answer)
            calls = [*answer.tool_calls, *answer.invalid_tool_calls]
            if not calls:
                return _reply(answer)
            used += (answer.usage_metadata or {"output_tokens": 0})["output_tokens"]
            if used >= self.max_tokens:
                raise AgentError(f"no answer within {used} tokens (raise agents.max_tokens)")
            for number, call in enumerate(calls):
                shown = await _use(tools, call) if number < MOST_CALLS else f"error: more than {MOST_CALLS} calls at once"
                messages.append(ToolMessage(FOREIGN.sub(" ", shown), tool_call_id=call["id"] or ""))
        raise AgentError(f"no answer within {self.max_turns} turns (raise Agent.max_turns)")


MOST_CALLS = 16
"""Tool calls of one turn that are carried out."""
FOREIGN = re.compile(r"<[|\uff5c][^\s<>]{1,64}[|\uff5c]>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")
"""Control tokens of other models than the policy, which a server may read as such wherever they stand."""


async def _call(model: Runnable[Any, Any], messages: list[BaseMessage], sampling: Mapping[str, Any]) -> AIMessage:
    """One turn of a chat model. Raises BadBody where its client stumbled over the answer, and whatever else the client raises."""
    try:
        answer = await model.ainvoke(messages, **sampling)
    except (ValueError, TypeError, LookupError) as error:
        raise BadBody(f"{type(error).__name__}: {_line(error)}") from error
    if not isinstance(answer, AIMessage):
        raise BadBody(f"the model answered with a {type(answer).__name__}, not an AIMessage")
    return answer


def _reply(answer: AIMessage) -> Reply:
    """What is spliced in: the answer's text, without its reasoning and the blanks around it, and its ids where the model knows them."""
    given = answer.response_metadata.get("reply")
    reply = given if isinstance(given, Reply) else Reply(_without_reasoning(str(answer.text)).strip())
    if not reply.text:
        reason = answer.response_metadata.get("finish_reason") or answer.response_metadata.get("stop_reason")
        if reason in ("length", "max_tokens"):
            raise AgentError("all tokens went into reasoning, none into an answer (raise agents.max_tokens)")
        if reason in ("content_filter", "refusal") or answer.additional_kwargs.get("refusal"):
            raise AgentError("the provider's content filter left no answer; name another model in agents.models")
    return reply


def _without_reasoning(text: str) -> str:
    """The text after its reasoning part, whose opening tag may stand in the prompt; one that is not closed is all reasoning."""
    _, closing, tail = text.rpartition("</think>")
    return tail if closing else text.partition("<think>")[0]


def _line(error: BaseException) -> str:
    """An error's message on one line of bounded length: a server may have written it."""
    return " ".join(str(error)[:2000].split())[:300]


async def _use(tools: Mapping[str, Tool], call: Mapping[str, Any]) -> str:
    """What a model is shown of its tool call, a failure of the tool included; a transient one is left to the retries."""
    if call["name"] not in tools:
        return f"error: there is no tool {call['name']!r}; the tools are {', '.join(tools) or 'none'}"
    if not isinstance(call["args"], Mapping):
        return f"error: the arguments of {call['name']!r} are not a JSON object"
    try:
        return await tools[call["name"]](str(next(iter(call["args"].values()), "")))
    except ToolError as error:
        return f"error: {error}"
    except Exception as error:  # the tool boundary
        if is_transient(error):
            raise
        return f"error: {type(error).__name__}: {_line(error)}"
