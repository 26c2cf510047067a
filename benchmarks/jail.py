"""What a run in the jail costs: `python benchmarks/jail.py [--runs 50]` prints milliseconds per run for each layer this machine has.

The programs print one line; `prelude` also imports what LiveCodeBench's programs find at hand. `interpreter` is the bare interpreter.
CPU time is that of all processes of a run, and says more than the clock on a machine that is busy.
"""

import argparse
import asyncio
import functools
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

from aipo_graph.tasks.livecodebench import program
from aipo_graph.tools import jail

SOURCE = "print(input())"


async def line(name: str, run: Callable[[], Awaitable[object]], runs: int) -> str:
    found = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(runs):
        start = time.perf_counter()
        await run()
        found.append(1000 * (time.perf_counter() - start))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / runs
    low, *_, high = statistics.quantiles(found, n=20)
    return f"{name:20} median {statistics.median(found):6.1f} ms   5 % {low:6.1f}   95 % {high:6.1f}   CPU time {cpu:6.1f}"


async def measure(runs: int) -> None:
    async def bare() -> None:
        await asyncio.to_thread(
            subprocess.run, [sys.executable, "-I", "-S", "-B", "-c", "print(1)"], env={}, capture_output=True, check=True
        )

    print(
        f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, user {os.geteuid()}"
    )
    print(await line("interpreter", bare, runs))
    layers: tuple[jail.Layer, ...] = ("L0", "L1", "L2")
    for layer in layers:
        if layer != "L0" and (fault := jail.check(layer)):
            print(f"{layer}: not to be had here: {fault}")
            continue
        cell = jail.Jail(layer, 1)
        for name, source in ((layer, SOURCE), (f"{layer}, prelude", program(SOURCE, ""))):
            print(await line(name, functools.partial(cell.run, source, b"1\n"), runs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    asyncio.run(measure(parser.parse_args().runs))
