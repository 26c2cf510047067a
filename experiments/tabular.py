"""A table instead of a network: what each coefficient makes of one consult's reply, in expectation. `python -m experiments.tabular`.

The policy is a softmax table over the replies to a request. A trace makes ``consults`` such requests, all alike, and earns 1 where every
reply is right and nothing else slips. Half of a group asks a helper, half writes its own replies; advantages are those of the quick start
(`grpo`, `split`). The expected update of a logit is then a sum over a handful of cases, which this integrates over a run, in seconds.
docs/theory.md says what follows; the command writes its table, docs/results/tabular.json and the figure.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from aipo_graph import cli
from aipo_graph.cli import write_whole
from experiments.report import figures
from experiments.report.markdown import filled, table
from experiments.report.stored import Study, read

PAGE, PREDICTIONS, FIGURE = Path("docs/theory.md"), Path("docs/results/tabular.json"), Path("docs/img/study/tabular")
RESULTS = Path("docs/results/study")
Array = np.ndarray[Any, np.dtype[np.float64]]
"""[3]: the right reply, the wrong one that a helper repeats, each of the others."""
RIGHT = np.array([1.0, 0.0, 0.0])
STEPS, STUDY_STEPS = 500, 75
"""Euler steps of a run here, and training steps of a run of the study."""


@dataclass(frozen=True)
class World:
    """``faulty``: the share of wrong replies; ``same``: always the same one, else any. The rest is the quick start's."""

    faulty: float = 0.0
    same: bool = False
    consults: int = 3
    helped: int = 4
    alone: int = 4
    solved: float = 0.934
    """Chance that a trace whose replies are right is solved: pass@1 of easy problems, whose rules are known, after a run without faults."""
    replies: int = 20_000
    """Rules that there are: four digits, a sign."""
    own: float = 0.1
    """Weight of a token of an alone trace's reply against one of a helper's: their denominators, some 110 own tokens to 30 of helpers."""

    @property
    def counts(self) -> Array:
        return np.array([1.0, 1.0, self.replies - 2.0])

    @property
    def wrong(self) -> Array:
        """A helper's wrong reply: the chance of each."""
        return np.array([0.0, 1.0, 0.0]) if self.same else np.array([0.0, 1.0, 1.0]) / (self.replies - 1)

    @property
    def others_right(self) -> float:
        """Chance that a trace with a right reply here is solved, with helpers."""
        return self.solved * (1 - self.faulty) ** (self.consults - 1)

    def pass_alone(self, right: float) -> float:
        return self.solved * right**self.consults


CONDITIONS: Mapping[str, World] = {
    "clean": World(),
    "10": World(0.1),
    "25": World(0.25),
    "50": World(0.5),
    "same30": World(0.3, same=True),
    "same40": World(0.4, same=True),
    "same60": World(0.6, same=True),
}
"""By their names in the study."""
Weight = Callable[[Array, bool], Array]
"""Probabilities of replies (rho, since mu is 1), whether A > 0 -> what multiplies A grad log pi."""

WEIGHTS: Mapping[str, Weight] = {
    "aipo": lambda p, up: np.clip(p, 0.3, 2.0) if up else 0 * p,
    "signed": lambda p, up: np.clip(p, 0.3, 2.0) if up else np.minimum(p, 2.0),
    "gated": lambda p, up: np.full_like(p, up),
    "sft": lambda p, up: np.ones_like(p),
    "luffy": lambda p, up: 0.1 * p / (p + 0.1) ** 2,
    "ppo": lambda p, up: p if up else np.where(p > 0.8, p, 0.0),
    "mask": lambda p, up: 0 * p,
}
"""By their names in the study: `aipo` with `loss.negative` 0, `signed` with 1; all other settings are the defaults."""
CREDITS = ("credit for all", "credit")
"""aipo, but a helper's reply has an advantage of its own: the mean reward of the traces in which the request was answered so, by whomever,
minus the mean of all, over the deviation of all. The second, the study's of that name: in failed traces alone; others keep the trace's."""


