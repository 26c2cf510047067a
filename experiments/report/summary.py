"""What is filled into the page that a reader finishes: the main table, the verdicts, what did not work, what has not run."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments import grid
from experiments.report import figures
from experiments.report.claims import claims, judge
from experiments.report.experiments import MARKS, METRICS, drawn, forgotten, image, marked, variants
from experiments.report.markdown import listed, table
from experiments.report.stored import SEEDS, Mean, Study, compare, untrained

CONDITIONS = {
    "right and terse": ("coefficients", ""),
    **{f"{level} % wrong, at random": ("faulty", f"@{level}") for level in ("10", "25", "50")},
    **{f"{level} % wrong, one rule": ("faulty", f"@same{level}") for level in ("30", "40")},
    "wordy, known style": ("verbose", ""),
    "wordy, foreign style": ("foreign", ""),
    "a language model": ("language_model", ""),
}
"""What the helpers are -> the experiment, and what follows a method's name in it."""


def mean_of(study: Study, condition: str, method: str) -> Mean | None:
    experiment, tail = CONDITIONS[condition]
    return study.mean(experiment, f"{method}{tail}", METRICS[0])


def short(found: Mean | None) -> str:
    """
    >>> short(Mean(0.8, 0.79, 0.81, (0.8, 0.8))), short(None)
    ('.800±.010 (2)', '–')
    """
    if found is None:
        return "–"
    half = f"±{found.high - found.mean:.3f}" if found.bounded else ""
    return f"{found.mean:.3f}{half}".replace("0.", ".") + ("" if found.n == SEEDS else f" ({found.n})")


def conditions(study: Study) -> str:
    rows = []
    for condition in CONDITIONS:
        own, *others = (mean_of(study, condition, method) for method in grid.METHODS)
        rows.append([condition, short(own), *(marked(short(other), own, other) for other in others)])
    return table(["helpers are", *(f"`{method}`" for method in grid.METHODS)], rows)


def quick_start(study: Study, metrics: Sequence[str] = METRICS) -> str:
    """The quick start's recipe beside what does without one part of it."""
    rows = {"untrained": "base", "trained": "aipo", "helpers' words masked": "mask", "GRPO without helpers": "grpo"}
    heads = [study.named("coefficients", metric).replace("_", " ") for metric in metrics]
    cells = {told: [short(study.mean("coefficients", name, metric)) for metric in metrics] for told, name in rows.items()}
    return table(["", *heads], [[told, *found] for told, found in cells.items()])


def counted(study: Study) -> str:
    """In how many conditions `aipo` is separated from each other method, and whether it is never below and above each somewhere."""
    orders = {
        method: Counter(compare(mean_of(study, condition, "aipo"), mean_of(study, condition, method)) for condition in CONDITIONS)
        for method in grid.METHODS[1:]
    }
    told = ", ".join(f"`{method}` in {found['above']} / {found['below']}" for method, found in orders.items())
    below, never = [m for m in orders if orders[m]["below"]], [m for m in orders if not orders[m]["above"]]
    known, pairs = sum(found[order] for found in orders.values() for order in MARKS), len(CONDITIONS) * len(orders)
    goal = f"missed, below {listed(below)}" if below else f"open, nowhere above {listed(never)}" if never else "reached"
    goal += " so far" * (goal == "reached" and known < pairs)
    return (
        f"**Of {len(CONDITIONS)} conditions `aipo` is separated above / below {told}.** "
        f"The goal was never below any, above each somewhere: {goal}, with {known} of {pairs} pairs compared."
    )


def verdicts(study: Study) -> list[str]:
    images, lines = [name for experiment in study.cells for name in drawn(study, experiment)], list[str]()
    for number, (claim, first) in enumerate(zip(claims(study), claims(study, "signed"), strict=True), start=1):
        beside = f" ({first.words(study)})" if first.tests != claim.tests else ""
        lines.append(f"**{number}.** {claim.text} **{claim.words(study)}**{beside}")
        lines += [image(claim.figure)] if claim.figure in images else []
    return lines


def failures(study: Study) -> list[str]:
    """Comparisons of `aipo` that did not come out as claimed, or of `signed` where `aipo` has not run; what lost the easy problems."""
    found: dict[str, list[str]] = {"contradicted": [], "not shown": []}
    for claim, first in zip(claims(study), claims(study, "signed"), strict=True):
        for pair in zip(claim.tests, first.tests, strict=True):
            test = next((test for test in pair if judge(study, test) != "not run"), pair[0])
            told = f"{test.left[1]} {test.wanted} {test.right[1]} ({test.left[0]})"
            if (word := judge(study, test)) in found and told not in found[word]:
                found[word].append(told)
    lines = [f"- **{word.capitalize()}**: {listed(told)}." for word, told in found.items() if told]
    lost = [f"{name} ({experiment})" for experiment in study.cells for name in forgotten(study, experiment)]
    return [*lines, *([f"- Worse on easy problems than untrained: {listed(lost)}."] if lost else [])]


def missing(study: Study) -> str:
    """How many variants of each experiment have no run, and how many fewer seeds than a figure should have."""
    stored = {(run.experiment, run.variant, run.seed) for name in study.cells for run in study.runs(name)}
    left = sum((run.experiment, run.variant, run.seed) not in stored for run in grid.runs())
    absent, few = [], []
    for name in dict.fromkeys([*grid.EXPERIMENTS, *study.cells]):
        counts = [len(study.cell(name, variant)) for variant in variants(study, name) if not untrained(variant)]
        short_of = sum(0 < count < SEEDS for count in counts) if name not in grid.CHOOSING else 0
        absent += [f"[{name}](results/{name}.md) {counts.count(0)} of {len(counts)}"] if 0 in counts else []
        few += [f"{name} {short_of}"] if short_of else []
    told = {"Variants without a run": absent, f"On fewer than {SEEDS} seeds": few}
    lines = [f"- {what}: {', '.join(names)}." for what, names in told.items() if names]
    return "\n".join([f"- {len(stored)} runs are stored; {left} of the plan have not run.", *lines])


def draw(study: Study, path: Path) -> None:
    """The main table's figure."""
    panels = {condition: [mean_of(study, condition, method) for method in grid.METHODS] for condition in CONDITIONS}
    figures.bars(path, grid.METHODS, panels, 3)


def parts(study: Study) -> dict[str, str]:
    base, grpo = (short(study.mean("coefficients", name, METRICS[0])) for name in ("base", "grpo"))
    alone = f"Without training it is {base}, after plain GRPO without helpers {grpo}."
    return {
        "conditions": f"{conditions(study)}\n\n{alone} {counted(study)}",
        "claims": "\n\n".join(verdicts(study)),
        "failures": "\n".join(failures(study)),
        "missing": missing(study),
    }
