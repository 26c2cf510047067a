"""HTTP to one vLLM server. Retries live here and nowhere else."""

import json
import os
from typing import Any, Self

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from aipo_graph.errors import EngineError
from aipo_graph.forward import first_line

ATTEMPTS = 3
PATIENCE = 900.0
"""Seconds for a request that is no sampling: writing or loading weights takes minutes for large models."""
IDLE = 2.0
"""Seconds for which an unused connection is kept: less than vLLM's 5, after which it would be closed under a request."""
TRANSIENT = (408, 429, 500, 502, 503, 504)


class Refused(EngineError):
    """An answer other than 2xx."""

    def __init__(self, message: str, status: int = 0) -> None:  # 0: from a pickle, which brings the status afterwards
        super().__init__(message)
        self.status = status


class Unanswered(EngineError):
    """No answer: refused connection, reset, timeout."""


class Client:
    """``load`` counts the requests under way, ``runs`` the graph runs that stay with this server; ``longest`` bounds an answer's bytes."""

    def __init__(self, url: str, seconds: float, longest: int = 2**28) -> None:
        key = os.environ.get("VLLM_API_KEY")
        self.url = url.rstrip("/")
        self.load = self.runs = 0
        self._seconds, self._longest = seconds, longest
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def sample(self, path: str, body: dict[str, Any]) -> Any:
        """A request that is tried again, with the same seed, where it or its answer was lost."""
        self.load += 1
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(ATTEMPTS),
                wait=wait_random_exponential(multiplier=0.5, max=8),
                retry=retry_if_exception(_transient),
                reraise=True,
            ):
                with attempt:
                    return await self.call("POST", path, body, seconds=self._seconds)
        finally:
            self.load -= 1

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None, *, seconds: float = PATIENCE) -> Any:
        """One request; its JSON, or its text. Raises Refused, Unanswered."""
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=10)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                text = bytearray()
                async for chunk in response.content.iter_any():
                    text += chunk
                    if len(text) > self._longest:
                        raise ValueError(f"its answer is longer than {self._longest} bytes")
                answer = json.loads(text) if response.content_type == "application/json" else text.decode(errors="replace")
                status = response.status
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as error:
            what = f"no answer in {seconds:g} s" if isinstance(error, TimeoutError) else first_line(error)
            raise Unanswered(f"the vLLM server {self.url} cannot be reached ({what}); start it, or correct engine.urls") from error
        if status in (401, 403):
            raise Refused(f"the vLLM server {self.url} refuses the key; set VLLM_API_KEY to its --api-key", status)
        if status >= 300:
            raise Refused(f"the vLLM server {self.url} answered {path.partition('?')[0]} with {status}: {_message(answer)}", status)
        return answer


def _transient(error: BaseException) -> bool:
    return isinstance(error, Unanswered) or (isinstance(error, Refused) and error.status in TRANSIENT)


def _message(answer: Any) -> str:
    """The text of an error body, in one bounded line."""
    if isinstance(answer, dict):
        inner = answer.get("error", answer.get("detail", answer))
        answer = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(answer).split())[:300] or "no text"
