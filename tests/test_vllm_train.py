"""`python -m aipo_graph.train` on the real vLLM server: all weights and LoRA, every token and every sync checked against the learner."""

import contextlib
import json
import os
import secrets
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from started import run_module
from test_cluster import SMALL, gone, kill
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
    "train.steps": 3,
    "evaluate.problems": 2,
    "evaluate.problems_with_agents": 2,
    "evaluate.samples": 1,
    "engine.workers": 1,
}


def train(folder: Path, **settings: object) -> Path:
    done = run_module("aipo_graph.train", words_of(**TINY, **settings), folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "quickstart"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The summary of such a run with the embedded engine, of one step: what it says of the base policy is asked."""
    return json.loads((train(tmp_path_factory.mktemp("embedded"), train__steps=1) / "summary.json").read_text())


@pytest.mark.parametrize(("rank", "lag"), [(0, 1), (RANK, 0)])
def test_training_through_the_server(vllm_server: str, embedded: Any, tmp_path: Path, rank: int, lag: int) -> None:
    """Every step on new weights, and logprobs that are the learner's to 1e-3 after every sync."""
    server = {"engine__kind": "server", "engine__urls": json.dumps([vllm_server]), "engine__max_context": CONTEXT}
    through = train(tmp_path, policy__lora_rank=rank, rollout__max_lag=lag, **server)
    rows = read_metrics(through / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sync_gap_max"] <= 1e-3 for row in rows)
    if not lag:
        assert all(row["mismatch_max"] <= 1e-3 for row in rows if "mismatch_max" in row)
        assert all(row["lag"] == 0 for row in rows)
    assert all(row["failed"] == 0 for row in rows)
    groups, damaged = read_traces(through / "traces.jsonl")
    versions = {s.version for logged in groups for trace in logged.group.traces for s in trace.segments if s.source == "policy"}
    assert damaged == 0
    assert versions == {0, 1, 2} if not lag else max(versions) >= 1
    summary = json.loads((through / "summary.json").read_text())
    # Greedy decoding draws nothing: what the base policy solves is the same on either engine.
    for mode in ("alone", "with_agents"):
        assert summary["base"][mode]["greedy"] == embedded["base"][mode]["greedy"]
    assert summary["trained"]["with_agents"]["failed"] == {}


def marked(mark: str) -> list[str]:
    """Processes with this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
    return found


@pytest.mark.parametrize("kind", ["vllm", "server"])
def test_a_killed_sampler_comes_back_with_the_last_weights(
    kind: str, vllm_python: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Over Ray: vLLM in the sampler's process, or asked from there. All weights reach it, as a probe text shows after each load, and every
    sampled token."""
    lag = 0 if kind == "vllm" else 1
    settings = {
        "rollout.max_tokens": 128,
        "rollout.max_lag": lag,
        "engine.kind": kind,
        "engine.max_context": CONTEXT,
        "engine.max_batch": 16,
    }
    if kind == "server":
        settings["engine.urls"] = json.dumps([request.getfixturevalue("vllm_server")])
    mark = secrets.token_hex(8)
    command = [vllm_python, "-m", "aipo_graph.train", *words_of(**(SMALL | settings), cluster__address="local")]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        driver = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=err, env=os.environ | {"MARK": mark})
    limit = threading.Timer(900, driver.kill)
    limit.start()
    try:
        while "\nstep 1/" not in (tmp_path / "out").read_text():
            assert driver.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.1)
        kill(tmp_path, "sampler-0")
        assert driver.wait() == 0, (tmp_path / "err").read_text()
    finally:
        limit.cancel()
        driver.kill()
    assert "sampler-0 on" in (tmp_path / "out").read_text()
    rows = read_metrics(tmp_path / "runs" / "quickstart" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["failed"] == 0 and row["lag_max"] <= lag and row["sync_gap_max"] <= 1e-3 for row in rows)
    assert lag or all(row["mismatch_max"] <= 1e-3 for row in rows if "mismatch_max" in row)
    assert rows[-1]["restarts/sampler"] == 1
    assert all(0 <= row[f"wait/{kind}"] <= 1 for row in rows for kind in ("learner", "worker"))
    assert gone(tmp_path)
    end = time.monotonic() + 60
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left, "nothing is left, vLLM's own processes included"
