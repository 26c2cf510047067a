"""Training over real Ray: the bits of a run without it, over killed processes, too; every failure ends in one line, and nothing is left."""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from started import Started, run_module
from test_train import bits, words_of

from aipo_graph.config import Config
from aipo_graph.errors import ConfigError
from aipo_graph.log import read_metrics, read_traces

pytestmark = pytest.mark.slow
SMALL = {"train.steps": 3, "run.checkpoint_every": 1}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
RAY = """
import os, ray
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
print(ray.init("local", num_cpus=3, num_gpus=0, include_dashboard=False).address_info["gcs_address"], flush=True)
input()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster of one node and three CPUs, with a token of its own, which ends with the tests."""
    words = [sys.executable, "-c", RAY]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | TOKEN)
    assert process.stdin is not None
    assert process.stdout is not None
    limit = threading.Timer(300, process.kill)
    limit.start()
    found = process.stdout.readline().strip()
    limit.cancel()
    assert found, "Ray did not start"
    yield found
    process.communicate("\n", timeout=60)


def words(address: str = "", **settings: Any) -> list[str]:
    return words_of(**(SMALL | {"cluster__address": address} | settings))


def run(folder: Path, address: str = "", **settings: Any) -> subprocess.CompletedProcess[str]:
    return run_module("aipo_graph.train", words(address, **settings), folder, TOKEN)


def start(folder: Path, address: str, **settings: Any) -> Started:
    return Started("aipo_graph.train", words(address, **settings), folder, TOKEN)


def begun(folder: Path) -> list[dict[str, Any]]:
    """The processes that a run has started."""
    file = folder / "runs" / "quickstart" / "processes.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kill(folder: Path, name: str) -> None:
    os.kill([line["pid"] for line in begun(folder) if line["process"] == name][-1], signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def gone(folder: Path) -> bool:
    """Whether all that a run started ends."""
    end = time.monotonic() + 60
    while any(alive(process["pid"]) for process in begun(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(alive(process["pid"]) for process in begun(folder))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without Ray."""
    folder = tmp_path_factory.mktemp("local")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "quickstart"


def test_a_killed_worker_rank_and_driver_change_no_bit_of_a_run_without_ray(address: str, local: Path, tmp_path: Path) -> None:
    """One after the other; then the same command goes on."""
    driver = start(tmp_path, address, cluster__workers=1)
    driver.wait_for("\nstep 1/")
    kill(tmp_path, "worker-0")
    driver.wait_for("\nstep 2/")
    kill(tmp_path, "learner-0")
    driver.wait_for("all start again from the last checkpoint")
    driver.wait_for("\nstep 3/")
    driver.end(signal.SIGKILL)
    assert "worker-0 on " in driver.out.read_text()
    assert gone(tmp_path)
    last = read_metrics(tmp_path / "runs" / "quickstart" / "metrics.jsonl")[-1]
    assert (last["restarts/worker"], last["restarts/learner"]) == (1, 1)
    done = run(tmp_path, address, cluster__workers=1)
    assert done.returncode == 0, done.stderr
    assert bits(tmp_path / "runs" / "quickstart") == bits(local)
    assert gone(tmp_path)
    other = [*words(address, policy__lora_rank=4, train__steps=4), "--force"]
    changed = run_module("aipo_graph.train", other, tmp_path, TOKEN)
    assert changed.returncode == 2
    assert "is of another model than" in one_line(changed), "what a rank raises comes out as it is"


def test_two_ranks_and_two_workers_give_the_tokens_of_one_process(address: str, local: Path, tmp_path: Path) -> None:
    """A rank that dies takes the other with it, and both start again."""
    driver = start(tmp_path, address, cluster__learners=2, cluster__workers=2)
    driver.wait_for("\nstep 1/")
    kill(tmp_path, "learner-1")
    assert driver.wait() == 0, driver.err.read_text()
    names = ["learner-0", "learner-1", "worker-0", "worker-1"]
    assert sorted(line["process"] for line in begun(tmp_path)) == sorted([*names, "learner-0", "learner-1"])
    assert gone(tmp_path)
    folder = tmp_path / "runs" / "quickstart"
    sampled = [
        [
            (trace.seed, [s.token_ids for s in trace.segments])
            for logged in read_traces(where / "traces.jsonl")[0]
            for trace in logged.group.traces
        ]
        for where in (folder, local)
    ]
    assert sampled[0] == sampled[1]
    ours, theirs = (load_file(where / "policy" / "model.safetensors") for where in (folder, local))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5


DYING = """
import os
from langgraph.graph import END, START, StateGraph
from aipo_graph.rollout import Context, State, policy_node
def build():
    sample = policy_node()
    async def policy(state, runtime):
        if state["problem"].id in ("train-1", "train-6"):
            os._exit(3)
        return await sample(state, runtime)
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy)
    graph.add_edge(START, "policy")
    graph.add_edge("policy", END)
    return graph
"""


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in done.stderr
    return line


def test_a_problem_that_kills_its_worker_is_given_up_and_the_second_ends_the_run(address: str, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    done = run(tmp_path, address, cluster__workers=1, rollout__graph="dying.py:build", train__steps=2)
    assert done.returncode == 2
    assert "problem 'train-1' cost worker-0 again and again; its traces count as failed" in done.stdout
    (row,) = read_metrics(tmp_path / "runs" / "quickstart" / "metrics.jsonl")
    assert row["failed"] == row["ended/failed/WorkerLost"] == 0.25
    assert row["restarts/worker"] == 3
    assert "worker-0 on " in one_line(done)
    assert "was lost 4 times" in one_line(done)
    assert gone(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cluster__workers": 99}, "99 workers of one CPU each need 99 CPUs, the cluster has 3; lower cluster.workers"),
        ({"run__device": "cuda"}, "1 ranks of the learner with 1 each and 1 engines with 1 need 2 GPUs, the cluster has 0; lower"),
        ({"cluster__address": "127.0.0.1:1"}, "cluster.address = 127.0.0.1:1: no Ray cluster answers there"),
    ],
    ids=["CPUs", "GPUs", "address"],
)
def test_what_cannot_run_ends_in_one_line(address: str, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    done = run(tmp_path, **({"address": address, "cluster__workers": 1} | settings))
    assert done.returncode == 2
    assert said in one_line(done)
    assert gone(tmp_path)


@pytest.mark.parametrize(
    ("folder", "versions", "said"),
    [("elsewhere", {}, "does not see the run's folder .*elsewhere/runs/quickstart; put it where all nodes see it"),
     ("", {"torch": "2.0"}, "has torch .*, the command's 2.0; install the same on all nodes")],
)  # fmt: skip
def test_a_node_that_is_not_like_the_first_is_refused(
    tmp_path: Path, monkeypatch: Any, folder: str, versions: dict[str, str], said: str
) -> None:
    from aipo_graph import cluster

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / cluster.NONCE).write_text("nonce")
    with pytest.raises(ConfigError, match=said):
        cluster.Run(Config(), "operators", str(tmp_path / folder), "nonce", versions).enter()
