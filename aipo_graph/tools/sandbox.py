"""Killable worker processes for what a model's text can make slow, huge or fatal.

A worker is a fresh interpreter that speaks one JSON line per call over its pipes. It imports once and never sees a text: a child
that it forks does, and is forked anew where a text ended it. Not a ``multiprocessing`` pool, for three reasons: spawn runs the
parent's ``__main__`` again in every worker (for a trainer that means torch, which alone does not fit the memory limit), results
would be unpickled in the parent, and its workers outlive a parent that was killed.
"""

import asyncio
import atexit
import contextlib
import importlib
import json
import os
import resource
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
"""Bytes of address space of a call."""
PACKAGE = "aipo_graph"
FULL = MEMORY // 4
"""Bytes that a child may have used before it is replaced: what it keeps is not the next call's fault."""
START_SECONDS = 60.0
DIED = b"\0"
"""Before the exit code of a child, after whatever it had written: JSON has no such byte."""
PATIENCE = 30.0
"""Seconds of waiting, beyond a call's CPU time, for a machine that is busy with other things."""
# What a call can raise over its input. Anything else ends the worker, and is judged by whether it happens twice.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class InputFault(Exception):
    """The input is to blame: it ran out of CPU time or memory, raised, or crashed two workers in a row."""


class _Died(Exception):
    """The worker, or its child, ended without an answer, but with this exit code."""


class _Worker:
    """One process, for one thread."""

    def __init__(self) -> None:
        # None of the parent's environment: no secrets, no variables that change what sympy or Python do.
        env = {"PYTHONPATH": str(Path(__file__).parents[2]), "SYMPY_GROUND_TYPES": "python", "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-s", "-P", "-c", f"from {__name__} import serve; serve()"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, start_new_session=True
        )

    def ready(self) -> None:
        try:
            self._ask(b"", START_SECONDS)
        except (_Died, TimeoutError) as error:
            self.kill()
            raise ToolError(
                f"a sandbox worker did not start (exit code {self.process.returncode}); "
                f"`python -c 'from {__name__} import serve; serve()'` shows why"
            ) from error

    def call(self, name: str, args: tuple[str, ...], cpu_seconds: float) -> Any:
        answer = self._ask(json.dumps([name, args, cpu_seconds]).encode() + b"\n", cpu_seconds + PATIENCE)
        _, died, code = answer.rpartition(DIED)
        if died:
            raise _Died(int(code))
        return json.loads(answer)

    def _ask(self, line: bytes, seconds: float) -> bytes:
        """The line that answers a line. Raises _Died where the process ended without one, TimeoutError where we ended it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer, deadline, timer = b"", time.monotonic() + seconds, threading.Timer(seconds, self._kill)
        timer.start()
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except OSError:  # it has ended
            pass
        finally:
            timer.cancel()
        if answer.endswith(b"\n"):
            return answer
        code = self.process.wait()
        late = code == -signal.SIGKILL and time.monotonic() >= deadline
        raise TimeoutError("no answer in time") if late else _Died(code)

    def _kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        self._kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an unsent line may still be in the buffer
                    pipe.close()


class Workers(contextlib.AbstractContextManager["Workers"]):
    """A pool of worker processes, started when first needed.

    Independent of the event loop it is called from. A context manager; ``close`` may be called at any time, also twice.
    """

    def __init__(self, count: int | None = None) -> None:
        self._count = count or min(4, os.cpu_count() or 1)
        self._forget()

    def _forget(self) -> None:
        """Starts anew: in a forked child the workers are its parent's."""
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="sandbox")
        self._own = threading.local()
        self._alive: set[_Worker] = set()

    async def run(self, function: Callable[..., Any], *args: str, timeout: float = 1.0) -> Any:  # noqa: ASYNC109
        """``function(*args)`` in a worker; ``timeout`` is in seconds of CPU time, whatever else the machine is doing.

        The function is one of this package's own, at module level; it takes strings and returns what JSON can carry.
        Raises InputFault where the input is to blame, ToolError where the sandbox itself failed.
        """
        module = function.__module__
        if module.partition(".")[0] != PACKAGE or "." in function.__qualname__:
            raise ValueError(f"only module-level functions of {PACKAGE} run in a worker, not {module}.{function.__qualname__}")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._call, f"{module}:{function.__name__}", args, timeout)

    def _call(self, name: str, args: tuple[str, ...], timeout: float) -> Any:
        crash = ""
        for _ in range(2):
            worker = self._worker()
            try:
                kind, value = worker.call(name, args, timeout)
            except _Died as error:
                if error.args[0] == -signal.SIGPROF:
                    raise InputFault(f"more than {timeout:g} s of CPU time") from None
                crash = f"exit code {error}"
                continue
            except TimeoutError:
                # An input that needs time uses it, and is ended by the limit on CPU time.
                slow = f"a sandbox worker had not got {timeout:g} s of CPU time in {timeout + PATIENCE:g} s"
                raise ToolError(f"{slow}: use fewer processes") from None
            if kind == "fault":
                raise InputFault(value)
            return value
        raise InputFault(f"two workers in a row died of it ({crash})")

    def _worker(self) -> _Worker:
        """This thread's worker: a new one where it has none, or one that has ended."""
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None or worker.process.poll() is not None:
            if worker is not None:
                worker.kill()
                self._alive.discard(worker)
            worker = self._own.worker = _Worker()
            self._alive.add(worker)
            worker.ready()
        return worker

    def close(self) -> None:
        """End every worker. A call under way fails; a later call starts anew."""
        for worker in [*self._alive]:
            worker._kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._alive:
            worker.kill()
        self._forget()

    def __exit__(self, *_: object) -> None:
        self.close()


SHARED = Workers()
"""The pool that the grader and the Verify tool use."""
atexit.register(SHARED.close)
os.register_at_fork(after_in_child=SHARED._forget)


def serve() -> None:
    """A worker: answers the calls on stdin on stdout, in a child, ends with its parent."""
    answers = os.dup(1)
    os.dup2(2, 1)  # nothing that a library prints may look like an answer
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    for claim in (r"x^2-\sqrt{1} = (x-1)(x+\frac{2}{2})", r"e^{i\frac{π}{3}} = cis60°"):  # what is filled once is of no call's CPU time
        importlib.import_module("aipo_graph.tools.symbolic")._checked(claim)
    os.write(answers, b"ready\n")
    while child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == os.EX_NOINPUT:
            return
        if code:
            os.write(answers, DIED + b"%d\n" % code)
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))
    while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < FULL:
        line = sys.stdin.readline()
        if not line:
            sys.exit(os.EX_NOINPUT)
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
