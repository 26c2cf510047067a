"""The figures of the report, each as PNG and SVG, equal byte for byte when the runs are equal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report.stored import SEEDS, Mean, Run, Study, mean

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
    "shortfall": "#332288",
    "alone": "#000000",
    "grpo": "#000000",
    "base": "#7F7F7F",
}
"""Okabe and Ito's palette, which colour-blind readers can tell apart, and two more; each line carries its name as well."""
OTHERS = ("#117733", "#44AA99", "#AA4499", "#999933")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "aipo_graph",
    "savefig.dpi": 130,
}
WINDOW = 5
"""Steps of the running mean under each training curve."""
BANDED = 3
"""Seeds from which a line has a band: of two, it would cover the figure."""
BINS = ("0.001", "0.01", "0.1", "0.3", "1")
Band = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""x, and the mean over seeds with the ends of its interval (NaN for fewer than BANDED)."""


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    colour: str
    means: Sequence[Mean | None]
    """One per panel; None: not run."""


def colour(name: str) -> str:
    """Of a method; any other name gets one of its own by its letters."""
    method = name.partition("@")[0]
    return COLOURS.get(method) or OTHERS[sum(map(ord, name)) % len(OTHERS)]


def save(path: Path, draw: Callable[[Any], None], *, width: float = 9.0, height: float = 3.8) -> None:
    """Draws on a fresh figure and writes ``path``.png and .svg. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


# --- bars with intervals


def bars(path: Path, panels: Sequence[str], groups: Mapping[str, Sequence[Bar]]) -> None:
    """A panel per metric, a row per bar with its name and figure; groups under their headings ("" for none)."""
    rows: list[Bar | str] = []
    for heading, members in groups.items():
        rows += [*([heading] if heading else []), *members]
    save(path, lambda figure: _bars(figure, panels, rows), height=0.9 + 0.27 * len(rows))


def _bars(figure: Figure, panels: Sequence[str], rows: Sequence[Bar | str]) -> None:
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (axes, title) in enumerate(zip(all_axes, panels, strict=True)):
        axes.set(title=title, xlim=(0, 1.32), ylim=(len(rows) - 0.4, -0.6))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
        axes.grid(False, axis="y")
        for y, row in enumerate(rows):
            if isinstance(row, Bar):
                _bar(axes, y, row.means[panel], row.colour)
    first = all_axes[0]
    first.set_yticks(range(len(rows)), [row.label if isinstance(row, Bar) else row for row in rows])
    first.tick_params(axis="y", length=0)
    for tick, row in zip(first.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if isinstance(row, Bar) else "bold")


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


def lines(axes: Axes, bands: Mapping[str, Band], *, dashed: str = "base", marker: str | None = None) -> None:
    """Each named at its right end, in its colour, names pushed apart. The limits of y are set before."""
    bottom, top = axes.get_ylim()
    for name, (x, middle, low, high) in bands.items():
        axes.plot(x, middle, color=colour(name), linewidth=2, linestyle="--" if name == dashed else "-", marker=marker, markersize=4)
        if np.isfinite(low).any():
            axes.fill_between(x, low.clip(bottom, top), high.clip(bottom, top), color=colour(name), alpha=0.18, linewidth=0)
    gap = 0.065 * (top - bottom)
    ends = sorted((float(np.clip(middle[-1], bottom, top)), name) for name, (_, middle, _, _) in bands.items())
    places: list[float] = []
    for end, _ in ends:
        places.append(max(end, places[-1] + gap) if places else end)
    excess = max(0.0, places[-1] - top) if places else 0.0
    for i in reversed(range(len(places))):  # back under the top, as far as need be
        ceiling = places[i + 1] - gap if i + 1 < len(places) else top
        places[i] = min(places[i], ceiling) if excess else places[i]
    for place, (_, name) in zip(places, ends, strict=True):
        axes.annotate(
            name, (1, place), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color=colour(name)
        )


def curve(runs: Sequence[Run], key: str, *, by_tokens: bool = False) -> Band | None:
    """A curve's mean over seeds with its interval, as far as the shortest run goes. x: steps, or sampled policy tokens in millions."""
    smooth, ticks = [], []
    for run in runs:
        values = np.array([np.nan if value is None else value for value in run.curve.get(key, [])], dtype=float)
        known = np.isfinite(values)
        if not known.any():
            continue
        filled = np.interp(np.arange(len(values)), np.flatnonzero(known), values[known])
        half = min(WINDOW, len(filled)) // 2
        smooth.append(np.array([filled[max(0, i - half) : i + half + 1].mean() for i in range(len(filled))]))
        steps, tokens = run.curve.get("step"), run.curve.get("tokens/policy")
        x = np.cumsum([value or 0 for value in tokens]) / 1e6 if by_tokens and tokens else steps
        ticks.append(np.array(x if x is not None and len(x) >= len(values) else range(1, len(values) + 1), dtype=float))
    if not smooth:
        return None
    length = min(map(len, smooth))
    means = [found for i in range(length) if (found := mean(values[i] for values in smooth))]
    return _band(np.mean([tick[:length] for tick in ticks], axis=0), means)


