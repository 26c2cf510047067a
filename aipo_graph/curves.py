"""curves.png of a run: reward, consults, agent tokens, entropy and further scores over the steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLOURS = ("#0b6e99", "#d9730d", "#6b8e23", "#9b59b6", "#c0392b", "#7f8c8d")
WINDOW = 9
"""Steps of the running mean that is drawn over the raw values."""


def draw(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Four panels, or five, from the rows of metrics.jsonl, written whole or not at all. Raises OSError."""
    keys = dict.fromkeys(key for row in rows for key in row)
    scores = [(key.partition("/")[2], key) for key in keys if key.startswith("score/")]
    figure = Figure(figsize=(11, 10.5 if scores else 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    axes: Any = figure.subplots(3 if scores else 2, 2)
    agents = [key.partition("/")[2] for key in keys if key.startswith("consults/")]
    _panel(axes[0, 0], rows, "Reward", [("alone", "reward/alone"), ("with agents", "reward/with_agents")])
    _panel(axes[0, 1], rows, "Consults per trace with agents", [(agent, f"consults/{agent}") for agent in agents])
    _panel(axes[1, 0], rows, "Agent tokens at the floor of the coefficient", [(agent, f"floor_hit/{agent}") for agent in agents])
    _panel(axes[1, 1], rows, "Entropy of policy tokens (nats)", [("entropy", "entropy")])
    if scores:
        _panel(axes[2, 0], rows, "Further scores", scores)
        axes[2, 1].set_axis_off()
    low, high = axes[0, 0].get_ylim() if axes[0, 0].lines else (0, 1)
    axes[0, 0].set_ylim(min(low, -0.02), max(high, 1.02))
    axes[1, 0].set_ylim(-0.02, 1.02)
    axes[1, 0].yaxis.set_major_formatter(PercentFormatter(1))
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], title: str, curves: Sequence[tuple[str, str]]) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for i, (label, key) in enumerate(curves):
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(values), color=colour, linewidth=2, label=label, marker="o" if len(steps) == 1 else None)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred, over fewer values at the ends.

    >>> _running_mean([0.0, 0.0, 3.0])
    [1.0, 1.0, 1.0]
    """
    half = WINDOW // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
