import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from jail_attacks import AMPLE, ENDS, MAY_FAIL, REAL, REST, World, descendants, fare

from aipo_graph.errors import ConfigError, ToolError
from aipo_graph.tools import jail

LAYERS = [layer for layer in ("L1", "L2") if not jail.check(layer)]
LOCKED = pytest.mark.skipif(not LAYERS, reason=f"this kernel locks no program up: {jail.check('L1')}")
SHORT = jail.Limits(cpu_seconds=1, memory=1 << 29)
LONG = jail.Limits(cpu_seconds=500)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail is Linux's")


@pytest.fixture(scope="module", params=LAYERS or [pytest.param("L1", marks=LOCKED)])
def cell(request):
    return jail.Jail(request.param, 2)


@pytest.fixture(scope="module")
def open_cell():
    return jail.Jail("L0", 1)


@pytest.fixture
def world():
    with World() as world:
        yield world


@LOCKED
def test_this_machine_has_a_layer_that_locks_programs_up():
    layer, why = jail.probe()
    assert layer in LAYERS
    assert layer == LAYERS[-1]
    assert bool(why) == (layer == "L1")


async def test_input_goes_in_and_output_comes_back_as_bytes(cell):
    text = "d\u00e9j\u00e0 vu \U0001f600".encode()
    run = await cell.run(
        "import sys; b = sys.stdin.buffer; print(b.readline().decode().strip(), len(b.read()))", text + b"\n" + bytes(3 << 20)
    )
    assert (run.verdict, run.output) == ("ok", text + b" %d\n" % (3 << 20))
    assert 0 < run.cpu_seconds < 3


@pytest.mark.parametrize("opened", ["0", "'/dev/stdin'"])
async def test_stdin_opened_by_hand(cell, opened):
    run = await cell.run(f"print(open({opened}).read() * 2, file=open('/dev/stdout', 'w'))", b"ab")
    assert (run.verdict, run.output) == ("ok", b"abab\n")


async def test_honest_programs_have_threads_deep_recursion_and_the_standard_library(cell):
    program = """
        import asyncio, bisect, collections, datetime, decimal, fractions, functools, heapq, itertools, json, math, random, re, resource
        import statistics, string, sys, threading, typing, zoneinfo
        sys.setrecursionlimit(10**6)
        resource.setrlimit(resource.RLIMIT_STACK, resource.getrlimit(resource.RLIMIT_STACK))
        threading.stack_size(1 << 27)
        def depth(n):
            return n and 1 + depth(n - 1)
        def main():
            print(__name__, depth(50_000), decimal.Decimal(1) / 8)
        thread = threading.Thread(target=main)
        thread.start()
    """
    run = await cell.run(textwrap.dedent(program))
    assert (run.verdict, run.output) == ("ok", b"__main__ 50000 0.125\n")


async def test_input_that_is_not_read_does_no_harm(cell):
    assert await cell.run("print(1)", bytes(4 << 20)) == jail.Run("ok", b"1\n", pytest.approx(0, abs=5))


@pytest.mark.parametrize("name", REAL | REST)
async def test_attack(cell, world, name, monkeypatch):
    if name == "thread bomb":  # it waits for a thread that found no memory to begin
        monkeypatch.setattr(jail, "IDLE", 1)
    assert await fare(cell, world, (REAL | REST)[name]) == ""


@pytest.mark.parametrize("name", REAL)
async def test_the_attack_is_real(open_cell, world, name):
    """Where nothing is locked, it gets what it wants: so the tests above can fail. What it leaves behind is swept up all the same."""
    fault = await fare(open_cell, world, REAL[name])
    if not fault and name in MAY_FAIL:
        pytest.skip("this machine refuses it to everybody")
    assert fault != ""
    assert "infrastructure" not in fault
    assert "left over" not in fault


@pytest.mark.parametrize("name", ENDS)
async def test_end(cell, monkeypatch, name):
    program, verdict = ENDS[name]
    if name.startswith("sleep"):
        monkeypatch.setattr(jail, "IDLE", 0)
    before = descendants()
    run = await cell.run("import ctypes, os, sys, time\n" + program, b"", SHORT if verdict in ("timeout", None) else AMPLE)
    assert run.verdict == (verdict or run.verdict)
    assert verdict != "timeout" or run.cpu_seconds < 3
    assert not descendants() - before


