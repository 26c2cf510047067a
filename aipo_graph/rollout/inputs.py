"""What a graph is given of a problem, and what of its last state is scored."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, get_type_hints

from langchain_core.messages import HumanMessage

from aipo_graph.errors import ConfigError
from aipo_graph.load import nearest
from aipo_graph.rollout.apart import gives_away, unsolved
from aipo_graph.rollout.graph import Graph
from aipo_graph.rollout.tools import text
from aipo_graph.types import FIELDS, Problem


def in_messages(graph: Graph) -> bool:
    """Whether a graph is one of chat models: no `segments` in its state, which nodes of ours append to."""
    return "segments" not in graph.channels


@dataclass(frozen=True, slots=True)
class Inputs:
    """`rollout.inputs` of one graph: name -> field of the problem, by where the name is."""

    state: Mapping[str, str]
    context: Mapping[str, str]
    configurable: Mapping[str, str]

    @classmethod
    def open(cls, inputs: Mapping[str, str], graph: Graph, path: str, *, partly: bool = False) -> "Inputs":
        """Raises ConfigError for a name that the graph does not have, unless it may have them ``partly``, and for a graph that would get
        nothing of a problem.
        """
        keys = _input_keys(graph)
        places: dict[str, dict[str, str]] = {"state": {}, "context": {}, "configurable": {}}
        for target, field in inputs.items():
            place, dot, name = target.partition(".")
            place, name = (place, name) if dot and place in places else ("state", target)
            fault = _fault(graph, keys, place, name)
            if fault and not partly:
                raise ConfigError(f"rollout.inputs.{target}: {path}: {fault}")
            if not fault:
                places[place][name] = field
        if in_messages(graph) and "messages" not in keys and not places["state"]:
            raise ConfigError(
                f"{path}: its state has neither `messages` nor `segments`; say which of its keys the question goes into "
                f"({', '.join(keys)}): rollout.inputs: {{{keys[0] if keys else 'KEY'}: question}}"
            )
        if in_messages(graph) and "messages" in keys:
            places["state"] = {"messages": "", **places["state"]}
        return cls(**places)

    def of(self, problem: Problem) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """State, context and configurable values of a problem, copies that a graph may change. Raises ConfigError for a field it lacks."""
        given = ({name: _value(problem, field) for name, field in each.items()} for each in (self.state, self.context, self.configurable))
        state, context, configurable = given
        return state, context, configurable

    def warnings(self, problem: Problem) -> list[str]:
        """A line for each field that, by its name or in this problem, gives the answer away."""
        every = [*self.state.items(), *((f"context.{k}", v) for k, v in self.context.items())]
        every += [(f"configurable.{name}", field) for name, field in self.configurable.items()]
        return [
            f"rollout.inputs.{name} = {field!r} may give the answer away: the graph, its tools and a tracer see it"
            for name, field in every
            if field == "answer" or (field not in FIELDS and gives_away(problem, field, problem.meta.get(field)))
        ]


def start(problem: Problem) -> dict[str, Any]:
    """What a graph of segments starts from."""
    return {"problem": unsolved(problem), "segments": ()}


def said(state: Mapping[str, Any], key: str) -> str | None:
    """A key of the last state as text: of a list of messages the last one's, JSON of what is not text; None where there is none."""
    value = state.get(key)
    if key == "messages" and isinstance(value, list):
        value = value[-1] if value else None
    return None if value is None else text(value)


def _value(problem: Problem, field: str) -> Any:
    if not field:
        return [HumanMessage(problem.question)]
    if field in FIELDS:
        return getattr(problem, field)
    if field not in problem.meta:
        raise ConfigError(f"rollout.inputs: problem {problem.id!r} has no field {field!r}{nearest(field, (*FIELDS, *problem.meta))}")
    return deepcopy(problem.meta[field])


def _input_keys(graph: Graph) -> list[str]:
    builder = getattr(graph, "builder", None)
    return list(builder.schemas[builder.input_schema]) if builder is not None else [key for key in graph.channels if key.isidentifier()]


def _fault(graph: Graph, keys: list[str], place: str, name: str) -> str:
    """Why a name is none of the graph's; "" if it is."""
    if place == "state" and (name not in keys or (not in_messages(graph) and name in ("problem", "segments"))):
        return f"its input has no {name!r}{nearest(name, keys)}"
    if place == "context" and not in_messages(graph):
        return "the run context of a graph of segments is ours; give it to the state, or as configurable"
    schema = getattr(graph, "context_schema", None)
    if place == "context" and schema is not None and name not in (known := get_type_hints(schema)):
        return f"its context_schema has no {name!r}{nearest(name, known)}"
    return ""
