"""Training over real Ray: the bits of a run without it, over killed processes, too; every failure ends in one line, and nothing is left."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OwnerDiedError, RayTaskError
from safetensors.torch import load_file
from started import Started, run_module
from test_train import bits, words_of

from aipo_graph import cluster, load, train
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, LostError
from aipo_graph.log import read_metrics, read_traces

pytestmark = pytest.mark.slow
SMALL = {"train.steps": 3, "run.checkpoint_every": 1, "run.device": "cpu"}
RAY = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "num_gpus": 2, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=3, num_gpus=2) for _ in sys.argv[1:]]
head = cluster.head_node.all_processes["gcs_server"][0].process.pid
print(cluster.address, head, *(node.all_processes["raylet"][0].process.pid for node in nodes), flush=True)
input()
cluster.shutdown()
"""


@contextlib.contextmanager
def ray_cluster(python: str, *more: str) -> Iterator[list[str]]:
    """A Ray cluster on this machine: its address, its head's server and the raylets of the nodes beside the first. Each node has
    three CPUs and says that it has two GPUs."""
    words = [python, "-c", RAY, *more]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    limit = threading.Timer(300, process.kill)
    limit.start()
    found = process.stdout.readline().split()
    limit.cancel()
    assert found, "Ray did not start"
    yield found
    process.communicate("\n", timeout=60)


@pytest.fixture(scope="module")
def address(warm_python: str) -> Iterator[str]:
    """Of a cluster of one node, which ends with the tests."""
    with ray_cluster(warm_python) as (found, _):
        yield found


def words(address: str = "", **settings: Any) -> list[str]:
    return words_of(**(SMALL | {"cluster__address": address} | settings))


def run(folder: Path, address: str = "", **settings: Any) -> subprocess.CompletedProcess[str]:
    return run_module("aipo_graph.train", words(address, **settings), folder)


def start(folder: Path, address: str, **settings: Any) -> Started:
    return Started("aipo_graph.train", words(address, **settings), folder)


def begun(folder: Path) -> list[dict[str, Any]]:
    """The processes that a run has started."""
    file = folder / "runs" / "quickstart" / "processes.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kill(folder: Path, name: str, number: int = signal.SIGKILL) -> None:
    os.kill([line["pid"] for line in begun(folder) if line["process"] == name][-1], number)


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


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def sampled(folder: Path) -> list[Any]:
    groups = read_traces(folder / "traces.jsonl")[0]
    return [(trace.seed, [s.token_ids for s in trace.segments]) for logged in groups for trace in logged.group.traces]


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
    changed = run_module("aipo_graph.train", other, tmp_path)
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
    assert sampled(folder) == sampled(local)
    ours, theirs = (load_file(where / "policy" / "model.safetensors") for where in (folder, local))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5


GRAPH = """
import asyncio, os
from langgraph.graph import END, START, StateGraph
from aipo_graph.rollout import Context, State, policy_node
def build():
    sample = policy_node()
    async def policy(state, runtime):
        {first}
        return await sample(state, runtime)
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy)
    graph.add_edge(START, "policy")
    graph.add_edge("policy", END)
    return graph
"""
DYING = GRAPH.format(first="state['problem'].id in ('train-1', 'train-6') and os._exit(3)")
SLOW = GRAPH.format(first="await asyncio.sleep(1)")


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


