"""LoRA (arXiv 2106.09685) through peft: float32 adapters on a frozen model, which can be read as if they were merged."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aipo_graph.config import Policy
from aipo_graph.errors import ConfigError, install
from aipo_graph.learn.shards import from_first, whole

ADAPTER = "default"
"""peft's name of the only adapter."""
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate", "router"}
"""What linear layers of experts, and their routers, were called before transformers fused them."""
logger = logging.getLogger(__name__)


def attach(model: PreTrainedModel, policy: Policy, seed: int, *, experts: bool = True) -> Any:
    """Puts adapters on every linear layer of ``model`` but its head, in place, and freezes the rest. Returns peft's ``PeftModel``.

    The adapters' start comes from ``seed``, leaves the global random state alone, and changes no output of the model. Raises
    ConfigError where peft is not installed, finds no layer, or adapts one so that it cannot be merged under its own name.

    Args:
        experts: adapt experts kept in tensors of three dimensions, too; else a warning says that they stay frozen.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"policy.lora_rank = {policy.lora_rank}: LoRA needs peft; {install('peft')}") from error
    kind = model.config.model_type
    head, fused = model.get_output_embeddings(), _fused_experts(model)
    # By their values, which the first rank has.
    layers = from_first(lambda: [name for name, layer in model.named_modules() if layer is not head and _is_linear(layer)])
    # peft takes these names, wherever they stand, for those of fused experts.
    renamed = [name for name in layers if _expert_counts(model) and name.rpartition(".")[2] in EXPERT_NAMES]
    settings = LoraConfig(
        r=policy.lora_rank,
        lora_alpha=int(policy.lora_alpha) if policy.lora_alpha.is_integer() else policy.lora_alpha,  # type: ignore[arg-type]  # both do
        lora_dropout=0.0,
        target_modules=[name for name in layers if name not in renamed],
        target_parameters=[*(f"{name}.weight" for name in renamed), *(fused if experts else ())],
        task_type="CAUSAL_LM",
    )
    plain = {name: parameter.shape for name, parameter in model.named_parameters()}
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's, too
        try:
            adapted = get_peft_model(model, settings).eval()
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"policy.lora_rank: peft finds no way to adapt {kind} ({reason}); 0 trains all weights") from error
    wrapped = _wrapped(model).keys()
    missed = {*(f"{name}.weight" for name in layers), *(fused if experts else ())} - wrapped
    if missed or {name: parameter.shape for name, parameter in _plain_names(model)} != plain:
        what = f"leaves {min(missed)} out" if missed else "changes the names of its weights"
        raise ConfigError(f"policy.lora_rank: peft {what} in {kind}, so that the policy could not be merged; 0 trains all weights")
    if fused and not experts:
        logger.warning("policy.lora_rank: the experts of %s stay frozen: vLLM takes no adapters of them; 0 trains all weights", kind)
    return adapted


@torch.no_grad()
def _is_linear(layer: nn.Module) -> bool:
    """Whether it computes x W + b and nothing else: routers and quantized layers are linear layers in name alone."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return isinstance(layer, nn.Linear | Conv1D)
    ones = layer.weight.new_ones(1, 2, layer.in_features)
    found = layer(ones)
    return isinstance(found, Tensor) and (found.is_meta or torch.allclose(found, linear(ones, layer.weight, layer.bias), rtol=1e-2))


def _expert_counts(model: PreTrainedModel) -> set[int]:
    settings = model.config.get_text_config().to_dict().items()
    return {value for key, value in settings if "expert" in key and type(value) is int}


def _fused_experts(model: PreTrainedModel) -> list[str]:
    """Parameters [experts, in, out] or [experts, out, in]."""
    counts = _expert_counts(model)
    return [name for name, p in model.named_parameters() if p.dim() == 3 and p.shape[0] in counts and p.is_floating_point()]


def _wrapped(model: PreTrainedModel) -> dict[str, nn.Module]:
    """peft's layers under the plain names of the parameters that they adapt."""
    return {
        f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def _plain_names(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name.replace(".base_layer", ""), parameter) for name, parameter in model.named_parameters() if ".lora_" not in name)


@torch.no_grad()
def merged(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter under its name in the plain model, W + scale * B A where there is an adapter.

    Merged one layer at a time, in float32, and returned in the model's type; the model stays as it is.
    """
    wrapped = _wrapped(model)
    for name, parameter in _plain_names(model):
        if name in wrapped:
            yield name, whole((parameter + wrapped[name].get_delta_weight(ADAPTER)).to(parameter.dtype))  # type: ignore[operator]
        else:
            yield name, whole(parameter.detach())


def tensors(adapter: Any) -> dict[str, Tensor]:
    """The adapter's tensors under the names of peft's files: base_model.model.….lora_A.weight."""
    from peft import get_peft_model_state_dict

    # Left to itself, peft asks the hub whether the vocabulary has grown.
    return {name: whole(tensor).detach() for name, tensor in get_peft_model_state_dict(adapter, save_embedding_layers=False).items()}


def state(adapter: Any) -> dict[str, Tensor]:
    """The same under the names that they have in the model."""
    return {name: whole(tensor) for name, tensor in adapter.state_dict().items() if ".lora_" in name}


def save(adapter: Any, state: dict[str, Tensor], directory: Path, name: str) -> None:
    """A directory that ``PeftModel.from_pretrained`` and vLLM load; ``name`` is that of the model it belongs to."""
    adapter.peft_config[ADAPTER].base_model_name_or_path = name
    adapter.save_pretrained(directory, state_dict=state, save_embedding_layers=False)


def fingerprint(model: PreTrainedModel) -> str:
    """Tells frozen models apart: names, shapes, types and the first values of the parameters that are not trained."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            first = parameter.detach().flatten()[:64].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + first.numpy().tobytes())
    return digest.hexdigest()
