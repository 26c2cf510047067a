"""The policy on one or more vLLM servers, over HTTP: token ids in, token ids and logprobs out.

In three parts: requests to one server, whether a server fits a run, and the engine over all of them.
"""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import aiohttp
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential
from transformers import AutoConfig

from aipo_graph.config import Config
from aipo_graph.engines import vllm, vllm_api
from aipo_graph.engines.facts import Facts
from aipo_graph.errors import ConfigError, EngineError, first_line

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


class Client(contextlib.AbstractAsyncContextManager["Client"]):
    """One server; ``longest`` bounds an answer's bytes."""

    def __init__(self, url: str, seconds: float, longest: int = 2**28) -> None:
        key = os.environ.get("VLLM_API_KEY")
        self.url = url.rstrip("/")
        self._seconds, self._longest = seconds, longest
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    @retry(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.5, max=8),
        retry=retry_if_exception(lambda error: isinstance(error, Unanswered) or getattr(error, "status", 0) in TRANSIENT),
        reraise=True,
    )
    async def sample(self, path: str, body: dict[str, Any]) -> Any:
        """A request that is tried again, with the same seed, where it or its answer was lost."""
        return await self.call("POST", path, body, seconds=self._seconds)

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, seconds: float = PATIENCE, missing: str = ""
    ) -> Any:
        """One request; its JSON, or its text. Raises Unanswered, Refused, and ConfigError, which says what is ``missing``, for a 404."""
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
        if status == 404 and missing:
            raise ConfigError(f"{self.url} {missing}")
        if status in (401, 403):
            raise Refused(f"the vLLM server {self.url} refuses the key; set VLLM_API_KEY to its --api-key", status)
        if status >= 300:
            raise Refused(f"the vLLM server {self.url} answered {path.partition('?')[0]} with {status}: {_message(answer)}", status)
        return answer


def _message(answer: Any) -> str:
    """The text of an error body, in one bounded line."""
    if isinstance(answer, dict):
        inner = answer.get("error", answer.get("detail", answer))
        answer = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(answer).split())[:300] or "no text"


# --- whether a running server fits a run: one line and the remedy for each way it does not

SHAPE = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
"""What two directories of one model's weights agree on."""
PROBE = "a1 B%=12?\n<knowledge>é✓ x²</knowledge> \\boxed{3}"
TOKENS, TEXT = "/inference/v1/generate", "/v1/completions"
NO_SERVER = "is no vLLM server: engine.urls must name vLLM servers, without /v1; start one with `vllm serve`"
NO_TOKENS = "does not say which weights sampled a token; start it with --enable-scale-out"
CLOSED = "takes no new weights; start it with VLLM_SERVER_DEV_MODE=1 in its environment, reachable by this machine alone"


