"""The policy on one or more vLLM servers, over HTTP: token ids in, token ids and logprobs out."""

import asyncio
import contextlib
import importlib.util
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from aipo_graph.config import Config
from aipo_graph.engines import wire
from aipo_graph.engines.client import Client
from aipo_graph.engines.facts import Facts, check_request
from aipo_graph.engines.fit import check_server, tokens_route
from aipo_graph.engines.handover import Handover
from aipo_graph.errors import ConfigError, EngineError
from aipo_graph.types import Completion, Stop

TOKENS, TEXT = "/inference/v1/generate", "/v1/completions"
APART = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean gap of logprobs between two servers past which they hold different weights; equal machines stay below."""


@dataclass(eq=False, slots=True)
class _Seat:
    """A graph run and the server it stays on, chosen at its first request."""

    engine: "ServerEngine"
    client: Client | None = None


_seat: ContextVar[_Seat | None] = ContextVar("seat", default=None)


class ServerEngine:
    """Implements ``types.Engine``. Open it with ``open``.

    New weights reach a server while it samples: its requests pause, the weights change, the cache of the old ones is dropped, the requests
    go on, and each completion says from which token on. With LoRA a request keeps the adapter that it was sent with.
    """

    def __init__(
        self,
        config: Config,
        facts: Facts,
        clients: Sequence[Client],
        names: dict[str, str],
        *,
        tokens: bool,
        nccl: bool,
        lora: bool,
        context: int,
    ) -> None:
        self.eos_ids = facts.eos_ids
        self.version = 0
        self.takes: Literal["weights", "adapter"] = "adapter" if config.policy.lora_rank else "weights"
        self.in_flight = tokens or self.takes == "adapter"
        self.max_context = context
        self._facts = facts
        self._clients = clients
        self._names = names
        self._tokens = tokens
        self._nccl = nccl
        self._lora = lora
        self._apart = APART[config.policy.dtype]
        self._labels = wire.Labels(secrets.token_hex(4))
        self._handover = Handover(config, facts)
        self._adapter: str | None = None
        self._in_use: Counter[str] = Counter()

    @classmethod
    async def open(cls, config: Config, model_path: str, urls: Sequence[str]) -> Self:
        """Checks every server and loads ``model_path`` where another's weights may be.

        Raises ConfigError where a server does not fit, EngineError where it does not answer.
        """
        facts = Facts.read(config, model_path)
        wire.sampling(facts, seed=0, limit=1, stop=(), temperature=config.rollout.temperature)  # refused now, not in every trace
        async with contextlib.AsyncExitStack() as stack:
            different = dict.fromkeys(url.rstrip("/") for url in urls)
            clients = [await stack.enter_async_context(Client(url, config.rollout.timeout)) for url in different]
            found = [await check_server(client, config, facts) for client in clients]
            names = {client.url: name for client, (name, _, _) in zip(clients, found, strict=True)}
            tokens = all([await tokens_route(client, names[client.url]) for client in clients])
            if not tokens and config.rollout.max_lag:
                raise ConfigError(
                    f"{clients[0].url} does not say which weights sampled a token, rollout.max_lag is {config.rollout.max_lag}; "
                    "start every server with --enable-scale-out, or use 0"
                )
            lengths = [int(settings["model_config"]["max_model_len"]) for _, _, settings in found]
            transfers = [(settings.get("weight_transfer_config") or {}).get("backend") for _, _, settings in found]
            nccl = all(backend == "nccl" for backend in transfers) and importlib.util.find_spec("vllm") is not None
            lora = any(settings.get("lora_config") for _, _, settings in found)
            engine = cls(config, facts, clients, names, tokens=tokens, nccl=nccl, lora=lora, context=min(facts.context, *lengths))
            try:
                foreign = [client for client, (_, fresh, _) in zip(clients, found, strict=True) if not fresh]
                await engine._reload(foreign, model_path, 0)
                await engine._label([client for client in clients if client not in foreign], 0)
            except BaseException:
                engine._handover.close()
                raise
            stack.pop_all()
        return engine

    async def generate(
        self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        """Samples until an EOS token or a ``stop`` match ("stop"), or ``max_tokens`` or the context ("length").

        ``temperature`` 0 is greedy, with logprobs at 1. The ids stay as sampled, also where a stop string ends inside the last one.
        Raises EngineError.
        """
        limit = check_request(prompt_ids, max_tokens, temperature, vocab_size=self._facts.vocab_size, context=self.max_context)
        parameters = wire.sampling(self._facts, seed=seed, limit=limit, stop=stop, temperature=temperature)
        client = self._choose()
        adapter, version = self._adapter, self.version
        with self._using(adapter):
            choice = (await self._ask(client, adapter, prompt_ids, parameters))["choices"][0]
        ids = choice["token_ids"] or ()
        if not self._tokens:
            return wire.completion(self._facts, ids, choice["logprobs"]["token_logprobs"], choice["finish_reason"], [(0, version)])
        versions = [(0, version)]
        if adapter is None and self.takes == "weights":
            spans = choice["weight_versions"] or ()
            versions = [(span["start"], self._labels.version(span["version"])) for span in spans] or versions
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return wire.completion(self._facts, ids, logprobs, choice["finish_reason"], versions)

    async def _ask(self, client: Client, adapter: str | None, prompt_ids: Sequence[int], parameters: dict[str, Any]) -> Any:
        name = adapter or self._names[client.url]
        if self._tokens:
            parameters = parameters | {"detokenize": bool(parameters.get("stop"))}
            return await client.sample(TOKENS, {"model": name, "token_ids": list(prompt_ids), "sampling_params": parameters})
        return await client.sample(TEXT, {"model": name, "prompt": list(prompt_ids), "return_token_ids": True, **parameters})

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Asks every server. Raises EngineError where they do not agree."""
        answers = await asyncio.gather(*(self._score(client, token_ids) for client in self._clients))
        for client, answer in zip(self._clients, answers, strict=True):
            gap = sum(abs(a - b) for a, b in zip(answers[0], answer, strict=True)) / len(answer)
            if not gap <= self._apart:
                pair = f"{self._clients[0].url} and {client.url}"
                raise EngineError(
                    f"weights {self.version} are not on every server: logprobs of {pair} differ by {gap:.2g}; "
                    "restart both, then run the same command"
                )
        return answers[0]

    async def _score(self, client: Client, token_ids: Sequence[int]) -> tuple[float, ...]:
        parameters = wire.scoring(len(token_ids))
        check_request(token_ids, 1, 0.0, vocab_size=self._facts.vocab_size, context=self.max_context)
        if self._lora:
            return tuple(await asyncio.gather(*(self._score_next(client, token_ids[:t], token_ids[t]) for t in range(1, len(token_ids)))))
        answer = await self._ask(client, None, token_ids, parameters)
        entries = answer["prompt_logprobs"] if self._tokens else answer["choices"][0]["prompt_logprobs"]
        return tuple(entry["logprob"] for entry in wire.prompt_scores(token_ids, entries))

    async def _score_next(self, client: Client, prompt: Sequence[int], token: int) -> float:
        """One token, on a server with adapters. Prompt logprobs beside other requests end its engine (vLLM 0.32 maps the batch's rows to
        adapters, not the prompt's), and only completions return the logprob of a given token."""
        body: dict[str, Any] = {"model": self._adapter or self._names[client.url], "prompt": list(prompt)}
        body |= {"max_tokens": 1, "temperature": 0.0, "logprobs": 0}
        body |= {"logprob_token_ids": [token], "return_tokens_as_token_ids": True}
        answer = await client.sample(TEXT, body)
        return float(answer["choices"][0]["logprobs"]["top_logprobs"][0][f"token_id:{token}"])

    @contextlib.contextmanager
    def run(self, key: str) -> Iterator[None]:
        """Entered around one graph run, which stays on one server: its prefix is cached there."""
        seat = _Seat(self)
        token = _seat.set(seat)
        try:
            yield
        finally:
            _seat.reset(token)
            if seat.client is not None:
                seat.client.runs -= 1

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        yield

    def _choose(self) -> Client:
        """The run's server; a new run's is the one with the fewest requests under way."""
        seat = _seat.get()
        if seat is not None and seat.engine is self and seat.client is not None:
            return seat.client
        client = min(self._clients, key=lambda c: (c.load, c.runs))
        if seat is not None and seat.engine is self:
            seat.client = client
            client.runs += 1
        return client

    @contextlib.contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        """vLLM may read an adapter's files again as long as a request uses it."""
        if adapter is None:
            yield
            return
        self._in_use[adapter] += 1
        try:
            yield
        finally:
            self._in_use[adapter] -= 1

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """To every server: a new adapter, tensors over NCCL where learner and servers can, else a directory that servers read.

        Raises EngineError where one does not take them.
        """
        label = self._labels.of(version)
        if self.takes == "adapter":
            await self._switch(label, await asyncio.to_thread(self._handover.write, label, weights), version)
            return
        if self._nccl and not self._handover.renames and (tensors := list(weights)) and tensors[0][1].is_cuda:
            await self._transfer(tensors, version)
        else:
            path = await asyncio.to_thread(self._handover.write, label, weights)
            await self._reload(self._clients, str(path), version)
            self._handover.keep(label)
        self.version = version

    async def _reload(self, clients: Sequence[Client], path: str, version: int) -> None:
        async with self._paused(clients, version):
            body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            try:
                await _all(client.call("POST", "/collective_rpc", body) for client in clients)
            except EngineError as error:
                remedy = "restart the server where it can read them"
                raise EngineError(f"weights {version} from {path} were not taken: {error}; {remedy}") from error

    async def _transfer(self, tensors: list[tuple[str, Any]], version: int) -> None:
        """Untested: it needs two GPUs."""
        from aipo_graph.engines import vllm

        async with self._paused(self._clients, version):
            await asyncio.to_thread(vllm.send_nccl, [client.url for client in self._clients], tensors)

    @contextlib.asynccontextmanager
    async def _paused(self, clients: Sequence[Client], version: int) -> AsyncIterator[None]:
        """Requests wait, and go on under the new weights without the old ones' cache, which would be neither's distribution."""
        try:
            await _all(client.call("POST", "/pause?mode=keep") for client in clients)
            yield
            await self._label(clients, version)
            await _all(client.call("POST", "/reset_prefix_cache?reset_running_requests=true") for client in clients)
        finally:
            await asyncio.gather(*(client.call("POST", "/resume") for client in clients), return_exceptions=True)

    async def _label(self, clients: Sequence[Client], version: int) -> None:
        """Also under adapters: a server without a label passes for one that still has the weights it was started with."""
        body = {"new_version": self._labels.of(version)}
        await _all(client.call("POST", "/update_weight_version", body) for client in clients)

    async def _switch(self, name: str, path: Path, version: int) -> None:
        """New requests name the new adapter; the one before is forgotten, its files go when its last request is done."""
        old = self._adapter
        if name == old:  # a run that loads its version again
            await _all(client.call("POST", "/v1/unload_lora_adapter", {"lora_name": old}) for client in self._clients)
        body = {"lora_name": name, "lora_path": str(path)}
        await _all(client.call("POST", "/v1/load_lora_adapter", body) for client in self._clients)
        self._adapter, self.version = name, version
        if old is not None and old != name:
            await _all(client.call("POST", "/v1/unload_lora_adapter", {"lora_name": old}) for client in self._clients)
        self._handover.keep(name, *(adapter for adapter, count in self._in_use.items() if count))

    async def sleep(self) -> None:
        """Does nothing: servers have their memory to themselves."""

    async def close(self) -> None:
        """Takes its adapter and files away."""
        if self._adapter is not None:
            body = {"lora_name": self._adapter}
            await asyncio.gather(
                *(c.call("POST", "/v1/unload_lora_adapter", body, seconds=10) for c in self._clients), return_exceptions=True
            )
        for client in self._clients:
            await client.close()
        self._handover.close()


async def _all(calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """All at once, all to their end; then the first error."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
