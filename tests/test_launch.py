"""The server that a run starts for itself: its command, its end with the run, and its failures."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_world import OPERATORS, settings

from aipo_graph.engines.facts import Facts
from aipo_graph.engines.launch import serve_command, serve_environment, serve_text, serving
from aipo_graph.errors import ConfigError, EngineError


@pytest.mark.parametrize(("sections", "there", "absent"), [
    ({}, ["--dtype float32", "--max-model-len 512", "--max-num-seqs 256", "--enable-scale-out", "--enforce-eager"], "--enable-lora"),
    ({"policy": {"lora_rank": 12}}, ["--enable-lora --max-lora-rank 16 --max-loras 2"], "--gpu"),
    ({"policy": {"lora_rank": 16}, "rollout": {"max_lag": 2}}, ["--max-loras 4"], "--gpu"),
    ({"policy": {"dtype": "bfloat16"}}, ["--dtype bfloat16"], "--enable-lora"),
    ({"engine": {"max_context": 256, "max_batch": 8}}, ["--max-model-len 256", "--max-num-seqs 8"], "--enable-lora"),
    ({"run": {"device": "cuda"}, "engine": {"memory": 0.5}}, ["--gpu-memory-utilization 0.5"], "--enforce-eager"),
])  # fmt: skip
def test_the_command_says_what_the_config_says(sections: dict[str, Any], there: list[str], absent: str) -> None:
    config = settings(**sections)
    text = serve_text(config, OPERATORS, 8123)
    assert all(words in text for words in [*there, "--port 8123", "--logprobs-mode processed_logprobs", "VLLM_SERVER_DEV_MODE=1"])
    assert absent not in text
    count = len(serve_environment(config))
    assert shlex.split(text)[count + 1 :] == serve_command(config, Facts.read(config, OPERATORS), 8123)[1:]
    assert ("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in text) == bool(config.policy.lora_rank)


@pytest.mark.parametrize(("visible", "given"), [(None, "3"), ("2,5", "5"), ("GPU-a,GPU-b", "GPU-b")])
def test_of_several_gpus_the_server_gets_the_last_alone(monkeypatch: pytest.MonkeyPatch, visible: str | None, given: str) -> None:
    """Also where a scheduler has set which may be used: the learner is on the first of them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4 if visible is None else 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert serve_environment(settings(run={"device": "cuda"}))["CUDA_VISIBLE_DEVICES"] == given


def test_a_rank_beyond_vllm_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_rank = 600"):
        serve_text(settings(policy={"lora_rank": 600}), OPERATORS)


@pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is installed here")
def test_without_vllm_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'vllm==0.32\.\*'"):
        serving(settings(), OPERATORS, tmp_path / "vllm.log").__enter__()


def test_a_server_that_does_not_come_up_shows_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"code 1 before it was ready: .*No module named 'vllm'.*vllm\.log") as caught:
        serving(settings(), OPERATORS, tmp_path / "vllm.log", python=str(Path(sys.base_prefix) / "bin" / "python3")).__enter__()
    assert "\n" not in str(caught.value)


PARENT = """
import sys, time
from pathlib import Path

from aipo_graph.engines.launch import _start
say = "import os, subprocess, sys, time; print(os.getpid(), flush=True);"
code = f"{say} subprocess.run([sys.executable, '-c', {say + 'time.sleep(600)'!r}])"
_start([sys.executable, "-c", code], {}, Path(sys.argv[1]))
print("started", flush=True)
time.sleep(600)
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_the_server_ends_with_a_killed_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(log)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        while len(pids := [int(line) for line in log.read_text().split()]) < 2:
            time.sleep(0.05)
        assert all(map(running, pids))
        parent.send_signal(signal.SIGKILL)
    for _ in range(600):
        if not any(map(running, pids)):
            break
        time.sleep(0.05)
    assert not any(map(running, pids))
