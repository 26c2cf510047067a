"""LoRA and bfloat16 training on a real two-layer model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_learner import save_tokenizer
from tiny_learner import VOCAB, random_groups, tiny_learner, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from aipo_graph.config import Loss
from aipo_graph.errors import ConfigError
from aipo_graph.learn import model as model_module
from aipo_graph.learn.batch import POLICY, Batch, pack
from aipo_graph.learn.learner import Learner
from aipo_graph.learn.model import fast_attention, load_model, token_logprobs

LORA = {"lora_rank": 4, "lora_alpha": 8.0}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}
MODELS = {
    "llama": lambda: tiny_model(),
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "biased": lambda: tiny_model(attention_bias=True, mlp_bias=True),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, head_dim=16, num_key_value_heads=1, **SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)),
}


@pytest.fixture
def batch() -> Batch:
    return pack(random_groups(1), Loss())


def trained_lora(folder: Path, batch: Batch, steps: int = 3, **sections: dict[str, object]) -> Learner:
    sections["policy"] = LORA | sections.get("policy", {})
    learner = tiny_learner(folder, **sections)
    for _ in range(steps):
        assert learner.step(batch)["skipped"] == 0
    return learner


def parameters(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


@torch.no_grad()
def plain(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return token_logprobs(model, batch.token_ids, batch.mask)[0]


def test_a_step_changes_the_adapter_and_nothing_else(batch: Batch, tmp_path: Path) -> None:
    learner = trained_lora(tmp_path, batch, steps=0)
    before = parameters(learner)
    for _ in range(2):
        learner.step(batch)
    changed = {name for name, value in parameters(learner).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 2 * 7 * 2  # A and B of the seven linear layers of two layers; not the head
    assert not any("lm_head" in name for name in changed)


def test_the_start_is_the_base_policy_and_repeats_by_seed(batch: Batch, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trained_lora(tmp_path, batch, steps=0)
    torch.set_rng_state(state)
    drawn = torch.rand(3)
    again = trained_lora(tmp_path, batch, steps=0)
    other = trained_lora(tmp_path, batch, steps=0, run={"seed": 1})
    assert torch.equal(plain(first.model, batch), plain(load_model(tmp_path), batch))
    assert all(torch.equal(a, b) for a, b in zip(first.trained.values(), again.trained.values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.trained.values(), other.trained.values(), strict=True))
    torch.set_rng_state(state)
    trained_lora(tmp_path, batch, steps=0)
    assert torch.equal(torch.rand(3), drawn)  # the global random state is left alone


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft says what it does about GPT-2's layers
@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_a_plain_model_that_computes_the_same(name: str, batch: Batch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path)
    learner = trained_lora(tmp_path, batch)
    other = load_model(tmp_path)
    start = plain(other, batch)
    own = parameters(learner)
    weights = dict(learner.weights())
    assert set(weights) == {n for n, _ in other.named_parameters()} | {n for n, _ in other.named_buffers() if n in other.state_dict()}
    other.load_state_dict(weights, strict=False)
    now = plain(learner.model, batch)
    assert torch.allclose(plain(other, batch), now, atol=1e-5)
    assert float((now - start).abs().max()) > 1e-2
    assert all(torch.equal(value, own[n]) for n, value in parameters(learner).items())  # the model is as it was


def test_the_adapter_has_pefts_names(batch: Batch, tmp_path: Path) -> None:
    learner = trained_lora(tmp_path, batch)
    adapter = dict(learner.adapter())
    assert len(adapter) == len(learner.trained)
    assert adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    with pytest.raises(ConfigError, match="policy.lora_rank = 0: all weights are trained"):
        list(tiny_learner(tmp_path).adapter())


def test_the_reference_is_the_model_with_its_adapter_off(batch: Batch, tmp_path: Path) -> None:
    learner = trained_lora(tmp_path, batch, loss={"kl_weight": 0.1})
    assert learner.reference is learner.model
    base = plain(load_model(tmp_path), batch)
    assert torch.equal(learner._reference_logprobs(learner.reference, batch), base)
    assert float((plain(learner.model, batch) - base).abs().max()) > 1e-2
    before = parameters(learner)
    assert learner.step(batch)["kl"] > 0  # the adapter is on again and goes on learning
    assert not torch.equal(parameters(learner)[next(iter(learner.trained))], before[next(iter(learner.trained))])


def test_the_kl_term_is_that_of_a_copy(batch: Batch, tmp_path: Path) -> None:
    """Adapter off against a second model, also where layers are recomputed in the backward pass."""
    kls = []
    for checkpointing in (False, True):
        learner = trained_lora(tmp_path, batch, loss={"kl_weight": 0.1}, train={"gradient_checkpointing": checkpointing})
        gap = (plain(load_model(tmp_path), batch) - plain(learner.model, batch))[batch.mask & (batch.source == POLICY)]
        active = batch.trainable(learner.config.loss)
        assert bool(active[batch.mask & (batch.source == POLICY)].all())
        kl = learner.step(batch)["kl"]
        assert kl == pytest.approx(float((gap.exp() - gap - 1).mean()), rel=1e-3)
        kls.append(dict(learner.adapter()))
    assert all(torch.allclose(kls[0][name], kls[1][name], atol=1e-5) for name in kls[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_loads_in_plain_transformers_and_in_peft(dtype: str, batch: Batch, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    learner = trained_lora(base, batch, policy={"dtype": dtype})
    save_tokenizer(base)
    learner.export(out)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == getattr(torch, dtype)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    if dtype == "float32":
        assert torch.allclose(plain(merged, batch), plain(learner.model, batch), atol=1e-5)
    adapted = PeftModel.from_pretrained(load_model(base, dtype=dtype), out / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == str(base)
    # peft casts to float32 what it loads for a bfloat16 model: the same adapter in the same arithmetic
    assert torch.allclose(plain(adapted.get_base_model(), batch), plain(learner.model, batch), atol=1e-5)
    learner.export(out)  # and replaces itself


@pytest.mark.parametrize("settings", [{}, {"policy": {"dtype": "bfloat16"}}, {"train": {"epochs": 2, "minibatches": 2}}])
def test_save_restore_continue_is_bit_exact(settings: dict, tmp_path: Path) -> None:
    batches = [pack(random_groups(seed), Loss()) for seed in range(4)]
    straight = trained_lora(tmp_path / "base", batches[0], steps=2, **settings)
    broken = trained_lora(tmp_path / "base", batches[0], steps=2, **settings)
    assert broken.save(tmp_path / "saved", {"next": 2}) is None
    files = {path.name: path.stat().st_size for path in (tmp_path / "saved" / "step-00000002").iterdir()}
    whole = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert files["model.safetensors"] < whole / 2  # the adapter alone
    torch.rand(5)
    resumed = trained_lora(tmp_path / "base", batches[0], steps=0, **settings)
    assert resumed.restore(tmp_path / "saved") == {"next": 2}
    for batch in batches[1:]:
        assert straight.step(batch) == resumed.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(straight.trained.values(), resumed.trained.values(), strict=True))
    slots = [learner.optimizer.state_dict()["state"] for learner in (straight, resumed)]
    assert all(torch.equal(slots[0][i][slot], slots[1][i][slot]) for i in slots[0] for slot in slots[0][i])


def test_a_checkpoint_of_another_adapter_or_model_is_refused(batch: Batch, tmp_path: Path) -> None:
    trained_lora(tmp_path / "base", batch).save(tmp_path / "saved", {})
    tiny_model(seed=1).save_pretrained(tmp_path / "other")  # the same shapes, other weights
    others = [("base", {"lora_rank": 2}), ("base", {"lora_alpha": 4.0}), ("base", {"lora_rank": 0}), ("other", {})]
    for model, policy in others:
        learner = trained_lora(tmp_path / model, batch, steps=0, policy=policy)
        before = parameters(learner)
        with pytest.raises(ConfigError, match="is of another model than .* with policy.lora_rank = ") as caught:
            learner.restore(tmp_path / "saved")
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in parameters(learner).items())


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_trains_float32_weights(rank: int, checkpointing: bool, batch: Batch, tmp_path: Path) -> None:
    train = {"gradient_checkpointing": checkpointing}
    learner = trained_lora(tmp_path, batch, steps=0, policy={"dtype": "bfloat16", "lora_rank": rank}, train=train, loss={"kl_weight": 0.01})
    exact = trained_lora(tmp_path, batch, steps=0, policy={"lora_rank": rank}, train=train, loss={"kl_weight": 0.01})
    seen: set[torch.dtype] = set()
    learner.model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    losses = [(learner.step(batch)["agent_logprob"], exact.step(batch)["agent_logprob"]) for _ in range(8)]
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in learner.trained.values()} == {torch.float32}
    assert {p.dtype for p in learner.model.parameters()} == ({torch.float32, torch.bfloat16} if rank else {torch.float32})
    assert {t.dtype for _, t in learner.weights()} == {torch.bfloat16 if rank else torch.float32}
    state = learner.optimizer.state_dict()["state"]
    assert {value.dtype for slots in state.values() for value in slots.values()} == {torch.float32}
    logprobs, entropy = learner._score(learner.model, batch)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert losses[-1][0] > losses[0][0] + 0.1  # learns, and as float32 does
    assert losses[-1][0] == pytest.approx(losses[-1][1], abs=0.3)


@pytest.mark.parametrize("rank", [0, 4])
def test_chunked_logprobs_equal_unchunked_ones_under_autocast(
    rank: int, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = trained_lora(tmp_path, batch, policy={"dtype": "bfloat16", "lora_rank": rank})
    results = []
    for chunk in (2**26, VOCAB * 7):
        monkeypatch.setitem(model_module.CHUNK, "cpu", chunk)
        learner.optimizer.zero_grad()
        logprobs, entropy = learner._score(learner.model, batch)
        (logprobs * batch.advantages).sum().backward()
        results.append((logprobs.detach(), entropy, torch.cat([p.grad.flatten() for p in learner.trained.values()])))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)
    assert torch.allclose(results[0][2], results[1][2], atol=2e-2 * float(results[0][2].abs().max()))  # bfloat16 sums in another order


def test_one_batch_is_its_micro_batches_for_lora(batch: Batch, tmp_path: Path) -> None:
    results = [
        dict(trained_lora(tmp_path, batch, train={"micro_batch_tokens": n}, rollout={"max_tokens": 40}, optimizer={"lr": 1e-3}).adapter())
        for n in (40, 10**6)
    ]
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-5) for name in results[0])


def test_bfloat16_full_training_exports_bfloat16(batch: Batch, tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path / "base", policy={"dtype": "bfloat16"})
    save_tokenizer(tmp_path / "base")
    learner.step(batch)
    learner.export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(again.parameters(), learner.model.parameters(), strict=True))
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("rank", [0, 4])
def test_logprobs_of_a_text_are_the_plain_ones(rank: int, batch: Batch, tmp_path: Path) -> None:
    learner = trained_lora(tmp_path, batch, policy={"lora_rank": rank}, rollout={"temperature": 0.5})
    ids = [3, 1, 4, 1, 5]
    found = learner.logprobs(ids)
    every = torch.log_softmax(learner.model(input_ids=torch.tensor([ids])).logits[0].detach(), -1)
    assert found == pytest.approx([float(every[t - 1, ids[t]]) for t in range(1, 5)], abs=1e-5)  # at temperature 1
    assert learner.logprobs(ids[:1]) == ()


def test_flash_attention_needs_its_package_cuda_and_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for three, two, chosen in ((True, True, "flash_attention_3"), (False, True, "flash_attention_2"), (False, False, None)):
        monkeypatch.setattr(model_module, "is_flash_attn_3_available", lambda three=three: three)
        monkeypatch.setattr(model_module, "is_flash_attn_2_available", lambda two=two: two)
        assert fast_attention(cuda, "bfloat16") == chosen
        assert fast_attention(cuda, "float32") is None
        assert fast_attention(torch.device("cpu"), "bfloat16") is None


def test_without_peft_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_learner(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    tiny_learner(tmp_path)  # full training needs none
    with pytest.raises(ConfigError) as caught:
        tiny_learner(tmp_path, policy=LORA)
    assert str(caught.value) == "policy.lora_rank = 4: LoRA needs peft; pip install 'peft<0.22,>=0.21'"
