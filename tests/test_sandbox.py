import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from aipo_graph.errors import ToolError
from aipo_graph.tasks import grading
from aipo_graph.tools import sandbox, symbolic

BOMB = "(9^{99999})^{99999} = 1"  # past the filter: one long C call


@pytest.fixture(scope="module")
def workers():
    with sandbox.Workers(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def one():
    with sandbox.Workers(1) as pool:
        yield pool


def only(pool):
    """The process id of a pool's only worker. Raises psutil.NoSuchProcess where it has ended, or none has begun."""
    for worker in pool._alive:
        if worker.process.poll() is None:
            return worker.process.pid
    raise psutil.NoSuchProcess(0)


def child_of(pid):
    """The one that runs a worker's calls. Raises psutil.NoSuchProcess between two."""
    for child in psutil.Process(pid).children():
        return child
    raise psutil.NoSuchProcess(pid)


async def test_a_function_of_the_package_runs_and_its_result_comes_back(workers):
    assert await workers.run(symbolic._checked, r"\frac{1}{2}+\frac{1}{3} = 5/6", timeout=2) == "yes"


async def test_a_call_out_of_cpu_time_is_the_inputs_fault_and_the_next_call_works(workers):
    with pytest.raises(sandbox.InputFault, match="CPU time"):
        await workers.run(symbolic._checked, BOMB, timeout=0.3)
    assert await workers.run(symbolic._checked, "1+1 = 2", timeout=2) == "yes"


async def test_a_worker_has_little_memory_no_secrets_and_writes_no_file(monkeypatch):
    monkeypatch.setenv("API_KEY", "hunter2")
    with sandbox.Workers(1) as pool:
        await pool.run(symbolic._checked, "1+1 = 2", timeout=2)
        process = child_of(only(pool))
        assert process.rlimit(psutil.RLIMIT_AS) == (1 << 30, 1 << 30)
        assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert process.environ()["SYMPY_GROUND_TYPES"] == "python"
        assert "API_KEY" not in process.environ()


@pytest.mark.parametrize("whole", [False, True])
async def test_one_crash_is_retried_and_two_are_the_inputs_fault(one, whole):
    await one.run(symbolic._checked, "1+1 = 2", timeout=2)
    call, seen = asyncio.create_task(one.run(symbolic._checked, BOMB, timeout=20)), set()
    while len(seen) < 2:
        assert not call.done(), "it ended before its worker was killed"
        with contextlib.suppress(psutil.Error):  # one that was killed is gone while we look
            child = child_of(only(one))
            if child.pid not in seen and child.cpu_times().user > 0.1:
                seen.add(child.pid)
                os.killpg(only(one), signal.SIGKILL) if whole else child.kill()
        await asyncio.sleep(0.01)
    with pytest.raises(sandbox.InputFault, match="two workers"):
        await call


async def test_a_worker_that_died_while_idle_costs_no_verdict(one):
    assert await one.run(symbolic._checked, "1+1 = 2", timeout=2) == "yes"
    os.kill(only(one), signal.SIGKILL)
    assert await one.run(symbolic._checked, "1+2 = 4", timeout=2) == "no"


async def test_a_worker_that_cannot_start_is_our_fault(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with sandbox.Workers(1) as pool, pytest.raises(ToolError, match="did not start"):
        await pool.run(symbolic._checked, "1+1 = 2", timeout=2)


async def test_only_module_level_functions_of_the_package_are_accepted(workers):
    for function in (json.dumps, lambda: "", sandbox.Workers.close):
        with pytest.raises(ValueError, match="module-level"):
            await workers.run(function, "x", timeout=1)


async def test_a_child_that_has_used_much_memory_is_replaced(one):
    await one.run(symbolic._checked, "1+1 = 2", timeout=2)
    worker = only(one)
    first = child_of(worker)
    for size, same in ((1, True), (sandbox.FULL // 2, False)):
        assert await one.run(grading.leaks, " " * size, "42", "", timeout=10) is False
        assert await one.run(symbolic._checked, "1+1 = 2", timeout=2) == "yes"
        assert only(one) == worker
        assert (child_of(worker) == first) is same


async def test_the_event_loop_keeps_running_beside_bombs_and_honest_calls_are_answered(workers):
    ticks = 0

    async def ticker():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    async def call(text):
        before = ticks
        try:
            return await workers.run(symbolic._checked, text, timeout=0.5)
        except sandbox.InputFault:
            assert ticks - before >= 10
            return "fault"

    tick = asyncio.create_task(ticker())
    texts = ["1+1 = 2", BOMB, "2+2 = 5", BOMB, "3+3 = 6"]
    assert await asyncio.gather(*map(call, texts)) == ["yes", "fault", "no", "fault", "yes"]
    tick.cancel()


def test_no_worker_is_left_after_exit_nor_after_kill_9():
    code = (
        "import asyncio, sys, time\n"
        "from aipo_graph.tools import symbolic\n"
        "print(asyncio.run(symbolic.check('sqrt(8) = 2*sqrt(2)')), flush=True)\n"
        "time.sleep(float(sys.argv[1]))\n"
    )
    for seconds, kill in ((1, False), (60, True)):
        parent = subprocess.Popen([sys.executable, "-c", code, str(seconds)], stdout=subprocess.PIPE, text=True)
        assert parent.stdout.readline() == "yes\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) == 2
        if kill:
            parent.kill()
        assert parent.wait(30) == (-signal.SIGKILL if kill else 0)
        parent.stdout.close()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
