"""The learner over ranks: three processes with gloo, started once. Two are ranks, the third does the same alone; then all are ranks.

Each writes what it found, and the tests compare.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_learner import save_tokenizer
from tiny_learner import VOCAB, random_groups, same, tiny_model
from tiny_models import tiny

from aipo_graph.config import Config, Loss
from aipo_graph.errors import AipoError
from aipo_graph.learn import model as model_module
from aipo_graph.learn import shards
from aipo_graph.learn.batch import Batch, pack
from aipo_graph.learn.learner import Learner
from aipo_graph.learn.model import load_model
from aipo_graph.load import model as find_model

LIMIT = 500
"""Seconds after which the processes are killed: many times what they take."""
MICRO = 85
LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "gpt2": lambda: tiny("gpt2"),
    "gemma2": lambda: tiny("gemma2", num_key_value_heads=1),
    "phi3": lambda: tiny("phi3", **LONGROPE),
    "experts": lambda: tiny("qwen3_moe"),
}
CLOSE = 1e-5
"""Weights after two or three steps at a rate of 1e-3, over ranks and by one process: Adam divides by gradients as small as rounding."""
BF16 = {"policy": {"dtype": "bfloat16"}}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "shipped": ("operators", {}),
    "chunked head": ("llama", {}),
    "gradient checkpointing": ("llama", {"train": {"gradient_checkpointing": True}}),
    "epochs and minibatches": ("llama", {"train": {"epochs": 2, "minibatches": 2}}),
    "bfloat16": ("llama", BF16),
    "LoRA": ("llama", {"policy": {"lora_rank": 4}}),
    "LoRA on bfloat16": ("llama", {"policy": {"dtype": "bfloat16", "lora_rank": 4}}),
    "reference": ("llama", {"loss": {"kl_weight": 0.1}}),
    "LoRA, reference": ("llama", {"loss": {"kl_weight": 0.1}, "policy": {"lora_rank": 4}}),
    "tied": ("tied", {}),
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {"loss": {"algorithm": "gspo"}}),
    "phi3": ("phi3", {}),
    "experts": ("experts", {}),
    "LoRA on experts": ("experts", {"policy": {"lora_rank": 4}, "engine": {"kind": "local"}}),
}
"""Model and settings."""


KINDS = {"full": {}, "lora": {"policy": {"lora_rank": 4}}}
Found = tuple[dict[str, Any], ...]


def batches() -> list[Batch]:
    return [pack(random_groups(seed), Loss()) for seed in range(3)]


def learner(folder: Path, model: str, sections: dict[str, Any]) -> Learner:
    train = {"micro_batch_tokens": MICRO} | sections.get("train", {})
    settings = {"optimizer": {"lr": 1e-3, "warmup_steps": 0}, "rollout": {"max_tokens": 40}} | sections | {"train": train}
    return Learner(Config.model_validate(settings), find_model(model) if model == "operators" else folder / model)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two models."""
    assert a.keys() == b.keys()
    return max(float((a[name].detach().float() - b[name].float()).abs().max()) for name in a)


def whole(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights()}


def row(folder: Path, name: str) -> dict[str, Any]:
    """Two steps: metrics, what the first would make of each token, the last gradients, weights."""
    model, sections = ROWS[name]
    model_module.CHUNK["cpu"] = VOCAB * 7 if name == "chunked head" else 2**26
    made = learner(folder, model, sections)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for n, p in made.trained.items()})

    made.optimizer.register_step_pre_hook(keep)
    groups = random_groups(0)
    learned = made.learned(pack(groups, Loss()), groups)
    metrics = [made.step(batch) for batch in batches()[:2]]
    found = {"metrics": metrics, "learned": str(learned), "probe": made.logprobs((1, 2, 3)), "updates": made.updates}
    return found | {"gradients": gradients, "weights": whole(made)}


def poisoned(folder: Path, rank: int) -> dict[str, Any]:
    """A nan in the second rank's forward, then in its gradient, then none."""
    made = learner(folder, "llama", {})
    first, second, third = batches()
    made.step(first)
    before, metrics = whole(made), []
    spoils: list[Callable[[], Any]] = [
        lambda: made.model.model.norm.register_forward_hook(lambda module, args, out: out * torch.nan),
        lambda: made.model.model.norm.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * torch.nan,)),
    ]
    for spoil in spoils:
        hook = spoil() if rank == 1 else None
        metrics.append(made.step(second))
        if hook:
            hook.remove()
    unchanged = same(before, whole(made))
    return {"metrics": metrics, "unchanged": unchanged, "after": made.step(third)["skipped"], "finite": made.logprobs((1, 2))}


