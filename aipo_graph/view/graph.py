"""The picture of a graph as numbers: the trainer's graph.json, or one row made of the recorded paths."""

from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from aipo_graph.errors import ConfigError

START, END = "__start__", "__end__"
WIDE, TALL, GAP, MARGIN, APART, LIFT = 110, 44, 70, 10, 7, 34
"""A box's width and height; between boxes; the rim; from an edge to its way back; an edge that passes over boxes, per box."""


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class _Node(_Form):
    name: str
    label: str
    role: Literal["policy", "agent", "tool", "end"]
    x: float
    y: float
    width: PositiveFloat
    height: PositiveFloat


class _Edge(_Form):
    source: str
    target: str
    conditional: bool
    points: Annotated[tuple[tuple[float, float], ...], Field(min_length=4, max_length=4)]


class _Graph(_Form):
    width: PositiveFloat
    height: PositiveFloat
    nodes: tuple[_Node, ...]
    edges: tuple[_Edge, ...]


def read_graph(text: bytes) -> dict[str, Any]:
    """What graph.json says. Raises ConfigError where it is damaged."""
    try:
        return _Graph.model_validate_json(text).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc'])) or 'graph'}: {first['msg']}") from error


def graph_of_paths(names: Iterable[str], moves: Iterable[tuple[str, str]], agents: Collection[str]) -> dict[str, Any]:
    """Nodes side by side in the given order, between start and end; an edge for each move that a trace made."""
    order = [START, *names, END]
    place = {name: i for i, name in enumerate(order)}
    edges = [(one, two) for one, two in moves if one in place and two in place]
    lift = max((LIFT * _over(place[one], place[two]) for one, two in edges), default=0)
    middle = MARGIN + lift + TALL / 2
    nodes = [
        {
            "name": name,
            "label": name.strip("_") if name in (START, END) else name,
            "role": "end" if name in (START, END) else "agent" if name in agents else "policy",
            "x": MARGIN + WIDE / 2 + i * (WIDE + GAP),
            "y": middle,
            "width": WIDE,
            "height": TALL,
        }
        for name, i in place.items()
    ]
    drawn = [{"source": a, "target": b, "conditional": True, "points": _points(place[a], place[b], middle)} for a, b in edges]
    return {"width": 2 * MARGIN + len(order) * (WIDE + GAP) - GAP, "height": 2 * middle, "nodes": nodes, "edges": drawn}


def _over(source: int, target: int) -> int:
    """How high an edge goes, in lifts: not at all between neighbours."""
    step = abs(target - source)
    return 0 if step == 1 else max(step, 1)


def _points(source: int, target: int, middle: float) -> list[list[float]]:
    """A cubic curve: straight to the next box, over the boxes for a longer way, under them for one back."""
    one, two = (MARGIN + WIDE / 2 + i * (WIDE + GAP) for i in (source, target))
    step = target - source
    if abs(step) == 1:
        y = middle - step * APART
        x0, x1 = one + step * WIDE / 2, two - step * WIDE / 2
        return [[x0, y], [x0, y], [x1, y], [x1, y]]
    side = -1 if step >= 0 else 1
    near, far = middle + side * TALL / 2, middle + side * (TALL / 2 + LIFT * _over(source, target))
    lean = WIDE / 4 if step == 0 else 0
    return [[one - lean, near], [one - 2 * lean, far], [two + 2 * lean, far], [two + lean, near]]
