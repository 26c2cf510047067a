"""Whether a running vLLM server fits a run: one line and the remedy for each way it does not."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from aipo_graph.config import Config
from aipo_graph.engines.client import Client, Refused
from aipo_graph.engines.facts import Facts
from aipo_graph.engines.launch import WHOLE_PROMPTS, max_rank, prefill_budget
from aipo_graph.errors import ConfigError, EngineError

SHAPE = (
    "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
"""What two directories of one model's weights agree on."""
PROBE = "a1 B%=12?\n<knowledge>é✓ x²</knowledge> \\boxed{3}"


async def check_server(client: Client, config: Config, facts: Facts) -> tuple[str, bool, dict[str, Any]]:
    """The name under which it serves the policy, whether it serves just the weights asked for, and its settings.

    Raises ConfigError (remedy: another server or setting) or EngineError (no answer).
    """
    await _health(client)
    settings = await _settings(client)
    models = (await client.call("GET", "/v1/models"))["data"]
    base = next(model for model in models if not model.get("parent"))
    name, root = str(base["id"]), str(base["root"])
    fresh = (await client.call("GET", "/weight_info"))["weight_version"] == "default" and same_place(root, facts.path)
    _same_model(client, root, facts)
    await _same_tokenizer(client, name, facts)
    model = settings["model_config"]
    if model["logprobs_mode"] != "processed_logprobs":
        raise ConfigError(
            f"{client.url} gives {model['logprobs_mode']}, not those of the distribution it samples from; "
            "start it with --logprobs-mode processed_logprobs"
        )
    if (dtype := str(model["dtype"]).removeprefix("torch.")) != config.policy.dtype:
        raise ConfigError(
            f"{client.url} runs in {dtype}, policy.dtype is {config.policy.dtype}; start it with --dtype {config.policy.dtype}"
        )
    _context(client, int(model["max_model_len"]), config, facts)
    if settings["device_config"]["device"] == "cpu" and settings["scheduler_config"]["enable_chunked_prefill"]:
        flags = f"{' '.join(WHOLE_PROMPTS)} --max-num-batched-tokens {prefill_budget(facts.context)}"
        raise ConfigError(f"{client.url} splits prompts, and on the CPU vLLM dies of a split prompt with a seed; start it with {flags}")
    if config.policy.lora_rank:
        _lora(client, settings.get("lora_config"), config.policy.lora_rank, bool(settings["env"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")))
    return name, fresh, settings


async def _health(client: Client) -> None:
    try:
        await client.call("GET", "/health", seconds=30)
    except Refused as error:
        what = "is no vLLM server (it has no /health)" if error.status == 404 else f"is not ready (/health says {error.status})"
        raise ConfigError(f"{client.url} {what}; engine.urls must name vLLM servers, without /v1") from error


async def _settings(client: Client) -> dict[str, Any]:
    """Its own account of its settings, which it gives in dev mode only."""
    try:
        found = await client.call("GET", "/server_info?config_format=json")
        if isinstance(found, dict) and "vllm_config" in found:
            return {**found["vllm_config"], "env": found["vllm_env"]}
        raise ConfigError(f"{client.url} is no vLLM server (its /server_info has no vllm_config); start one with `vllm serve`")
    except Refused as error:
        if error.status != 404:
            raise
    try:
        await client.call("GET", "/version")
    except Refused as error:
        raise ConfigError(f"{client.url} is no vLLM server (it has no /version); start one with `vllm serve`") from error
    raise ConfigError(
        f"{client.url} takes no new weights; start it with VLLM_SERVER_DEV_MODE=1 in its environment, reachable by this machine alone"
    )


def same_place(root: str, path: str) -> bool:
    """Whether two names are one directory or one hub name."""
    return root == path or (Path(root).is_dir() and Path(root).resolve() == Path(path).resolve())


def _same_model(client: Client, root: str, facts: Facts) -> None:
    """Compares shapes where the served model's config can be read here; a name alone says nothing."""
    if same_place(root, facts.path):
        return
    try:
        theirs = AutoConfig.from_pretrained(root, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return  # on another machine: the tokenizer and the probe after each load decide
    for field in SHAPE:
        ours, other = _field(facts.config, field), _field(theirs, field)
        if ours != other:
            raise ConfigError(
                f"{client.url} serves {root!r} with {field} = {other}, the policy {facts.path!r} has {ours}; "
                f"start it with --model {facts.path}"
            )


def _field(config: PretrainedConfig, name: str) -> Any:
    return getattr(config, name, None) if name == "architectures" else getattr(config.get_text_config(), name, None)


async def _same_tokenizer(client: Client, name: str, facts: Facts) -> None:
    body = {"model": name, "prompt": PROBE, "add_special_tokens": False}
    try:
        theirs = (await client.call("POST", "/tokenize", body))["tokens"]
    except Refused as error:
        raise ConfigError(f"{client.url} runs without a tokenizer ({error.status}); start it without --skip-tokenizer-init") from error
    ours = facts.tokenizer.encode(PROBE, add_special_tokens=False)
    if theirs != ours:
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
        raise ConfigError(
            f"{client.url} has another tokenizer than the policy {facts.path!r} (they part at token {at} of a probe text); "
            f"start it with --tokenizer {facts.path}"
        )


def _context(client: Client, length: int, config: Config, facts: Facts) -> None:
    if length < (wanted := config.engine.max_context):
        raise ConfigError(f"{client.url} has a context of {length}, engine.max_context is {wanted}; start it with --max-model-len {wanted}")
    if length <= (budget := config.rollout.max_tokens):
        raise ConfigError(
            f"{client.url} has a context of {length}, rollout.max_tokens is {budget} and the prompt comes on top; "
            f"start it with --max-model-len {facts.context}, or lower the budget"
        )


def _lora(client: Client, settings: dict[str, Any] | None, rank: int, updating: bool) -> None:
    flag = f"--max-lora-rank {max_rank(rank)}"
    if settings is None:
        raise ConfigError(f"{client.url} serves no adapters, policy.lora_rank is {rank}; start it with --enable-lora {flag}")
    if settings["max_lora_rank"] < rank:
        limit = settings["max_lora_rank"]
        raise ConfigError(
            f"{client.url} takes adapters up to rank {limit}, policy.lora_rank is {rank}; start it with {flag}, or lower the rank"
        )
    if not updating:
        raise ConfigError(f"{client.url} loads no new adapters; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment")


async def tokens_route(client: Client, name: str) -> bool:
    """Whether it takes and gives token ids with their weight versions (``--enable-scale-out``)."""
    try:
        await client.call("POST", "/inference/v1/generate", {"model": name, "token_ids": [0], "sampling_params": {"max_tokens": 1}})
    except Refused as error:
        if error.status == 404:
            return False
        raise EngineError(f"{error}; it answers no requests, see its log") from error
    return True
