"""Show a graph: `python -m aipo_graph.draw [GRAPH] [--png FILE] [--svg FILE]` prints it as Mermaid and draws it where asked."""

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.runnables.graph import Edge
from langchain_core.runnables.graph import Graph as Drawing
from langgraph.graph import END, START
from langgraph.prebuilt import ToolNode
from pydantic_settings import CliPositionalArg

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError
from aipo_graph.rollout.collect import open_graph

COLOURS, LINE = {"policy": "#0b6e99", "agent": "#d9730d", "tool": "#7446b0", "end": "#5f6b73"}, "#3c4449"
COLUMN, ROW, HALF, TALL, PORT, LOOP, MARGIN = 3.2, 1.05, 0.85, 0.34, 0.22, 0.75, 0.15
"""Between the middles of columns and of rows; half a box's width and height; between edges at its side; height of a loop; white rim."""
PIXELS = 64
"""Of a page per unit of length."""


class Draw(Config):
    """A graph as Mermaid on the standard output, and as a picture where asked. The agents' names are those of agents.use."""

    graph: CliPositionalArg[str] = ""
    """path.py:function, or package.module:function; default: rollout.graph."""
    png: str = ""
    """Write a picture to this file."""
    svg: str = ""
    """Write a picture to this file."""


@dataclass(frozen=True)
class Box:
    """One node of the picture: its column, the middle and half the height of its box, and where edges meet its sides."""

    column: int
    y: float
    half: float
    ports: Mapping[tuple[str, str, str], float]
    """(side, source, target) -> y. Edges meet a side in the order of their other ends, so that they do not cross there."""

    @property
    def x(self) -> float:
        return self.column * COLUMN


def boxes(drawing: Drawing) -> dict[str, Box]:
    """Columns by distance from the start, so that no edge skips one going right; `__end__` at the foot of its column."""
    after: dict[str, list[str]] = {name: [] for name in drawing.nodes}
    for edge in drawing.edges:
        after[edge.source].append(edge.target)
    distance, queue = {START: 0}, deque([START])
    while queue:
        name = queue.popleft()
        fresh = [target for target in after[name] if target not in distance]
        distance |= dict.fromkeys(fresh, distance[name] + 1)
        queue.extend(fresh)
    columns: dict[int, list[str]] = {}
    for name in sorted(drawing.nodes, key=lambda name: name == END):
        columns.setdefault(distance.get(name, max(distance.values()) + 1), []).append(name)
    y = {name: (max(len(set(names) - {END}) - 1, 0) / 2 - row) * ROW for names in columns.values() for row, name in enumerate(names)}
    return {name: _box(name, column, y, distance, drawing.edges) for column, names in columns.items() for name in names}


def _box(name: str, column: int, y: Mapping[str, float], distance: Mapping[str, int], edges: Sequence[Edge]) -> Box:
    sides: dict[str, list[tuple[float, bool, Edge]]] = {"left": [], "right": []}
    for edge in edges:
        other = edge.target if edge.source == name else edge.source
        step = distance.get(other, column) - column
        if name in (edge.source, edge.target) and step in (-1, 1):
            goes_left = distance[edge.target] < distance[edge.source]
            sides["left" if step < 0 else "right"].append((-y[other], goes_left, edge))
    ports = {}
    for side, ends in sides.items():
        for place, (_, _, edge) in enumerate(sorted(ends, key=lambda end: end[:2])):
            ports[side, edge.source, edge.target] = y[name] + ((len(ends) - 1) / 2 - place) * PORT
    return Box(column, y[name], max(TALL, PORT * max(map(len, sides.values())) / 2), ports)


def layout(drawing: Drawing, agents: frozenset[str]) -> dict[str, Any]:
    """The picture as numbers, for a page or a file: boxes by their middles, edges as cubic curves of four points, y downwards."""
    at = boxes(drawing)
    right, top, bottom = _limits(drawing, at)

    def place(x: float, y: float) -> list[float]:
        return [round((x + HALF + MARGIN) * PIXELS, 1), round((top - y) * PIXELS, 1)]

    nodes = []
    for name, box in at.items():
        x, y = place(box.x, box.y)
        size = {"width": round(2 * _half_width(name) * PIXELS, 1), "height": round(2 * box.half * PIXELS, 1)}
        label = name.strip("_") if name in (START, END) else name
        nodes.append({"name": name, "label": label, "role": _role(drawing, name, agents), "x": x, "y": y, **size})
    edges = [
        {"source": edge.source, "target": edge.target, "conditional": edge.conditional, "points": [place(*p) for p in _points(edge, at)]}
        for edge in {(edge.source, edge.target): edge for edge in drawing.edges}.values()
    ]
    width, height = place(right, bottom)
    return {"width": width, "height": height, "nodes": nodes, "edges": edges}


def _role(drawing: Drawing, name: str, agents: frozenset[str]) -> str:
    data = drawing.nodes[name].data
    tools = frozenset(data.tools_by_name) if isinstance(data, ToolNode) else frozenset()
    return "end" if name in (START, END) else "agent" if agents & {name, *tools} else "tool" if tools else "policy"


