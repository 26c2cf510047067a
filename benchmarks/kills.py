"""`python benchmarks/kills.py [KILLS]`: kill -9 of a random process of a run over Ray, until there were so many (20).

Runs on this machine at lag 0, of two ranks and a worker with the embedded engine. Each suffers a kill of both ranks, two of the worker and
one of the command, in random order at random moments; then its checkpoint, policy and traces are compared with those of an undisturbed
run, bit for bit, and nothing may be left running. A killed command is started anew.

Where vLLM is installed (`.venv-vllm/bin/python benchmarks/kills.py 2`) it kills the sampler instead, with vLLM in it, over which runs share
no bits, and compares what was drawn. Writes benchmarks/results/kills.json.
"""

import hashlib
import importlib.util
import json
import os
import platform
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aipo_graph.log import read_metrics, read_traces

VLLM = importlib.util.find_spec("vllm") is not None
KILLED = ("sampler-0", "sampler-0") if VLLM else ("command", "learner-0", "learner-1", "worker-0", "worker-0")
STEPS, LIMIT = 4 * len(KILLED), 1800
"""Of a run; seconds for anything to happen."""
WORDS = (
    f"--train.steps {STEPS} --train.patience 100 --rollout.problems 4 --rollout.traces 4 --run.checkpoint_every 1 --evaluate.problems 0 "
    "--run.device cpu --cluster.address local "
    + ("--engine.kind vllm --engine.max_context 384 --rollout.max_tokens 128" if VLLM else "--cluster.learners 2 --cluster.workers 1")
).split()
RESULTS = Path(__file__).parent / "results" / "kills.json"


class Trial:
    """A run in a folder of its own. All its processes have ``mark`` in their environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder / "runs" / "quickstart", secrets.token_hex(8)
        self._log = (folder / "log").open("a")
        self.start()

    def start(self) -> None:
        """Again where Ray, which gives its own start 30 seconds, did not start."""
        command = [sys.executable, "-m", "aipo_graph.train", *WORDS]
        environment, before = os.environ | {"KILLS": self.mark}, len(self.begun())
        while True:
            self.driver = subprocess.Popen(command, cwd=self.folder.parents[1], env=environment, stdout=self._log, stderr=self._log)
            self.wait("a process", lambda: len(self.begun()) > before or self.driver.poll() is not None)
            if self.driver.poll() is None:
                return
            print("Ray did not start", flush=True)

    def begun(self) -> list[dict[str, Any]]:
        """The processes that the run has started."""
        file = self.folder / "processes.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def left(self) -> list[int]:
        """Processes of the run that are alive."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def wait(self, what: str, until: object) -> float:
        """Seconds until it is so."""
        begin = time.monotonic()
        while not until():  # type: ignore[operator]
            if time.monotonic() - begin > LIMIT:
                raise SystemExit(f"not within {LIMIT} s: {what}; see {self._log.name}")
            time.sleep(0.05)
        return time.monotonic() - begin

    def step(self) -> int:
        return len(read_metrics(self.folder / "metrics.jsonl"))

    def kill(self, name: str) -> float:
        """Seconds until the next step is done."""
        stopped, before = 0.0, self.step()
        if name == "command":
            self.driver.kill()
            self.driver.wait()
            stopped = self.wait("all processes of a killed command end", lambda: not self.left())
            before = self.step()
            self.start()
        else:
            os.kill([line["pid"] for line in self.begun() if line["process"] == name][-1], signal.SIGKILL)
        return stopped + self.wait("a step after the kill", lambda: self.step() > before or self.driver.poll() is not None)

    def end(self) -> list[tuple[str, str]]:
        """Digests of all that two equal runs share: files, and the tensors of the checkpoint, in whose files their order is torch's; with
        vLLM problems and seeds."""
        if self.driver.wait(LIMIT):
            raise SystemExit(f"the run failed; see {self._log.name}")
        self.wait("all processes end", lambda: not self.left())
        if VLLM:
            groups = [logged.group for logged in read_traces(self.folder / "traces.jsonl")[0]]
            return [(group.problem.id, str([trace.seed for trace in group.traces])) for group in groups]
        last = self.folder / "checkpoints" / f"step-{STEPS:08d}"
        found = [(path.name, path.read_bytes()) for path in (self.folder / "policy/model.safetensors", self.folder / "traces.jsonl")]
        for path in last.glob("*.safetensors"):
            found += [(name, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for name, tensor in load_file(path).items()]
        return sorted((name, hashlib.sha256(data).hexdigest()) for name, data in found)


def main(count: int) -> None:
    rng, kills = random.Random(0), []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        roots = [Path(folder, str(i)) for i in range(1 + -(-count // len(KILLED)))]
        for root in roots:
            root.mkdir()
        expected = Trial(roots[0]).end()
        for root in roots[1:]:
            trial, begun = Trial(root), []
            for name in rng.sample(KILLED, min(len(KILLED), count - len(kills))):
                done = trial.step()
                trial.wait("a step", lambda trial=trial, done=done: trial.step() > done or trial.driver.poll() is not None)
                if trial.driver.poll() is not None:
                    raise SystemExit(f"the run ended before its last kill; see {root / 'log'}")
                time.sleep(rng.uniform(0, 1))
                load = os.getloadavg()[0]
                begun.append({"process": name, "seconds": round(trial.kill(name), 1), "load": round(load, 1)})
                print(begun[-1], flush=True)
            same = trial.end() == expected
            kills += [kill | {"same": same} for kill in begun]
            print(f"{sum(kill['same'] for kill in kills)} of {len(kills)} kills: the same {'draws' if VLLM else 'bits'}", flush=True)
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            machine = f"{os.cpu_count()} cores, {platform.machine()}"
            found["draws with vLLM" if VLLM else "bits"] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine, "kills": kills}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
