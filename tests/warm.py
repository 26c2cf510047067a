"""A stand-in for a Python: what it runs is forked from a process that has the imports, which are most of a start.

It takes the words that Python takes, and passes on signals, open files, environment, folder and exit status: whoever starts, ends or waits
for it need not know. `sys.executable` is the stand-in in all that it runs: Ray's workers and what multiprocessing spawns are forked, too.
"""

import atexit
import builtins
import contextlib
import fcntl
import gc
import importlib
import itertools
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import spawn
from pathlib import Path


@contextlib.contextmanager
def warm(python: str | Path, modules: Sequence[str], environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """The path of the stand-in, which works as long as the context. What it runs first waits for the imports."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        stand_in, address = Path(folder, "python"), Path(folder, "socket")
        stand_in.write_text(f'#!/bin/sh\nexec {shlex.join([str(python), "-IS", __file__, str(address)])} "$@"\n')
        stand_in.chmod(0o755)
        listener.bind(str(address))
        listener.listen(64)
        serving = f"warm.serve({listener.fileno()}, {folder!r}, {list(modules)!r})"
        code = f"import sys; sys.path[0] = {str(Path(__file__).parent)!r}; import warm; warm.end({serving})"
        given = {"env": environment, "pass_fds": (listener.fileno(),)}
        with subprocess.Popen([python, "-c", code], stdin=subprocess.PIPE, **given) as server:
            listener.close()
            yield str(stand_in)
            server.communicate()


def serve(listening: int, folder: str, modules: Sequence[str]) -> Callable[[], object]:
    """Forks at every request until its standard input ends. Returns in the forked process, with what to run there; not in its own."""
    sys.modules["ray"] = None  # type: ignore[assignment]  # it reads its settings when it is imported, each process its own
    for name in modules:
        importlib.import_module(name)
    del sys.modules["ray"]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in sys.path[1:] if path not in given]
    sys.executable = f"{folder}/python"
    spawn.set_executable(sys.executable)
    listener = socket.socket(fileno=listening)
    gc.freeze()
    waiting = selectors.DefaultSelector()
    waiting.register(0, selectors.EVENT_READ)
    waiting.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fd == 0:
                os._exit(0)
            elif key.fileobj is listener:
                connection = listener.accept()[0]
                head, files, _, _ = socket.recv_fds(connection, 8, 256)
                request = json.loads(connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
                if not (pid := os.fork()):
                    for held in (*(key.fileobj for key in waiting.get_map().values()), connection, waiting):
                        os.close(held) if isinstance(held, int) else held.close()
                    return become(files, paths, *request)
                for file in files:
                    os.close(file)
                connection.sendall(pid.to_bytes(8, "big"))
                ended = os.pidfd_open(pid)
                waiting.register(ended, selectors.EVENT_READ, (pid, connection))
                waiting.register(connection, selectors.EVENT_READ, pid)
            elif isinstance(key.data, int):  # the stand-in was killed
                with contextlib.suppress(ProcessLookupError, KeyError, ValueError):  # its process has just ended, too
                    os.kill(key.data, signal.SIGKILL)
                    waiting.unregister(key.fileobj)
            else:
                pid, connection = key.data
                with contextlib.suppress(OSError):
                    connection.sendall(os.waitpid(pid, 0)[1].to_bytes(8, "big"))
                waiting.unregister(key.fd)
                os.close(key.fd)
                with contextlib.suppress(KeyError):
                    waiting.unregister(connection)
                connection.close()


def become(
    files: Sequence[int], paths: Sequence[str], words: list[str], folder: str, environment: Mapping[str, str], numbers: Sequence[int]
) -> Callable[[], object]:
    """Makes this process what Python with these words would be. What is left to call."""
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, max(numbers) + 1) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(high, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, name, *sys.argv[1:] = words if words[0] in ("-c", "-m") else ("", *words)
    sys.argv[0] = kind or name
    sys.path[:] = ["" if kind else str(Path(name).parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *paths]
    if kind == "-m":
        sys.modules.pop(name, None)  # imported already
        return lambda: runpy.run_module(name, run_name="__main__", alter_sys=True)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    if not kind:
        main.__file__ = name
    code = compile(Path(name).read_text() if not kind else name, name if not kind else "<string>", "exec")
    return lambda: exec(code, main.__dict__)


def end(main: Callable[[], object]) -> None:
    """Runs it to the end of the process, which does all that Python does then but take every module to pieces."""
    code = 0
    try:
        main()
    except SystemExit as asked:
        if isinstance(asked.code, str):
            raise
        code = asked.code or 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def stand_in(address: str, words: list[str]) -> None:
    """Asks for the process, and ends as it does. With options that isolate it, or in a form not known here, it is Python itself."""
    asked = list(itertools.dropwhile(lambda word: word in ("-B", "-u"), words))
    if not asked or (asked[0].startswith("-") and asked[0] not in ("-c", "-m")):
        os.execv(sys.executable, [sys.executable, *words])
    passed = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    python = str(Path(address).with_name("python"))
    asked = [word.replace(f'"py_executable": "{sys.executable}"', f'"py_executable": "{python}"') for word in asked]
    files = [
        file for file in map(int, os.listdir("/proc/self/fd")) if file != connection.fileno() and os.path.exists(f"/proc/self/fd/{file}")
    ]
    request = json.dumps([asked, os.getcwd(), dict(os.environ), files]).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], files)
    connection.sendall(request)
    for file in files:
        os.close(file)
    pid = int.from_bytes(connection.recv(8), "big")
    if not pid:
        sys.exit("nothing to fork from")

    def forward() -> None:
        while True:
            os.kill(pid, signal.sigwait(passed))

    threading.Thread(target=forward, daemon=True).start()
    code = os.waitstatus_to_exitcode(int.from_bytes(connection.recv(8), "big"))
    if code < 0:
        with contextlib.suppress(OSError):  # of SIGKILL it is that already
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    stand_in(sys.argv[1], sys.argv[2:])
