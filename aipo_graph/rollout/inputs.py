"""What a graph is given of a problem, what of its last state is scored, and how traces stay apart.

Nothing that a graph keeps (checkpoints, a store, a cache) reaches from one trace into another.
"""

import gc
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any, get_type_hints

from langchain_core.messages import HumanMessage
from langgraph.pregel import Pregel
from langgraph.store.base import BaseStore, Op, Result
from langgraph.store.memory import InMemoryStore

from aipo_graph.errors import ConfigError, GraphError
from aipo_graph.load import nearest
from aipo_graph.rollout.graph import Graph
from aipo_graph.rollout.tools import text
from aipo_graph.tasks.grading import leaks
from aipo_graph.types import FIELDS, Problem

SECRET = re.compile(r"answer|solution|gold|truth|target|label|reference|rationale|explanation|proof|test|output|reward", re.IGNORECASE)
"""Names under which a task may keep what gives an answer away."""


def in_messages(graph: Graph) -> bool:
    """Whether a graph is one of chat models: no `segments` in its state, which nodes of ours append to."""
    return "segments" not in graph.channels


@dataclass(frozen=True, slots=True)
class Inputs:
    """`rollout.inputs` of one graph."""

    fields: Mapping[str, Mapping[str, str]]
    """Name -> field of the problem, by where the name is: in the state, the context or the configurable values."""

    @classmethod
    def open(cls, inputs: Mapping[str, str], graph: Graph, path: str, *, partly: bool = False) -> "Inputs":
        """Raises ConfigError for a name that the graph does not have, unless it may have them ``partly``, and for a graph that would get
        nothing of a problem.
        """
        keys = list(graph.builder.schemas[graph.builder.input_schema])
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
        return cls(places)

    def of(self, problem: Problem) -> list[dict[str, Any]]:
        """State, context and configurable values of a problem, copies that a graph may change. Raises ConfigError for a field it lacks."""
        return [{name: _value(problem, field) for name, field in names.items()} for names in self.fields.values()]

    def warnings(self, problem: Problem) -> list[str]:
        """A line for each field that, by its name or in this problem, gives the answer away."""
        return [
            f"rollout.inputs.{'' if place == 'state' else f'{place}.'}{name} = {field!r} may give the answer away: "
            "the graph, its tools and a tracer see it"
            for place, names in self.fields.items()
            for name, field in names.items()
            if field == "answer" or (field not in FIELDS and gives_away(problem, field, problem.meta.get(field)))
        ]


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


def _fault(graph: Graph, keys: list[str], place: str, name: str) -> str:
    """Why a name is none of the graph's; "" if it is."""
    if place == "state" and (name not in keys or (not in_messages(graph) and name in ("problem", "segments"))):
        return f"its input has no {name!r}{nearest(name, keys)}"
    if place == "context" and not in_messages(graph):
        return "the run context of a graph of segments is ours; give it to the state, or as configurable"
    if place == "context" and graph.context_schema is not None and name not in (known := get_type_hints(graph.context_schema)):
        return f"its context_schema has no {name!r}{nearest(name, known)}"
    return ""


def unsolved(problem: Problem) -> Problem:
    """What a graph sees of a problem: neither its gold answer nor what of ``meta`` says it or, by its name, may."""

    kept = {key: value for key, value in problem.meta.items() if problem.answer and not gives_away(problem, str(key), value)}
    return replace(problem, answer="", meta=kept)


def gives_away(problem: Problem, key: str, value: object) -> bool:
    """Whether a field of ``meta`` says the answer or, by its name, may."""
    text, answer = str(value), problem.answer
    return bool(SECRET.search(key)) or (bool(answer) and (answer.casefold() in text.casefold() or leaks(text, answer, "")))


# --- traces apart

STORES: ContextVar[dict["TraceStore", InMemoryStore] | None] = ContextVar("stores", default=None)
LIBRARIES = sys.stdlib_module_names | {"langgraph", "langchain_core", "langchain", "langsmith", "pydantic", "aipo_graph"}
"""Whose functions' globals are not searched: they hold nothing of a graph."""
LONGEST = 10_000
"""Items of a collection past which it is taken for data, not for a part of a graph."""


class TraceStore(BaseStore):
    """Stands in for a graph's store: within a trace a copy of its own, as the store was when the graph was opened; outside, the store."""

    def __init__(self, store: InMemoryStore) -> None:
        self._store = store
        self._opened = _copy(store)

    def _own(self) -> InMemoryStore:
        stores = STORES.get()
        if stores is None:
            return self._store
        if self not in stores:
            stores[self] = _copy(self._opened)
        return stores[self]

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        return self._own().batch(ops)

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        return await self._own().abatch(ops)


@contextmanager
def within(variable: ContextVar[Any], value: object) -> Iterator[None]:
    """Within, the variable has the value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def apart(graph: Graph, path: str) -> Graph:
    """The graph without checkpointer and cache, and with a store per trace; likewise every graph that its nodes and tools reach.

    Raises GraphError for a store that cannot be copied for each trace, or that a node uses past LangGraph's runtime.
    """
    graph = graph.copy({"checkpointer": False, "cache": None, "store": graph.store and _per_trace(graph.store, path)})
    for found in _reachable(graph):
        if isinstance(found, Pregel) and found is not graph:
            found.cache = None
            found.checkpointer = found.checkpointer if isinstance(found.checkpointer, bool) else None
            found.store = found.store and _per_trace(found.store, path)
        elif isinstance(found, BaseStore) and not isinstance(found, TraceStore):
            raise GraphError(
                f"{path}: a node or tool uses a {type(found).__name__} by its name, so that traces would read each other's notes; "
                "compile the graph with it and take it from runtime.store, which is each trace's own"
            )
    return graph


def _per_trace(store: BaseStore, path: str) -> TraceStore:
    if isinstance(store, TraceStore):
        return store
    try:
        if isinstance(store, InMemoryStore):
            return _stand_in(store)
        reason = "it is no InMemoryStore"
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = str(error)
    raise GraphError(
        f"{path}: its store, a {type(store).__name__}, cannot be copied for each trace ({reason}), so that traces would read each other's "
        "notes; compile the graph that is trained with an InMemoryStore, or without"
    )


_stand_in = cache(TraceStore)  # the same for the same store, so that a graph and its sub-graphs share one within a trace


def _copy(store: InMemoryStore) -> InMemoryStore:
    shared = (store.embeddings, (store.index_config or {}).get("embed"))  # clients of models, which keep nothing of a trace
    return deepcopy(store, {id(kept): kept for kept in shared})


def _reachable(graph: Graph) -> Iterator[Any]:
    """The objects that a graph's nodes and tools hold or name: in attributes, closures, defaults, and the globals of functions."""
    seen: dict[int, Any] = {}
    left: list[Any] = [graph]
    while left:
        found = left.pop()
        if id(found) in seen or isinstance(found, (type, ModuleType, CodeType, str, bytes)):
            continue
        seen[id(found)] = found  # kept, so that no other object gets its id
        yield found
        if isinstance(found, FunctionType):
            left += _held(found)
        elif not isinstance(found, BaseStore) and not (isinstance(found, (dict, list, tuple, set)) and len(found) > LONGEST):
            left += filter(gc.is_tracked, gc.get_referents(found))  # numbers, texts and what holds nothing else reach no store


def _held(function: FunctionType) -> list[Any]:
    held = [*(function.__closure__ or ()), function.__defaults__, function.__kwdefaults__, function.__dict__]
    if (function.__module__ or "").partition(".")[0] in LIBRARIES:
        return held
    return held + [function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__]


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