async def test_weights_that_went_with_rank_0_are_a_loss_of_the_learner() -> None:
    gone, reference = OwnerDiedError("0" * 56, None, ""), concurrent.futures.Future[Any]()
    reference.set_exception(RayTaskError("load_weights", "", gone))
    with pytest.raises(LostError):
        await cluster.answer(SimpleNamespace(future=lambda: reference))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cluster__workers": 99}, "99 workers of one CPU each need 99 CPUs, the cluster has 3; lower cluster.workers"),
        ({"cluster__learners": 4}, "4 ranks of the learner without a GPU need 4 CPUs, the cluster has 3; lower"),
        (
            {"run__device": "cuda", "cluster__learners": 2},
            "2 ranks of the learner with 1 each and 1 engines with 1 need 3 GPUs, the cluster has 2; lower",
        ),
        ({"cluster__address": "127.0.0.1:1"}, "cluster.address = 127.0.0.1:1: no Ray cluster answers there"),
    ],
    ids=["workers", "ranks", "GPUs", "address"],
)
def test_what_cannot_run_ends_in_one_line(address: str, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    done = run(tmp_path, **({"address": address, "cluster__workers": 1} | settings))
    assert done.returncode == 2
    assert said in one_line(done)
    assert gone(tmp_path)


@pytest.mark.parametrize(
    ("folder", "versions", "said"),
    [("elsewhere", {}, "does not see the run's folder .*elsewhere/runs/quickstart; put it where all nodes see it"),
     ("", {"torch": "2.0"}, "has torch .*, the command's 2.0; install the same on all nodes"),
     ("", {"ray": "2.0"}, "has ray .*, the command's 2.0; install the same on all nodes")],
)  # fmt: skip
def test_a_node_that_is_not_like_the_first_is_refused(
    tmp_path: Path, monkeypatch: Any, folder: str, versions: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / cluster.NONCE).write_text("nonce")
    with pytest.raises(ConfigError, match=said):
        cluster.Run(Config(), "operators", str(tmp_path / folder), "nonce", versions).enter()


def test_objects_reach_no_other_process(tmp_path: Path) -> None:
    settings = {"cluster": {"address": "local"}, "run": {"dir": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"cluster.address = local: objects of this process reach no other; give paths, file.py:name"):
        train("operators", settings, reward=lambda reply: 0.0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def here(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """For a driver that is this process: settings of two ranks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    given = {"run": {"name": "quickstart", "device": "cpu"}, "cluster": {"address": address, "learners": 2, "workers": 1}}
    return Config.model_validate(given)


def test_another_version_of_ray_is_one_line(here: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "__version__", "2.52.1")
    said = f"cluster.address = {here.cluster.address}: .*Version mismatch: .* Ray: 2.52.1 .*; start one with the same Ray, Python and"
    with pytest.raises(ConfigError, match=said), cluster.joined(here, tmp_path, print):
        pass


def test_a_rank_that_hangs_is_ended_and_all_start_again(here: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is noticed by its peers, all of them by the driver."""
    monkeypatch.setattr(cluster, "JOIN", 15.0)
    notes: list[str] = []
    with cluster.joined(here, tmp_path / "runs" / "quickstart", notes.append) as ranks:
        learners = ranks.learners(load.model("operators"))
        learners.restore(tmp_path / "checkpoints")
        undisturbed = learners.logprobs([26, 9, 7])
        for stopped, limit, reason in ((["learner-1"], 600.0, "Timed out waiting 15000ms"), (["learner-0", "learner-1"], 5.0, "no answer")):
            monkeypatch.setattr(cluster, "LEARN", limit)
            for name in stopped:
                kill(tmp_path, name, signal.SIGSTOP)
            with pytest.raises(LostError):
                learners.logprobs([26, 9, 7])
            monkeypatch.setattr(cluster, "LEARN", 600.0)
            assert "a rank of the learner was lost (" in notes[-1]
            assert reason in notes[-1]
            assert notes[-1].endswith("all start again from the last checkpoint")
            learners.restore(tmp_path / "checkpoints")
            assert learners.logprobs([26, 9, 7]) == undisturbed
        kill(tmp_path, "learner-1")
        learners.export(tmp_path / "policy")  # no step is there to be done again
        assert (tmp_path / "policy" / "model.safetensors").exists()
    assert gone(tmp_path)


def test_a_lost_node_costs_its_processes_only_and_a_lost_head_ends_the_run(warm_python: str, tmp_path: Path, local: Path) -> None:
    """They start again on the other. Without the head the same command goes on in another cluster, or as here without any."""
    with ray_cluster(warm_python, "second") as (address, head, raylet):
        done = run(tmp_path, address, run__device="cuda", engine__kind="vllm", engine__gpus=3)
        assert "engines of 3 GPUs each need 3 GPUs, the largest node has 2; lower" in one_line(done)
        driver = start(tmp_path, address, cluster__workers=2, cluster__learners=2)
        driver.wait_for("\nstep 1/")
        lost = {int(raylet), *children(int(raylet))}
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 20
        while not (held := {line["process"] for line in begun(tmp_path) if not alive(line["pid"])}):
            assert time.monotonic() < end, "the second node runs nothing"
            time.sleep(0.1)
        assert driver.wait(600) == 0, driver.err.read_text()
        assert held <= {line["process"] for line in begun(tmp_path) if line["again"]}
        assert sampled(tmp_path / "runs" / "quickstart") == sampled(local)
        assert gone(tmp_path)
        other = tmp_path / "other"
        other.mkdir()
        (other / "slow.py").write_text(SLOW)
        driver = Started("hasty", words(address, rollout__graph="slow.py:build", train__steps=50), other)
        driver.wait_for("\nstep +1/")
        os.kill(int(head), signal.SIGKILL)
        assert driver.wait() == 2
        said = f"Ray's head at {address} is gone; start a cluster and run the same command again: it goes on from the last checkpoint"
        assert said in driver.err.read_text()
        assert gone(other)
    reached = len(read_metrics(other / "runs" / "quickstart" / "metrics.jsonl"))
    done = run(other, rollout__graph="slow.py:build", train__steps=reached + 1)
    assert done.returncode == 0, done.stderr
    assert re.search(f"goes on after step ({reached - 1}|{reached})\n", done.stdout), "it may have ended between a step and its checkpoint"
