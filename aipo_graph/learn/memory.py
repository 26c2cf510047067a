"""How much GPU memory a run needs, part by part, from the model's config.json alone."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, first_line
from aipo_graph.forward import read_config
from aipo_graph.learn import lora
from aipo_graph.learn.model import CHUNK

Phase = Literal["sampling", "learning"]
BOTH: tuple[Phase, ...] = ("sampling", "learning")
COPIES = 3
"""Float32 copies of one chunk of logits alive at once, forward or backward: they and two temporaries."""
SCALED_HEAD = re.compile(r"logits?_(soft|scal)|soft_?cap|lm_head_mult")
"""Config keys of models that do more to their logits than apply the head, which then come whole (Gemma 2, Granite, Cohere, Falcon-H1)."""
BYTES = {"float32": 4, "bfloat16": 2}
TITLE = "estimate; CUDA's context, fragmentation and other processes on the GPU (a helper's server) come on top"


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    bytes: int
    phases: tuple[Phase, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run keeps in memory, in a cluster each rank of its learner. ``gpu``: name and bytes of the run's GPU, if this machine has one;
    ``policy``: bytes of one copy of the policy."""

    parts: tuple[Part, ...] = ()
    gpu: tuple[str, int] | None = None
    policy: int = 0
    problem: str = ""
    """One line: why there is no estimate."""

    def total(self, phase: Phase) -> int:
        return sum(part.bytes for part in self.parts if phase in part.phases)


def estimate(config: Config, model_path: str | Path | None = None) -> Estimate:
    """Memory of the learner and of the sampler that shares its GPU, for the model at ``model_path`` (default: ``policy.model``).

    Weights, gradients, optimizer and reference are counted on the meta device and exact. Activations and logits follow
    :func:`activation_bytes` and ``COPIES``; CUDA's own context (about half a GiB) and fragmentation come on top. Raises ConfigError where
    LoRA is asked for and peft is missing.
    """
    try:
        shape = read_config(model_path or config.policy.model)
        if not hasattr(shape.get_text_config(), "num_attention_heads"):
            raise ValueError(f"what a model of the type {shape.model_type} keeps of a text is not counted here")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, _weight_type(config)))
    except (ConfigError, ValueError) as error:
        return Estimate(problem=f"no memory estimate: {first_line(error)}")
    count = sum(p.numel() for p in model.parameters())
    if config.policy.lora_rank:
        with torch.device("meta"):
            lora.attach(model, config.policy, seed=0, experts=config.engine.kind == "local")
    gpu = _gpu(config.run.device)
    whole = count * BYTES[config.policy.dtype] + _bytes(model.buffers())
    return Estimate((*_learner(config, model, whole), *_sampler(config, model, whole, gpu)), gpu, whole)


