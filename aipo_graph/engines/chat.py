"""The language models of agents: a provider's, through LangChain, or one that we sample ourselves, with its tokens and logprobs."""

import importlib
import os
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, SecretStr

from aipo_graph.config import Config
from aipo_graph.engines import vllm_api
from aipo_graph.engines.facts import Facts
from aipo_graph.engines.local import LocalEngine
from aipo_graph.engines.server import PROBE, TOKENS, Client, Refused, Unanswered, other_tokens
from aipo_graph.errors import ConfigError, EngineError, install
from aipo_graph.load import faults, model, nearest
from aipo_graph.messages import DATE, ChatFormat, decode
from aipo_graph.types import Completion, Generate, Reply, Stop, derive_seed

KEYS = {
    "anthropic": "ANTHROPIC_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY",
    "fireworks": "FIREWORKS_API_KEY",
    "groq": "GROQ_API_KEY",
    "mistralai": "MISTRAL_API_KEY",
    "openai": "OPENAI_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "together": "TOGETHER_API_KEY",
    "xai": "XAI_API_KEY",
}
"""Where providers look for their key; some clients miss it only at the first request."""
OPENAI = frozenset({"openai", "azure_openai", "deepseek", "xai", "together"})
"""Providers whose clients are OpenAI's, and take an HTTP client of ours."""
LONGEST_ANSWER = 2**22
"""Bytes of an answer that are read."""
FLAG = "was started without"


