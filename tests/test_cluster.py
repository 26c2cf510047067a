"""Training over real Ray: the same bits as without, over killed processes, too; every failure ends in one line, and nothing is left."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from started import Started, run_module
from test_train import bits, words_of

from aipo_graph.log import read_metrics

SMALL = {"train.steps": 3, "run.checkpoint_every": 1}
TWO = {"cluster__learners": 2, "cluster__workers": 2}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
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
    yield process.stdout.readline().strip()
    process.communicate("\n", timeout=60)


def run(folder: Path, address: str = "", **settings: Any) -> subprocess.CompletedProcess[str]:
    return run_module("aipo_graph.train", words_of(**(SMALL | {"cluster__address": address} | settings)), folder, TOKEN)


def begun(folder: Path) -> list[dict[str, Any]]:
    """The processes that a run has started."""
    file = folder / "runs" / "quickstart" / "cluster.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def gone(folder: Path) -> bool:
    """Whether all that a run started ends."""
    end = time.monotonic() + 30
    while any(alive(process["pid"]) for process in begun(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(alive(process["pid"]) for process in begun(folder))


@pytest.fixture(scope="module")
def undisturbed(address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(folder, address, **TWO)
    assert done.returncode == 0, done.stderr
    assert [line["process"] for line in begun(folder)] == ["learner-0", "learner-1", "worker-0", "worker-1"]
    assert gone(folder)
    return folder / "runs" / "quickstart"


@pytest.mark.slow
def test_one_worker_gives_the_bits_of_a_run_without_ray(address: str, tmp_path: Path) -> None:
    for name, where in (("with", address), ("without", "")):
        (tmp_path / name).mkdir()
        done = run(tmp_path / name, where, cluster__workers=1)
        assert done.returncode == 0, done.stderr
    assert bits(tmp_path / "with" / "runs" / "quickstart") == bits(tmp_path / "without" / "runs" / "quickstart")


@pytest.mark.slow
def test_a_killed_worker_rank_and_driver_change_no_bit(address: str, undisturbed: Path, tmp_path: Path) -> None:
    """One after the other, in a run over two ranks and two workers; then the same command goes on."""
    words = words_of(**(SMALL | {"cluster__address": address} | TWO))
    driver = Started("aipo_graph.train", words, tmp_path, tmp_path / "out", tmp_path / "err", TOKEN)
    driver.wait_for("\nstep 1/")
    os.kill(next(line["pid"] for line in begun(tmp_path) if line["process"] == "worker-0"), signal.SIGKILL)
    driver.wait_for("\nstep 2/")
    os.kill(next(line["pid"] for line in begun(tmp_path) if line["process"] == "learner-1"), signal.SIGKILL)
    driver.wait_for("all its processes start again (1 of 3)")
    driver.wait_for("\nstep 3/")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert "worker 0 on " in (tmp_path / "out").read_text()
    assert gone(tmp_path)
    last = read_metrics(tmp_path / "runs" / "quickstart" / "metrics.jsonl")[-1]
    assert (last["restarts/worker"], last["restarts/learner"]) == (1, 1)
    assert run(tmp_path, address, **TWO).returncode == 0
    assert bits(tmp_path / "runs" / "quickstart") == bits(undisturbed)


DYING = """
import os
from langgraph.graph import END, START, StateGraph
from aipo_graph.rollout import Context, State, policy_node
import ray
def build():
    in_worker = ray.is_initialized() and ray.get_runtime_context().get_actor_id()
    if in_worker and {always}:
        os._exit(3)
    sample = policy_node()
    async def policy(state, runtime):
        if in_worker and state["problem"].id == "train-1":
            os._exit(3)
        return await sample(state, runtime)
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy)
    graph.add_edge(START, "policy")
    graph.add_edge("policy", END)
    return graph
"""


@pytest.mark.slow
def test_a_problem_that_kills_its_worker_is_given_up_and_the_others_are_not(address: str, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING.format(always=False))
    done = run(tmp_path, address, cluster__workers=1, rollout__graph="dying.py:build", train__steps=1)
    assert done.returncode == 0, done.stderr
    (row,) = read_metrics(tmp_path / "runs" / "quickstart" / "metrics.jsonl")
    assert row["failed"] == row["ended/failed/WorkerLost"] == 0.25
    assert row["restarts/worker"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cluster__workers": 99}, "99 workers of one CPU each need 99 CPUs, the cluster has 3; lower cluster.workers"),
        ({"rollout__graph": "dying.py:build", "cluster__restarts": 1}, "worker 0 on a node was lost 2 times (cluster.restarts = 1)"),
        ({"cluster__address": "127.0.0.1:1"}, "cluster.address = 127.0.0.1:1: no Ray cluster answers there"),
        ({"cluster__address": "", "cluster__learners": 2}, "cluster.learners = 2: they are processes of Ray; say cluster.address: local"),
    ],
    ids=["placement", "crash loop", "address", "no address"],
)
def test_what_cannot_run_ends_in_one_line(address: str, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    (tmp_path / "dying.py").write_text(DYING.format(always=True))
    done = run(tmp_path, **({"address": address, "cluster__workers": 1} | settings))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.stderr
    assert gone(tmp_path)
