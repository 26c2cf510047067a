"""Runs untrusted Python programs, each in a fresh interpreter that the kernel has locked up.

Input goes in by stdin and output comes back as bytes, so that whoever calls compares here: what is expected never enters the
process. Layers: L0 limits CPU time, memory and output; L1 adds Landlock (reads the interpreter's libraries, writes nothing) and a
seccomp filter (no process, no signal, no socket, no program but itself); L2 adds user, PID, network, mount, IPC and UTS namespaces.
A program has no folder of its own to write to: none of those it is meant for needs one, and nothing is left to clean up.
"""

import asyncio
import functools
import logging
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aipo_graph.errors import ConfigError, ToolError
from aipo_graph.tools import jail_child

log = logging.getLogger(__name__)

Layer = Literal["L0", "L1", "L2"]
Wanted = Literal["auto", "L1", "L2", "none"]
Verdict = Literal["ok", "crash", "timeout", "output", "memory"]
"""How a program ended. ``ok``: by itself, without an exception; ``output``: it wrote more than it may. Each is its own doing."""
LAUNCHER = next(path for path in (Path(jail_child.__spec__.cached or ""), Path(jail_child.__file__)) if path.is_file())
"""Compiled, where it was importable so: compiling it anew would cost every run milliseconds."""
IDLE = 10
"""Seconds, beyond its CPU time, that a program may sleep."""
PATIENCE = 60
"""Seconds, beyond its CPU time, for a machine that is busy with other things."""
GRACE = 10
"""Seconds in which a keeper that was asked to end must have ended."""
PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use: seconds of CPU time, bytes of address space, bytes of output."""

    cpu_seconds: float = 6.0
    memory: int = 2 << 30
    output: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """How one run ended, and what it wrote to stdout (nothing, where that was too much)."""

    verdict: Verdict
    output: bytes
    cpu_seconds: float


class Jail:
    """Runs programs at one layer, ``count`` at a time. Independent of the event loop it is called from."""

    def __init__(self, layer: Layer, count: int | None = None) -> None:
        self.layer = layer
        # Threads: a process is started without the event loop waiting for it, and ends with the thread that it serves.
        self._threads = ThreadPoolExecutor(count or min(4, os.cpu_count() or 1), thread_name_prefix="jail")

    async def run(self, program: str, stdin: bytes = b"", limits: Limits = Limits()) -> Run:
        """One run of ``program``, ended and gone when this returns, also if it is cancelled.

        Raises ToolError where the jail or the machine failed, which says nothing about the program.
        """
        held = _Held()
        call = self._threads.submit(_run, self.layer, program, stdin, limits, held)
        try:
            return await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            held.stop()
            while not call.done():
                await asyncio.sleep(0.01)
            raise


@functools.cache
def probe() -> tuple[Layer, str]:
    """The strongest layer that works on this machine, tried out once and logged, and why those above it do not."""
    faults: list[str] = []
    layers: tuple[Layer, ...] = ("L2", "L1")
    for layer in layers:
        if not (fault := check(layer)):
            log.log(logging.WARNING if faults else logging.INFO, "untrusted programs run at layer %s %s", layer, "; ".join(faults))
            return layer, "; ".join(faults)
        faults.append(f"no {layer}: {fault}")
    return "L0", "; ".join(faults)


def choose(wanted: Wanted, setting: str) -> Layer:
    """The layer for ``wanted``: the strongest, but at least L1, for auto; L0 for none. Raises ConfigError if it does not work here."""
    if wanted == "none":
        log.warning("%s = none: untrusted programs run with your rights, limited only in time, memory and output", setting)
        return "L0"
    layer, fault = probe() if wanted == "auto" else (wanted, check(wanted))
    if layer == "L0" or (wanted != "auto" and fault):
        raise ConfigError(
            f"{setting} = {wanted!r}: this machine cannot lock up untrusted programs ({fault}); run on Linux 5.13 or later, x86-64 or "
            f"aarch64, with Landlock and seccomp, or say {setting}: none where there is nothing to steal or to break"
        )
    return layer


CHECK = """
import bisect, ctypes, decimal, fractions, hashlib, heapq, math, os, random, re, threading
def refused(call, *args):
    try:
        call(*args)
    except OSError:
        return 1
    return 0
