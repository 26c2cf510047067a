"""The stored runs of the study, and what they say together: means over seeds, their intervals, and comparisons by rule."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from aipo_graph.errors import ConfigError

SEEDS = 5
"""Seeds that a reported cell should have."""
LEAST = 0.02
"""Means that are less apart are not told apart, however narrow their intervals: of few seeds some coincide by chance."""
Order = Literal["above", "below", "not separated", "one seed", "not run"]
T_975 = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120),
    *(2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
]
"""The 0.975 quantile of Student's t for 1 … 30 degrees of freedom; beyond, the last is a little too wide."""


class Evaluation(BaseModel):
    """What the report reads of an `evaluation.json`: a mode's or kind's figures by name."""

    model_config = ConfigDict(frozen=True)

    alone: dict[str, Any] = {}
    with_agents: dict[str, Any] = {}
    kinds: dict[str, dict[str, dict[str, Any]]] = {}


class Run(BaseModel):
    """One line of ``<experiment>.jsonl``; keys that are not named here are passed over."""

    model_config = ConfigDict(frozen=True)

    experiment: str
    variant: str
    seed: int
    config: str
    settings: dict[str, Any] = {}
    """Over the config."""
    trained: Evaluation
    """Of the untrained policy where the variant is base."""
    curve: dict[str, list[float | None]] = {}
    tokens: float | None = None
    """Policy tokens sampled in training."""
    steps: int | None = None
    stopped: str | None = None
    seconds: float | None = None
    command: str = ""
    hardware: str = ""
    date: str = ""
    version: str = ""

    def value(self, metric: str) -> float | None:
        """A figure of the evaluation; ``metric`` is a mode or a kind and a name: "alone pass@1", "easy greedy". None where absent."""
        place, _, name = metric.partition(" ")
        return _finite(self._figures(place).get(name))

    def interval(self, metric: str) -> tuple[float, float] | None:
        """The evaluation's own of that figure, a bootstrap over problems."""
        place, _, name = metric.partition(" ")
        intervals = self._figures(place).get("intervals")
        ends = intervals.get(name) if isinstance(intervals, dict) else None
        known = [end for end in map(_finite, ends) if end is not None] if isinstance(ends, list) else []
        return (known[0], known[1]) if len(known) == 2 else None

    def _figures(self, place: str) -> dict[str, Any]:
        modes = {"alone": self.trained.alone, "with_agents": self.trained.with_agents}
        return modes.get(place, self.trained.kinds.get(place, {}).get("alone", {}))


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def method(variant: str) -> str:
    """METHOD, METHOD@LEVEL and PLACE/METHOD -> METHOD."""
    return variant.partition("@")[0].rpartition("/")[2]


def untrained(variant: str) -> bool:
    return method(variant) == "base"


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds and its 95 % interval by Student's t; NaN for its ends where a single seed has none."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    """Of each seed."""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def bounded(self) -> bool:
        return not math.isnan(self.low)

    def __str__(self) -> str:
        ends = f" ({self.low:.3f} … {self.high:.3f})" if self.bounded else ""
        return f"{self.mean:.3f}{ends}".replace("-0.000", "0.000")


def mean(values: Iterable[float | None]) -> Mean | None:
    """Over what is there; None if nothing is.

    >>> print(mean([0.1, 0.2, None, 0.3]), mean([0.5]), mean([None]))
    0.200 (-0.048 … 0.448) 0.500 None
    """
    found = [value for value in values if value is not None]
    if not found:
        return None
    middle, n = statistics.fmean(found), len(found)
    half = T_975[min(n - 1, len(T_975)) - 1] * statistics.stdev(found) / math.sqrt(n) if n > 1 else math.nan
    return Mean(middle, middle - half, middle + half, tuple(found))


def compare(left: Mean | None, right: Mean | None) -> Order:
    """The rule of the whole report: one is above the other where their intervals are separate and the means at least LEAST apart."""
    if left is None or right is None:
        return "not run"
    if not (left.bounded and right.bounded):
        return "one seed"
    if abs(left.mean - right.mean) < LEAST:
        return "not separated"
    return "above" if left.low > right.high else "below" if left.high < right.low else "not separated"


class Study:
    """All runs, by experiment and variant, in the order in which they were stored."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.cells: dict[str, dict[str, list[Run]]] = {}
        for run in runs:
            self.cells.setdefault(run.experiment, {}).setdefault(run.variant, []).append(run)
        for variants in self.cells.values():
            for cell in variants.values():
                cell.sort(key=lambda run: run.seed)

    def runs(self, experiment: str) -> list[Run]:
        return [run for cell in self.cells.get(experiment, {}).values() for run in cell]

    def cell(self, experiment: str, variant: str) -> list[Run]:
        """The runs of a variant. Where an experiment changes something of `coefficients`, its unchanged end is that of `coefficients`:
        METHOD@0 of `faulty`, METHOD of `ablations`, llama/grpo/METHOD of `generality`, as long as both ran from the same config."""
        own = self.cells.get(experiment, {}).get(variant, [])
        if own or experiment not in SHARED:
            return own
        configs = {run.config for run in self.runs(experiment)}
        unchanged = variant.removesuffix("@0").removeprefix("llama/grpo/")
        return [run for run in self.cells.get("coefficients", {}).get(unchanged, []) if {run.config} == configs]

    def ks(self, experiment: str) -> list[int]:
        """Every k for which a pass@k alone is stored, ascending."""
        names = {name for run in self.runs(experiment) for name in run.trained.alone}
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"pass@[0-9]{1,6}", name))

    def named(self, experiment: str, metric: str) -> str:
        """The metric, with the largest k of the experiment for a final "pass@max"."""
        return metric.replace("pass@max", f"pass@{max(self.ks(experiment), default='max')}")

    def mean(self, experiment: str, variant: str, metric: str) -> Mean | None:
        """None where nothing is stored. The untrained policy has no seed of training: evaluated once, it has that evaluation's interval."""
        metric, cell = self.named(experiment, metric), self.cell(experiment, variant)
        found = mean(run.value(metric) for run in cell)
        if found and len(cell) == 1 and untrained(variant) and (ends := cell[0].interval(metric)):
            return replace(found, low=ends[0], high=ends[1])
        return found


SHARED = {"faulty": (), "ablations": ("aipo", "signed"), "generality": ("llama/grpo/aipo",)}
"""Experiments on the task, the policy and the budget of `coefficients` -> what their tables show of it."""


def read(folder: Path) -> Study:
    """Every ``*.jsonl`` of the folder. Raises ConfigError for a line that is no run, a run that stands twice, and for no runs at all."""
    runs: dict[tuple[str, str, int], tuple[Run, str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                run = Run.model_validate_json(line)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                what = ": ".join([*([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]])
                raise ConfigError(f"{where}: not a run of the study: {what}; remove the line") from error
            key = run.experiment, run.variant, run.seed
            if key in runs:
                raise ConfigError(f"{where}: {'/'.join(key[:2])}, seed {run.seed}, stands already at {runs[key][1]}; remove one")
            runs[key] = run, where
    if not runs:
        raise ConfigError(f"{folder}: no stored runs (*.jsonl); run the study first, or name its folder with --results")
    return Study([run for run, _ in runs.values()])
