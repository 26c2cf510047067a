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
from langchain_core.exceptions import ModelError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import StructuredTool

from aipo_graph.errors import AgentError, AipoError, ConfigError, ToolError
from aipo_graph.rollout.prompts import Prompts
from aipo_graph.types import Reply, Request

Tool = Callable[[str], Awaitable[str]]
"""An async function of the query; its name and docstring are what a chat model sees of it. Raises ToolError with a text for the agent."""

TRANSIENT_STATUS = frozenset({408, 409, 429})
TRANSIENT = (TimeoutError, ConnectionError, json.JSONDecodeError, HTTPException, URLError)
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


BREAK_AFTER = 5
"""Failed consults in a row after which an agent is spared."""


@dataclass
class Breaker:
    """Spares an agent that is down: once BREAK_AFTER consults in a row have failed, one per pause is let through, until one succeeds."""

    failed: int = 0
    closed_until: float = 0.0

    def admit(self, name: str, pause: float) -> None:
        """Raises AgentError for a consult that is not let through."""
        if self.failed < BREAK_AFTER:
            return
        wait = self.closed_until - time.monotonic()
        if wait > 0:
            raise AgentError(f"agent {name!r}: not asked, its last {self.failed} consults failed; the next try is in {wait:.0f} s")
        self.closed_until = time.monotonic() + pause

    def record(self, answered: bool, pause: float) -> None:
        self.failed = 0 if answered else self.failed + 1
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
    attempts: int = 3
    timeout: float = 90.0
    """Seconds per consult, retries included. Each try has an equal share, so that one that hangs leaves time for the next.
    In a run, `agents.attempts` and `agents.timeout` replace both."""
    backoff: float = 0.5
    """Seconds: the shortest wait between two tries. Waits double, with jitter, up to 16 times this; Retry-After is honoured."""
    pause: float = 10.0
    """Seconds between tries of an agent that is down."""
    _breaker: Breaker = field(default_factory=Breaker, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.tools and self.model is None:
            raise AgentError(f"agent {self.name!r} has neither a tool nor a model: give it one")

    async def __call__(self, request: Request, prompts: Prompts) -> Reply:
        """Answers one request. Raises AgentError when the tries or the time are used up, or while an agent that is down is spared."""
        self._breaker.admit(self.name, self.pause)
        try:
            reply = await self._answer(request, prompts)
        except AgentError:
            self._breaker.record(False, self.pause)
            raise
        self._breaker.record(True, self.pause)
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
            raise AgentError(f"agent {self.name!r}: {type(error).__name__}: {error}") from error

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
        system = prompts.render(self.prompt or self.name, question=request.question, query=request.query, transcript=request.transcript)
        messages: list[BaseMessage] = [SystemMessage(system), HumanMessage(request.query)]
        for _ in range(self.max_turns):
            answer = await bound.ainvoke(messages)
            messages.append(answer)
            calls = [*answer.tool_calls, *answer.invalid_tool_calls] if isinstance(answer, AIMessage) else []
            if not calls:
                return Reply(str(answer.text).strip())
            for call in calls:
                messages.append(ToolMessage(await _use(tools, call), tool_call_id=call["id"] or ""))
        raise AgentError(f"no answer within {self.max_turns} turns (raise Agent.max_turns)")


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
        return f"error: {type(error).__name__}: {error}"