@cache
def _advantages(own: int, size: int, others: int) -> Array:
    """grpo's A of a trace of reward ``own`` by the number of the others that succeed, [size, others + 1]: of its own kind, of the rest."""
    mean = (own + np.arange(size)[:, None] + np.arange(others + 1)) / (size + others)
    n = size + others
    deviation = np.sqrt(mean * (1 - mean) * n / max(1, n - 1))
    return np.divide(own - mean, deviation, out=np.zeros_like(mean), where=deviation > 1e-9)


@cache
def _choose(n: int) -> Array:
    return np.array([comb(n, k) for k in range(n + 1)], dtype=np.float64)


def _binomial(n: int, p: float) -> Array:
    k = np.arange(n + 1)
    return _choose(n) * p**k * (1 - p) ** (n - k)


def expected_advantages(world: World, helped: float, alone: float) -> tuple[float, float, float, float]:
    """E[A] of a helped trace that succeeds, one that fails, an alone one that succeeds, one that fails; by the chances to succeed."""
    with_help, without, none = _binomial(world.helped - 1, helped), _binomial(world.alone, alone), np.ones(1)
    own = _binomial(world.alone - 1, alone)
    a, b = (float(with_help @ _advantages(r, world.helped, world.alone) @ without) for r in (1, 0))
    c, d = (float(own @ _advantages(r, world.alone, 0) @ none) for r in (1, 0))
    return a, b, c, d


def policy(world: World, logits: Array) -> Array:
    odds = np.exp(logits - logits.max())
    return odds / (world.counts @ odds)


def update(world: World, logits: Array, name: str) -> Array:
    """The expected update of each logit: of `loss.agent` on the helped traces' replies, of the policy gradient on those written alone."""
    p = policy(world, logits)
    rest, rest_alone = world.others_right, world.pass_alone(p[0]) / p[0]
    ours = (1 - world.faulty) * RIGHT
    wrong = world.faulty * world.wrong
    up, down, alone_up, alone_down = expected_advantages(world, (1 - world.faulty) * rest, rest_alone * p[0])
    solved, failed = ours * rest, ours * (1 - rest) + wrong
    if name == "credit for all":
        push = _credit(world, p, solved + failed)
    elif name == "credit":
        push = solved * up * WEIGHTS["aipo"](p, True) + _credit(world, p, failed)
    else:
        push = solved * up * WEIGHTS[name](p, True) + failed * down * WEIGHTS[name](p, False)
    push = push + world.own * p * (alone_down + RIGHT * rest_alone * (alone_up - alone_down))
    return push - p * (world.counts @ push)


def _credit(world: World, p: Array, said: Array) -> Array:
    """What aipo's coefficient makes of the right reply's own advantage, known exactly, in what is ``said``; the others' are negative: 0."""
    share, ours = world.helped / (world.helped + world.alone), 1 - world.faulty
    earned = share * ours * world.others_right + (1 - share) * world.pass_alone(p[0])  # the mean of all: no other reply earns anything
    advantage = (earned / (share * ours + (1 - share) * p[0]) - earned) / np.sqrt(earned * (1 - earned))
    return RIGHT * said * advantage * WEIGHTS["aipo"](p, True)


def run(world: World, name: str, force: float, steps: int = STEPS) -> Array:
    """Pass@1 alone over a run: its start, then after each step. ``force``: the integral of the learning rate, which falls as a cosine."""
    logits, found = np.zeros(3), []
    for step in range(steps):
        found.append(world.pass_alone(policy(world, logits)[0]))
        rate = 1 + np.cos(np.pi * (step + 0.5) / steps)
        logits = logits + force / steps * rate * update(world, logits, name)
    return np.array([*found, world.pass_alone(policy(world, logits)[0])])


def rest(world: World, name: str) -> float:
    """Pass@1 alone where the expected update ends: the right reply gains nothing on the others, the repeated wrong one is gone."""

    def gain(right: float) -> float:
        logits = np.log([right, 1e-12, (1 - right) / (world.replies - 2)])
        moved = update(world, logits, name)
        return float(moved[0] - moved[2])

    if name == "mask":
        return 0.0  # what was never solved alone has no gradient
    low, high = 1e-3, 1 - 1e-6
    if gain(high) > 0:
        return world.solved
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return world.pass_alone(low)