def _weight_type(config: Config) -> str:
    return config.policy.dtype if config.policy.lora_rank else "float32"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _learner(config: Config, model: PreTrainedModel, whole: int) -> list[Part]:
    """``whole``: bytes of a plain copy of the model in ``policy.dtype``."""
    rank, dtype, tokens, ranks = config.policy.lora_rank, config.policy.dtype, config.train.micro_batch_tokens, config.cluster.learners
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    copy = 0 if rank or config.loss.kl_weight == 0 else whole
    text = model.config.get_text_config()
    layer, ends = activation_bytes(config, model)
    layers = text.num_hidden_layers
    kept, how = layer * layers, "everything saved for the backward pass"
    if config.train.gradient_checkpointing:
        kept, how = BYTES[_weight_type(config)] * text.hidden_size * layers + layer, "the input of each layer, and one layer's inside"
    logits = tokens * text.vocab_size
    if not any(SCALED_HEAD.search(name) and value not in (None, False, 1) for name, value in text.to_dict().items()):
        logits = min(CHUNK["cpu" if config.run.device == "cpu" else "cuda"], logits)
    parts = [
        Part(
            "weights",
            _bytes((*model.parameters(), *model.buffers())) // ranks,
            BOTH,
            f"{_weight_type(config)}" + (f", LoRA rank {rank} in float32" if rank else "") + (f", 1/{ranks} of them" if ranks > 1 else ""),
        ),
        Part("gradients", 4 * count // ranks, ("learning",), f"float32, of {count:,} trained values"),
        Part("optimizer", (8 * count + 4 * len(trained)) // ranks, BOTH, "AdamW: two float32 values each"),
        Part(
            "reference",
            copy // ranks,
            BOTH,
            "the adapter turned off" if rank else f"{dtype}, for loss.kl_weight" if copy else "loss.kl_weight is 0",
        ),
        Part("activations", (kept + ends) * tokens, ("learning",), f"{tokens:,} tokens (train.micro_batch_tokens): {how}"),
        Part("logits", COPIES * 4 * logits, ("learning",), f"float32, {logits // text.vocab_size:,} tokens at a time"),
    ]
    if ranks > 1:
        parts.insert(4, Part("gathered", _gathered(model), ("learning",), "two whole layers at a time, and what is in no layer"))
    if dtype == "bfloat16":
        parts.insert(4, Part("bfloat16 copies", 2 * count, ("learning",), "of trained weights, made by autocast"))
    return parts


def _gathered(model: PreTrainedModel) -> int:
    blocks = set(model._no_split_modules or ())
    layers = [_bytes(module.parameters()) for module in model.modules() if type(module).__name__ in blocks]
    return _bytes(model.parameters()) - sum(layers) + 2 * max(layers, default=0)


def placement(config: Config, found: Estimate) -> list[str]:
    """For ``--dry-run``: the processes of a cluster, what each takes, and the weights on a sampler's GPU."""
    cluster, engine = config.cluster, config.engine
    lines = [
        f"processes, over Ray ({cluster.address}); the table is of each learner's GPU:",
        f"  {cluster.learners} rank(s) of the learner, one GPU each",
        f"  {cluster.workers or 'per node one'} worker(s), one CPU each" + (", and an engine of its own" if engine.kind == "local" else ""),
    ]
    if engine.kind == "vllm":
        size = f"{shown(found.policy // engine.gpus)} of weights, the cache up to engine.memory = {engine.memory:g}"
        lines.append(f"  a sampler per {engine.gpus} GPU(s) that are left, on each {size}")
    elif engine.kind == "server":
        lines.append(f"  {len(engine.urls) or 1} sampler(s), which ask the server(s)")
    return lines


def activation_bytes(config: Config, model: PreTrainedModel) -> tuple[int, int]:
    """Bytes per token that autograd keeps: of one layer, and of what follows the last.

    Assumes a dense layer of the Llama kind: two norms computed in float32, attention that keeps its inputs, its output and one number
    per head (sdpa's fused kernels, flash-attn), a gated MLP; linear inputs are kept once, or under autocast, once per layer that casts
    them. Frozen layers keep no input, their adapters do. Parallel experts and attention without a fused kernel are not counted.
    """
    text: Any = model.config.get_text_config()
    hidden, rank = text.hidden_size, config.policy.lora_rank
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    width = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    queries = text.num_attention_heads * width
    keys = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width
    size, mixed = BYTES[config.policy.dtype], config.policy.dtype == "bfloat16"
    norms = 2 * (4 * hidden + 4) + (0 if rank else 2 * 4 * hidden)
    if any(name.endswith("q_norm") for name, _ in model.named_modules()):
        norms += (queries + keys) * (4 if rank else 4 + size) + 4 * (queries + keys) // width
    linear = (5 if mixed else 2) * hidden * size + 4 * inner * size
    attention = 2 * (queries + keys) * size + 4 * text.num_attention_heads
    adapters = (7 * rank + (queries if mixed else 0)) * size if rank else 0
    ends = (8 + BYTES[_weight_type(config)] + size) * hidden
    return norms + linear + attention + adapters, ends


def _sampler(config: Config, model: PreTrainedModel, whole: int, gpu: tuple[str, int] | None) -> list[Part]:
    """The engine's share, where it runs on the learner's GPU."""
    setting, text = config.engine, model.config.get_text_config()
    size = BYTES[config.policy.dtype]
    if config.cluster.address:
        return []
    if setting.kind == "local":
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        copies = setting.workers * (1 + ("policy" in config.agents.models.values()))
        rows = min(setting.workers * setting.max_batch, config.rollout.problems * config.rollout.traces)
        length = config.rollout.max_tokens + config.task.max_prompt_tokens
        cache = rows * length * 2 * heads * width * text.num_hidden_layers * size
        return [
            Part("sampler's weights", copies * whole, BOTH, f"{config.policy.dtype}, {copies} copies (engine.workers, agents.models)"),
            Part("sampler's cache", cache, BOTH, f"{rows} rows of {length:,} tokens; longer prompts and replies take more"),
        ]
    if setting.kind == "server" and (not setting.launch or torch.cuda.device_count() > 1):  # a launched one takes the last GPU
        return []
    phases: tuple[Phase, ...] = ("sampling",) if setting.kind == "vllm" else BOTH
    share = int(setting.memory * gpu[1]) if gpu else 0
    note = f"engine.memory = {setting.memory:g} of the GPU{'' if gpu else '; this machine has none'}"
    return [Part("vLLM", share, phases, note)]


def _gpu(device: str) -> tuple[str, int] | None:
    if device == "cpu" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.device("cuda" if device == "auto" else device))
    return properties.name, properties.total_memory


def shown(size: int) -> str:
    """
    >>> shown(3 * 2**30), shown(5 * 2**19), shown(0)
    ('3.0 GiB', '2.5 MiB', '-')
    """
    unit, name = (2**30, "GiB") if size >= 2**30 / 10 else (2**20, "MiB")
    return f"{size / unit:,.1f} {name}" if size else "-"


def table(found: Estimate) -> Table | str:
    """For ``--dry-run``: the parts, the peak of each phase, and whether the GPU of this machine holds it; or the line that says why not."""
    if found.problem:
        return found.problem
    result = Table("memory of the run", "", "sampling", "learning", title=TITLE)
    result.columns[2].justify = result.columns[3].justify = "right"
    for part in found.parts:
        result.add_row(part.name, part.note, *(shown(part.bytes) if phase in part.phases else "" for phase in BOTH))
    result.add_section()
    result.add_row("together", "", *(shown(found.total(phase)) for phase in BOTH), style="bold")
    if found.gpu:
        name, size = found.gpu
        verdicts = ("fits" if found.total(phase) <= size else "does not fit" for phase in BOTH)
        result.add_row(name, shown(size), *verdicts, style="bold")
    return result