class EngineChatModel(BaseChatModel):
    """A chat model over a sampler of the policy's tokenizer: a reply knows its own token ids and logprobs.

    They are in ``response_metadata["reply"]``, a ``types.Reply``, for exactly the text without reasoning, blanks around it and end
    tokens; without ids where that text begins or ends inside a token. ``seed`` is given per call: ``ainvoke(messages, seed=7)``.
    Without a ``chat_format``, for models without a chat template, the system message alone is the prompt, as it is. Asynchronous only.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    sample: Any
    """A ``types.Generate``."""
    tokenizer: Any
    eos_ids: frozenset[int]
    chat_format: ChatFormat | None = None
    temperature: float = 1.0
    max_tokens: int = 1024
    seed: int = 0

    @property
    def _llm_type(self) -> str:
        return "aipo_graph"

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> ChatResult:
        raise NotImplementedError("asynchronous only: use ainvoke")

    def bind_tools(self, tools: Sequence[Any], *, tool_choice: str | None = None, **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Raises ConfigError for a model without a chat template, or with one that writes no calls: it has no way to call a tool."""
        if self.chat_format is None:
            raise ConfigError("a model without a chat template cannot call tools; name the agent in agents.use with an empty path")
        self.chat_format.check_tools()
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        *,
        seed: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **kwargs: Any,
    ) -> ChatResult:
        prompt = self._prompt(messages, tools)
        seed = self.seed if seed is None else seed
        done: Completion = await self.sample(
            prompt,
            seed=seed,
            max_tokens=self.max_tokens,
            stop=tuple(stop or ()),
            temperature=self.temperature,
        )
        end = len(done.token_ids) - (done.token_ids[-1] in self.eos_ids)
        text = decode(self.tokenizer, done.token_ids[:end])
        turn = derive_seed(seed, str(prompt))
        message = self.chat_format.parse(text, tools, seed=turn) if self.chat_format else AIMessage(text.strip())
        reply = self._reply(done.token_ids[:end], done.logprobs[:end], str(message.content))
        message.response_metadata = {"reply": reply, "finish_reason": done.stop}
        counts = len(prompt), len(done.token_ids)
        message.usage_metadata = UsageMetadata(input_tokens=counts[0], output_tokens=counts[1], total_tokens=sum(counts))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _prompt(self, messages: list[BaseMessage], tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        if self.chat_format is not None:
            return self.chat_format.encode(self.chat_format.render(messages, tools))
        # The prompt file holds the query where the model wants it; a message of its own would repeat it.
        spoken = [m for m in messages if isinstance(m, SystemMessage)] or messages
        ids = self.tokenizer.encode("\n".join(str(m.text) for m in spoken), add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        return tuple(ids) if bos is None else (bos, *ids)

    def _reply(self, token_ids: Sequence[int], logprobs: Sequence[float], text: str) -> Reply:
        """The text with the run of sampled ids that is exactly it, or with none. Decodes O(log n) times."""
        read = partial(decode, self.tokenizer)
        at = read(token_ids).rfind(text)
        if not text or at < 0:
            return Reply(text)
        lengths = range(len(token_ids) + 1)
        first, last = (bisect_left(lengths, place, key=lambda n: len(read(token_ids[:n]))) for place in (at, at + len(text)))
        ids = tuple(token_ids[first:last])
        return Reply(text, ids, tuple(logprobs[first:last])) if read(ids) == text else Reply(text)


async def open_chats(config: Config) -> dict[str, BaseChatModel]:
    """The language model of each agent that `agents.models` names; agents of one spec share it.

    Raises ConfigError: no such provider or model, a package or key missing, a server that does not answer.
    """
    opened: dict[str, BaseChatModel] = {}
    for name, spec in config.agents.models.items():
        if spec in opened:
            continue
        try:
            if spec.partition(":")[0] == "policy":
                opened[spec] = await _open_policy(config, spec.partition(":")[2] or config.policy.model)
            elif spec.startswith("vllm:"):
                opened[spec] = await _open_vllm(spec.removeprefix("vllm:"), config)
            else:
                opened[spec] = _open_provider(spec, config)
        except (ConfigError, EngineError) as error:
            raise ConfigError(f"agents.models.{name}: {error}") from error
    return {name: opened[spec] for name, spec in config.agents.models.items()}


def describe(chats: Mapping[str, BaseChatModel], config: Config) -> list[str]:
    """One line per agent with a language model: whether its replies carry μ, the helper's own logprobs."""
    lines = []
    for name, chat in chats.items():
        why = (chat.metadata or {}).get("why")
        absent = f"μ absent{f' ({why})' if why else ''}: loss.behaviour = {config.loss.behaviour:g} stands in"
        lines.append(f"agents.{name}: {'μ recorded' if isinstance(chat, EngineChatModel) else absent}")
    return lines


def _open_provider(spec: str, config: Config, **given: Any) -> BaseChatModel:
    provider, _, name = spec.partition(":")
    if not (provider and name):
        raise ConfigError(f"{spec!r} names no model; write provider:model, vllm:URL or policy")
    settings = config.agents
    try:
        from langchain.chat_models import init_chat_model

        if provider in KEYS and "api_key" not in given and not os.environ.get(KEYS[provider]):
            raise ConfigError(f"{spec!r} needs an API key; set {KEYS[provider]} in the environment")
        return init_chat_model(
            name,
            model_provider=provider,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            timeout=settings.timeout / settings.attempts,
            max_retries=0,  # the agent retries
            **({"http_async_client": _bounded_http()} if provider in OPENAI else {}),
            **given,
        )
    except ImportError as error:
        extra = install("agents")
        remedy = extra if provider in ("openai", "anthropic") else f"{extra} and {provider}'s own ({error})"
        raise ConfigError(f"{spec!r} needs a package that is not installed; {remedy}") from error
    except faults() as error:
        text, listed, known = str(error).partition("Supported model providers are:")
        if listed:
            names = ["vllm", "policy", *known.replace(",", " ").split()]
            raise ConfigError(f"no provider {provider!r}{nearest(provider, names)}") from error
        raise ConfigError(f"{spec!r} cannot be opened: {' '.join(text.split())[:300]}") from error


def _bounded_http() -> Any:
    """An HTTP client for OpenAI's that gives up on an answer of more than LONGEST_ANSWER bytes, and on one that might unfold to more."""
    import openai

    http = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])  # httpx2 or httpx, by version

    class Bounded(http.AsyncByteStream):  # type: ignore[name-defined]
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self.stream:
                size += len(chunk)
                if size > LONGEST_ANSWER:
                    raise http.ReadError(f"the answer is longer than {LONGEST_ANSWER} bytes")
                yield chunk

        async def aclose(self) -> None:
            await self.stream.aclose()

    async def bound(response: Any) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise http.DecodingError("the answer is compressed, which was not asked for")
        response.stream = Bounded(response.stream)

    return openai.DefaultAsyncHttpxClient(event_hooks={"response": [bound]}, headers={"Accept-Encoding": "identity"})


async def _open_policy(config: Config, name: str) -> BaseChatModel:
    """``name`` is the starting policy's: in an evaluation `policy.model` is what is evaluated."""
    path = model(name)
    if config.engine.kind == "local":
        return _over(LocalEngine.load(config, path).generate, Facts.read(config, path), config)
    if config.engine.kind == "server" and config.policy.lora_rank and config.engine.urls and path == model(config.policy.model):
        return await _open_vllm(config.engine.urls[0], config)
    raise ConfigError(
        f"policy: engine.kind = {config.engine.kind} keeps no copy of the starting weights; serve them apart and say vllm:URL, "
        "or use policy.lora_rank with engine.urls"
    )


