"""What the engines on vLLM share: its flags and parameters, sampling and scores, names of weight versions, weights as files."""

import copy
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from aipo_graph.config import Config
from aipo_graph.engines.decoder import torch_device
from aipo_graph.engines.facts import Facts, check_request
from aipo_graph.errors import ConfigError, EngineError, first_line
from aipo_graph.types import Completion, Stop

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's choices for --max-lora-rank."""
WHOLE_PROMPTS = ("--no-enable-chunked-prefill",)
"""On the CPU, vLLM 0.32 dies of a seeded request whose prompt it splits over two steps (its generator cannot be set back)."""
COLDEST, HOTTEST = 0.01, 2.0
"""Between these vLLM samples at the temperature that it is asked for."""
PREFIX = "weights-"


def prefill_budget(context: int) -> int:
    """Tokens per step without chunked prefill: at least the longest prompt."""
    return max(4096, context)


def on_cuda(config: Config) -> bool:
    return torch_device(config).startswith("cuda")


def max_rank(rank: int) -> int:
    """The least of vLLM's choices that holds ``rank``. Raises ConfigError where none does."""
    fitting = [choice for choice in RANKS if choice >= rank]
    if not fitting:
        raise ConfigError(f"policy.lora_rank = {rank}: vLLM takes adapters up to rank {RANKS[-1]}; lower it, or use 0")
    return fitting[0]


