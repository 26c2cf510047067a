"""The run folder: one owner, files that survive a kill and a full disk, and what is shown."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from aipo_graph.config import Config, Run
from aipo_graph.errors import ConfigError
from aipo_graph.log import LoggedGroup, RunLog, read_metrics, read_traces
from aipo_graph.rollout.stream import exclusions, rollout_metrics
from aipo_graph.types import Learned, Problem, Segment, Trace, TraceGroup

LEARNED = Learned((None, -0.1), (None, 1.0), (None, 0.5), (None, 2.0))
METRICS = {
    "reward": 0.5,
    "reward/alone": 0.25,
    "reward/with_agents": 0.75,
    "consults/verify": 1.5,
    "consults/knowledge": 2.0,
    "agent_ratio_mean/verify": 0.4,
    "floor_hit/verify": 0.125,
    "ceiling_hit/verify": 0.0,
    "entropy": 1.1,
    "tokens_per_second": 9812.3,
}


def config(folder: Path, **run: object) -> Config:
    return Config(run=Run.model_validate({"name": "r", "dir": str(folder), "trackers": (), **run}))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def group(problem: str = "p-1") -> TraceGroup:
    prompt = Segment("context", "policy", (1, 2), text="1+1? \u2028 \u00e9\n")
    asked = Segment("policy", "policy", (3, 4), text="<verify>", logprobs=(-0.1, -1 / 3), version=7)
    reply = Segment("agent", "verify", (5,), text="yes", logprobs=(-math.inf,), thread="side", masked=True)
    done = Trace(problem, 5, True, (prompt, asked, reply), ("policy", "verify"), scores={"reward": 1e-17 / 3})
    failed = Trace(problem, 6, False, (prompt,), (), status="failed", error="EngineError: gone")
    return TraceGroup(Problem(problem, "1+1?", "2", kind="easy", meta={"level": 3}), (done, failed))


def write(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.step(step, METRICS | {"loss": step / 3}, [group(f"p-{step}")])


def test_metrics_and_traces_come_back_exact(tmp_path: Path) -> None:
    with RunLog(config(tmp_path), quiet()) as log:
        log.resume_at(0)
        log.step(1, {"reward": 0.1 + 0.2, "bad": math.nan}, [group(), group()], [(LEARNED, None), (None, None)])
    assert read_metrics(log.folder / "metrics.jsonl") == [{"step": 1, "reward": 0.1 + 0.2, "bad": None}]
    logged, bad = read_traces(log.folder / "traces.jsonl")
    assert logged == [LoggedGroup(1, group(), (LEARNED, None)), LoggedGroup(1, group(), (None, None))]
    assert bad == 0


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    with RunLog(config(tmp_path), quiet()) as log:
        write(log, 1, 3)
    path = log.folder / "traces.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    wrong = json.loads(lines[1])
    wrong["group"]["traces"][0]["segments"][1]["logprobs"] = [0.0]  # fewer than tokens
    path.write_bytes(b"".join([lines[0], b"not json\n", json.dumps(wrong).encode() + b"\n", b"[" * 100_000 + b"\n", lines[2][:-40]]))
    logged, bad = read_traces(path)
    assert ([entry.step for entry in logged], bad) == ([1], 4)
    with pytest.raises(ConfigError, match="cannot read"):
        read_traces(tmp_path / "nowhere.jsonl")


def test_a_resumed_run_leaves_the_files_of_an_undisturbed_one(tmp_path: Path) -> None:
    with RunLog(config(tmp_path / "a"), quiet()) as undisturbed:
        write(undisturbed, 1, 6)
    with RunLog(config(tmp_path / "b"), quiet()) as log:
        write(log, 1, 5)
    for name in ("metrics.jsonl", "traces.jsonl"):
        with (log.folder / name).open("ab") as file:
            file.write(b'{"step": 6, "half')
    with RunLog(config(tmp_path / "b"), quiet()) as log:
        log.resume_at(3)
        write(log, 4, 6)
    for name in ("metrics.jsonl", "traces.jsonl"):
        assert (log.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()


def test_lost_traces_are_logged_by_problem_and_each_kind_warns_once(tmp_path: Path) -> None:
    def late(problem: str) -> TraceGroup:
        traces = [replace(trace, status="timeout", error="more than 3 s") for trace in group(problem).traces]
        return TraceGroup(group(problem).problem, (*traces, *group(problem).traces))

    console = quiet()
    with RunLog(config(tmp_path), console) as log:
        log.excluded(1, exclusions([group("p-1")]), alarm=False)
        log.excluded(2, exclusions([group("p-2"), late("p-3"), TraceGroup(Problem("p-4", "", ""), group().traces[:1])]), alarm=True)
        log.excluded(3, exclusions([group("p-5"), late("p-6")]), alarm=True)
        lines = [json.loads(line) for line in (log.folder / "excluded.jsonl").read_text().splitlines()]
        log.resume_at(1)
    assert [(line["step"], line["problem"], line["lost"], line["of"]) for line in lines] == [
        *[(1, "p-1", 1, 2), (2, "p-2", 1, 2), (2, "p-3", 3, 4), (3, "p-5", 1, 2), (3, "p-6", 3, 4)]
    ]
    assert lines[2]["reasons"] == {"timeout": 2, "failed/EngineError": 1}
    assert lines[2]["errors"] == {"timeout": "more than 3 s", "failed/EngineError": "EngineError: gone"}
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said == [
        "note: step 2 lost 2 traces of 2 problems as failed/EngineError, and learns nothing from them; the first: p-2, EngineError: gone; "
        "excluded.jsonl has all",
        "note: step 2 lost 2 traces of 1 problems as timeout, and learns nothing from them; the first: p-3, more than 3 s; "
        "excluded.jsonl has all",
    ]
    assert (log.folder / "excluded.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(("lost", "alarm"), [(1, 0.0), (2, 1.0), (20, 1.0)])
def test_the_alarm_is_raised_from_a_tenth_on(lost: int, alarm: float) -> None:
    done, failed = group().traces
    metrics = rollout_metrics([TraceGroup(group().problem, (*[done] * (20 - lost), *[failed] * lost))], [], 7)
    assert metrics["alarm"] == alarm


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "r" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "r" / "config.yaml").write_text("run: [")
    with pytest.raises(ConfigError, match=r"config.yaml:\d"):
        RunLog(config(tmp_path), quiet()).__enter__()
    (tmp_path / "r" / "config.yaml").unlink()
    with RunLog(config(tmp_path), quiet()):  # the refusal gave the lock back
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "r").touch()
    with pytest.raises(ConfigError, match="File exists; choose another --run.name or --run.dir"):
        RunLog(config(tmp_path), quiet()).__enter__()
    with pytest.raises(ConfigError, match=r"run folder /proc/nowhere/r: .*choose another --run.name or --run.dir"):
        RunLog(config(Path("/proc/nowhere")), quiet()).__enter__()


HOLDER = """
import os, sys, time
from aipo_graph.config import Config, Run
from aipo_graph.log import RunLog
with RunLog(Config(run=Run(name="r", dir=sys.argv[1], trackers=()))):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # it has closed its copy of the lock
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_one_owner_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on .*; wait for it, or choose another --run.name"):
            RunLog(config(tmp_path), quiet()).__enter__()
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # the worker it had forked still lives
        with RunLog(config(tmp_path), quiet()):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


