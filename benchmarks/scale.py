"""`python benchmarks/scale.py`: how throughput follows from GPUs, problems per step and `rollout.max_lag`; simulated, not measured.

Samplers decode with continuous batching, graph runs wait for their helpers in between, the learner takes steps in the order of their draws,
as the run's scheduler does, or (for comparison) whatever is finished first; weights go out after each step. Its assumptions are printed
above the table; the speeds are estimates for an H100, none was measured. Writes benchmarks/results/scale.json and docs/img/scale.png.
"""

import heapq
import json
import math
import random
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
LAGS = (0, 1, 2, 4)


@dataclass(frozen=True)
class Speeds:
    """Of one policy. A decoding step takes ``base`` seconds and ``each`` more per sequence of the GPU's batch, at most ``slots``."""

    base: float
    each: float
    slots: int
    learned: float
    """Tokens that one learner GPU learns from per second."""
    sync: float = 2.0
    """Seconds in which sampling stands still for new weights."""
    gpus: int = 1
    """Of one sampler."""


POLICIES = {
    "8 B": Speeds(7e-3, 0.18e-3, 86, 6000),
    "1.7 B": Speeds(3e-3, 0.14e-3, 140, 29000),
    "32 B": Speeds(12.6e-3, 0.16e-3, 69, 1550, sync=10.0, gpus=2),
}


@dataclass(frozen=True)
class Traces:
    """Lengths are log-normal. ``helped`` of each group consults ``consults`` times, each for ``wait`` seconds in the mean."""

    mean: int = 4000
    sigma: float = 0.8
    longest: int = 16384
    group: int = 16
    helped: float = 0.5
    consults: int = 6
    wait: float = 2.0
    prompts: float = 1.15
    """Tokens learned from or read by the learner per sampled one: prompts and replies come on top."""


@dataclass(frozen=True)
class Case:
    policy: str
    samplers: int
    learners: int
    problems: int

    @property
    def gpus(self) -> int:
        return self.samplers * POLICIES[self.policy].gpus + self.learners


CASES = (
    Case("8 B", 5, 3, 64),
    Case("8 B", 42, 22, 64),
    Case("8 B", 42, 22, 512),
    Case("1.7 B", 48, 16, 256),
    Case("32 B", 16, 32, 256),
    Case("8 B", 340, 172, 512),
    Case("8 B", 340, 172, 2048),
)


class Pipeline:
    """One run: ``now`` in seconds, ``clock`` in tokens that a sequence which was active all along would have got."""

    def __init__(self, case: Case, lag: int, *, in_order: bool, seed: int = 0, traces: Traces | None = None) -> None:
        self.case, self.lag, self.in_order = case, lag, in_order
        self.speeds, self.traces = POLICIES[case.policy], traces or Traces()
        self.rng = random.Random(seed)
        self.now = self.clock = 0.0
        self.version = self.drawn = self.learned = self.active = 0
        self.paused = self.learning = False
        self.waiting: deque[tuple[int, list[float]]] = deque()  # (group, the parts that it still samples)
        self.sampling: list[tuple[float, int, int, list[float]]] = []  # heap of (clock at its end, number, group, parts after)
        self.events: list[tuple[float, int, str, int, list[float]]] = []  # heap of (time, number, what, group, parts)
        self.left: dict[int, int] = {}
        self.size: dict[int, float] = {}
        self.began: dict[int, int] = {}
        self.ready: list[int] = []
        self.number = 0
        self.ends: list[float] = []
        self.ages: list[list[int]] = []

    def run(self, steps: int) -> None:
        self._draw()
        while len(self.ends) < steps:
            batch = self.active / self.case.samplers
            rate = 0.0 if self.paused or not self.active else 1 / (self.speeds.base + self.speeds.each * max(batch, 1))
            ends = self.now + (self.sampling[0][0] - self.clock) / rate if rate and self.sampling else math.inf
            event = self.events[0][0] if self.events else math.inf
            then = min(ends, event)
            self.clock += rate * (then - self.now)
            self.now = then
            if ends <= event:
                _, _, group, parts = heapq.heappop(self.sampling)
                self.active -= 1
                if parts:
                    self._later(self.rng.expovariate(1 / self.traces.wait), "back", group, parts)
                else:
                    self._finished(group)
                self._fill()
            else:
                _, _, what, group, parts = heapq.heappop(self.events)
                getattr(self, f"_{what}")(group, parts)

    def _later(self, seconds: float, what: str, group: int = 0, parts: list[float] | None = None) -> None:
        self.number += 1
        heapq.heappush(self.events, (self.now + seconds, self.number, what, group, parts or []))

    def _draw(self) -> None:
        shape = self.traces
        middle = math.log(shape.mean) - shape.sigma**2 / 2
        while self.drawn < (self.version + self.lag + 1) * self.case.problems:
            group, self.drawn = self.drawn, self.drawn + 1
            self.left[group], self.size[group] = shape.group, 0.0
            for i in range(shape.group):
                length = min(shape.longest, max(64, int(self.rng.lognormvariate(middle, shape.sigma))))
                parts = 1 + (shape.consults if i < shape.group * shape.helped else 0)
                self.size[group] += length
                self.waiting.append((group, [length / parts] * parts))
        self._fill()

    def _fill(self) -> None:
        while self.waiting and self.active < self.case.samplers * self.speeds.slots:
            group, (first, *rest) = self.waiting.popleft()
            self.began.setdefault(group, self.version)
            self.number += 1
            self.active += 1
            heapq.heappush(self.sampling, (self.clock + first, self.number, group, rest))

    def _back(self, group: int, parts: list[float]) -> None:
        self.waiting.appendleft((group, parts))
        self._fill()

    def _finished(self, group: int) -> None:
        self.left[group] -= 1
        if not self.left[group]:
            self.ready.append(group)
            self._learn()

    def _learn(self) -> None:
        count = self.case.problems
        if self.in_order:
            taken = list(range(self.learned, self.learned + count))
            if self.learning or any(self.left.get(group, 1) for group in taken):
                return
        else:
            taken = self.ready[:count]
            if self.learning or len(taken) < count:
                return
        gone = set(taken)
        self.ready = [group for group in self.ready if group not in gone]
        self.learned += count
        self.learning = True
        self.ages.append([self.version - self.began[group] for group in taken])
        tokens = sum(self.size[group] for group in taken) * self.traces.prompts
        self._later(tokens / (self.case.learners * self.speeds.learned), "stepped")

    def _stepped(self, group: int, parts: list[float]) -> None:
        self.paused = True
        self._later(self.speeds.sync, "synced")

    def _synced(self, group: int, parts: list[float]) -> None:
        self.paused = self.learning = False
        self.version += 1
        self.ends.append(self.now)
        self._draw()
        self._learn()