def _limits(drawing: Drawing, at: Mapping[str, Box]) -> tuple[float, float, float]:
    """Right, top and bottom of the picture; the left is at -HALF - MARGIN."""
    right = max(box.x for box in at.values()) + HALF + MARGIN
    top = max(box.y + box.half + (LOOP if any(_loops(edge, name) for edge in drawing.edges) else 0) for name, box in at.items()) + MARGIN
    sweep = any(at[e.target].column < at[e.source].column - 1 for e in drawing.edges)
    return right, top, min(box.y - box.half for box in at.values()) - MARGIN - (0.8 * ROW if sweep else 0)


def _loops(edge: Edge, name: str) -> bool:
    return edge.source == edge.target == name


def _half_width(name: str) -> float:
    return HALF * 0.6 if name in (START, END) else HALF


def _points(edge: Edge, at: Mapping[str, Box]) -> list[tuple[float, float]]:
    """A cubic curve from side to side; over the top for a loop, up or down within a column, below for a long way back."""
    one, two = at[edge.source], at[edge.target]
    step = two.column - one.column
    if abs(step) == 1:
        x0, x1 = one.x + step * _half_width(edge.source), two.x - step * _half_width(edge.target)
        y0 = one.ports["right" if step > 0 else "left", edge.source, edge.target]
        y1 = two.ports["left" if step > 0 else "right", edge.source, edge.target]
        return [(x0, y0), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), (x1, y1)]
    if edge.source == edge.target:
        top = one.y + one.half
        return [(one.x - 0.35, top), (one.x - 0.6, top + LOOP), (one.x + 0.6, top + LOOP), (one.x + 0.35, top)]
    if step == 0:
        up = 1 if two.y > one.y else -1
        x, y0, y1 = one.x - 0.2 * up, one.y + up * one.half, two.y - up * two.half
        return [(x, y0), (x, y0), (x, y0), (x, y1)]
    low = min(box.y - box.half for box in at.values()) - ROW
    return [(one.x, one.y - one.half), (one.x, low), (two.x, low), (two.x, two.y - two.half)]


def save(drawing: Drawing, agents: frozenset[str], path: Path) -> None:
    """Draws the layout in the format of the path's suffix; the same graph gives the same bytes. Raises ConfigError.

    Solid edges always follow, dashed ones are the router's choice.
    """
    from matplotlib import patches, rc_context  # takes a second, which every other command is spared
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Curve

    picture = layout(drawing, agents)
    drawn = Figure(figsize=(picture["width"] / PIXELS * 0.85, picture["height"] / PIXELS * 0.85), dpi=200)
    axes = drawn.add_axes((0, 0, 1, 1), xlim=(0, picture["width"]), ylim=(picture["height"], 0))
    axes.set_axis_off()
    for edge in picture["edges"]:
        points = edge["points"]
        dashes: Any = (0, (4, 2.5)) if edge["conditional"] else "solid"
        curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
        axes.add_patch(patches.PathPatch(curve, fill=False, edgecolor=LINE, linewidth=1.3, linestyle=dashes, zorder=1))
        # A head of its own: one that belongs to a dashed line has a dashed outline.
        (x, y), (control_x, control_y) = points[3], points[2]
        before = (x + 0.1 * (control_x - x), y + 0.1 * (control_y - y))
        head = patches.FancyArrowPatch(before, points[3], arrowstyle="-|>", mutation_scale=14, color=LINE, linewidth=0, shrinkB=0, zorder=3)
        axes.add_patch(head)
    for node in picture["nodes"]:
        x, y, width, height, label = (node[key] for key in ("x", "y", "width", "height", "label"))
        shape, colour = f"round,pad=0,rounding_size={0.18 * PIXELS}", COLOURS[node["role"]]
        corner = (x - width / 2, y - height / 2)
        axes.add_patch(patches.FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=colour, edgecolor="none", zorder=2))
        axes.text(x, y, label, color="white", ha="center", va="center", fontsize=min(13.0, 150 / max(len(label), 1)), zorder=3)
    try:
        with rc_context({"svg.hashsalt": "aipo_graph"}):
            drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {error}; name a file in a folder that exists") from error


def command(argv: list[str]) -> None:
    settings, _ = cli.parse(argv, Draw, prog="python -m aipo_graph.draw")
    pictures = [(name, suffix) for name, suffix in ((settings.png, ".png"), (settings.svg, ".svg")) if name]
    for name, suffix in pictures:
        if Path(name).suffix != suffix:
            raise ConfigError(f"--{suffix[1:]} {name}: the file's name must end in {suffix}")
    drawing = open_graph(settings.graph or settings.rollout.graph).get_graph()
    print(drawing.draw_mermaid(), end="")
    for name, _ in pictures:
        save(drawing, frozenset(settings.agents.use), Path(name))


if __name__ == "__main__":
    sys.exit(cli.main(command))
