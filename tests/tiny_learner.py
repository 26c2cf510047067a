"""A two-layer model and traces of random tokens, for the tests of learn/."""

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aipo_graph.config import Config
from aipo_graph.learn.learner import Learner
from aipo_graph.types import Problem, Segment, Source, Status, Trace, TraceGroup

VOCAB = 32


def tiny_model(seed: int = 0, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **(shape | settings))).eval()


def tiny_learner(folder: Path, **sections: dict[str, object]) -> Learner:
    if not (folder / "config.json").exists():
        tiny_model().save_pretrained(folder)
    sections["optimizer"] = {"lr": 1e-2, "warmup_steps": 0} | sections.get("optimizer", {})
    return Learner(Config.model_validate(sections), folder)


def segment(source: Source, *ids: int, author: str = "", logprobs: tuple[float, ...] | None = None, **rest: object) -> Segment:
    if source == "policy" and logprobs is None:
        logprobs = (-1.0,) * len(ids)
    version = 0 if source == "policy" else -1
    return Segment(source, author or source, ids, text="", logprobs=logprobs, **({"version": version} | rest))


def trace(*segments: Segment, reward: float = 1.0, with_agents: bool = False, status: Status = "done") -> Trace:
    return Trace("p", 0, with_agents, segments, ("policy",), status=status, scores={"reward": reward})


def group(*traces: Trace) -> TraceGroup:
    return TraceGroup(Problem("p", "", ""), traces)


def random_groups(seed: int, problems: int = 3, size: int = 4) -> list[TraceGroup]:
    """Half of each group with helpers; rewards such that all but a few rows have an advantage."""
    draw = random.Random(seed)

    def words(source: Source, low: int, high: int, author: str) -> Segment:
        ids = [draw.randrange(VOCAB) for _ in range(draw.randint(low, high))]
        logprobs = tuple(-draw.uniform(2, 4.5) for _ in ids) if source == "policy" or author == "verify" else None
        return segment(source, *ids, author=author, logprobs=logprobs)

    result = []
    for _ in range(problems):
        traces = []
        for member in range(size):
            parts = [words("context", 2, 6, "policy"), words("policy", 2, 9, "policy")]
            if member < size // 2:
                for author in ("verify", "knowledge"):
                    parts += [words("agent", 1, 5, author), words("policy", 1, 6, "policy")]
            traces.append(trace(*parts, reward=float(member % 2), with_agents=member < size // 2))
        result.append(group(*traces))
    return result


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    """Parameters, optimizer state and random state, copied."""
    state = {name: tensor.clone() for name, tensor in learner.weights()}
    for index, slots in learner.optimizer.state_dict()["state"].items():
        state |= {f"{index}.{slot}": value.clone() for slot, value in slots.items()}
    return state | {"rng": torch.get_rng_state()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal bit for bit, nan included."""
    return a.keys() == b.keys() and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)
