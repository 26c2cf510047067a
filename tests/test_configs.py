"""Every shipped config is ready for use: it parses, what it names loads, its budgets fit together, and `--dry-run` accepts it."""

import re
from pathlib import Path
from typing import Any

import pytest
from started import run_module
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.learn.memory import estimate
from aipo_graph.load import find, load
from aipo_graph.rollout import Agent
from aipo_graph.rollout.agents import Prompts
from aipo_graph.rollout.collect import open_graph
from aipo_graph.tasks.datasets import MAPPINGS
from aipo_graph.tasks.open import TASKS

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
LARGE = {
    "qwen3_1p7b_lora_1gpu": Qwen3Config(
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, intermediate_size=6144, tie_word_embeddings=True
    ),
    "qwen3_4b_full_8gpu": Qwen3Config(
        hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, intermediate_size=9728, tie_word_embeddings=True
    ),
    "qwen2p5_7b_full_8gpu": Qwen2Config(
        vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, intermediate_size=18944
    ),
    "qwen3_32b_lora_2nodes": Qwen3Config(hidden_size=5120, num_hidden_layers=64, num_attention_heads=64, intermediate_size=25600),
    "llama3p2_3b_lora_1gpu": LlamaConfig(
        vocab_size=128256, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, intermediate_size=8192, tie_word_embeddings=True
    ),
}
"""The models' shapes, as on the hub; eight key-value heads of width 128 each, four of Qwen2.5-7B."""
GPU = 80 * 10**9


def read(path: Path) -> Config:
    return cli.parse([str(path)], Config, prog="test")[0]


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(params=sorted(LARGE))
def large(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_it_names_loads(path: Path) -> None:
    config = read(path)
    assert config.run.name in (path.stem, path.stem.rpartition("_")[0]), "two configs must not share a run folder"
    assert config.task.name in TASKS
    nodes = set(open_graph(config.rollout.graph).get_graph().nodes)
    assert set(config.agents.use) <= nodes
    assert "policy" in open_graph(config.rollout.solo).get_graph().nodes
    prompts = Prompts.read(find(config.rollout.prompts, "dir")).texts
    assert {"policy", "solo", *config.agents.models} <= set(prompts)
    for name, factory in config.agents.use.items():
        assert name in config.agents.models or factory, f"{name} has neither a model nor a tool"
        if factory:
            assert isinstance(load(factory)(config), Agent)


@pytest.mark.slow
def test_dry_run_accepts_it_without_the_network(path: Path, tmp_path: Path) -> None:
    done = run_module("aipo_graph.train", [str(path), "--dry-run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^  model: {re.escape(read(path).policy.model)}$", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_those_for_large_models_are_there(root: Path) -> None:
    assert {f"{name}.yaml" for name in LARGE} <= {path.name for path in CONFIGS}


def test_budgets_fit_together(large: str, root: Path) -> None:
    config = read(root / "configs" / f"{large}.yaml")
    rollout, replies = config.rollout, config.rollout.max_consults * config.agents.max_reply_tokens
    prompt = config.task.max_prompt_tokens + len(Prompts.read(find(rollout.prompts, "dir")).texts["policy"]) // 2
    longest = prompt + rollout.max_tokens + replies
    assert config.task.max_prompt_tokens > 0
    assert longest <= config.engine.max_context
    assert longest <= config.train.micro_batch_tokens
    assert rollout.max_supersteps > 2 * rollout.max_consults + 1
    assert config.rollout.problems % config.train.minibatches == 0
    assert config.agents.timeout * 2 < rollout.timeout
    assert rollout.with_agents == 0.5
    assert rollout.max_lag == 1
    assert config.task.name in MAPPINGS


def test_each_agent_asks_the_helper_that_the_comment_serves(large: str, root: Path) -> None:
    text = (root / "configs" / f"{large}.yaml").read_text()
    (port,) = re.findall(r"vllm serve \S+ --host 127.0.0.1 --port (\d+)", text)
    config = read(root / "configs" / f"{large}.yaml")
    assert set(config.agents.models) == {"verify", "knowledge", "reasoning"}
    assert set(config.agents.models.values()) == {f"vllm:http://localhost:{port}"}
    longest = int(re.findall(r"--max-model-len (\d+)", text)[0])
    needed = config.task.max_prompt_tokens + config.rollout.max_tokens + config.agents.max_tokens  # the transcript is in reasoning.md
    assert needed <= longest


@pytest.fixture
def shape(large: str, tmp_path: Path) -> str:
    model: Any = LARGE[large]
    model.num_key_value_heads, model.head_dim = 4 if large.startswith("qwen2p5") else 8, 128
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def test_memory_is_what_the_comments_say(large: str, shape: str, root: Path) -> None:
    text = (root / "configs" / f"{large}.yaml").read_text()
    config = read(root / "configs" / f"{large}.yaml")
    found = estimate(config, shape)
    assert not found.problem
    learner = sum(part.bytes for part in found.parts if part.name != "vLLM")
    if config.engine.launch:
        helper = float(re.findall(r"--gpu-memory-utilization (\S+)", text)[0])
        assert learner < 0.6 * (1 - helper - config.engine.memory) * GPU, "helper, sampling and learner on one GPU, with room to spare"
    else:
        said = int(re.findall(r"--dry-run estimates (\d+) GiB", text)[0])
        assert round(learner / 2**30) == said
        assert learner < 0.9 * GPU
