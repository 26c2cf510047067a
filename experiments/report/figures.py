"""The figures of the report, each as PNG and SVG, equal byte for byte when the runs are equal."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report.stored import SEEDS, Mean, Run, Study, mean, method

COLOURS = {
    "aipo": "#0072B2",
    "signed": "#882255",
    "gated": "#E69F00",
    "luffy": "#009E73",
    "sft": "#D55E00",
    "ppo": "#56B4E9",
    "mask": "#CC79A7",
    "echo": "#8C6D31",
    "raft": "#9467BD",
    "alone": "#000000",
    "grpo": "#000000",
    "base": "#7F7F7F",
}
"""Okabe and Ito's palette, which colour-blind readers can tell apart, and some more; each line carries its name as well."""
OTHERS = ("#117733", "#44AA99", "#AA4499", "#999933")
STYLE: dict[Any, Any] = {
    **{"font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.axisbelow": True},
    **{"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False},
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "aipo_graph",
    "savefig.dpi": 130,
}
WINDOW = 5
"""Steps of which a point of a curve is the mean."""
BANDED = 3
"""Seeds from which a line has a band: of two, it would cover the figure."""
CURVES = {
    "reward/alone/hard": "reward alone, hard problems",
    "agent_ratio_below/0.1": "share of agent tokens with ρ < 0.1, before clipping",
}
"""Metrics of each step that are drawn, in words."""
Line = tuple[Sequence[int], Sequence[Mean]]
"""x, and the mean over seeds at each."""


def colour(variant: str) -> str:
    """Of its method; any other name gets one of its own by its letters."""
    return COLOURS.get(method(variant)) or OTHERS[sum(map(ord, variant)) % len(OTHERS)]


def save(path: Path, draw: Callable[[Any], None], *, width: float = 9.0, height: float = 3.8) -> None:
    """Draws on a fresh figure and writes ``path``.png and .svg. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


# --- bars with intervals


def bars(path: Path, names: Sequence[str], panels: Mapping[str, Sequence[Mean | None]], columns: int) -> None:
    """A panel per title, as many as fill the last row; in each a bar per name with its figure (None: not run)."""
    lines = len(panels) // columns

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (title, means) in zip(grid.flat, panels.items(), strict=True):
            axes.set(title=title, xlim=(0, 1.32), ylim=(len(names) - 0.4, -0.6))
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
            for y, (name, found) in enumerate(zip(names, means, strict=True)):
                _bar(axes, y, found, colour(name))

    save(path, draw, height=lines * (0.7 + 0.24 * len(names)))


def _bar(axes: Axes, y: int, found: Mean | None, shade: str) -> None:
    if found is None:
        axes.text(0.01, y, "not run", va="center", fontsize=8, color="0.45")
        return
    axes.barh(y, found.mean, height=0.72, color=shade, alpha=0.6)
    low, high = np.clip([found.low, found.high], 0, 1)
    if found.bounded:
        axes.plot([low, high], [y, y], color="0.1", linewidth=1.3, solid_capstyle="butt")
        axes.plot([low, high], [y, y], "|", color="0.1", markersize=5)
    axes.plot(found.values, [y] * found.n, "o", color="white", markeredgecolor="0.1", markeredgewidth=0.7, markersize=3.2, clip_on=False)
    text = f"{found.mean:.2f}" + ("" if found.n >= SEEDS else f" (n {found.n})")
    axes.text(max(found.mean, *found.values, high if found.bounded else 0) + 0.025, y, text, va="center", fontsize=8)


# --- lines with bands


def lines(axes: Axes, found: Mapping[str, Line], marker: str | None = None) -> None:
    """Each named at its right end, in its colour, names pushed apart. The limits of y are set before."""
    bottom, top = axes.get_ylim()
    for name, (x, means) in found.items():
        style = "--" if name == "base" else "-"
        axes.plot(x, [m.mean for m in means], color=colour(name), linewidth=2, linestyle=style, marker=marker, markersize=4)
        low, high = np.array([(m.low, m.high) if m.n >= BANDED else (np.nan, np.nan) for m in means]).clip(bottom, top).T
        axes.fill_between(x, low, high, color=colour(name), alpha=0.18, linewidth=0)
    gap = 0.065 * (top - bottom)
    place = bottom - gap
    ends = sorted((means[-1].mean, name) for name, (_, means) in found.items())
    for above, (end, name) in zip(reversed(range(len(ends))), ends, strict=True):
        place = min(max(end, place + gap), top - gap * above)
        axes.annotate(
            name, (1, place), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color=colour(name)
        )


def curve(runs: Sequence[Run], key: str) -> Line | None:
    """Of every WINDOW steps, as far as the shortest run goes. None if no run stored it."""
    found = [values for run in runs if mean(values := run.curve.get(key, []))]
    starts = range(0, min(map(len, found), default=0), WINDOW)
    means = {at + WINDOW // 2: m for at in starts if (m := mean(part.mean for values in found if (part := mean(values[at : at + WINDOW]))))}
    return (list(means), list(means.values())) if means else None


def curves(study: Study, experiment: str, path: Path) -> None:
    """Training, a panel per metric of CURVES."""
    cells = study.cells[experiment]
    panels = {title: {name: line for name, cell in cells.items() if (line := curve(cell, key))} for key, title in CURVES.items()}

    def draw(figure: Figure) -> None:
        for axes, (title, found) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            axes.set(title=title, ylim=(-0.02, 1.02), xlabel="step")
            lines(axes, found)

    save(path, draw, width=10)


def pass_at_k(study: Study, experiment: str, path: Path) -> None:
    """pass@k alone over k."""
    ks, found = study.ks(experiment), dict[str, Line]()
    for name in study.cells[experiment]:
        if means := {k: m for k in ks if (m := study.mean(experiment, name, f"alone pass@{k}"))}:
            found[name] = list(means), list(means.values())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set(title="pass@k alone, held-out hard problems", xscale="log", xlabel="k", ylim=(-0.02, 1.02))
        lines(axes, found, marker="o")
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()

    save(path, draw, width=7.5, height=4.2)
