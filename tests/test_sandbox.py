import asyncio
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from aipo_graph.errors import ToolError
from aipo_graph.tools import sandbox, symbolic

BOMB = "(9^{99999})^{99999} = 1"  # past the filter: one long C call


@pytest.fixture(scope="module")
def workers():
    with sandbox.Workers(2) as pool:
        yield pool


def worker_ids():
    return {child.pid for child in psutil.Process().children() if "sandbox import serve" in " ".join(child.cmdline())}


async def test_a_function_of_the_package_runs_and_its_result_comes_back(workers):
    assert await workers.run(symbolic._checked, r"\frac{1}{2}+\frac{1}{3} = 5/6", timeout=2) == "yes"


async def test_a_call_out_of_cpu_time_is_the_inputs_fault_and_the_next_call_works(workers):
    with pytest.raises(sandbox.InputFault, match="CPU time"):
        await workers.run(symbolic._checked, BOMB, timeout=0.3)
    assert await workers.run(symbolic._checked, "1+1 = 2", timeout=2) == "yes"


async def test_a_worker_has_little_memory_no_secrets_and_writes_no_file(workers, monkeypatch):
    monkeypatch.setenv("API_KEY", "hunter2")
    before = worker_ids()
    with sandbox.Workers(1) as pool:
        await pool.run(symbolic._checked, "1+1 = 2", timeout=2)
        (pid,) = worker_ids() - before
        process = psutil.Process(pid)
        assert process.rlimit(psutil.RLIMIT_AS) == (1 << 30, 1 << 30)
        assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert process.environ()["SYMPY_GROUND_TYPES"] == "python"
        assert "API_KEY" not in process.environ()


async def kill_the_worker_on_a_call(pool, call, seen):
    while not call.done():
        for worker in list(pool._alive):
            if worker.calls and worker.process.pid not in seen:
                seen.add(worker.process.pid)
                return worker.process.kill()
        await asyncio.sleep(0.01)
    raise AssertionError("the call ended before its worker was killed")


async def test_one_crash_is_retried_and_two_are_the_inputs_fault():
    with sandbox.Workers(1) as pool:
        call, seen = asyncio.create_task(pool.run(symbolic._checked, BOMB, timeout=20)), set()
        await kill_the_worker_on_a_call(pool, call, seen)
        await kill_the_worker_on_a_call(pool, call, seen)
        with pytest.raises(sandbox.InputFault, match="two workers"):
            await call


async def test_a_worker_that_died_while_idle_costs_no_verdict():
    before = worker_ids()
    with sandbox.Workers(1) as pool:
        assert await pool.run(symbolic._checked, "1+1 = 2", timeout=2) == "yes"
        for pid in worker_ids() - before:
            os.kill(pid, signal.SIGKILL)
        assert await pool.run(symbolic._checked, "1+2 = 4", timeout=2) == "no"


async def test_a_worker_that_cannot_start_is_our_fault(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with sandbox.Workers(1) as pool, pytest.raises(ToolError, match="did not start"):
        await pool.run(symbolic._checked, "1+1 = 2", timeout=2)


async def test_only_module_level_functions_of_the_package_are_accepted(workers):
    for function in (json.dumps, lambda: "", sandbox.Workers.close):
        with pytest.raises(ValueError, match="module-level"):
            await workers.run(function, "x", timeout=1)


async def test_workers_are_replaced_after_max_calls():
    before = worker_ids()
    seen = set()
    with sandbox.Workers(1, max_calls=2) as pool:
        for _ in range(4):
            await pool.run(symbolic._checked, "1+1 = 2", timeout=2)
            seen |= worker_ids() - before
    assert len(seen) <= 2
    assert worker_ids() == before


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
        children = psutil.Process(parent.pid).children()
        assert children
        if kill:
            parent.kill()
        assert parent.wait(30) == (-signal.SIGKILL if kill else 0)
        parent.stdout.close()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
