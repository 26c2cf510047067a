"""`python -m MODULE` in a process of its own, forked from one that has imported what they all need: seconds less for each."""

import functools
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess, SpawnProcess
from multiprocessing.popen_forkserver import Popen
from pathlib import Path
from typing import Any, Self

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preloaded"])
SHARED = "TESTS_FORKSERVER"
forkserver.set_forkserver_preload = lambda names: None  # type: ignore[assignment]  # what the package would, `preloaded` does


class _Forked(Popen):
    """A process from the server, in its parent's environment and with its signal mask, as if spawned."""

    def _launch(self, process: Any) -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        process._target = functools.partial(_inherit, dict(os.environ), mask, process._target)
        super()._launch(process)


def _inherit(environment: dict[str, str], mask: set[signal.Signals], target: Callable[..., object], *args: object, **named: object) -> None:
    assert "preloaded" in sys.modules
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]  # what this one spawns is from the same server
    os.environ.clear()
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    target(*args, **named)


def _run_server(run: Callable[[], None] = forkserver._forkserver.ensure_running) -> None:
    with pytest.MonkeyPatch.context() as patch:  # it is told nothing of sys.path, and leaves out what it cannot import
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        run()


def share() -> None:
    """Makes the processes that this one starts (`pytest -n`) fork from its server, whose imports run while they collect tests."""
    server = forkserver._forkserver
    if SHARED in os.environ:
        server._forkserver_address, server._forkserver_alive_fd = os.environ[SHARED], os.open(os.devnull, os.O_RDONLY)  # type: ignore[attr-defined]
        server.ensure_running = lambda: None  # type: ignore[method-assign]
    else:
        server.ensure_running()
        os.environ[SHARED] = server._forkserver_address  # type: ignore[attr-defined]


forkserver._forkserver.ensure_running = _run_server  # type: ignore[method-assign]
SpawnProcess._Popen = ForkServerProcess._Popen = staticmethod(_Forked)


class Started:
    """A process that runs a module: what of subprocess.Popen the tests use, output in files beside ``cwd``. It leads a process group."""

    def __init__(self, module: str, words: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self.out, self.err = (cwd.parent / f"{cwd.name}.{name}" for name in ("out", "err"))
        self._process = _CONTEXT.Process(target=_main, args=(module, list(words), str(cwd), str(self.out), str(self.err), dict(env or {})))
        self.out.write_text("")
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            self.end()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.out.name, timeout)
        return self._process.exitcode

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


def _main(module: str, words: list[str], cwd: str, out: str, err: str, env: dict[str, str]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
