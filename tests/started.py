"""`python -m MODULE` in a process of its own, forked from one that has imported what they all need: seconds less for each."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preloaded"])


class Started:
    """A process that runs a module: what of subprocess.Popen the tests use, output in files. It leads a process group."""

    def __init__(self, module: str, words: Sequence[str], cwd: Path, out: Path, err: Path, env: Mapping[str, str] | None = None) -> None:
        self.out = out
        self._process = _CONTEXT.Process(target=_main, args=(module, list(words), str(cwd), str(out), str(err), dict(env or {})))
        out.touch()
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.out.name, timeout)
        return self._process.exitcode

    def wait_for(self, text: str, timeout: float = 300) -> None:
        """Until it has written ``text`` to its standard output."""
        end = time.monotonic() + timeout
        while text not in self.out.read_text():
            assert self.poll() is None, f"ended without {text!r}"
            assert time.monotonic() < end, f"no {text!r} after {timeout} s"
            time.sleep(0.02)


def run_module(module: str, words: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As subprocess.run, with text captured and nothing to read. Its output lies beside ``cwd`` meanwhile, not in it."""
    out, err = (cwd.parent / f"{cwd.name}.{name}" for name in ("out", "err"))
    code = Started(module, words, cwd, out, err, env).wait()
    return subprocess.CompletedProcess([module, *words], code, out.read_text(), err.read_text())


def _main(module: str, words: list[str], cwd: str, out: str, err: str, env: dict[str, str]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