@LOCKED
@pytest.mark.slow
def test_attacks_as_another_user():
    """As root the tests above show less: most of what is refused is refused to other users more readily."""
    python = next((path for minor in (13, 12, 11) if (path := shutil.which(f"python3.{minor}", path="/usr/bin:/usr/local/bin"))), "")
    if os.geteuid() or not python:
        pytest.skip("needs root, and an interpreter that everybody may run")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own is not for others
        package, tests = Path(folder) / "aipo_graph", Path(folder) / "tests"
        for name in ("__init__.py", "errors.py", "tools/__init__.py", "tools/jail.py", "tools/jail_child.py"):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(jail.__file__).parents[1] / name, package / name)
        tests.mkdir()
        shutil.copy(Path(__file__).with_name("jail_attacks.py"), tests)
        Path(folder).chmod(0o755)
        command = [python, "-B", str(tests / "jail_attacks.py"), *LAYERS]
        done = subprocess.run(
            command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False, env={"HOME": str(tests)}
        )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert "L1" in report
    assert all(found == dict.fromkeys(REAL | REST, "") for found in report.values()), report


async def test_the_program_has_no_environment_no_arguments_and_nothing_of_the_caller(cell, monkeypatch):
    monkeypatch.setenv("API_KEY", "hunter2")
    program = """
        import gc, os, sys
        seen, frame = [dict(os.environ), sys.orig_argv, gc.get_objects()], sys._getframe()
        while frame:
            seen += [*frame.f_locals.values(), *frame.f_globals.values()]
            frame = frame.f_back
        text = repr(seen)
        print(sys.argv, list(os.environ), len(text) > 10**4, "".join(("hun", "ter2")) in text)
    """
    run = await cell.run(textwrap.dedent(program))
    assert (run.verdict, run.output) == ("ok", b"['program.py'] ['LC_CTYPE'] True False\n")


async def test_programs_do_not_see_each_other(cell):
    first = await cell.run("import builtins, sys; builtins.len = lambda x: 7; sys.setrecursionlimit(50); print(len('a'))")
    second = await cell.run("print(len('a'))")
    assert (first.output, second.output) == (b"7\n", b"1\n")


async def test_too_slow_is_told_by_cpu_time_not_by_the_clock(cell):
    slept = await cell.run("import time; time.sleep(1.5); print('awake')", b"", SHORT)
    assert (slept.verdict, slept.output) == ("ok", b"awake\n")
    spun = await cell.run("import time\nwhile time.process_time() < 0.6: pass", b"", jail.Limits(cpu_seconds=0.3))
    assert spun.verdict == "timeout"


def ends_first(pid):
    """Where the machine's memory ends."""
    return Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


async def test_a_cancelled_run_leaves_no_process(cell):
    before = descendants()
    calls = [asyncio.create_task(cell.run("import time; time.sleep(1000)", b"", LONG)) for _ in range(4)]  # two run, two wait
    while len(new := descendants() - before) < 4:
        await asyncio.sleep(0.01)
    assert {ends_first(pid) for pid in new} == {True}
    for call in calls:
        call.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*calls, return_exceptions=True))
    assert not descendants() - before
    assert (await cell.run("print(1)")).output == b"1\n"


async def test_a_killed_keeper_takes_its_program_along_and_the_run_has_no_verdict(cell):
    before = descendants()
    call = asyncio.create_task(cell.run("import time; time.sleep(1000)", b"", LONG))
    while len(new := descendants() - before) < 2:
        await asyncio.sleep(0.01)
    keeper = next(pid for pid in new if psutil.Process(pid).ppid() == os.getpid())
    os.kill(keeper, signal.SIGKILL)
    with pytest.raises(ToolError, match="no report"):
        await call
    await gone(new)


async def gone(pids):
    """Within a minute: by themselves they would go on for longer."""
    async with asyncio.timeout(60):
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    await asyncio.sleep(0.01)