def sampling(
    facts: Facts, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...], temperature: float
) -> dict[str, Any]:
    """vLLM's sampling parameters, all that shape the distribution said: its defaults come from the model's generation config.

    Raises ContextError, EngineError for a prompt that the model cannot have, a stop or a temperature that vLLM cannot honour.
    """
    limit = check_request(prompt_ids, max_tokens, temperature, stop, vocab_size=facts.vocab_size, context=facts.context)
    strings = [entry for entry in stop if isinstance(entry, str)]
    sequences = [entry for entry in stop if not isinstance(entry, str)]
    if longer := [ids for ids in sequences if len(ids) > 1]:
        raise EngineError(f"stop holds the token sequence {longer[0]}: vLLM stops at single tokens or strings; give its text")
    if temperature and not COLDEST <= temperature <= HOTTEST:
        raise EngineError(f"temperature is {temperature}: vLLM takes 0 for greedy, or {COLDEST:g} to {HOTTEST:g}; give one of these")
    return {
        "seed": seed % 2**63,
        "max_tokens": limit,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "stop": strings,
        "stop_token_ids": sorted(facts.eos_ids.union(*sequences)),
        "detokenize": bool(strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }


def scoring(facts: Facts, token_ids: Sequence[int]) -> dict[str, Any]:
    """Parameters that score these tokens. Raises EngineError where there is nothing to score."""
    if len(token_ids) < 2:
        raise EngineError(f"{len(token_ids)} tokens have no logprobs; give at least 2")
    check_request(token_ids, 1, 0.0, vocab_size=facts.vocab_size, context=facts.context)
    return {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}


def completion(facts: Facts, choice: Mapping[str, Any], versions: Sequence[tuple[int, int]]) -> Completion:
    """A finished request, as a server's answer has it, which says neither tokens nor logprobs of one that it aborted.

    ``versions`` are (first token, weights) in order. Raises EngineError where vLLM did not finish it.
    """
    token_ids = choice["token_ids"] or ()
    finish = choice["finish_reason"]
    logprobs = [entry["logprob"] for entry in (choice["logprobs"] or {}).get("content") or ()]
    if finish not in ("stop", "length") or not token_ids or len(token_ids) != len(logprobs):
        raise EngineError(f"vLLM ended a request with {finish!r} after {len(token_ids)} tokens and {len(logprobs)} logprobs; see its log")
    stopped = finish == "stop" or token_ids[-1] in facts.eos_ids
    (_, first), *later = versions
    return Completion(tuple(token_ids), tuple(logprobs), "stop" if stopped else "length", first, tuple(later))


def prompt_scores(token_ids: Sequence[int], entries: Sequence[Mapping[Any, Any] | None]) -> Iterable[Any]:
    """Each token's own entry among vLLM's prompt logprobs, which have none for the first token. Keys are ids, or ids as text."""
    for token, entry in zip(token_ids[1:], entries[1:], strict=True):
        found = entry or {}
        yield found[token] if token in found else found[str(token)]


class Labels(NamedTuple):
    """Names of weight versions that no other run uses, since a server can outlive its run or be shared by mistake.

    >>> labels = Labels("a1b2")
    >>> labels.of(3), labels.version("a1b2-3")
    ('a1b2-3', 3)
    """

    token: str

    def of(self, version: int) -> str:
        return f"{self.token}-{version}"

    def version(self, label: str) -> int:
        """Raises EngineError for weights that this run did not load."""
        token, _, number = label.rpartition("-")
        if token != self.token:
            raise EngineError(f"the server sampled with weights {label!r}, which this run did not load; give each run its own server")
        return int(number)


def sweep(folder: Path) -> None:
    """Deletes what killed processes left in a run's folder, which no other process may be training in."""
    for left in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


class WeightFiles:
    """A folder of versions, in the run's folder where there is one: servers on other machines must see it under the same path.

    ``write`` makes NAME; ``keep`` deletes all but the named ones; ``close`` deletes the folder.
    """

    def __init__(self, config: Config, facts: Facts) -> None:
        self._facts, self._policy = facts, config.policy
        run = Path(config.run.dir).absolute() / config.run.name
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=run if run.is_dir() else None))
        self.folder.chmod(0o755)  # the server may run as another user

    def write(self, name: str, weights: Iterable[tuple[str, Any]]) -> Path:
        """Writes all weights, or an adapter where the policy is trained with LoRA. Raises EngineError if the disk refuses."""
        final, temporary = self.folder / name, self.folder / f".{name}"
        rank = self._policy.lora_rank
        dtype = torch.float32 if rank else getattr(torch, self._policy.dtype)
        tensors = {n: t.detach().to("cpu", dtype if t.is_floating_point() else None).contiguous() for n, t in weights}
        if not tensors:
            raise EngineError(f"weights {name} are empty; send every tensor")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            if rank:
                (temporary / "adapter_config.json").write_text(json.dumps(self._adapter_config(tensors)), encoding="utf-8")
                save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
            else:
                self._shell.save_pretrained(temporary, state_dict=tensors)  # undoes what loading renamed and fused
                self._facts.config.save_pretrained(temporary)
                self._facts.tokenizer.save_pretrained(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"weights {name} cannot be written to {self.folder} ({first_line(error)}); free space there") from error
        return final

    @cached_property
    def _shell(self) -> PreTrainedModel:
        """The model without its weights: knows under which names the hub keeps them."""
        with torch.device("meta"):
            shell: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(self._facts.config))
        shell.generation_config = GenerationConfig()
        return shell

    @property
    def renames(self) -> bool:
        """Whether files name or cut weights otherwise than the model in memory does, as for fused experts: then they go by disk."""
        state = self._shell.state_dict()
        return revert_weight_conversion(self._shell, dict(state)).keys() != state.keys()

    def _adapter_config(self, tensors: Iterable[str]) -> dict[str, Any]:
        modules = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._facts.path,
            "r": self._policy.lora_rank,
            "lora_alpha": self._policy.lora_alpha,
            "target_modules": sorted(modules),
            "bias": "none",
        }

    def keep(self, *names: str) -> None:
        for path in self.folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class VllmSampler(ABC):
    """The policy on vLLM, wherever that runs: what it is asked for, under which weights, and how these are called."""

    def __init__(self, config: Config, facts: Facts, run: str) -> None:
        self.eos_ids = facts.eos_ids
        self.max_context = facts.context
        self.version = 0
        self.takes: Literal["weights", "adapter"] = "adapter" if config.policy.lora_rank else "weights"
        self._facts = facts
        self._labels = Labels(run)
        self._files = WeightFiles(config, facts)
        self._adapter: Any = None

    @abstractmethod
    async def _sampled(self, prompt_ids: Sequence[int], parameters: dict[str, Any]) -> Any:
        """One choice, as a server answers it."""

    async def generate(
        self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        """Samples until an EOS token or a ``stop`` match ("stop"), or ``max_tokens`` or the context ("length").

        ``temperature`` 0 is greedy, with logprobs at 1. The ids stay as sampled, also where a stop string ends inside the last one.
        Raises EngineError.
        """
        parameters = sampling(self._facts, prompt_ids, seed=seed, max_tokens=max_tokens, stop=stop, temperature=temperature)
        versions, adapter = [(0, self.version)], self._adapter
        choice = await self._sampled(prompt_ids, parameters)
        if adapter is None and self.takes == "weights":
            versions = [(span["start"], self._labels.version(span["version"])) for span in choice["weight_versions"] or ()] or versions
        return completion(self._facts, choice, versions)
