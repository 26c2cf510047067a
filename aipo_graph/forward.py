"""Opens a Hugging Face causal LM's files, and knows what its forward depends on beside the tokens: how it attends, and at which lengths
that changes."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from aipo_graph.errors import ConfigError, EngineError, first_line

CAP = re.compile(r"att\w*(soft_?cap|logit_?cap)")
"""Config keys of a bound on attention scores (Gemma 2), which sdpa leaves out."""
LENGTH = re.compile(r"window|chunk|local|block_size|conv|original_max_position")
"""Config keys whose numbers are lengths at which attention changes; some are others, which costs a longer check."""
MISFITS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)
"""What a model raises that is not made for the call."""
EXACT = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Rounding: the most by which the log-probabilities of two ways to compute one forward differ."""
WORK = {"cpu": 2**36, "cuda": 2**45}
"""Multiplications that a check at the start may cost a forward: seconds."""


def read_config(path: str | Path) -> PretrainedConfig:
    """Raises ConfigError where there is no model."""
    disable_progress_bar()
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise ConfigError(f"policy.model: {str(path)!r} has no config.json; give a Hugging Face model directory")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"policy.model: no model at {str(path)!r} ({first_line(error)}); give a model directory or a hub name") from error


def read_weights(path: str | Path, dtype: str, config: PretrainedConfig | None = None) -> Any:
    """A causal LM on the CPU. Raises ConfigError where there is no model, EngineError where weights do not load or are lacking."""
    config = config or read_config(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=getattr(torch, dtype), output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise EngineError(f"policy.model: the weights of {str(path)!r} cannot be loaded ({first_line(error)})") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # would be left at random values
        raise EngineError(f"policy.model: the weights of {str(path)!r} lack {len(missing)} tensors, {missing[0]} among them")
    return model


def scaled_from(config: PretrainedConfig) -> int | None:
    """The length past which a row's positions are scaled by the length of the longest row beside it; None where they never are.

    longrope (Phi-3.5, Phi-4-mini) changes its scale once, dynamic NTK with each token past the context.
    """
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    borders = [
        int(kind.get("original_max_position_embeddings") or text.max_position_embeddings)
        if kind["rope_type"] == "longrope"
        else int(text.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") == "longrope" or "dynamic" in str(kind.get("rope_type"))
    ]
    return min(borders, default=None)


def borders(config: PretrainedConfig) -> dict[str, int]:
    """The config's lengths at which attention may change, by key."""
    text = config.get_text_config().to_dict()
    return {key: value for key, value in text.items() if LENGTH.search(key) and type(value) is int and value > 1}


def affordable(model: PreTrainedModel) -> int:
    """Tokens of a forward that a check may cost: at least 24."""
    return max(24, WORK[model.device.type if model.device.type in WORK else "cuda"] // max(1, sum(p.numel() for p in model.parameters())))


def probe_rows(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Rows of these lengths, no two alike; every token of a small vocabulary comes up, its padding's too."""
    return [[(7 * i + i * i // 5 + 3 * row) % vocabulary for i in range(length)] for row, length in enumerate(lengths)]


@torch.no_grad()
def own_logprobs(model: Any, row: Sequence[int]) -> Tensor:
    """f32 [V]: what the model's own forward of this row alone says of the token after it."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    logits: Tensor = model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False, **keep).logits[0, -1]
    return logits.float().log_softmax(-1)


def gap(found: Tensor, own: Tensor) -> float:
    """Largest difference of two distributions' log-probabilities; nan where only one is finite."""
    both = (found == own) | (found.isneginf() & own.isneginf())
    return float((found - own).masked_fill(both, 0.0).abs().max())


def use_exact_attention(model: PreTrainedModel) -> None:
    """Chooses sdpa, transformers' default, where that computes what eager attention does, else eager.

    A bound on attention scores is read from the config, since short texts do not reach it; all else shows in one short forward.
    """
    text = model.config.get_text_config().to_dict()
    row = probe_rows([12], text["vocab_size"])[0]
    with suppress(*MISFITS):  # some models have one kind alone
        model.set_attn_implementation("eager")
        if any(CAP.search(key) and value for key, value in text.items()):
            return
        eager = own_logprobs(model, row)
        model.set_attn_implementation("sdpa")
        if not gap(own_logprobs(model, row), eager) <= EXACT.get(model.dtype, 0.5):
            model.set_attn_implementation("eager")
