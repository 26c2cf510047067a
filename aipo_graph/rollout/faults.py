"""What a failed consult's error means: whether another try may help, whose fault it is, and what to do about it."""

import json
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from urllib.error import URLError

from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAuthenticationError,
    ModelError,
    ModelNotFoundError,
    ModelPermissionDeniedError,
)

from aipo_graph.errors import ContextError, EngineError


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
        return status >= 500 or (status in TRANSIENT_STATUS and not is_lasting(error))
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


_OVERFLOW = re.compile(
    r"context.?(?:length|window|size)|(?:maximum|max).?(?:context|model.?len|input|prompt)|above_max_length|reduce the (?:length|size)"
    r"|(?:prompt|input|string|request)[^.]{0,40}too (?:long|large)|too many (?:input )?tokens|exceeds? (?:the|this) (?:model|max)",
    re.IGNORECASE,
)
_FILTERED = re.compile(r"content.?(?:filter|management)|moderation|flagged|safety", re.IGNORECASE)
_EXHAUSTED = re.compile(r"insufficient.?(?:quota|balance|credit)|billing", re.IGNORECASE)
_NO_MODEL = re.compile(
    r"model\b.{0,120}(?:not.?found|does not exist|not supported|decommissioned|not a valid)|(?:no such|invalid|unknown) model\b",
    re.IGNORECASE,
)
_NO_CALLS = re.compile(r"tool.?choice.{0,60}requires|does not support tools|tool.?(?:use|calling).{0,40}not supported", re.IGNORECASE)
LASTING_STATUS = frozenset({401, 402, 404, 405, 410})


def _said(error: BaseException) -> str:
    return f"{error} {getattr(error, 'body', '')}"[:4000]


def overflows(error: BaseException) -> bool:
    """Whether a request was refused for its length."""
    if isinstance(error, (ContextOverflowError, ContextError)):
        return True
    status = _status(error)
    return status == 413 or (status in (400, 422) and _OVERFLOW.search(_said(error)) is not None)


def is_lasting(error: BaseException) -> bool:
    """Whether a model's client will fail at every request: key, model name, address or package are wrong, or the account is used up."""
    status, text = _status(error), _said(error)
    if isinstance(error, (ImportError, ModelAuthenticationError, ModelNotFoundError)):
        return True
    if status == 429 or (status == 400 and not overflows(error)):
        patterns = (_EXHAUSTED,) if status == 429 else (_NO_MODEL, _NO_CALLS)
        return any(pattern.search(text) for pattern in patterns)
    if status == 403 or isinstance(error, ModelPermissionDeniedError):
        return not _FILTERED.search(text)  # some providers refuse a single text so
    return status in LASTING_STATUS


def remedy(error: BaseException, name: str) -> str:
    """What to do about a provider's lasting refusal of agent ``name``'s request; nothing where we do not know."""
    status, text = _status(error), _said(error)
    if overflows(error):
        return f"; too long for the model: shorten the agent's prompt file, lower agents.max_tokens, or change agents.models.{name}"
    if status in (400, 403) and _FILTERED.search(text):
        return f"; the provider filters this content: name another model in agents.models.{name}"
    if status == 401 or isinstance(error, ModelAuthenticationError):
        return "; set the provider's API key in the environment (such as OPENAI_API_KEY; VLLM_API_KEY for a vLLM server)"
    if status == 403 or isinstance(error, ModelPermissionDeniedError):
        return f"; the key may not use this model: name another in agents.models.{name}, or another key"
    if isinstance(error, ImportError):
        return "; install that package"
    if status in (402, 429) and is_lasting(error):
        return f"; the account behind the key is used up: fill it, or name another model in agents.models.{name}"
    if status == 400 and _NO_CALLS.search(text):
        return "; start vLLM with --enable-auto-tool-choice --tool-call-parser NAME, or name a model that calls tools"
    if is_lasting(error):
        return f"; the provider has no such model or address: correct agents.models.{name}"
    return ""
