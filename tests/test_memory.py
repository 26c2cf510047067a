"""The memory estimate against the tensors of real small models."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_lora import MODELS
from tiny_learner import VOCAB, group, random_groups, segment, tiny_learner, tiny_model, trace
from transformers import Gemma2Config, MambaConfig, Qwen3Config, Qwen3ForCausalLM

from aipo_graph.config import Config, Loss
from aipo_graph.learn.batch import pack
from aipo_graph.learn.memory import COPIES, Estimate, Part, estimate, shown, table


def sizes(found: Estimate) -> dict[str, int]:
    assert not found.problem
    return {part.name: part.bytes for part in found.parts}


def total(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft says what it does about GPT-2's layers
@pytest.mark.parametrize("name", ["llama", "tied", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_a_step_keeps_is_counted_exactly(name: str, dtype: str, rank: int, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    learner = tiny_learner(tmp_path, policy={"dtype": dtype, "lora_rank": rank}, loss={"kl_weight": 0.1})
    found = sizes(estimate(learner.config, tmp_path))
    gradients: list[int] = []
    learner.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(total(p.grad for p in learner.model.parameters() if p.grad is not None))
    )
    assert learner.step(pack(random_groups(1), Loss()))["skipped"] == 0
    assert found["weights"] == total([*learner.model.parameters(), *learner.model.buffers()])
    assert [found["gradients"]] == gradients
    slots = learner.optimizer.state_dict()["state"].values()
    assert found["optimizer"] == total(value for slot in slots for value in slot.values())
    copy = learner.reference
    assert copy is not None
    assert found["reference"] == (0 if copy is learner.model else total([*copy.parameters(), *copy.buffers()]))
    assert (found["reference"] == 0) == (rank > 0)


def rows(count: int, length: int) -> list:
    """One group: its traces have one policy token each, so that next to nothing of the head is kept."""
    ids = [t % VOCAB for t in range(length - 1)]
    return [group(*(trace(segment("context", *ids), segment("policy", 1), reward=float(i % 2)) for i in range(count)))]


def saved_and_estimated(folder: Path, layers: int, kind: str, dtype: str, rank: int) -> tuple[int, int]:
    """Bytes of every storage that one step saves for its backward pass, counted once, but for the parameters; and the estimate of them."""
    shape = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    if kind == "llama":
        tiny_model(**shape, intermediate_size=160).save_pretrained(folder)
    else:
        Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, intermediate_size=160, **shape)).save_pretrained(folder)
    count, length = 32, 120
    learner = tiny_learner(folder, policy={"dtype": dtype, "lora_rank": rank})
    weights = {p.untyped_storage().data_ptr() for p in learner.model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.step(pack(rows(count, length), Loss()))
    tokens = count * (length - 1)  # the last of a row predicts nothing
    config = learner.config.model_copy(update={"train": learner.config.train.model_copy(update={"micro_batch_tokens": tokens})})
    found = sizes(estimate(config, folder))
    return sum(storage.nbytes() for storage in storages.values()), found["activations"] + found.get("bfloat16 copies", 0)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 8])
def test_activations_are_those_that_autograd_saves(kind: str, dtype: str, rank: int, tmp_path: Path) -> None:
    """A layer's to a thousandth; the whole to a tenth, of which much is LoRA's first norm: nothing below it is trained."""
    two, four = (saved_and_estimated(tmp_path, layers, kind, dtype, rank) for layers in (2, 4))
    assert four[0] - two[0] == pytest.approx(four[1] - two[1], rel=1e-3)
    assert four[0] == pytest.approx(four[1], rel=0.1)


@pytest.mark.parametrize(("dtype", "rank"), [("float32", 0), ("bfloat16", 0), ("bfloat16", 4)])
def test_checkpointing_keeps_the_input_of_each_layer_and_one_layers_inside(dtype: str, rank: int, tmp_path: Path) -> None:
    count, length = 32, 120
    learner = tiny_learner(tmp_path, policy={"dtype": dtype, "lora_rank": rank}, train={"gradient_checkpointing": True})
    inputs: list[int] = []
    learner.model.model.layers[1].register_forward_pre_hook(lambda module, args: inputs.append(total(args[:1])))
    learner.step(pack(rows(count, length), Loss()))
    shape = json.loads((tmp_path / "config.json").read_text())

    def activations(layers: int, checkpointing: bool) -> int:
        (tmp_path / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": layers}))
        train = {"gradient_checkpointing": checkpointing, "micro_batch_tokens": count * (length - 1)}
        return sizes(estimate(Config.model_validate({"policy": {"dtype": dtype, "lora_rank": rank}, "train": train}), tmp_path))[
            "activations"
        ]

    inside, kept = (activations(3, checkpointing) - activations(2, checkpointing) for checkpointing in (False, True))
    assert {kept} == set(inputs)
    assert activations(2, False) - activations(2, True) == inside - 2 * kept


def test_logits_are_one_chunk_except_where_a_model_transforms_them(tmp_path: Path) -> None:
    vocab = 2**20
    Qwen3Config(vocab_size=vocab, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16).save_pretrained(tmp_path / "q")
    Gemma2Config(vocab_size=vocab, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16).save_pretrained(tmp_path / "g")
    config = Config.model_validate({"train": {"micro_batch_tokens": 1000}})
    assert sizes(estimate(config, tmp_path / "q"))["logits"] == 64 * vocab * 4 * COPIES
    assert sizes(estimate(config, tmp_path / "g"))["logits"] == 1000 * vocab * 4 * COPIES


def test_the_samplers_share_follows_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path)

    def names(**engine: object) -> set[str]:
        return {
            part.name for part in estimate(Config.model_validate({"engine": engine}), tmp_path).parts if part.name[:4] in ("samp", "vLLM")
        }

    assert names(kind="local") == {"sampler's weights", "sampler's cache"}
    assert names(kind="server", urls=["http://localhost:8000"]) == set()  # elsewhere
    assert names(kind="server", launch=True) == names(kind="vllm") == {"vLLM"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (names(kind="server", launch=True), names(kind="vllm")) == (set(), {"vLLM"})  # a launched server takes the last GPU
    found = sizes(estimate(Config.model_validate({"engine": {"max_batch": 10}, "rollout": {"max_tokens": 50}}), tmp_path))
    assert found["sampler's weights"] == found["weights"]
    helper = Config.model_validate({"agents": {"models": {"verify": "policy"}}})  # a copy of the starting policy
    assert sizes(estimate(helper, tmp_path))["sampler's weights"] == 2 * found["weights"]
    assert found["sampler's cache"] == 10 * 50 * 2 * 32 * 2 * 4  # rows, tokens, keys and values, width, layers, float32


def text(found: Estimate) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table(found))
    return captured.get()


def test_the_table_compares_each_phase_with_the_gpu() -> None:
    parts = (Part("weights", 3 * 2**30, ("sampling", "learning")), Part("vLLM", 20 * 2**30, ("sampling",)))
    assert "fits" not in text(Estimate(parts))
    lines = text(Estimate(parts, ("GPU of 16 GiB", 16 * 2**30))).splitlines()
    together = next(line for line in lines if "together" in line)
    assert together.index("23.0 GiB") < together.index("3.0 GiB", together.index("23.0 GiB") + 5)
    verdict = next(line for line in lines if "GPU of 16 GiB" in line)
    assert verdict.index("does not fit") < verdict.index(" fits ")
    assert shown(10 * 2**40) == "10,240.0 GiB"


def test_a_model_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    for path in ("nobody/no-such-model", tmp_path / "none"):
        found = estimate(Config(), path)
        assert found.parts == ()
        assert text(found).startswith(f"no memory estimate: policy.model: no model at {str(path)!r}")
        assert "\n" not in found.problem
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # no weights are read
    assert estimate(Config(), tmp_path).parts
    MambaConfig(hidden_size=16, num_hidden_layers=2).save_pretrained(tmp_path)
    assert text(estimate(Config(), tmp_path)).startswith("no memory estimate: what a model of the type mamba keeps")


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu_and_chunks_save_the_logits(root: Path, warm_python: str) -> None:
    command = [warm_python, "benchmarks/learner_memory.py"]
    done = subprocess.run([*command, "--tiny"], capture_output=True, text=True, check=True, cwd=root)
    cells = json.loads(done.stdout)["models"]["tiny"]
    assert [(cell["training"], cell["logprobs"]) for cell in cells] == [
        ("LoRA 32", "chunked"), ("LoRA 32", "unchunked"), ("full", "chunked"), ("full", "unchunked")
    ]  # fmt: skip
    logits = 4 * 120 * 4096 * 4  # rows, trained tokens, vocabulary, float32
    for chunked, unchunked in (cells[:2], cells[2:]):
        assert unchunked["bytes"] - chunked["bytes"] > 0.9 * logits > chunked["bytes"]
        assert chunked["estimated_bytes"] > chunked["bytes"]
    wrong = subprocess.run([*command, "--small"], capture_output=True, text=True, check=False, cwd=root)
    assert (wrong.returncode, "'--small': give --tiny, or some of Qwen3-0.6B, Qwen3-1.7B" in wrong.stderr) == (2, True)


def test_the_script_for_a_gpu_is_bash(root: Path) -> None:
    """`DRY=1 benchmarks/gpu.sh` runs all of it on a CPU."""
    subprocess.run(["bash", "-n", root / "benchmarks" / "gpu.sh"], check=True)