thread = threading.Thread(target=int)
thread.start()
thread.join()
import socket
print(input(), refused(os.fork), refused(socket.socket), refused(open, "/etc/passwd"), refused(open, "/tmp/x", "w"), refused(os.kill, 1, 0))
"""


@functools.cache
def check(layer: Layer) -> str:
    """Why a layer does not work here; "" if it does: honest programs run in it, and a few things are refused."""
    try:
        run = _run(layer, CHECK, b"yes\n", Limits(), _Held())
    except ToolError as error:
        return str(error)
    expected = b"yes 1 1 1 1 1\n"
    return "" if run.output == expected else f"a trial run ended with {run.verdict}, {run.output[:80]!r}"


class _Held:
    """The process of a call under way, for whoever wants to end it."""

    def __init__(self) -> None:
        self.stopped = False
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, cwd="/", start_new_session=True, bufsize=0)
        if self.stopped:
            self.process.terminate()
        return self.process

    def stop(self) -> None:
        self.stopped = True
        if self.process is not None:
            self.process.terminate()


def _run(layer: Layer, program: str, stdin: bytes, limits: Limits, held: _Held) -> Run:
    for _ in range(2):
        reason, code, cpu, output, flooded = _once(layer, program, stdin, limits, held)
        if flooded:
            return Run("output", b"", cpu)
        if held.stopped:
            raise ToolError("the run was cancelled")
        if reason in ("slow", "idle") or cpu > limits.cpu_seconds:
            return Run("timeout", output, cpu)
        if reason == "starved":
            raise ToolError(f"a program got {cpu:.1f} s of CPU time in {limits.cpu_seconds + PATIENCE:g} s: use fewer processes")
        if code != -signal.SIGKILL:
            return Run("ok" if code == 0 else "memory" if code == jail_child.MEMORY_EXIT else "crash", output, cpu)
    # It cannot have killed itself. Once may be chance, twice is a program that the machine has no memory for.
    return Run("memory", output, cpu)


def _once(layer: Layer, program: str, stdin: bytes, limits: Limits, held: _Held) -> tuple[str, int, float, bytes, bool]:
    """What the keeper reported (why it ended the run, the program's exit code and CPU time), the output, whether that was too much."""
    source = program.encode(errors="replace")
    seconds = math.ceil(limits.cpu_seconds)
    numbers = (layer[1], limits.memory, seconds + IDLE, seconds + PATIENCE, len(source), os.getpid(), limits.cpu_seconds)
    try:
        process = held.start([sys.executable, "-I", "-S", "-B", "-X", "utf8", str(LAUNCHER), *map(str, numbers)])
    except OSError as error:
        raise ToolError(f"a sandboxed interpreter did not start: {error}") from error
    with process:
        try:
            output, report, flooded = _converse(process, source + stdin, limits.output, time.monotonic() + seconds + PATIENCE + GRACE)
        finally:
            process.kill()  # its program dies with it
    before, _, last = report.decode(errors="replace").strip().rpartition("\n")
    words = last.split()
    reported = len(words) == 3 and words[0] in ("ended", "slow", "idle", "starved", "stopped")
    if before != "ready" or not reported:
        fault = before.rpartition("\n")[2] if reported else last
        raise ToolError(f"the sandbox failed: {fault[:300].removeprefix('ready') or f'no report, exit code {process.returncode}'}")
    return words[0], os.waitstatus_to_exitcode(int(words[1])), float(words[2]), output, flooded


def _converse(process: subprocess.Popen[bytes], data: bytes, limit: int, deadline: float) -> tuple[bytes, bytes, bool]:
    """Feeds stdin and reads until the keeper has ended: (stdout, the keeper's report, whether stdout was over the limit)."""
    pipes = [pipe for pipe in (process.stdin, process.stdout, process.stderr) if pipe]
    stdin, stdout, stderr = pipes
    output, report, left, flooded = bytearray(), bytearray(), memoryview(data), False
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_WRITE if pipe is stdin else selectors.EVENT_READ)
        while stderr in selector.get_map() or stdout in selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            if not ready:
                raise ToolError("the sandbox did not end a program in time")
            for key, _ in ready:
                if key.fileobj is stdin:
                    try:
                        left = left[os.write(key.fd, left[:PIECE]) :]
                    except BrokenPipeError:  # the program ended without reading it all
                        left = left[:0]
                    if not left:
                        selector.unregister(stdin)
                        stdin.close()
                    continue
                piece = os.read(key.fd, PIECE)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.fileobj is stderr:
                    report += piece
                elif len(output) + len(piece) <= limit:
                    output += piece
                elif not flooded:
                    flooded = True
                    process.terminate()
    return bytes(output), bytes(report), flooded
