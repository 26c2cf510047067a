import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from tiny_learner import VOCAB, group, random_groups, same, segment, snapshot, tiny_learner, tiny_model, trace
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from aipo_graph.config import Config, Loss
from aipo_graph.errors import ConfigError, EngineError, TrainError
from aipo_graph.learn import model as model_module
from aipo_graph.learn.batch import POLICY, Batch, pack
from aipo_graph.learn.learner import Learner, learning_rate
from aipo_graph.learn.model import applies_head_only, load_model, token_logprobs
from aipo_graph.messages import read_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}
MODELS = {
    "llama": lambda: tiny_model(),
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=VOCAB, head_dim=16, num_key_value_heads=2, final_logit_softcapping=2.0, pad_token_id=0, **SHAPE)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(vocab_size=VOCAB, logit_scale=0.25, pad_token_id=0, **SHAPE)),
}


@pytest.fixture
def batch() -> Batch:
    return pack(random_groups(1), Loss())


def plain_logprobs(model: PreTrainedModel, token_ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook way: all logits of an unpadded row at once."""
    logits = model(input_ids=token_ids[None]).logits[0].float() / temperature
    every = torch.log_softmax(logits, -1)
    own = every[:-1].gather(-1, token_ids[1:, None]).squeeze(-1)
    return own, -(every.exp() * every).sum(-1)[:-1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("chunk", "packed"), [(2**26, False), (VOCAB * 7, False), (VOCAB * 7, True)])
def test_token_logprobs_equal_the_plain_forward(name: str, chunk: int, packed: bool, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows that lie end to end in one."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    monkeypatch.setitem(model_module.CHUNK, "cpu", chunk)
    logprobs, entropy = token_logprobs(model, batch.token_ids, batch.mask, 0.7, packed=packed)
    expected = torch.zeros(logprobs.shape)
    for row, length in enumerate(batch.lengths):
        own, spread = plain_logprobs(model, batch.token_ids[row, :length], 0.7)
        expected[row, 1:length] = own
        wanted = batch.mask[row, 1:length]
        assert torch.allclose(entropy[row, 1:length][wanted], spread[wanted], atol=1e-5)
    assert not logprobs[~batch.mask].any()
    assert torch.allclose(logprobs[batch.mask], expected[batch.mask], atol=1e-5)
    gradients = []
    for values in (logprobs, expected):
        model.zero_grad()
        (values * batch.mask * batch.advantages).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-3 * gradients[1].abs().max())


def test_logits_never_exist_as_a_whole(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setitem(model_module.CHUNK, "cpu", VOCAB * 7)
    assert applies_head_only(model)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    token_logprobs(model, batch.token_ids, batch.mask)
    assert max(sizes) == 7
    assert sum(sizes) == int(batch.mask.sum())


def test_on_policy_ratio_is_one_against_a_sampler_with_a_cache(tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path)
    prompt, sampled, logprobs = torch.tensor([[3, 1, 4]]), [], []
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        out = learner.model(input_ids=prompt, use_cache=True)
        for _ in range(30):
            every = torch.log_softmax(out.logits[0, -1], -1)
            sampled.append(int(torch.multinomial(every.exp(), 1, generator=generator)))
            logprobs.append(float(every[sampled[-1]]))
            out = learner.model(input_ids=torch.tensor([[sampled[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    won = trace(segment("context", 3, 1, 4), segment("policy", *sampled, logprobs=tuple(logprobs)))
    lost = trace(segment("context", 3, 1, 4, 1), segment("policy", 2), reward=0.0)
    metrics = learner.step(pack([group(won, lost)], Loss()).select(torch.tensor([0])))
    assert metrics["ratio_max"] == metrics["ratio_mean"] == 1.0
    assert metrics["mismatch_max"] < 1e-5


def gradients(learner: Learner, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """What the optimizer would see after these parts, taken by doing the update with a step that only records."""
    recorded: dict[str, torch.Tensor] = {}
    total: dict[str, torch.Tensor] = {}
    clip = learner.config.optimizer.grad_clip
    assert clip > 1e6
    for part in batches:
        hook = learner.optimizer.register_step_pre_hook(
            lambda *_: recorded.update({n: p.grad.clone() for n, p in learner.model.named_parameters()})
        )
        before = snapshot(learner)
        learner.step(part)
        hook.remove()
        for name, tensor in learner.weights():
            tensor.copy_(before[name])
        for name, value in recorded.items():
            total[name] = total.get(name, 0) + value
    return total


NO_CLIP = {"optimizer": {"grad_clip": 1e9}, "rollout": {"max_tokens": 40}}


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo", "rloo", "cispo", "gspo"])
def test_one_batch_is_its_micro_batches_and_its_parts(algorithm: str, batch: Batch, tmp_path: Path) -> None:
    whole = gradients(tiny_learner(tmp_path, loss={"algorithm": algorithm}, train={"micro_batch_tokens": 10**6}, **NO_CLIP), [batch])
    micro = gradients(tiny_learner(tmp_path, loss={"algorithm": algorithm}, train={"micro_batch_tokens": 40}, **NO_CLIP), [batch])
    thirds = [batch.select(torch.arange(start, len(batch), 3)) for start in range(3)]
    parts = gradients(tiny_learner(tmp_path, loss={"algorithm": algorithm}, **NO_CLIP), thirds)
    for name, value in whole.items():
        assert torch.allclose(value, micro[name], atol=1e-6)
        assert torch.allclose(value, parts[name], atol=1e-6)
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-3


def test_resulting_weights_do_not_depend_on_the_micro_batches(batch: Batch, tmp_path: Path) -> None:
    results = []
    for tokens, packed in ((40, False), (10**6, False), (40, True)):
        learner = tiny_learner(tmp_path, train={"micro_batch_tokens": tokens}, rollout={"max_tokens": 40}, optimizer={"lr": 1e-3})
        learner.packed = packed  # as flash attention has it: rows end to end
        for _ in range(3):
            learner.step(batch)
        results.append(dict(learner.weights()))
    assert all(torch.allclose(results[0][name], other[name], atol=1e-6) for other in results[1:] for name in other)


def test_rows_without_advantage_are_not_run_but_still_counted(tmp_path: Path) -> None:
    groups = random_groups(2)
    flat = trace(segment("context", 1, 2), segment("policy", *[3] * 9), reward=1.0)
    batch = pack([*groups, group(flat, flat)], Loss())
    learner = tiny_learner(tmp_path)
    seen: list[int] = []
    learner.model.model.register_forward_hook(lambda module, args, out: seen.append(len(out.last_hidden_state)))
    learner.step(batch)
    assert sum(seen) == int((batch.advantages != 0).any(1).sum()) < len(batch)
    assert batch.policy_tokens == pack(groups, Loss()).policy_tokens + 18


def test_learning_raises_what_was_rewarded_and_agent_words_with_it(tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path, loss={"behaviour": 1.0})
    good = trace(segment("context", 1), segment("policy", 2, 3), segment("agent", 4, 5), segment("policy", 6), with_agents=True)
    bad = trace(segment("context", 1), segment("policy", 7, 8), reward=0.0)
    batch = pack([group(good, bad)], Loss(baseline="group"))
    first = learner.step(batch)
    for _ in range(20):
        last = learner.step(batch)
    assert last["agent_logprob"] > first["agent_logprob"] + 1
    assert first["floor_hit"] > 0
    assert learner.version == learner.updates == 21


def test_several_updates_take_old_from_before_the_first(batch: Batch, tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path, train={"epochs": 2, "minibatches": 2})
    with torch.no_grad():
        own, _ = token_logprobs(learner.model, batch.token_ids, batch.mask)
    exact = replace(batch, behaviour_logprobs=torch.where(batch.source == POLICY, own, batch.behaviour_logprobs))
    metrics = learner.step(exact)
    assert learner.updates == 4
    assert metrics["mismatch_max"] < 1e-5  # against the weights before any update
    assert metrics["ratio_max"] > 1.01  # against the same, after some
    assert metrics["clip_fraction"] > 0


def poison_reward(learner: Learner, batch: Batch) -> Batch:
    groups = random_groups(1)
    damaged = [replace(t, scores={"reward": math.nan}) for t in groups[0].traces]
    return pack([replace(groups[0], traces=tuple(damaged))], Loss())


def poison_logprob(learner: Learner, batch: Batch) -> Batch:
    behaviour = batch.behaviour_logprobs.clone()
    behaviour[batch.source == POLICY] = math.nan
    return replace(batch, behaviour_logprobs=behaviour)


def poison_positive_logprob(learner: Learner, batch: Batch) -> Batch:
    return replace(batch, behaviour_logprobs=batch.behaviour_logprobs.abs())


def poison_advantage(learner: Learner, batch: Batch) -> Batch:
    values = batch.advantages.clone()
    values[batch.mask.nonzero()[0].unbind()] = math.inf
    return replace(batch, advantages=values)


def poison_weight(learner: Learner, batch: Batch) -> Batch:
    learner.model.lm_head.weight.data[3, 3] = math.nan
    return batch


def poison_gradient(learner: Learner, batch: Batch) -> Batch:
    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[0, 0] = math.nan
        return gradient

    learner.hook = learner.model.model.layers[0].mlp.up_proj.weight.register_hook(spoil)
    return batch


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (poison_reward, None),
        (poison_logprob, "logprob"),
        (poison_positive_logprob, "logprob"),
        (poison_advantage, "advantage"),
        (poison_weight, "loss"),
        (poison_gradient, "gradient"),
    ],
)
def test_a_bad_step_changes_nothing_and_the_run_goes_on(poison, reason: str | None, batch: Batch, tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path)
    learner.step(batch)
    clean = learner.model.lm_head.weight.data.clone()
    bad = poison(learner, batch)
    before, updates = snapshot(learner), learner.updates
    metrics = learner.step(bad)
    assert same(snapshot(learner), before)
    assert learner.updates == updates
    assert learner.version == 2
    if reason:
        assert metrics["skipped"] == metrics[f"skipped/{reason}"] == 1.0
    else:
        assert (metrics["trainable_tokens"], metrics["batch_bad_reward"]) == (0.0, 4.0)
    if poison is poison_gradient:
        learner.hook.remove()
    learner.model.lm_head.weight.data.copy_(clean)
    assert learner.step(batch)["skipped"] == 0.0
    assert all(tensor.isfinite().all() for _, tensor in learner.weights())
    assert not same(snapshot(learner), before)


def test_three_bad_steps_in_a_row_end_the_run(batch: Batch, tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path)
    bad = poison_advantage(learner, batch)
    learner.step(bad)
    learner.step(bad)
    learner.step(batch)  # a good one starts the count again
    learner.step(bad)
    learner.step(bad)
    with pytest.raises(TrainError, match="3 bad steps in a row, the last for its advantage"):
        learner.step(bad)


def test_nothing_to_train_on_is_reported_then_ends_the_run(tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path, train={"patience": 2})
    flat = trace(segment("context", 1), segment("policy", 2))
    nothing = pack([group(flat, flat)], Loss())
    before = snapshot(learner)
    assert learner.step(nothing)["trainable_tokens"] == 0
    assert same(snapshot(learner), before)
    with pytest.raises(TrainError, match=r"nothing to train on for 2 steps \(train\.patience\)"):
        learner.step(nothing)


def test_kl_holds_the_policy_near_its_start(batch: Batch, tmp_path: Path) -> None:
    def moved(weight: float) -> float:
        learner = tiny_learner(tmp_path, loss={"kl_weight": weight})
        for _ in range(8):
            metrics = learner.step(batch)
        assert ("kl" in metrics) == (weight > 0)
        with torch.no_grad():
            now, _ = token_logprobs(learner.model, batch.token_ids, batch.mask)
            start, _ = token_logprobs(load_model(tmp_path), batch.token_ids, batch.mask)
        return float((now - start)[batch.mask & (batch.source == POLICY)].abs().mean())

    assert moved(5.0) < 0.6 * moved(0.0)


def test_gradient_checkpointing_runs_layers_twice_and_gives_the_same_step(batch: Batch, tmp_path: Path) -> None:
    results, calls = [], []
    for checkpointing in (False, True):
        learner = tiny_learner(tmp_path, train={"gradient_checkpointing": checkpointing})
        count: list[int] = []
        learner.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        learner.step(batch)
        results.append(dict(learner.weights()))
        calls.append(len(count))
    assert calls[1] == 2 * calls[0]
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


def test_schedule() -> None:
    constant = Config.model_validate({"optimizer": {"lr": 1.0, "warmup_steps": 4}, "train": {"steps": 12}})
    cosine = Config.model_validate({"optimizer": {"lr": 1.0, "warmup_steps": 4, "schedule": "cosine"}, "train": {"steps": 12}})
    assert [learning_rate(constant, u) for u in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [learning_rate(cosine, u) for u in (3, 4, 8, 12, 99)] == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])


def test_steps_follow_the_schedule(batch: Batch, tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path, optimizer={"lr": 0.01, "warmup_steps": 4})
    assert [learner.step(batch)["lr"] for _ in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert learner.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    "settings", [{}, {"train": {"epochs": 2, "minibatches": 2}}, {"optimizer": {"schedule": "cosine", "warmup_steps": 3}}]
)
def test_save_restore_continue_is_bit_exact(settings: dict, tmp_path: Path) -> None:
    batches = [pack(random_groups(seed), Loss()) for seed in range(6)]
    straight = tiny_learner(tmp_path / "base", **settings)
    broken = tiny_learner(tmp_path / "base", **settings)
    for batch in batches[:3]:
        straight.step(batch)
        broken.step(batch)
    assert broken.save(tmp_path / "saved", {"next": 3, "groups": ["a"]}) is None
    torch.rand(5)
    resumed = tiny_learner(tmp_path / "base", **settings)
    assert resumed.restore(tmp_path / "saved") == {"next": 3, "groups": ["a"]}
    assert resumed.version == 3
    assert same(snapshot(resumed) | {"rng": torch.zeros(1)}, snapshot(broken) | {"rng": torch.zeros(1)})
    for batch in batches[3:]:
        assert straight.step(batch) == resumed.step(batch)
    assert same(snapshot(straight), snapshot(resumed))


def test_random_state_is_restored(tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path / "base")
    torch.manual_seed(7)
    learner.save(tmp_path / "saved", {})
    expected = torch.rand(3)
    torch.rand(5)
    learner.restore(tmp_path / "saved")
    assert torch.equal(torch.rand(3), expected)


def test_restore_without_a_checkpoint_and_of_another_model(tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path / "base")
    assert learner.restore(tmp_path / "nowhere") == {}
    learner.save(tmp_path / "saved", {})
    tiny_model(hidden_size=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="is of another model than"):
        tiny_learner(tmp_path / "other").restore(tmp_path / "saved")


def test_weights_fit_a_second_model_tied_or_not(batch: Batch, tmp_path: Path) -> None:
    for tied in (False, True):
        tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / str(tied))
        learner = tiny_learner(tmp_path / str(tied))
        learner.step(batch)
        other = load_model(tmp_path / str(tied))
        report = other.load_state_dict(dict(learner.weights()), strict=False)
        assert not report.unexpected_keys
        for a, b in zip(other.parameters(), learner.model.parameters(), strict=True):
            assert torch.equal(a, b)


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)


def test_export_is_a_hugging_face_directory_and_replaces_only_one(batch: Batch, tmp_path: Path) -> None:
    learner = tiny_learner(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    for _ in range(2):
        learner.step(batch)
        learner.export(tmp_path / "out" / "final")
        again = load_model(tmp_path / "out" / "final")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), learner.model.parameters(), strict=True))
    assert read_tokenizer(tmp_path / "out" / "final").convert_tokens_to_ids("7") == 7
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["final"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    with pytest.raises(ConfigError, match="exists and is no model directory"):
        learner.export(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.png").exists()


def test_export_writes_what_models_ship_as_generation_config(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_learner(base)
    save_tokenizer(base)
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": [1, 2]}')
    tiny_learner(base).export(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"], written["eos_token_id"]) == (True, 0.6, [1, 2])


def test_bad_model_directories_are_one_clear_line(tmp_path: Path) -> None:
    def line(kind: type[Exception], path: Path) -> str:
        with pytest.raises(kind) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no model at" in line(ConfigError, tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in line(ConfigError, tmp_path / "empty")
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    with pytest.raises(ConfigError, match="has no tokenizer that loads"):
        read_tokenizer(base)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in line(EngineError, base)
    weights.unlink()
    assert "cannot be loaded" in line(EngineError, base)
    tensors = load(whole)
    tensors.pop("model.norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lack 1 tensors, model.norm.weight" in line(EngineError, base)
    (base / "config.json").write_text("{")
    assert "no model at" in line(ConfigError, base)