FULL = """
import resource, signal, sys
from aipo_graph.config import Config, Run
from aipo_graph.log import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RunLog(Config(run=Run(name="r", dir=sys.argv[1], trackers=("tensorboard",)))) as log:
    log.resume_at(0)
    log.step(1, {"reward": 0.5})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    for step in range(2, 40):
        log.step(step, {"reward": 0.5})
    log.write("summary.json", {"text": "x" * 200})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.step(40, {"reward": 0.5})
    log.write("summary.json", {"done": 1})
"""


@pytest.mark.slow
def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    # A file-size limit fails writes half-way, just as a full disk does.
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("note: cannot write metrics.jsonl") == 1
    assert done.stdout.count("note: cannot write summary.json") == 1
    steps = [row["step"] for row in read_metrics(tmp_path / "r" / "metrics.jsonl")]
    assert steps[0] == 1
    assert steps[-1] == 40
    assert (tmp_path / "r" / "metrics.jsonl").read_text().count("\n") == len(steps)  # no half lines in between
    assert json.loads((tmp_path / "r" / "summary.json").read_text()) == {"done": 1}


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(config(tmp_path, trackers=("tensorboard",)), quiet()) as log:
        log.resume_at(0)
        write(log, 1, 4)
    with RunLog(config(tmp_path, trackers=("tensorboard",)), quiet()) as log:
        log.resume_at(2)
        log.step(3, {"loss": -1.0})
    events = EventAccumulator(str(log.folder / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("loss")] == [(1, 0.333), (2, 0.667), (3, -1.0)]


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"run.trackers: trackio is not installed; pip install 'trackio>=0.5' 'wandb>=0.22'"):
        RunLog(config(tmp_path, trackers=("trackio",)), quiet()).__enter__()


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    console = quiet()
    with RunLog(config(tmp_path), console) as log:
        write(log, 1, 2)
        log.note("line\x1b[2J")
    assert isinstance(console.file, io.StringIO)
    first, second, note = console.file.getvalue().splitlines()
    assert first == "step   1/100: reward 0.500, with agents 0.750, alone 0.250, entropy 1.100, tokens/s 9,812"
    assert second.startswith("step   2/100")
    assert note == "note: line [2J"


@pytest.mark.parametrize(("no_color", "live"), [(False, True), (True, False)])
def test_live_display_on_a_terminal(tmp_path: Path, no_color: bool, live: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, no_color=no_color, _environ={"TERM": "xterm"})
    with RunLog(config(tmp_path), console) as log:
        log.resume_at(40)
        write(log, 41, 42)
        log.note("watch out")
        log.pause()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert ("42/100" in shown and "watch out" in shown) is True
    assert ("\x1b[?25l" in shown) is live  # the cursor is hidden by a live display
    assert ("step  42/100: " in shown) is not live