async def kill_the_program(cell, call, seen, before):
    """Kills the program, not its keeper, of a run under way."""
    while not call.done():
        for pid in descendants() - before - seen:
            with contextlib.suppress(psutil.NoSuchProcess):  # what is left of the run before
                if psutil.Process(pid).ppid() != os.getpid() and sum(psutil.Process(pid).cpu_times()[:2]) > 0.1:
                    seen.add(pid)
                    return os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.01)
    raise AssertionError("the run ended before it was killed")


async def test_a_program_killed_from_outside_runs_again_and_the_second_time_it_is_memory(cell):
    before, seen = descendants(), set()
    call = asyncio.create_task(cell.run("import time\nwhile time.process_time() < 0.2: pass\ntime.sleep(3)\nprint(1)"))
    await kill_the_program(cell, call, seen, before)
    assert (await call).output == b"1\n"
    call = asyncio.create_task(cell.run("while True: pass", b"", LONG))
    await kill_the_program(cell, call, seen, before)
    await kill_the_program(cell, call, seen, before)
    assert (await call).verdict == "memory"


async def test_a_program_that_the_machine_has_no_time_for_gets_no_verdict(cell, monkeypatch):
    monkeypatch.setattr(jail, "PATIENCE", -2)
    with pytest.raises(ToolError, match=r"got \d.\d s of CPU time in 1 s: use fewer processes"):
        await cell.run("while True: pass", b"", jail.Limits(cpu_seconds=3))


async def test_an_interpreter_that_does_not_start_is_our_fault(cell, monkeypatch):
    for interpreter in ("/bin/false", "/nowhere/python"):
        monkeypatch.setattr(sys, "executable", interpreter)
        with pytest.raises(ToolError, match="no report|did not start"):
            await cell.run("print(1)")


def test_programs_die_with_a_killed_caller(cell):
    script = f"""
        import asyncio, sys
        sys.path.insert(0, {str(Path(jail.__file__).parents[2])!r})
        from aipo_graph.tools.jail import Jail, Limits
        asyncio.run(Jail({cell.layer!r}, 1).run("import time; time.sleep(1000)", b"", Limits(cpu_seconds=500)))
    """
    caller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    while len(found := psutil.Process(caller.pid).children(recursive=True)) < 2:
        assert caller.poll() is None
        time.sleep(0.01)
    caller.kill()
    caller.wait()
    asyncio.run(gone(process.pid for process in found))


async def test_the_event_loop_keeps_running_and_runs_go_side_by_side(cell):
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    ticker = asyncio.create_task(tick())
    runs = await asyncio.gather(*(cell.run("import time; time.sleep(0.5); print(input())", b"%d" % n) for n in range(4)))
    ticker.cancel()
    assert [run.output for run in runs] == [b"0\n", b"1\n", b"2\n", b"3\n"]
    assert ticks > 8


def test_a_jail_serves_several_event_loops(cell):
    found = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(cell.run("print(1)")))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.output for run in found] == [b"1\n"] * 3


@LOCKED
def test_choosing_a_layer(caplog):
    assert jail.choose("auto", "task.options.sandbox") == jail.probe()[0]
    assert jail.choose("none", "task.options.sandbox") == "L0"
    assert "with your rights" in caplog.text
    for layer in LAYERS:
        assert jail.choose(layer, "task.options.sandbox") == layer


@pytest.mark.parametrize("wanted", ["auto", "L1", "L2"])
def test_below_l1_nothing_runs_unless_the_setting_says_so(wanted, monkeypatch):
    monkeypatch.setattr(jail, "LAUNCHER", Path("/nowhere/jail_child.py"))
    for cached in (jail.check, jail.probe):
        cached.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"task.options.sandbox = '\w+': this machine cannot lock up .*: none where"):
            jail.choose(wanted, "task.options.sandbox")
    finally:
        for cached in (jail.check, jail.probe):
            cached.cache_clear()


def test_a_layer_that_holds_nothing_back_is_not_taken():
    assert "a trial run ended with ok" in jail.check("L0")