async def check_server(client: Client, config: Config, facts: Facts) -> tuple[str, bool, dict[str, Any]]:
    """The name under which it serves the policy, whether it serves just the weights asked for, and its settings.

    Raises ConfigError (remedy: another server or setting) or EngineError (no answer).
    """
    await client.call("GET", "/version", seconds=30, missing=NO_SERVER)
    info = await client.call("GET", "/server_info?config_format=json", missing=CLOSED)
    if not isinstance(info, dict) or "vllm_config" not in info:
        raise ConfigError(f"{client.url} {NO_SERVER}")
    settings = info["vllm_config"]
    models = (await client.call("GET", "/v1/models"))["data"]
    base = next(model for model in models if not model.get("parent"))
    name, root = str(base["id"]), str(base["root"])
    fresh = (await client.call("GET", "/weight_info"))["weight_version"] == "default" and _same_place(root, facts.path)
    other_words = await other_tokens(client, name, facts)
    model, lora, rank = settings["model_config"], settings.get("lora_config") or {}, config.policy.lora_rank
    highest, updating = lora.get("max_lora_rank", 0), info["vllm_env"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    dtype, mode, length = str(model["dtype"]).removeprefix("torch."), model["logprobs_mode"], int(model["max_model_len"])
    wanted, budget = config.engine.max_context, config.rollout.max_tokens
    splits = settings["device_config"]["device"] == "cpu" and settings["scheduler_config"]["enable_chunked_prefill"]
    whole = f"{' '.join(vllm_api.WHOLE_PROMPTS)} --max-num-batched-tokens {vllm_api.prefill_budget(facts.context)}"
    faults = [
        (other_shape := _other_shape(root, facts), f"serves {root!r} with {other_shape}; start it with --model {facts.path}"),
        (other_words, f"has another tokenizer than the policy {facts.path!r}; start it with --tokenizer {facts.path}"),
        (
            mode != "processed_logprobs",
            f"gives {mode}, not those of the distribution it samples from; start it with --logprobs-mode processed_logprobs",
        ),
        (
            dtype != config.policy.dtype,
            f"runs in {dtype}, policy.dtype is {config.policy.dtype}; start it with --dtype {config.policy.dtype}",
        ),
        (length < wanted, f"has a context of {length}, engine.max_context is {wanted}; start it with --max-model-len {wanted}"),
        (
            length <= budget,
            f"has a context of {length}, rollout.max_tokens is {budget} and the prompt comes on top; "
            f"start it with --max-model-len {facts.context}, or lower the budget",
        ),
        (splits, f"splits prompts, and on the CPU vLLM dies of a split prompt with a seed; start it with {whole}"),
        (
            highest < rank,
            f"takes adapters up to rank {highest}, policy.lora_rank is {rank}; "
            f"start it with --enable-lora --max-lora-rank {vllm_api.max_rank(rank)}, or lower the rank",
        ),
        (rank and not updating, "loads no new adapters; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"),
    ]
    if fault := next((text for found, text in faults if found), None):
        raise ConfigError(f"{client.url} {fault}")
    await client.call("POST", TOKENS, {"model": name, "token_ids": [0], "sampling_params": {"max_tokens": 1}}, missing=NO_TOKENS)
    return name, fresh, settings


async def other_tokens(client: Client, name: str, facts: Facts) -> bool:
    """Whether the server's tokenizer makes other tokens of a probe text than the policy's."""
    theirs = await client.call("POST", "/tokenize", {"model": name, "prompt": PROBE, "add_special_tokens": False})
    return theirs["tokens"] != facts.tokenizer.encode(PROBE, add_special_tokens=False)


def _same_place(root: str, path: str) -> bool:
    """Whether two names are one directory or one hub name."""
    return root == path or (Path(root).is_dir() and Path(root).resolve() == Path(path).resolve())


def _other_shape(root: str, facts: Facts) -> str:
    """How the served model's shape differs from the policy's, where its config can be read here; a name alone says nothing."""
    try:
        theirs = AutoConfig.from_pretrained(root, local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError):
        return ""  # on another machine: the tokenizer and the probe after each load decide
    ours = facts.config.get_text_config()
    pairs = ((field, getattr(theirs, field, None), getattr(ours, field, None)) for field in SHAPE)
    return next((f"{field} = {other}, the policy {facts.path!r} has {own}" for field, other, own in pairs if other != own), "")


# --- the engine

APART = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean gap of logprobs between two servers past which they hold different weights; equal machines stay below."""


class Seats:
    """Of several servers or samplers each graph run stays on one, where its prefix is cached."""

    def __init__(self) -> None:
        self.load: Counter[Any] = Counter()
        """Requests under way at each."""
        self._runs: Counter[Any] = Counter()
        self._own: ContextVar[list[Any] | None] = ContextVar("seats", default=None)

    def choose(self, there: Sequence[Any]) -> Any:
        """The run's, as long as it is there; else the one with the fewest requests under way."""
        own = self._own.get()
        if own and own[-1] in there:
            return own[-1]
        least = min(there, key=lambda one: (self.load[one], self._runs[one]))
        if own is not None:
            own.append(least)
            self._runs[least] += 1
        return least

    @contextlib.contextmanager
    def run(self, key: str) -> Iterator[None]:
        """Entered around one graph run."""
        own: list[Any] = []
        token = self._own.set(own)
        try:
            yield
        finally:
            self._own.reset(token)
            self._runs.subtract(own)

    def busy(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def agreed(answers: Mapping[str, Sequence[float]], dtype: str, version: int) -> tuple[float, ...]:
    """The logprobs of the first that was asked. Raises EngineError where another's differ by more than two machines' do."""
    first, found = next(iter(answers.items()))
    for name, theirs in answers.items():  # the first, too: its own may be nan
        gap = sum(abs(a - b) for a, b in zip(found, theirs, strict=True)) / len(theirs)
        if not gap <= APART[dtype]:
            raise EngineError(
                f"weights {version} are not everywhere: logprobs of {first} and {name} differ by {gap:.2g}; "
                "restart both, then run the same command"
            )
    return tuple(found)


class ServerEngine(Seats, vllm_api.VllmSampler):
    """Implements ``types.Engine``. Open it with ``open``.

    New weights reach a server while it samples: its requests pause, the weights change, the cache of the old ones is dropped, the requests
    go on, and each completion says from which token on. With LoRA a request keeps the adapter that it was sent with.
    """

    in_flight = True
    _opened: contextlib.AsyncExitStack

    def __init__(
        self,
        config: Config,
        facts: Facts,
        clients: Sequence[Client],
        names: dict[str, str],
        *,
        nccl: bool,
        lora: bool,
    ) -> None:
        Seats.__init__(self)
        vllm_api.VllmSampler.__init__(self, config, facts, secrets.token_hex(4))
        self._clients, self._names, self._nccl, self._lora, self._dtype = clients, names, nccl, lora, config.policy.dtype
        self._loads = itertools.count()
        self._in_use: Counter[str | None] = Counter()
        """Requests under way by adapter, whose files vLLM may read again as long as one uses it."""

    @classmethod
    async def open(cls, config: Config, model_path: str, urls: Sequence[str]) -> Self:
        """Checks every server and loads ``model_path`` where another's weights may be.

        Raises ConfigError where a server does not fit, EngineError where it does not answer.
        """
        facts = Facts.read(config, model_path)
        # Refused now, not in every trace.
        vllm_api.sampling(facts, [0], seed=0, max_tokens=1, stop=(), temperature=config.rollout.temperature)
        async with contextlib.AsyncExitStack() as stack:
            different = dict.fromkeys(url.rstrip("/") for url in urls)
            clients = [await stack.enter_async_context(Client(url, config.rollout.timeout)) for url in different]
            found = [await check_server(client, config, facts) for client in clients]
            names = {client.url: name for client, (name, _, _) in zip(clients, found, strict=True)}
            transfers = [(settings.get("weight_transfer_config") or {}).get("backend") for _, _, settings in found]
            nccl = all(backend == "nccl" for backend in transfers) and importlib.util.find_spec("vllm") is not None
            lora = any(settings.get("lora_config") for _, _, settings in found)
            lengths = [int(settings["model_config"]["max_model_len"]) for _, _, settings in found]
            facts = replace(facts, context=min(facts.context, *lengths))
            engine = cls(config, facts, clients, names, nccl=nccl, lora=lora)
            stack.callback(engine._files.close)
            foreign = [client for client, (_, fresh, _) in zip(clients, found, strict=True) if not fresh]
            await engine._reload(foreign, model_path, 0)
            await engine._label([client for client in clients if client not in foreign], 0)
            engine._opened = stack.pop_all()
        return engine

    async def _sampled(self, prompt_ids: Sequence[int], parameters: dict[str, Any]) -> Any:
        client = self.choose(self._clients)
        adapter = self._adapter
        self._in_use[adapter] += 1
        self.load[client] += 1
        try:
            return (await self._ask(client, adapter, prompt_ids, parameters))["choices"][0]
        finally:
            self._in_use[adapter] -= 1
            self.load[client] -= 1

    async def _ask(self, client: Client, adapter: str | None, prompt_ids: Sequence[int], parameters: dict[str, Any]) -> Any:
        body = {"model": adapter or self._names[client.url], "token_ids": list(prompt_ids), "sampling_params": parameters}
        return await client.sample(TOKENS, body)

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Asks every server. Raises EngineError where they do not agree."""
        answers = await asyncio.gather(*(self._score(client, token_ids) for client in self._clients))
        return agreed({client.url: answer for client, answer in zip(self._clients, answers, strict=True)}, self._dtype, self.version)

    async def _score(self, client: Client, token_ids: Sequence[int]) -> tuple[float, ...]:
        parameters = vllm_api.scoring(self._facts, token_ids)
        if self._lora:
            return tuple(await asyncio.gather(*(self._score_next(client, token_ids[:t], token_ids[t]) for t in range(1, len(token_ids)))))
        entries = (await self._ask(client, None, token_ids, parameters))["prompt_logprobs"]
        return tuple(entry["logprob"] for entry in vllm_api.prompt_scores(token_ids, entries))

    async def _score_next(self, client: Client, prompt: Sequence[int], token: int) -> float:
        """One token, on a server with adapters. Prompt logprobs beside other requests end its engine (vLLM 0.32 maps the batch's rows to
        adapters, not the prompt's), and only completions return the logprob of a given token."""
        body: dict[str, Any] = {
            "model": self._adapter or self._names[client.url],
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 0,
            "logprob_token_ids": [token],
            "return_tokens_as_token_ids": True,
        }
        answer = await client.sample(TEXT, body)
        return float(answer["choices"][0]["logprobs"]["top_logprobs"][0][f"token_id:{token}"])

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """To every server: a new adapter, tensors over NCCL where learner and servers can, else a directory that servers read.

        Raises EngineError where one does not take them.
        """
        # Files take the weights one by one from where they are; a transfer needs them all.
        if self._nccl and self.takes == "weights" and not self._files.renames and (weights := list(weights)) and weights[0][1].is_cuda:
            async with self._paused(self._clients, version):
                await asyncio.to_thread(vllm.send_nccl, [client.url for client in self._clients], weights)
        else:
            # An adapter's name never comes twice, since vLLM finds what it has cached by it.
            label = self._labels.of(version) + (f".{next(self._loads)}" if self.takes == "adapter" else "")
            path = await asyncio.to_thread(self._files.write, label, weights)
            if self.takes == "adapter":
                await self._switch(label, path, version)
            else:
                await self._reload(self._clients, str(path), version)
                self._files.keep(label)
        self.version = version

    async def _reload(self, clients: Sequence[Client], path: str, version: int) -> None:
        async with self._paused(clients, version):
            body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            try:
                await _all(client.call("POST", "/collective_rpc", body) for client in clients)
            except EngineError as error:
                remedy = "restart the server where it can read them"
                raise EngineError(f"weights {version} from {path} were not taken: {error}; {remedy}") from error

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
        body = {"lora_name": name, "lora_path": str(path)}
        await _all(client.call("POST", "/v1/load_lora_adapter", body) for client in self._clients)
        self._adapter, self.version = name, version
        if old is not None:
            await _all(client.call("POST", "/v1/unload_lora_adapter", {"lora_name": old}) for client in self._clients)
        self._files.keep(name, *(adapter for adapter, count in self._in_use.items() if adapter and count))

    async def sleep(self) -> None:
        """Does nothing: servers have their memory to themselves."""

    async def close(self) -> None:
        """Takes its adapter and files away."""
        if self._adapter is not None:
            body = {"lora_name": self._adapter}
            await asyncio.gather(
                *(c.call("POST", "/v1/unload_lora_adapter", body, seconds=10) for c in self._clients), return_exceptions=True
            )
        await self._opened.aclose()


async def _all(calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """All at once, all to their end; then the first error."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
