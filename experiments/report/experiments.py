"""The tables and figures of each experiment's page, and what is compared with what in it."""

import statistics
from pathlib import Path

from aipo_graph import cli
from experiments import grid
from experiments.report import figures
from experiments.report.markdown import listed, plain, table
from experiments.report.stored import SHARED, Mean, Order, Study, compare, untrained

METRICS = ("alone pass@1", "alone greedy", "alone pass@max", "with_agents pass@1", "easy pass@1")
DRAWN = {"coefficients": "bars pass_at_k curves", "boundary": "pass_at_k", "second": "bars curves", "verbose": "bars curves"}
"""Experiment -> its figures; those that chose settings have none, all others bars."""
STEPS = {"lag": ("lag", "mismatch_mean", "mismatch_kl", "mismatch_capped", "policy_ess", "agent_ess")}
"""Experiment -> metrics of each step that its page gives as means over steps and seeds."""
MARKS: dict[Order, str] = {"above": "▼", "below": "▲", "not separated": "="}
"""How `aipo` compares with what a cell holds -> what the cell shows: how it compares with `aipo`."""


def reference(variant: str) -> str:
    """The `aipo` that a variant is compared with: of its level of faults, of its architecture and algorithm, of its condition."""
    place, slash, _ = variant.rpartition("/")
    _, at, level = variant.partition("@")
    return f"aipo@{level}" if at else f"{place}{slash}aipo"


def variants(study: Study, experiment: str) -> list[str]:
    """The grid's in its order, then the others as stored; those that are compared with each other stand together."""
    planned = grid.EXPERIMENTS[experiment].variants if experiment in grid.EXPERIMENTS else ()
    names = list(dict.fromkeys([*SHARED.get(experiment, ()), *planned, *study.cells.get(experiment, {})]))
    places = list(dict.fromkeys(map(reference, names)))
    return sorted(names, key=lambda name: places.index(reference(name)))


def marked(text: str, own: Mean | None, other: Mean | None) -> str:
    """The text of a cell that holds ``other``, with how that compares with `aipo`'s ``own``."""
    return f"{text} {MARKS.get(compare(own, other), '')}".rstrip()


def forgotten(study: Study, experiment: str) -> list[str]:
    """Variants that are below the untrained policy on easy problems."""
    metric, names = "easy pass@1", [name for name in study.cells.get(experiment, {}) if not untrained(name)]
    others = grid.EXPERIMENTS[experiment].bases if experiment in grid.EXPERIMENTS else {}

    def base(name: str) -> Mean | None:
        place = name.partition("/")[0]
        return study.mean(experiment, f"{place}/base" if place in others else "base", metric)

    return [name for name in names if compare(study.mean(experiment, name, metric), base(name)) == "below"]


# --- figures


def drawn(study: Study, experiment: str) -> list[str]:
    """The names of the figures that there is data for."""
    curves = any(run.curve.get(key) for run in study.runs(experiment) for key in figures.CURVES)
    there = {"bars": True, "pass_at_k": len(study.ks(experiment)) > 1, "curves": curves}
    kinds = DRAWN.get(experiment, "" if experiment in grid.CHOOSING else "bars") if study.runs(experiment) else ""
    return [f"{experiment}_{kind}" for kind in kinds.split() if there[kind]]


def draw(study: Study, experiment: str, path: Path) -> None:
    kinds = {"bars": bars, "pass_at_k": figures.pass_at_k, "curves": figures.curves}
    kinds[path.name.removeprefix(f"{experiment}_")](study, experiment, path)


def bars(study: Study, experiment: str, path: Path) -> None:
    """A panel per metric; of `generality` one per architecture, with a row per algorithm and method."""
    names = [name for name in variants(study, experiment) if study.cell(experiment, name)]
    if experiment == "generality":
        places, names = (list(dict.fromkeys(name.partition("/")[i] for name in names)) for i in (0, 2))
        panels = {place: [study.mean(experiment, f"{place}/{name}", METRICS[0]) for name in names] for place in places}
    else:
        shown = [m for m in METRICS if m != "with_agents pass@1" and any(study.mean(experiment, name, m) for name in names)]
        panels = {study.named(experiment, metric): [study.mean(experiment, name, metric) for name in names] for metric in shown}
    figures.bars(path, [cli.printable(name) for name in names], panels, len(panels))


def image(name: str, folder: str = "img/study") -> str:
    return f"[![{name.replace('_', ' ')}]({folder}/{name}.png)]({folder}/{name}.svg)"


# --- tables


def text(study: Study, experiment: str) -> str:
    if not study.runs(experiment):
        return "**Not run.**"
    names = variants(study, experiment)
    heads = [study.named(experiment, metric).replace("_", " ") for metric in METRICS]
    means = table(["variant", "n", *heads, "policy tokens, M", "steps"], [_row(study, experiment, name) for name in names])
    tables = [means, *([_steps(study, experiment, names)] if experiment in STEPS else [])]
    images = [image(name, "../img/study") for name in drawn(study, experiment)]
    rows = [
        [plain(name), listed(f"{key}={value}" for key, value in run.settings.items()) or "–", str(run.seed)]
        + ["–" if (value := run.value(study.named(experiment, metric))) is None else f"{value:.3f}" for metric in METRICS]
        for name in names
        for run in study.cell(experiment, name)
    ]
    each = table(["variant", "settings over the config", "seed", *heads], rows, left=2)
    again = f"Anew: `python -m experiments.study --results again --only {experiment}`, with `--variants` and `--seeds` for some."
    marks = "▼ below `aipo`, ▲ above it, = not separated; [the rule, and how to read the figures](how.md#the-rule)."
    return "\n\n".join(
        [*tables, marks, *images, "<details><summary>Each seed's figures, settings, command</summary>", each, again, "</details>"]
    )


def _steps(study: Study, experiment: str, names: list[str]) -> str:
    """What the learner saw, per step."""
    rows = []
    for name in names:
        curves = [[run.curve.get(metric, ()) for run in study.cell(experiment, name)] for metric in STEPS[experiment]]
        found = [[value for curve in of for value in curve if value is not None] for of in curves]
        rows.append([plain(name), *(f"{statistics.fmean(values):.3g}" if values else "–" for values in found)])
    return table(["mean over steps", *(f"`{metric}`" for metric in STEPS[experiment])], rows)


def _row(study: Study, experiment: str, name: str) -> list[str]:
    cell = study.cell(experiment, name)
    if not cell:
        return [plain(name), "0", *["not run"] * len(METRICS), "", ""]
    origin = "" if name in study.cells[experiment] else " (from coefficients)"
    pairs = [(study.mean(experiment, reference(name), metric), study.mean(experiment, name, metric)) for metric in METRICS]
    tokens, steps = [run.tokens for run in cell if run.tokens], [run.steps for run in cell if run.steps]
    spent = f"{statistics.fmean(tokens) / 1e6:.2f}" if tokens else "–"
    ran = "–".join(map(str, sorted({min(steps), max(steps)}))) if steps else "–"
    return [plain(name) + origin, str(len(cell)), *(marked(str(other or "–"), own, other) for own, other in pairs), spent, ran]
