"""The picture of a graph as numbers, which the pages draw: boxes by their middles, edges as cubic curves of four points."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

START, END = "__start__", "__end__"
COLUMN, ROW, WIDE, SMALL, TALL, PORT, LOOP, MARGIN = 205, 67, 54, 33, 22, 14, 40, 10
"""Between the middles of columns and of rows; half a box's width, that of start and end, and half its height; between edges at its side;
height of a loop; the rim."""
Edge = tuple[str, str]


def layout(roles: Mapping[str, str], edges: Mapping[Edge, bool]) -> dict[str, Any]:
    """Places nodes in columns by their distance from the start, so that no edge skips one going right, `__end__` at the foot of its column.

    Args:
        roles: node -> policy, agent, tool or end.
        edges: (source, target) -> whether a router chose it.
    """
    column = _columns(roles, edges)
    y: dict[str, float] = {}
    for place in sorted(set(column.values())):
        names = sorted((name for name in roles if column[name] == place), key=lambda name: name == END)
        middle = (max(len(set(names) - {END}), 1) - 1) / 2
        y |= {name: (row - middle) * ROW for row, name in enumerate(names)}
    sides: dict[tuple[str, int], list[tuple[float, bool, Edge]]] = defaultdict(list)
    for one, two in edges:
        step = column[two] - column[one]
        if abs(step) == 1:
            sides[one, step].append((y[two], step < 0, (one, two)))
            sides[two, -step].append((y[one], step < 0, (one, two)))
    # Edges meet a side in the order of their other ends, so that they do not cross there.
    ports = {
        (name, edge): y[name] + (place - (len(ends) - 1) / 2) * PORT
        for (name, _), ends in sides.items()
        for place, (_, _, edge) in enumerate(sorted(ends))
    }
    boxes: dict[str, Any] = {
        name: {
            "name": name,
            "label": name.strip("_") if name in (START, END) else name,
            "role": role,
            "x": column[name] * COLUMN,
            "y": y[name],
            "width": 2 * (SMALL if name in (START, END) else WIDE),
            "height": max(2 * TALL, PORT * len(sides[name, -1]), PORT * len(sides[name, 1])),
        }
        for name, role in roles.items()
    }
    floor = max(box["y"] + box["height"] / 2 for box in boxes.values()) + ROW
    curves = {edge: _curve(edge, boxes[edge[0]], boxes[edge[1]], ports, floor) for edge in edges}
    points = [point for curve in curves.values() for point in curve]
    points += [(box["x"] + side * box["width"] / 2, box["y"] + side * box["height"] / 2) for box in boxes.values() for side in (-1, 1)]
    left, top = (min(values) - MARGIN for values in zip(*points, strict=True))
    right, bottom = (max(values) + MARGIN for values in zip(*points, strict=True))
    drawn = [
        {
            "source": one,
            "target": two,
            "conditional": conditional,
            "points": [[round(x - left, 1), round(y - top, 1)] for x, y in curves[one, two]],
        }
        for (one, two), conditional in edges.items()
    ]
    nodes = [box | {"x": round(box["x"] - left, 1), "y": round(box["y"] - top, 1)} for box in boxes.values()]
    return {"width": round(right - left, 1), "height": round(bottom - top, 1), "nodes": nodes, "edges": drawn}


def _columns(names: Mapping[str, Any], edges: Mapping[Edge, bool]) -> dict[str, int]:
    """Each node's distance from the start; one that cannot be reached stands behind all others."""
    after: dict[str, list[str]] = defaultdict(list)
    for one, two in edges:
        after[one].append(two)
    column, reached = {START: 0}, [START]
    for name in reached:  # it grows meanwhile
        for target in after[name]:
            if target not in column:
                column[target] = column[name] + 1
                reached.append(target)
    return dict.fromkeys(names, column[reached[-1]] + 1) | column


def _curve(edge: Edge, one: Any, two: Any, ports: Mapping[tuple[str, Edge], float], floor: float) -> list[tuple[float, float]]:
    """From side to side; over the top for a loop, up or down within a column, below all boxes for a long way back."""
    x0, x1, step = one["x"], two["x"], (two["x"] - one["x"]) // COLUMN
    if abs(step) == 1:
        x0, x1 = x0 + step * one["width"] / 2, x1 - step * two["width"] / 2
        y0, y1 = ports[edge[0], edge], ports[edge[1], edge]
        return [(x0, y0), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), (x1, y1)]
    if one is two:
        y0 = one["y"] - one["height"] / 2
        return [(x0 - 22, y0), (x0 - 38, y0 - LOOP), (x0 + 38, y0 - LOOP), (x0 + 22, y0)]
    if step == 0:
        down = 1 if two["y"] > one["y"] else -1
        x, y0, y1 = x0 + 13 * down, one["y"] + down * one["height"] / 2, two["y"] - down * two["height"] / 2
        return [(x, y0), (x, y0), (x, y0), (x, y1)]
    return [(x0, one["y"] + one["height"] / 2), (x0, floor), (x1, floor), (x1, two["y"] + two["height"] / 2)]