def _band(x: np.ndarray, means: Sequence[Mean]) -> Band:
    low, high = (np.array([getattr(m, end) if m.n >= BANDED else np.nan for m in means]) for end in ("low", "high"))
    return x, np.array([m.mean for m in means]), low, high


def _bands(study: Study, experiment: str, key: str, *, by_tokens: bool = False) -> dict[str, Band]:
    found = {name: curve(cell, key, by_tokens=by_tokens) for name, cell in study.cells.get(experiment, {}).items()}
    return {name: band for name, band in found.items() if band is not None}


def training(study: Study, experiment: str, path: Path) -> bool:
    """Reward on training problems over sampled tokens, alone on hard ones and with agents. False if no run stored it."""
    kinds = {"alone, hard problems": "reward/alone/hard", "with agents": "reward/with_agents"}
    panels = {title: bands for title, key in kinds.items() if (bands := _bands(study, experiment, key, by_tokens=True))}

    def draw(figure: Figure) -> None:
        for axes, (title, bands) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            axes.set(title=f"reward in training, {title}", ylim=(-0.02, 1.02), xlabel="policy tokens sampled, millions")
            lines(axes, bands)

    if panels:
        save(path, draw, height=4.2)
    return bool(panels)


def consults(study: Study, experiment: str, path: Path) -> bool:
    """Consults per trace with agents over the steps, a panel per agent. False if no run stored it."""
    agents = dict.fromkeys(key for run in study.runs(experiment) for key in run.curve if key.startswith("consults/"))
    panels = {key.partition("/")[2]: bands for key in agents if (bands := _bands(study, experiment, key))}

    def draw(figure: Figure) -> None:
        for axes, (agent, bands) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            top = max(float(np.nanmax(middle)) for _, middle, _, _ in bands.values())
            axes.set(title=f"consults of {agent} per trace", ylim=(0, max(1.1 * top, 0.1)), xlabel="step")
            lines(axes, bands)

    if panels:
        save(path, draw, height=4.2)
    return bool(panels)


def ratios(study: Study, experiment: str, path: Path) -> bool:
    """Left: the histogram of the agent tokens' raw ratio over training. Right: the share below 0.1. False if no run stored it."""
    runs = study.cell(experiment, "aipo")
    shares = [band for edge in BINS if (band := curve(runs, f"agent_ratio_below/{edge}")) is not None]
    below = _bands(study, experiment, "agent_ratio_below/0.1")
    if len(shares) < len(BINS) or not below:
        return False

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        length = min(len(share[0]) for share in shares)
        steps, edges = shares[0][0][:length], [np.zeros(length), *(np.clip(s[1][:length], 0, 1) for s in shares), np.ones(length)]
        names = [f"ρ < {BINS[0]}", *(f"{low} – {high}" for low, high in pairwise(BINS)), f"ρ ≥ {BINS[-1]}"]
        shades = matplotlib.colormaps["cividis"](np.linspace(0.05, 0.95, len(names)))
        for (bottom, top), shade in zip(pairwise(edges), shades, strict=True):
            left.fill_between(steps, bottom, np.maximum(top, bottom), color=shade, linewidth=0)
        left.set(title="aipo: agent tokens by ratio ρ = π/μ", ylim=(0, 1), xlim=(steps[0], steps[-1]), xlabel="step", ylabel="share")
        places = np.linspace(0.08, 0.92, len(names))
        for place, name, shade in zip(places, names, shades, strict=True):
            for text, shift, shown in (("■", 4, shade), (name, 16, "0.15")):
                left.annotate(text, (1, place), (shift, 0), xycoords="axes fraction", textcoords="offset points", va="center", color=shown)
        right.set(title="share of agent tokens with ρ < 0.1", ylim=(-0.02, 1.02), xlabel="step")
        lines(right, below)

    save(path, draw, height=4.2)
    return True


def pass_at_k(study: Study, experiment: str, path: Path) -> bool:
    """pass@k alone over k, for every variant with at least two k. False if there is none."""
    bands: dict[str, Band] = {}
    for name in study.cells.get(experiment, {}):
        found = {k: m for k in study.ks(experiment) if (m := study.mean(experiment, name, f"alone pass@{k}"))}
        if len(found) > 1:
            bands[name] = _band(np.array(list(found), dtype=float), list(found.values()))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set(title="pass@k alone, held-out hard problems", xscale="log", xlabel="k", ylim=(-0.02, 1.02))
        lines(axes, bands, marker="o")
        ticks = sorted({int(k) for x, *_ in bands.values() for k in x})
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()

    if bands:
        save(path, draw, width=7.5, height=4.2)
    return bool(bands)


LINES: Mapping[str, Callable[[Study, str, Path], bool]] = {
    "pass_at_k": pass_at_k,
    "training": training,
    "consults": consults,
    "ratios": ratios,
}