def error(work: Callable[[], Any]) -> str:
    try:
        work()
    except AipoError as caught:
        return f"{type(caught).__name__}: {caught}"
    return "none"


def saved(folder: Path, root: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a checkpoint after each, a third, and an export."""
    made = learner(folder, "llama", sections)
    first, second, third = batches()
    made.step(first)
    made.save(root, {"at": 1})
    made.step(second)
    made.save(root, {"at": 2})
    metrics = made.step(third)
    made.export(root.with_name(f"{root.name}-policy"))
    return {"metrics": metrics, "weights": whole(made), "adapter": dict(made.adapter()) if made.adapted else {}}


def full_disk(folder: Path, root: Path, rank: int) -> list[str | None]:
    """What a save says where the second rank's disk is full, and what one says after that."""
    made = learner(folder, "llama", {})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    said = [made.save(root, {})]
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return [*said, made.save(root, {})]


def resumed(folder: Path, root: Path, sections: dict[str, Any]) -> dict[str, Any]:
    made = learner(folder, "llama", sections)
    cursor = made.restore(root)
    return {"cursor": cursor, "metrics": made.step(batches()[2]), "weights": whole(made)}


def join(folder: Path, rank: int, size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)


def process(folder: Path, rank: int, barrier: Any) -> None:
    """Ranks 0 and 1 are one learner, 2 is another by itself; in the end they are three ranks."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    own = folder / ("one" if rank == 2 else "two")
    if rank < 2:
        join(folder, rank, 2)
        found["poisoned"] = poisoned(folder, rank)
        found["full disk"] = full_disk(folder, own / "disk", rank)
        lent, scalar = tiny_model(), tiny_model()
        lent.model.layers[1].mlp = lent.model.layers[0].mlp
        scalar.model.layers[0].gain = torch.nn.Parameter(torch.tensor(1.0))
        found["lent"] = error(lambda: shards.shard(lent, torch.device("cpu"), model_module.row_logprobs))
        found["scalar"] = error(lambda: shards.shard(scalar, torch.device("cpu"), model_module.row_logprobs))
        found["missing"] = error(lambda: learner(folder, "nowhere", {}))
    for name in ROWS:
        found[name] = row(folder, name)
    for kind, sections in KINDS.items():
        found[f"saved {kind}"] = saved(folder, own / kind, sections)
    barrier.wait(LIMIT)
    for kind, sections in KINDS.items():
        for source in ("one", "two"):
            found[f"resumed {kind} from {source}"] = resumed(folder, folder / source / kind, sections)
    found["other"] = error(lambda: learner(folder, "tied", {}).restore(folder / "two" / "full"))
    if rank < 2:
        dist.destroy_process_group()
    barrier.wait(LIMIT)
    join(folder, rank, 3)
    for kind, sections in KINDS.items():
        found[f"three {kind}"] = resumed(folder, folder / "two" / kind, sections)
    if rank == 2:
        newest = folder / "two" / "full" / "step-00000002" / "shard-00002-model-00001-of-00003.safetensors"
        damaged = bytearray(newest.read_bytes())
        damaged[-5] ^= 4
        newest.write_bytes(damaged)
    dist.barrier()
    found["damaged"] = learner(folder, "llama", {}).restore(folder / "two" / "full")
    dist.destroy_process_group()
    torch.save(found, folder / f"found-{rank}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What each process found."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
    save_tokenizer(folder / "llama")
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(3)
    processes = [context.Process(target=process, args=(folder, rank, barrier), daemon=True) for rank in range(3)]
    for one in processes:
        one.start()
    end = time.monotonic() + LIMIT + 20
    while any(one.is_alive() for one in processes) and not any(one.exitcode for one in processes) and time.monotonic() < end:
        multiprocessing.connection.wait([one.sentinel for one in processes if one.is_alive()], timeout=1)
    for one in processes:
        one.kill()
        one.join()
    return tuple(torch.load(folder / f"found-{rank}", weights_only=True) for rank in range(3))


def test_batches_do_not_come_out_even() -> None:
    """A rank runs out of micro-batches, and repeats one that does not count."""
    run = [batch.select(batch.trainable(Loss()).any(1)) for batch in batches()]
    assert {len(batch.plan(MICRO)) % 2 for batch in run} == {0, 1}


@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_equal_one_process(found: Found, name: str) -> None:
    first, second, alone = (by_process[name] for by_process in found)
    assert apart(first["gradients"], alone["gradients"]) <= 1e-6
    if name != "gpt2":  # its key biases have no gradient but rounding, which Adam divides by itself
        assert apart(first["weights"], alone["weights"]) <= CLOSE
    assert apart(first["weights"], second["weights"]) == 0
    assert max(float(tensor.abs().max()) for tensor in alone["gradients"].values()) > 1e-2
    assert (first["metrics"], first["learned"], first["probe"]) == (second["metrics"], second["learned"], second["probe"])
    assert first["learned"] == alone["learned"]
    assert first["probe"] == pytest.approx(alone["probe"], abs=1e-4)
    assert first["updates"] == alone["updates"]
    for ours, theirs in zip(first["metrics"], alone["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def test_a_nan_on_one_rank_is_skipped_by_all(found: Found) -> None:
    for by_process in found[:2]:
        metrics = by_process["poisoned"]["metrics"]
        assert [(m["skipped"], m.get("skipped/loss", 0.0), m.get("skipped/gradient", 0.0)) for m in metrics] == [(1, 1, 0), (1, 0, 1)]
        assert by_process["poisoned"]["unchanged"]
        assert by_process["poisoned"]["after"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_over_any_number_of_ranks(found: Found, kind: str) -> None:
    two, _, one = (by_process[f"saved {kind}"] for by_process in found)
    for source, straight in (("one", one), ("two", two)):
        for by_process, exact in zip(found, (source == "two", source == "two", source == "one"), strict=True):
            resumed = by_process[f"resumed {kind} from {source}"]
            assert resumed["cursor"] == {"at": 2}
            assert apart(resumed["weights"], straight["weights"]) <= (0 if exact else CLOSE)
            assert not exact or resumed["metrics"] == straight["metrics"]
    for by_process in found:
        assert apart(by_process[f"three {kind}"]["weights"], two["weights"]) <= CLOSE


def test_a_flipped_bit_in_one_ranks_file_costs_that_checkpoint(found: Found) -> None:
    assert [by_process["damaged"] for by_process in found] == [{"at": 1}] * 3


def test_a_full_disk_of_one_rank_costs_one_checkpoint_only(found: Found, folder: Path) -> None:
    first, second = (by_process["full disk"] for by_process in found[:2])
    assert first == second
    assert "not written ([Errno 27] File too large" in first[0]
    assert first[1] is None
    assert sorted(path.name for path in (folder / "two" / "disk").iterdir()) == ["LATEST", "step-00000000"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_adapter_and_export_are_whole_under_their_names(found: Found, folder: Path, kind: str) -> None:
    two, _, one = (by_process[f"saved {kind}"] for by_process in found)
    assert list(two["weights"]) == list(one["weights"])
    assert apart(two["weights"], one["weights"]) <= CLOSE
    assert apart(dict(load_model(folder / "two" / f"{kind}-policy").named_parameters()), two["weights"]) == 0
    config = (folder / "two" / f"{kind}-policy" / "config.json").read_text()
    assert config == (folder / "one" / f"{kind}-policy" / "config.json").read_text()
    if kind == "lora":
        assert apart(load_file(folder / "two" / "lora-policy" / "adapter" / "adapter_model.safetensors"), one["adapter"]) <= CLOSE


def test_what_cannot_be_done_is_one_line_on_every_rank(found: Found) -> None:
    for by_process in found[:2]:
        assert "ConfigError: policy.model: no model at" in by_process["missing"]
        assert "LlamaForCausalLM cannot be sharded over 2 ranks (layers share model.layers.1.mlp" in by_process["lent"]
        assert "LlamaForCausalLM cannot be sharded over 2 ranks (fully_shard doesn't support scalar" in by_process["scalar"]
        assert "ConfigError: checkpoint " in by_process["other"]
        assert "is of another model than" in by_process["other"]
        assert not any("\n" in by_process[name] for name in ("missing", "lent", "scalar", "other"))
