"""`python -m aipo_graph.train` on the real vLLM server: all weights and LoRA, every token and every sync checked against the learner."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from started import Started, run_module
from test_cluster import begun, gone
from test_train import words_of
from vllm_world import CONTEXT, RANK

from aipo_graph.log import read_metrics, read_traces

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
TINY = {
    "run.device": "cpu",
    "run.trace_groups": 4,
    "rollout.problems": 4,
    "rollout.traces": 4,
    "rollout.max_tokens": 128,
    "train.steps": 4,
    "evaluate.problems": 8,
    "evaluate.problems_with_agents": 4,
    "evaluate.samples": 2,
    "engine.workers": 1,
}


def train(folder: Path, **settings: object) -> Path:
    done = run_module("aipo_graph.train", words_of(**TINY, **settings), folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "quickstart"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The summary of the same run with the embedded engine."""
    return json.loads((train(tmp_path_factory.mktemp("embedded")) / "summary.json").read_text())


@pytest.mark.parametrize(("rank", "lag"), [(0, 1), (RANK, 0)])
def test_training_through_the_server(vllm_server: str, embedded: Any, tmp_path: Path, rank: int, lag: int) -> None:
    """Every step on new weights, and logprobs that are the learner's to 1e-3 after every sync."""
    server = {"engine__kind": "server", "engine__urls": json.dumps([vllm_server]), "engine__max_context": CONTEXT}
    through = train(tmp_path, policy__lora_rank=rank, rollout__max_lag=lag, **server)
    rows = read_metrics(through / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sync_gap_max"] <= 1e-3 for row in rows)
    if not lag:
        assert all(row["mismatch_max"] <= 1e-3 for row in rows if "mismatch_max" in row)
        assert all(row["lag"] == 0 for row in rows)
    assert all(row["failed"] == 0 for row in rows)
    groups, damaged = read_traces(through / "traces.jsonl")
    versions = {s.version for logged in groups for trace in logged.group.traces for s in trace.segments if s.source == "policy"}
    assert damaged == 0
    assert versions == {0, 1, 2, 3} if not lag else max(versions) >= 2
    summary = json.loads((through / "summary.json").read_text())
    # Greedy decoding draws nothing: what the base policy solves is the same on either engine.
    for mode in ("alone", "with_agents"):
        assert summary["base"][mode]["greedy"] == embedded["base"][mode]["greedy"]
    assert summary["trained"]["with_agents"]["failed"] == {}


def test_a_killed_sampler_comes_back_with_the_last_weights(vllm_server: str, tmp_path: Path) -> None:
    """Over Ray: requests go through the sampler's process, and so do the weights."""
    server = {"engine__kind": "server", "engine__urls": json.dumps([vllm_server]), "engine__max_context": CONTEXT}
    words = words_of(**TINY, **server, cluster__address="local", evaluate__problems=0, rollout__max_lag=1)
    driver = Started("aipo_graph.train", words, tmp_path)
    driver.wait_for("\nstep 1/")
    sampler = next(process for process in begun(tmp_path) if process["process"] == "sampler-0")
    os.kill(sampler["pid"], signal.SIGKILL)
    assert driver.wait() == 0
    assert "sampler-0 on" in driver.out.read_text()
    rows = read_metrics(tmp_path / "runs" / "quickstart" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["failed"] == 0 and row["sync_gap_max"] <= 1e-3 and row["lag_max"] <= 1 for row in rows)
    assert rows[-1]["restarts/sampler"] == 1
    assert gone(tmp_path)
