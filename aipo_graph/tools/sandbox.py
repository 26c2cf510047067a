"""Killable worker processes for what a model's text can make slow, huge or fatal.

A worker is a fresh interpreter that speaks one JSON line per call over its pipes. Not a ``multiprocessing`` pool, for three
reasons: spawn runs the parent's ``__main__`` again in every worker (for a trainer that means torch, which alone does not fit the
memory limit), results would be unpickled in the parent, and its workers outlive a parent that was killed.
"""

import asyncio
import atexit
import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aipo_graph.errors import ToolError

MEMORY = 1 << 30
"""Bytes of address space of a worker."""
PACKAGE = "aipo_graph"
START_SECONDS = 60.0
PATIENCE = 30.0
"""Seconds of waiting, beyond a call's CPU time, for a machine that is busy with other things."""
# What a call can raise over its input. Anything else ends the worker, and is judged by whether it happens twice.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class InputFault(Exception):
    """The input is to blame: it ran out of CPU time or memory, raised, or crashed two workers in a row."""


class _Died(Exception):
    """The worker ended without an answer."""


class _Worker:
    """One process. Not thread-safe: it is out of the idle list while a call is on it."""

    def __init__(self) -> None:
        # None of the parent's environment: no secrets, no variables that change what sympy or Python do.
        env = {"PYTHONPATH": str(Path(__file__).parents[2]), "SYMPY_GROUND_TYPES": "python", "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-s", "-P", "-c", f"from {__name__} import serve; serve()"]
        self.calls = 0
        self.rest = b""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, start_new_session=True
        )

    def ready(self) -> None:
        try:
            self._read(time.monotonic() + START_SECONDS)
        except (_Died, TimeoutError) as error:
            self.kill()
            raise ToolError(
                f"a sandbox worker did not start ({error}); `python -c 'from {__name__} import serve; serve()'` shows why"
            ) from error

    def call(self, name: str, args: tuple[str, ...], cpu_seconds: float, deadline: float) -> Any:
        assert self.process.stdin is not None
        line = json.dumps([name, args, cpu_seconds]).encode() + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError as error:
            raise _Died(f"exit code {self.process.wait()}") from error
        self.calls += 1
        return json.loads(self._read(deadline))

    def _read(self, deadline: float) -> bytes:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        while b"\n" not in self.rest:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError("no answer in time")
            chunk = os.read(descriptor, 65536)
            if not chunk:
                raise _Died(f"exit code {self.process.wait()}")
            self.rest += chunk
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def cpu_seconds(self) -> float | None:
        """CPU time used so far; None where /proc does not tell."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an unsent line may still be in the buffer
                    pipe.close()


class Workers:
    """A pool of worker processes, started when first needed, each replaced after ``max_calls`` calls.

    Independent of the event loop it is called from. A context manager; ``close`` may be called at any time, also twice.
    """

    def __init__(self, count: int | None = None, max_calls: int = 500) -> None:
        self.count = count or min(4, os.cpu_count() or 1)
        self.max_calls = max_calls
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    async def run(self, function: Callable[..., Any], *args: str, timeout: float) -> Any:  # noqa: ASYNC109
        """``function(*args)`` in a worker; ``timeout`` is in seconds of CPU time, whatever else the machine is doing.

        The function is one of this package's own, at module level; it takes strings and returns what JSON can carry.
        Raises InputFault where the input is to blame, ToolError where the sandbox itself failed.
        """
        module = function.__module__
        if module.partition(".")[0] != PACKAGE or "." in function.__qualname__:
            raise ValueError(f"only module-level functions of {PACKAGE} run in a worker, not {module}.{function.__qualname__}")
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="sandbox")
            threads = self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, self._call, f"{module}:{function.__name__}", args, timeout)

    def _call(self, name: str, args: tuple[str, ...], timeout: float) -> Any:
        crash = ""
        deadline = None
        for _ in range(2):
            worker = self._take()
            deadline = deadline or time.monotonic() + timeout + PATIENCE
            before = worker.cpu_seconds()
            try:
                kind, value = worker.call(name, args, timeout, deadline)
            except _Died as error:
                self._drop(worker)
                if worker.process.returncode == -signal.SIGPROF:
                    raise InputFault(f"more than {timeout:g} s of CPU time") from None
                crash = str(error)
                continue
            except TimeoutError:
                used = (worker.cpu_seconds() or 0.0) - (before or 0.0)
                self._drop(worker)
                # An input that needs time uses it, and is ended by the limit on CPU time.
                raise ToolError(f"a sandbox worker got {used:.1f} s of CPU time in {timeout + PATIENCE:g} s: use fewer processes") from None
            except BaseException:
                self._drop(worker)
                raise
            self._give(worker)
            if kind == "fault":
                raise InputFault(value)
            return value
        raise InputFault(f"two workers in a row died of it ({crash})")

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        worker = _Worker()
        with self._lock:
            self._alive.add(worker)
        try:
            worker.ready()
        except ToolError:
            self._drop(worker)
            raise
        return worker

    def _give(self, worker: _Worker) -> None:
        with self._lock:
            keep = worker.calls < self.max_calls and worker in self._alive
            if keep:
                self._idle.append(worker)
        if not keep:
            self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        with self._lock:
            self._alive.discard(worker)
        worker.kill()

    def close(self) -> None:
        """End every worker. A call under way fails; a later call starts anew."""
        with self._lock:
            threads, self._threads = self._threads, None
            for worker in self._alive:
                worker.process.kill()
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            workers, self._alive, self._idle = self._alive, set(), []
        for worker in workers:
            worker.kill()

    def _forget(self) -> None:
        # In a forked child: the workers are its parent's.
        self._idle, self._alive, self._lock, self._threads = [], set(), threading.Lock(), None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


SHARED = Workers()
"""The pool that the grader and the Verify tool use."""
atexit.register(SHARED.close)
os.register_at_fork(after_in_child=SHARED._forget)


def serve() -> None:
    """The worker's loop: reads calls from stdin, answers on stdout, ends with its parent."""
    answers = os.dup(1)
    os.dup2(2, 1)  # nothing that a library prints may look like an answer
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    importlib.import_module("aipo_graph.tools.symbolic").warm_up()
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        name, args, cpu_seconds = json.loads(line)
        module, _, function = name.partition(":")
        call = getattr(importlib.import_module(module), function)
        # SIGPROF keeps its default action: the kernel ends the process, also in the middle of one long C call.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            answer = ["value", call(*args)]
        except FAULTS as error:
            answer = ["fault", type(error).__name__]
        signal.setitimer(signal.ITIMER_PROF, 0)
        data = json.dumps(answer).encode() + b"\n"
        while data:
            data = data[os.write(answers, data) :]
