"""`python benchmarks/learner_memory.py [SHAPE ...]`: peak memory and tokens/s of a learner step on a GPU, for models of Qwen3's shapes.

Random weights, LoRA and full training in bfloat16 with gradient checkpointing; log-probabilities chunked, as the learner does them,
against unchunked. `mfu`: 6 operations per weight and token (LoRA: 4), attention aside, over those of a bfloat16 matmul that is measured
beside it. Without a SHAPE all of them, and the figures go to `results/`. `--tiny` runs all of it on the CPU with a tiny shape and writes
no file: memory is then the bytes saved for the backward pass, not a peak.
"""

import gc
import json
import math
import platform
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError
from aipo_graph.learn import model as model_module
from aipo_graph.learn.batch import Batch, pack
from aipo_graph.learn.learner import Learner
from aipo_graph.learn.memory import estimate
from aipo_graph.types import Problem, Segment, Trace, TraceGroup

STEPS = 5
QWEN3 = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 151936}
SHAPES = {
    "Qwen3-0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "Qwen3-1.7B": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
}
TINY = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 4096}
TINY_SHAPES = {"tiny": {**TINY, "hidden_size": 32, "intermediate_size": 64}}
CHUNK, WHOLE = 2**18, 2**62
"""Logits at once: a chunk for the tiny shape, and no chunks at all."""


def rows(count: int, length: int, vocab: int) -> Batch:
    """Random tokens: a short prompt and a completion in which every token is trained, half of the rows rewarded."""
    draw = random.Random(0)

    def trace(index: int) -> Trace:
        ids = [draw.randrange(vocab) for _ in range(length)]
        prompt = Segment("context", "policy", tuple(ids[:8]), text="")
        words = Segment("policy", "policy", tuple(ids[8:]), text="", logprobs=(-math.log(vocab),) * (length - 8), version=0)
        return Trace("p", index, False, (prompt, words), ("policy",), scores={"reward": float(index % 2)})

    return pack([TraceGroup(Problem("p", "", ""), tuple(trace(i) for i in range(count)))], Config().loss)


def saved_bytes(learner: Learner, batch: Batch) -> int:
    """Bytes that autograd keeps for the backward pass of one step, parameters aside, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in learner.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.step(batch)
    return sum(storage.nbytes() for storage in kept.values())


def timed(learner: Learner, batch: Batch) -> float:
    started = time.perf_counter()
    if learner.step(batch)["skipped"]:
        raise SystemExit("a step was skipped: its time means nothing")
    if learner.device.type == "cuda":
        torch.cuda.synchronize(learner.device)
    return time.perf_counter() - started


def matmul_flops(device: str) -> float:
    """Operations per second of a large product of bfloat16 matrices."""
    size, repeats = (8192, 20) if device == "cuda" else (256, 3)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for count in (3, repeats):
        started = time.perf_counter()
        for _ in range(count):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def measure(config: Config, folder: str, device: str, batch: Batch) -> dict[str, Any]:
    """One cell. The first step, which makes the optimizer's state and compiles kernels, is not timed."""
    tokens = int(batch.lengths.sum())
    if device == "cpu":
        learner = Learner(config, folder, device)
        memory = saved_bytes(learner, batch)
    else:
        gc.collect()  # of the cell before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            learner = Learner(config, folder, device)
            timed(learner, batch)
            timed(learner, batch)
        except torch.OutOfMemoryError:
            return {"bytes": None, "tokens_per_second": None, "error": "out of memory"}
        memory = torch.cuda.max_memory_allocated(device)
    seconds = [timed(learner, batch) for _ in range(STEPS)]
    rate = tokens / statistics.median(seconds)
    weights = sum(p.numel() for name, p in learner.model.named_parameters() if ".lora_" not in name)
    mfu = (4 if learner.adapted else 6) * weights * rate / matmul_flops(device)
    return {"bytes": memory, "tokens_per_second": round(rate, 1), "mfu": round(mfu, 3), "seconds": [round(s, 4) for s in seconds]}


def cells(shape: dict[str, int], device: str, count: int, length: int) -> list[dict[str, Any]]:
    found = []
    chunk = CHUNK if device == "cpu" else model_module.CHUNK[device]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with torch.device(device):
            Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True)).bfloat16().save_pretrained(folder)
        for rank in (32, 0):
            policy = {"model": folder, "dtype": "bfloat16", "lora_rank": rank, "lora_alpha": 64}
            train = {"micro_batch_tokens": count * length, "gradient_checkpointing": True}
            config = Config.model_validate({"policy": policy, "train": train, "rollout": {"max_tokens": length}, "run": {"device": device}})
            parts = estimate(config).parts
            for name, size in (("chunked", chunk), ("unchunked", WHOLE)):
                model_module.CHUNK[device] = size
                cell = measure(config, folder, device, rows(count, length, shape["vocab_size"]))
                estimated = sum(part.bytes for part in parts if "learning" in part.phases and not part.name.startswith("sampler"))
                cell |= {"estimated_bytes": estimated} if name == "chunked" else {}
                found.append({"training": f"LoRA {rank}" if rank else "full", "logprobs": name, **cell})
        model_module.CHUNK[device] = chunk
    return found


def main(argv: list[str]) -> None:
    tiny = argv == ["--tiny"]
    if unknown := next((name for name in argv if not tiny and name not in SHAPES), None):
        raise ConfigError(f"{unknown!r}: give --tiny, or some of {', '.join(SHAPES)}")
    if not tiny and not torch.cuda.is_available():
        raise ConfigError("this machine has no CUDA device; --tiny runs on the CPU")
    chosen = {name: SHAPES[name] for name in SHAPES if not argv or name in argv}
    device, shapes, count, length = ("cpu", TINY_SHAPES, 4, 128) if tiny else ("cuda", chosen, 8, 2048)
    if tiny:
        torch.set_num_threads(1)
    gpu = "" if tiny else f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB, "
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "hardware": f"{gpu}{platform.machine()}, torch {torch.__version__}",
        "bytes": "saved for the backward pass of one step"
        if tiny
        else "torch.cuda.max_memory_allocated over two steps, the model included",
        "rows": f"{count} rows of {length} tokens in one micro-batch, bfloat16, gradient checkpointing; seconds of {STEPS} steps",
        "models": {name: cells(shape, device, count, length) for name, shape in shapes.items()},
    }
    text = json.dumps(report, indent=1)
    Console(soft_wrap=True).print_json(text)
    if not argv:
        (Path(__file__).parent / "results" / "learner_memory.json").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(cli.main(main))