async def _open_vllm(url: str, config: Config) -> BaseChatModel:
    """Samples tokens where the server's tokenizer is the policy's, and logprobs are of what it samples from; else its chat API."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"vllm:{url} names no server; write vllm:http://HOST:PORT")
    url = url.rstrip("/").removesuffix("/v1")
    facts = Facts.read(config, model(config.policy.model))
    try:
        async with Client(url, config.agents.timeout) as client:
            served = next(entry for entry in (await client.call("GET", "/v1/models", seconds=30))["data"] if not entry.get("parent"))
            name, context = str(served["id"]), int(served.get("max_model_len") or facts.context)
            why = await _another_tokenizer(client, name, facts) or await _no_logprobs(client, name, facts)
    except Unanswered as error:
        raise ConfigError(f"{url} cannot be reached ({error.__cause__}); start the server, or correct the URL") from error
    except (LookupError, TypeError, StopIteration) as error:
        raise ConfigError(f"{url} is no vLLM server: it does not answer as one; start one with `vllm serve`") from error
    if not why:
        return _over(_sampler(url, name, replace(facts, context=context), config.agents.timeout / config.agents.attempts), facts, config)
    if not facts.tokenizer.chat_template and FLAG in why:
        raise ConfigError(f"{why}, and a model without a chat template is reached with token ids alone; start it with that")
    return _open_provider(
        f"openai:{name}",
        config,
        base_url=f"{url}/v1",
        api_key=SecretStr(os.environ.get("VLLM_API_KEY") or "none"),
        seed=config.run.seed,
        extra_body={"chat_template_kwargs": {"enable_thinking": config.policy.thinking, "date_string": DATE}},
        metadata={"why": why},
    )


def _over(sample: Generate, facts: Facts, config: Config) -> EngineChatModel:
    templated = bool(facts.tokenizer.chat_template)
    return EngineChatModel(
        sample=sample,
        tokenizer=facts.tokenizer,
        eos_ids=facts.eos_ids,
        chat_format=ChatFormat(facts.tokenizer, thinking=config.policy.thinking) if templated else None,
        temperature=config.agents.temperature,
        # Without a template there is no reasoning: what is past the longest reply would be cut off.
        max_tokens=config.agents.max_tokens if templated else min(config.agents.max_tokens, config.agents.max_reply_tokens),
        seed=config.run.seed,
    )


def _sampler(url: str, name: str, facts: Facts, seconds: float) -> Generate:
    """Tokens in and out of one server. A connection per request, so that nothing is left to close."""

    async def sample(
        prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        parameters = vllm_api.sampling(facts, prompt_ids, seed=seed, max_tokens=max_tokens, stop=stop, temperature=temperature)
        body = {"model": name, "token_ids": list(prompt_ids), "sampling_params": parameters}
        async with Client(url, seconds, LONGEST_ANSWER) as client:
            choice = (await client.call("POST", TOKENS, body, seconds=seconds))["choices"][0]
        return vllm_api.completion(facts, choice, [(0, 0)])

    return sample


async def _another_tokenizer(client: Client, name: str, facts: Facts) -> str:
    """Why the server's tokens are not the policy's: other ids for a probe text, or other texts for the ids of the vocabulary."""
    why = f"{client.url} has another tokenizer than the policy"
    if await other_tokens(client, name, facts):
        return why
    vocabulary = list(range(len(facts.tokenizer)))
    try:
        text = (await client.call("POST", "/detokenize", {"model": name, "tokens": vocabulary}))["prompt"]
    except Refused:
        return why
    decode: Callable[..., Any] = facts.tokenizer.decode
    return "" if text == decode(vocabulary) else why


async def _no_logprobs(client: Client, name: str, facts: Facts) -> str:
    """Why the server gives no logprobs of what it samples from: which flag it was started without.

    Of a single allowed token the probability is 1 in what is sampled from, and the model's own in raw logprobs.
    """
    ids = facts.tokenizer.encode(PROBE, add_special_tokens=False)
    parameters = vllm_api.sampling(facts, ids, seed=0, max_tokens=1, stop=(), temperature=1.0) | {"allowed_token_ids": ids[:1]}
    try:
        answer = await client.call("POST", TOKENS, {"model": name, "token_ids": ids, "sampling_params": parameters})
    except Refused as error:
        if error.status != 404:
            raise
        return f"{client.url} {FLAG} --enable-scale-out"
    certain = abs(answer["choices"][0]["logprobs"]["content"][0]["logprob"]) < 1e-4
    return "" if certain else f"{client.url} {FLAG} --logprobs-mode processed_logprobs"
