"""Kinds of models: what is sampled and learned must be the model's own distribution, or be refused in one line."""

import asyncio
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_learner import save_tokenizer
from tiny_learner import random_groups
from tiny_models import CONTEXT, TYPES, UNTRIED, listed, outcome, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from aipo_graph.config import Config, Loss
from aipo_graph.engines.facts import Facts
from aipo_graph.engines.local import LocalEngine
from aipo_graph.engines.vllm_api import WeightFiles
from aipo_graph.errors import ConfigError, EngineError
from aipo_graph.learn.batch import pack
from aipo_graph.learn.learner import Learner
from aipo_graph.learn.model import applies_head_only, check_rows, token_logprobs

LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
    "original_max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def own(model: Any, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        scores = model(torch.tensor([row]), use_cache=False).logits[0].float().log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(row)[1:, None])[:, 0]


def learned(model: Any, rows: list[list[int]], *, packed: bool = False) -> list[torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    with torch.no_grad():
        found = token_logprobs(model, ids, mask, packed=packed)[0]
    return [line[1 : len(row)] for line, row in zip(found, rows, strict=True)]


ROWS = [torch.arange(length).mul(11).add(length).remainder(61).add(3).tolist() for length in (6, 40, 15)]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full attention beside a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "a window in some layers": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
    "a bound on scores": ("gemma2", {"attn_logit_softcapping": 2.0}),
    "scaled states": ("granite", {"logits_scaling": 8.0}),
    "a head by another name": ("modernbert-decoder", {}),
    "experts": ("qwen3_moe", {}),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_engine_and_learner_give_the_models_own_logprobs_in_any_company(kind: str) -> None:
    model = tiny(KINDS[kind][0], **KINDS[kind][1])
    engine = LocalEngine(model, (), str, max_context=CONTEXT)
    done = await asyncio.gather(*(engine.generate(row, seed=i, max_tokens=30) for i, row in enumerate(ROWS)))
    rows = [[*row, *found.token_ids] for row, found in zip(ROWS, done, strict=True)]
    for row, prompt, found, scored, packed in zip(rows, ROWS, done, learned(model, rows), learned(model, rows, packed=True), strict=True):
        torch.testing.assert_close(scored, own(model, row), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed, scored, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(found.logprobs), scored[len(prompt) - 1 :], atol=1e-4, rtol=1e-4)


def test_rows_end_to_end_are_refused_where_a_state_goes_on_from_one_to_the_next() -> None:
    check_rows(tiny("llama"), "float32", packed=True)
    check_rows(tiny("lfm2"), "float32")
    with pytest.raises(ConfigError, match="log-probabilities of a text alone and in a batch are"):
        check_rows(tiny("lfm2"), "float32", packed=True)


def test_a_bound_on_scores_is_not_left_out() -> None:
    model = tiny("gemma2", attn_logit_softcapping=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(30 if "q_proj" in name else 1)
    plain = own(model, ROWS[1])
    LocalEngine(model, (), str, max_context=CONTEXT)  # takes eager attention
    assert float((own(model, ROWS[1]) - plain).abs().max()) > 1e-2


@pytest.mark.parametrize(("kind", "alone"), [("llama", True), ("inkling_text", False), ("modernbert-decoder", False), ("cohere", False)])
def test_the_head_stands_alone_only_where_it_gives_the_logits(kind: str, alone: bool) -> None:
    model = tiny(kind)
    assert applies_head_only(model) == alone
    torch.testing.assert_close(learned(model, [ROWS[1]])[0], own(model, ROWS[1]), atol=1e-4, rtol=1e-4)


def test_positions_that_the_longest_row_scales_do_not_reach_other_rows(tmp_path: Path) -> None:
    model = tiny("phi3", **LONGROPE)
    for row, scored in zip(ROWS, learned(model, ROWS), strict=True):
        torch.testing.assert_close(scored, own(model, row), atol=1e-4, rtol=1e-4)
    with pytest.raises(EngineError, match="set engine.max_context = 16"):
        LocalEngine(model, (), str, max_context=CONTEXT)
    LocalEngine(model, (), str, max_context=16)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(EngineError, match="set engine.max_context = 16"):
        Facts.read(Config(), str(tmp_path))
    assert Facts.read(Config.model_validate({"engine": {"max_context": 16}}), str(tmp_path)).context == 16


@pytest.mark.parametrize("kind", ["recurrent_gemma", "gpt_neo", "bart", "mamba"])
def test_what_the_engine_cannot_sample_is_refused_in_one_line(kind: str) -> None:
    with pytest.raises(EngineError, match="the local engine cannot sample .*; use engine.kind = server or vllm$"):
        LocalEngine(tiny(kind), (), str, max_context=CONTEXT)


@pytest.mark.parametrize(("kind", "train"), [("bert", {}), ("opt", {"gradient_checkpointing": True})])
def test_what_cannot_be_learned_is_refused_at_the_start(kind: str, train: dict[str, Any], tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be learned"):
        Learner(Config.model_validate({"train": train}), tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_under_lora_are_trained_merged_and_exported(kind: str, dtype: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny(kind).save_pretrained(base)
    save_tokenizer(base)
    learner = Learner(
        Config.model_validate({"policy": {"lora_rank": 4, "dtype": dtype}, "optimizer": {"lr": 1e-2, "warmup_steps": 0}}), base
    )
    assert {p.dtype for p in learner.trained.values()} == {torch.float32}
    for _ in range(2):
        assert learner.step(pack(random_groups(1), Loss()))["skipped"] == 0
    start = dict(AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).named_parameters())
    weights = dict(learner.weights())
    changed = {name for name in start if not torch.equal(weights[name], start[name])}
    assert any("expert" in name for name in changed)
    learner.export(out)
    merged = AutoModelForCausalLM.from_pretrained(out).float()
    if dtype == "float32":
        expected = learner.logprobs(ROWS[0])
        assert own(merged, ROWS[0]).tolist() == pytest.approx(expected, abs=1e-4)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
        assert own(adapted, ROWS[0]).tolist() == pytest.approx(expected, abs=1e-4)


def test_for_vllm_experts_stay_frozen_and_a_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    config = Config.model_validate({"policy": {"lora_rank": 4}, "engine": {"kind": "server", "urls": ["http://127.0.0.1:1"]}})
    assert not any("experts" in name for name, _ in Learner(config, tmp_path).adapter())
    assert "the experts of qwen3_moe stay frozen" in caplog.text


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "llama"])
def test_weights_for_vllm_are_the_files_that_the_hub_has(kind: str, tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    learner = Learner(Config(), tmp_path)
    files = WeightFiles(Config(), Facts.read(Config(), str(tmp_path)))
    try:
        path = files.write("a-1", learner.weights())
        assert (path / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
        assert files.renames == (kind in ("qwen3_moe", "mixtral"))
    finally:
        files.close()


def test_a_reply_ends_where_the_template_ends_it(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    words.add_special_tokens({"additional_special_tokens": ["<|over|>"]})
    words.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}<|over|>{% endfor %}"
    words.save_pretrained(tmp_path)
    over = words.convert_tokens_to_ids("<|over|>")
    assert over in Facts.read(Config(), str(tmp_path)).eos_ids
    assert over in LocalEngine.load(Config.model_validate({"run": {"device": "cpu"}}), str(tmp_path)).eos_ids


@pytest.mark.slow
def test_the_table_of_models_is_current() -> None:
    """Types that the page does not list are reported, not failed: transformers adds some with each version."""
    torch.manual_seed(0)
    page = listed()
    assert len(page) > 100
    wrong = {kind: (found, page[kind]) for kind in page if kind in TYPES and (found := outcome(kind)) != page[kind]}
    assert not wrong, "run python tests/tiny_models.py"
    if new := sorted(TYPES.keys() - page.keys() - UNTRIED):
        warnings.warn(f"docs/models.md does not list {', '.join(new)}", stacklevel=1)
