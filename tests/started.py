"""`python -m MODULE` in a process of its own, forked from one that has imported what they all need: seconds less for each."""

import atexit
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import spawn
from pathlib import Path
from typing import Self

import warm


@functools.cache
def python() -> str:
    """A stand-in for this Python, to the end of this process; what multiprocessing spawns here is forked from it, too."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    found = stack.enter_context(warm.warm(sys.executable, ("preloaded",)))
    spawn.set_executable(found)
    return found


class Started:
    """A process that runs a module: what of subprocess.Popen the tests use, output in files beside ``cwd``. It leads a process group."""

    def __init__(self, module: str, words: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self.out, self.err = (cwd.parent / f"{cwd.name}.{name}" for name in ("out", "err"))
        address = str(Path(python()).with_name("socket"))
        with open(os.devnull) as nothing, self.out.open("w") as out, self.err.open("w") as err:
            files = {number: file.fileno() for number, file in enumerate((nothing, out, err))}
            environment, blocked = {**os.environ, **(env or {})}, signal.pthread_sigmask(signal.SIG_BLOCK, ())
            self.pid, self._connection = warm.ask(address, ["-m", module, *words], str(cwd), environment, blocked, files)
        self._code: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            self.end()

    def poll(self) -> int | None:
        with contextlib.suppress(TimeoutError, BlockingIOError):
            return self._ended(0)
        return None

    def wait(self, timeout: float = 300) -> int:
        try:
            return self._ended(timeout)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.out.name, timeout) from None

    def _ended(self, timeout: float) -> int:
        if self._code is None:
            self._connection.settimeout(timeout)
            self._code = warm.exit_code(self._connection)
            self._connection.close()
        return self._code

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends it the signal and waits."""
        os.kill(self.pid, number)
        return self.wait()

    def wait_for(self, pattern: str, timeout: float = 300) -> str:
        """Until it has written what the pattern finds to its standard output, which is returned."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.out.read_text())):
            assert self.poll() is None, f"ended without {pattern!r}: {self.err.read_text()}"
            assert time.monotonic() < end, f"no {pattern!r} after {timeout} s"
            time.sleep(0.02)
        return found[0]


def run_module(module: str, words: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As subprocess.run, with text captured and nothing to read."""
    started = Started(module, words, cwd, env)
    code = started.wait()
    return subprocess.CompletedProcess([module, *words], code, started.out.read_text(), started.err.read_text())
