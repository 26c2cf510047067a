"""A vLLM server on this machine for the time of a run: its command, its start, its end."""

import asyncio
import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from aipo_graph import loops
from aipo_graph.config import Config
from aipo_graph.engines.facts import Facts
from aipo_graph.engines.server import Client
from aipo_graph.engines.vllm_api import WHOLE_PROMPTS, max_rank, on_cuda, prefill_budget
from aipo_graph.errors import ConfigError, EngineError, install

C = TypeVar("C", bound=Config)
MODULE = "vllm.entrypoints.openai.api_server"
KEEPER = """
import os, signal, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
ending = threading.Event()
def end():
    os.read(0, 1)  # returns when whoever started us closes the pipe, or dies
    ending.set()
    child.terminate()
    try:
        child.wait(15)
    finally:
        os.killpg(0, signal.SIGKILL)
threading.Thread(target=end, daemon=True).start()
code = child.wait()
if ending.is_set():
    signal.pause()
os._exit(code % 256)
"""
"""Ends the server, and what it started, with the process that asked for it, however that ends."""


def serve_command(config: Config, facts: Facts, port: int, *, python: str = sys.executable) -> list[str]:
    """Starts a server that fits this run. Raises ConfigError for a rank that vLLM does not have."""
    command = [
        *(python, "-m", MODULE, "--model", facts.path, "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", config.policy.dtype, "--max-model-len", str(facts.context), "--max-num-seqs", str(config.engine.max_batch)),
        *("--logprobs-mode", "processed_logprobs", "--enable-scale-out", "--disable-uvicorn-access-log"),
    ]
    if rank := config.policy.lora_rank:  # requests keep the adapter that they began with
        command += ["--enable-lora", "--max-lora-rank", str(max_rank(rank)), "--max-loras", str(config.rollout.max_lag + 2)]
    if not on_cuda(config):
        return [*command, "--enforce-eager", *WHOLE_PROMPTS, "--max-num-batched-tokens", str(prefill_budget(facts.context))]
    return [*command, "--gpu-memory-utilization", f"{config.engine.memory:g}"]


def serve_environment(config: Config) -> dict[str, str]:
    """What the server needs beside the command. Variables that the user has set stay, but of several GPUs it gets the last one alone: the
    learner has the first."""
    found = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if config.policy.lora_rank:
        found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if not on_cuda(config):
        found["VLLM_CPU_KVCACHE_SPACE"] = "1"
    found = {name: os.environ.get(name, value) for name, value in found.items()}
    if on_cuda(config) and (count := torch.cuda.device_count()) > 1:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES") or str(count - 1)
        found["CUDA_VISIBLE_DEVICES"] = devices.split(",")[-1]
    return found


def serve_text(config: Config, model_path: str, port: int = 8000) -> str:
    """The command for a shell, as `--dry-run` prints it."""
    return _shell(serve_command(config, Facts.read(config, model_path), port, python="python"), serve_environment(config))


def _shell(command: list[str], environment: Mapping[str, str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])


@contextlib.contextmanager
def launched(config: C, model_path: str, folder: Path, console: Console | None = None) -> Iterator[C]:
    """The config with the URL of a server that runs as long as the context; unchanged where ``engine.launch`` asks for none.

    Raises ConfigError, EngineError like ``serving``.
    """
    if not config.engine.launch:
        yield config
        return
    with serving(config, model_path, folder / "vllm.log", console=console) as url:
        yield config.model_copy(update={"engine": config.engine.model_copy(update={"launch": False, "urls": (url,)})})


@contextlib.contextmanager
def serving(config: Config, model_path: str, log: Path, *, python: str = sys.executable, console: Console | None = None) -> Iterator[str]:
    """Prints the command of a server and starts it. Gives its URL once it answers; it ends, all its processes with it, with the context.

    Raises ConfigError where vLLM is not installed, EngineError with the end of its log where it does not come up.
    """
    if python == sys.executable and importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"engine.launch: vLLM is not installed here; {install('vllm')}, or give engine.urls of a running server")
    console = console or Console(stderr=True, soft_wrap=True, highlight=False)
    facts = Facts.read(config, model_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url, port = f"http://127.0.0.1:{probe.getsockname()[1]}", probe.getsockname()[1]
    command, extra = serve_command(config, facts, port, python=python), serve_environment(config)
    console.print(_shell(command, extra), markup=False)
    keeper = _start(command, extra, log)
    try:
        with console.status(f"vLLM starts; its log is {log}"):
            loops.run(_ready(url, keeper, log))
        yield url
    finally:
        if keeper.stdin is not None:
            keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)


def _start(command: list[str], extra: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-c", KEEPER, *command],
            env={**os.environ, **extra},
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the trainer's, which then stops the server
        )


async def _ready(url: str, keeper: "subprocess.Popen[bytes]", log: Path) -> None:
    async with Client(url, seconds=5) as client:
        while True:
            try:
                await client.call("GET", "/health", seconds=5)
                return
            except EngineError:
                if (code := keeper.poll()) is not None:
                    raise EngineError(f"vLLM ended with code {code} before it was ready: {_last(log)}; see {log}") from None
            await asyncio.sleep(0.5)


def _last(log: Path) -> str:
    """The last error in the log, else its last line."""
    lines = [" ".join(line.split()) for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or line.startswith("error:") or " error: " in line]
    return (errors or lines or ["it wrote nothing"])[-1][:300]
