"""`python benchmarks/kills.py [KILLS]`: kill -9 of a random process of a run over Ray, until there were so many (20).

Runs of two ranks and two workers on this machine, embedded engine, lag 0. Each suffers three kills, of a rank, a worker and the command in
random order and at random moments; then its checkpoint, policy and traces are compared with those of an undisturbed run, bit for bit, and
nothing may be left running. A killed command is started anew. Writes benchmarks/results/kills.json.
"""

import hashlib
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

import torch
from safetensors.torch import load_file

from aipo_graph.log import read_metrics

STEPS, LIMIT = 6, 900
"""Of a run; seconds for anything to happen."""
WORDS = (
    f"--train.steps {STEPS} --train.patience 100 --rollout.problems 4 --rollout.traces 4 --run.checkpoint_every 1 --evaluate.problems 0 "
    "--cluster.address local --cluster.learners 2 --cluster.workers 2"
).split()
RESULTS = Path(__file__).parent / "results" / "kills.json"


class Trial:
    """A run in a folder of its own. All its processes have ``mark`` in their environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder / "runs" / "quickstart", secrets.token_hex(8)
        self._log = (folder / "log").open("a")
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "aipo_graph.train", *WORDS]
        environment = os.environ | {"KILLS": self.mark}
        self.driver = subprocess.Popen(command, cwd=self.folder.parents[1], env=environment, stdout=self._log, stderr=self._log)

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

    def kill(self, kind: str, rng: random.Random) -> float:
        """Seconds until the next step is done."""
        if kind == "command":
            self.driver.kill()
            self.driver.wait()
            stopped = self.wait("all processes of a killed command end", lambda: not self.left())
            before = self.step()
            self.start()
            return stopped + self.wait("a step after the kill", lambda: self.step() > before)
        lines = [json.loads(line) for line in (self.folder / "processes.jsonl").read_text().splitlines()]
        pids = {line["process"]: line["pid"] for line in lines}
        before = self.step()
        os.kill(pids[rng.choice([name for name in sorted(pids) if name.startswith(kind)])], signal.SIGKILL)
        return self.wait("a step after the kill", lambda: self.step() > before or self.driver.poll() is not None)

    def end(self) -> list[tuple[str, str]]:
        """Digests of all that two equal runs share: files, and the tensors of the checkpoint, in whose files their order is torch's."""
        if self.driver.wait(LIMIT):
            raise SystemExit(f"the run failed; see {self._log.name}")
        self.wait("all processes end", lambda: not self.left())
        last = self.folder / "checkpoints" / f"step-{STEPS:08d}"
        found = [(path.name, path.read_bytes()) for path in (self.folder / "policy/model.safetensors", self.folder / "traces.jsonl")]
        for path in last.glob("*.safetensors"):
            found += [(name, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for name, tensor in load_file(path).items()]
        return sorted((name, hashlib.sha256(data).hexdigest()) for name, data in found)


def main(count: int) -> None:
    rng, kills = random.Random(0), []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        roots = [Path(folder, str(i)) for i in range(1 + -(-count // 3))]
        for root in roots:
            root.mkdir()
        expected = Trial(roots[0]).end()
        for root in roots[1:]:
            trial, begun = Trial(root), []
            for kind in rng.sample(["learner", "worker", "command"], min(3, count - len(kills))):
                done = trial.step()
                trial.wait("a step", lambda trial=trial, done=done: trial.step() > done)
                time.sleep(rng.uniform(0, 1))
                begun.append({"kind": kind, "seconds": round(trial.kill(kind, rng), 1)})
                print(begun[-1], flush=True)
            same = trial.end() == expected
            kills += [kill | {"same_bits": same} for kill in begun]
            print(f"{sum(kill['same_bits'] for kill in kills)} of {len(kills)} kills: the same bits", flush=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    RESULTS.write_text(json.dumps({"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine, "kills": kills}, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
