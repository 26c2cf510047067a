"""LoRA (arXiv 2106.09685) through peft: float32 adapters on a frozen model, which can be read as if they were merged."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import Policy
from ..errors import ConfigError

ADAPTER = "default"
"""peft's name of the only adapter."""


def attach(model: PreTrainedModel, policy: Policy, seed: int) -> Any:
    """Puts adapters on every linear layer of ``model`` but its head, in place, and freezes the rest. Returns peft's ``PeftModel``.

    The adapters' start comes from ``seed``, leaves the global random state alone, and changes no output of the model. Raises
    ConfigError where peft is not installed or finds no layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"policy.lora_rank = {policy.lora_rank}: LoRA needs peft; pip install 'aipo-graph[peft]'") from error
    alpha: Any = int(policy.lora_alpha) if policy.lora_alpha.is_integer() else policy.lora_alpha  # peft says int and takes both
    settings = LoraConfig(r=policy.lora_rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's, too
        try:
            return get_peft_model(model, settings).eval()
        except ValueError as error:
            raise ConfigError(f"policy.lora_rank: peft finds no layer for LoRA in {type(model).__name__}; 0 trains all weights") from error


@torch.no_grad()
def _merged(layer: nn.Module) -> Tensor:
    weight = layer.get_submodule("base_layer").get_parameter("weight")
    delta: Tensor = layer.get_delta_weight(ADAPTER)  # type: ignore[operator]
    return (weight + delta).to(weight.dtype)


def merged(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter under its name in the plain model, W + scale * B A where there is an adapter.

    Merged one layer at a time, in float32, and returned in the model's type; the model stays as it is.
    """
    for name, parameter in model.named_parameters():
        owner, adapted, leaf = name.rpartition(".base_layer.")
        if adapted:
            yield f"{owner}.{leaf}", _merged(model.get_submodule(owner)) if leaf == "weight" else parameter.detach()
        elif ".lora_" not in name:
            yield name, parameter.detach()


def tensors(adapter: Any) -> dict[str, Tensor]:
    """The adapter's tensors under the names of peft's files: base_model.model.….lora_A.weight."""
    from peft import get_peft_model_state_dict

    # Left to itself, peft asks the hub whether the vocabulary has grown.
    return {name: tensor.detach() for name, tensor in get_peft_model_state_dict(adapter, save_embedding_layers=False).items()}


def save(adapter: Any, directory: Path, name: str) -> None:
    """A directory that ``PeftModel.from_pretrained`` and vLLM load; ``name`` is that of the model it belongs to."""
    adapter.peft_config[ADAPTER].base_model_name_or_path = name
    adapter.save_pretrained(directory, save_embedding_layers=False)


def fingerprint(model: PreTrainedModel) -> str:
    """Tells frozen models apart: names, shapes, types and the first values of the parameters that are not trained."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            first = parameter.detach().flatten()[:64].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + first.numpy().tobytes())
    return digest.hexdigest()