def unrest(world: World, name: str) -> float:
    """Root mean square of a single helped reply's update of the logits, where the right reply is nearly sure: 0.99."""
    p = np.array([0.99, 1e-12, 0.01 / (world.replies - 2)])
    ours, wrong, others = (1 - world.faulty) * RIGHT, world.faulty * world.wrong, world.others_right
    up, down, *_ = expected_advantages(world, (1 - world.faulty) * others, world.pass_alone(p[0]))
    norm = 1 - 2 * p + world.counts @ p**2  # of e_y - p, squared
    weights = WEIGHTS[name](p, True), WEIGHTS[name](p, False)
    square = ours * others * (up * weights[0]) ** 2 + (ours * (1 - others) + wrong) * (down * weights[1]) ** 2
    return float(np.sqrt(world.counts @ (square * norm)))


FITTED = ("clean", "signed", 0.838)
"""The one measured figure that the length of a run is fitted to: alone pass@1 of `signed` with right helpers, the mean of five seeds."""


def fitted_force() -> float:
    condition, name, target = FITTED
    low, high = 1.0, 10_000.0
    for _ in range(25):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if run(CONDITIONS[condition], name, middle)[-1] < target else (low, middle)
    return float(f"{low:.3g}")


def predictions() -> dict[str, Any]:
    """By coefficient and condition: pass@1 alone at a run's end and at rest, the step at which it is first 0.4, and the unrest."""
    force, found = fitted_force(), {}
    for name in (*WEIGHTS, *CREDITS):
        found[name] = cells = dict[str, dict[str, float | None]]()
        for condition, world in CONDITIONS.items():
            curve = run(world, name, force)
            steps = float(np.argmax(curve >= 0.4)) / STEPS * STUDY_STEPS if curve.max() >= 0.4 else None
            cells[condition] = {
                "final": round(float(curve[-1]), 3),
                "rest": round(rest(world, name), 3),
                "steps": steps and round(steps, 1),
                "unrest": None if name in CREDITS else round(unrest(world, name), 3),
            }
    return {"force": force, "coefficients": found}


# --- beside the runs


def measured(study: Study, condition: str, name: str) -> Any:
    experiment, variant = ("coefficients", name) if condition == "clean" else ("faulty", f"{name}@{condition}")
    return study.mean(experiment, variant, "alone pass@1")


def text(found: Mapping[str, Any], study: Study) -> str:
    """The page's table: predicted at a run's end (at rest), and measured."""
    rows = []
    for name, cells in found["coefficients"].items():
        row = [name]
        for condition, cell in cells.items():
            known = measured(study, condition, name)
            said = f"**{known.mean:.2f}** (n {known.n})" if known else "–"
            row.append(f"{cell['final']:.2f} ({cell['rest']:.2f}); {said}")
        rows.append(row)
    return table(["coefficient", *CONDITIONS], rows)


def draw(figure: Any, found: Mapping[str, Any], study: Study) -> None:
    shown = ("clean", "25", "same30", "same60")
    for axes, condition in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        axes.set(title=condition, xlim=(0, 1.12), ylim=(-0.02, 1), xlabel="share of the run")
        for name in WEIGHTS:
            line = run(CONDITIONS[condition], name, found["force"])
            axes.plot(np.linspace(0, 1, len(line)), line, color=figures.colour(name), label=name, linewidth=1.4)
            if known := measured(study, condition, name):
                axes.plot([1.06], [known.mean], "o", color=figures.colour(name), markeredgecolor="0.1", markeredgewidth=0.7, markersize=5)
    figure.axes[0].set_ylabel("alone pass@1")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def main(argv: list[str]) -> None:
    found, study = predictions(), read(RESULTS)
    written = text(found, study)
    print(written)
    write_whole(PREDICTIONS, json.dumps(found, indent=1) + "\n")
    figures.save(FIGURE, lambda figure: draw(figure, found, study), width=10)
    write_whole(PAGE, filled(PAGE, {"table": written}))


if __name__ == "__main__":
    sys.exit(cli.main(main))