def simulate(case: Case, lag: int, *, in_order: bool = True, steps: int = 12, warm: int = 4) -> dict[str, float]:
    """Seconds per step, that as a share of what the slower side alone would take, tokens/s per GPU, mean and largest lag."""
    pipeline = Pipeline(case, lag, in_order=in_order)
    pipeline.run(steps)
    speeds, traces = pipeline.speeds, pipeline.traces
    seconds = (pipeline.ends[-1] - pipeline.ends[warm - 1]) / (steps - warm)
    tokens = case.problems * sum(pipeline.size.values()) / len(pipeline.size)
    bound = max(
        tokens * traces.prompts / (case.learners * speeds.learned), tokens * (speeds.base / speeds.slots + speeds.each) / case.samplers
    )
    ages = [age for step in pipeline.ages[warm:] for age in step]
    return {
        "lag": lag,
        "seconds": seconds,
        "of_bound": bound / seconds,
        "tokens_per_gpu": tokens / seconds / case.gpus,
        "mean_lag": sum(ages) / len(ages),
        "largest_lag": float(max(ages)),
    }


def draw(rows: list[dict[str, float | str]], path: Path) -> None:
    matplotlib.use("agg")
    figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for case in CASES:
        mine = [row for row in rows if row["case"] == asdict(case) and row["in_order"]]
        label = f"{case.policy}, {case.gpus} GPUs, {case.problems} problems"
        axes.plot([row["lag"] for row in mine], [row["of_bound"] for row in mine], marker="o", label=label)
    axes.set(xlabel="rollout.max_lag", ylabel="throughput over that of the slower side alone", ylim=(0, 1.05), xticks=LAGS)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("simulated, not measured", fontsize=9)
    figure.savefig(path, dpi=150)


def main(console: Console) -> None:
    console.print("Simulated. Assumptions:", markup=False)
    for name, speeds in POLICIES.items():
        console.print(
            f"  {name}: a step takes {1000 * speeds.base:g} ms and {1000 * speeds.each:g} ms per sequence, {speeds.slots} sequences "
            f"on {speeds.gpus} GPU(s); the learner does {speeds.learned:,} tokens/s per GPU; weights stop sampling for {speeds.sync:g} s"
        )
    console.print(f"  {Traces()}", markup=False)
    rows = []
    table = Table(
        "policy", "GPUs (samplers + learners)", "problems", "order", "lag", "s/step", "of bound", "tokens/s/GPU", "mean lag", "largest lag"
    )
    for case in CASES:
        for in_order, lags in ((True, LAGS), (False, (1, 2))):
            for lag in lags:
                found = simulate(case, lag, in_order=in_order, **({"steps": 9, "warm": 3} if case.problems >= 256 else {}))
                rows.append({"case": asdict(case), "in_order": in_order, **found})
                order = "as drawn" if in_order else "first finished"
                where = f"{case.gpus} ({case.samplers} + {case.learners})"
                cells = (
                    f"{found['seconds']:.1f}",
                    f"{found['of_bound']:.2f}",
                    f"{found['tokens_per_gpu']:,.0f}",
                    f"{found['mean_lag']:.2f}",
                )
                table.add_row(case.policy, where, str(case.problems), order, str(lag), *cells, f"{found['largest_lag']:.0f}")
    console.print(table)
    (ROOT / "benchmarks/results/scale.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, ROOT / "docs/img/scale.png")


if __name__ == "__main__":
    main(Console(width=140, highlight=False))
