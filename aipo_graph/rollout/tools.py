"""Tools of agents: functions and LangChain tools, how a model is shown them, and what they return as text."""

import functools
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.tools import BaseTool, StructuredTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, create_model
from pydantic.errors import PydanticUserError

from aipo_graph import loops
from aipo_graph.errors import ConfigError, first_line

Tool = Callable[..., Any] | BaseTool
"""A function, async or plain (which runs in a thread), an object that can be called, or a LangChain tool. What it returns becomes text.

Without a model it is given the query. A model is shown its name, its docstring and its parameters, which must have types.
Raises ToolError with a text for who called it.
"""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What providers take as a tool's name."""
TAKEN = frozenset({"config", "run_manager", "callbacks"})
"""Parameters that LangChain fills in itself."""


def shown(agent: str, tool: Tool) -> BaseTool:
    """The tool as a model of ``agent`` is shown it. Raises ConfigError where its name or a parameter's type cannot be."""
    try:
        made = tool if isinstance(tool, BaseTool) else _structured(tool)
        if not NAME.fullmatch(made.name):
            raise ValueError(f"{made.name!r} is no name that providers take; write a function whose name has letters, digits and _ alone")
        schema = _schema(made)
        if hidden := sorted(set(made.get_input_jsonschema().get("required", ())) - set(schema["properties"])):
            raise ValueError(f"its parameter {hidden[0]!r} is one that a graph injects; take it out")
        json.dumps(schema)
    except (TypeError, ValueError, NameError, PydanticUserError) as error:
        raise ConfigError(f"agent {agent!r}: its tool {_name(tool)} cannot be shown to a model: {first_line(error)}") from error
    return made


def check_alone(agent: str, tool: Tool) -> None:
    """Raises ConfigError for a tool that the query alone does not satisfy."""
    try:
        fits = isinstance(tool, BaseTool) or inspect.signature(tool).bind("") is not None
        fits = fits and (not isinstance(tool, BaseTool) or len(_schema(tool).get("required", ())) <= 1 <= len(_schema(tool)["properties"]))
    except (TypeError, ValueError, PydanticUserError):
        fits = False
    if not fits:
        raise ConfigError(
            f"agent {agent!r}: without a model its tool {_name(tool)} is given the query and nothing else, which is not what it takes; "
            f"write one of a single argument, or name a model in agents.models.{agent}"
        )


async def answer(tool: Tool, query: str) -> str:
    """What a tool makes of the query, without a model that could fill in more."""
    if not isinstance(tool, BaseTool):
        return text(await loops.call(tool, query, named={}, late=[]))
    schema = _schema(tool)
    return text(await tool.ainvoke({next(iter((*schema.get("required", ()), *schema["properties"]))): query}))


def text(result: Any) -> str:
    """What a tool returned, as text: JSON where it is a list, a dict, a model of pydantic's, a truth value or nothing."""
    if isinstance(result, BaseMessage):
        return str(result.text)
    if isinstance(result, BaseModel):
        return result.model_dump_json()
    return json.dumps(result, ensure_ascii=False, default=str) if isinstance(result, (dict, list, tuple, bool, type(None))) else str(result)


def _structured(function: Callable[..., Any]) -> StructuredTool:
    """A function as LangChain's tool. Raises ValueError, or what reading its signature raises."""
    if isinstance(function, type) or not callable(function):
        raise ValueError("it is no function; write one, or give an instance")
    signature = inspect.signature(function, eval_str=True)
    fields: Any = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in _open(function, signature)}
    inner = loops.inner(function)
    about = inner.__doc__ if inspect.isroutine(inner) else type(inner).__call__.__doc__ or type(inner).__doc__
    name = getattr(inner, "__name__", type(inner).__name__)

    async def call(**arguments: Any) -> Any:
        bound = signature.bind_partial()
        bound.arguments.update(arguments)
        return await loops.call(function, *bound.args, named=bound.kwargs, late=[])

    schema = create_model(name, __config__=ConfigDict(arbitrary_types_allowed=True), **fields)
    return StructuredTool(name=name, description=inspect.cleandoc(about or ""), args_schema=schema, coroutine=call)


def _open(function: Callable[..., Any], signature: inspect.Signature) -> list[inspect.Parameter]:
    """The parameters that a caller may fill in: not what a partial has filled in already. Raises ValueError for one that has no type."""
    filled = function.keywords if isinstance(function, functools.partial) else {}
    parameters = [p for p in signature.parameters.values() if p.name not in filled]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if parameters and not named:
        raise ValueError(f"its parameters are {signature}, which name nothing to fill in; write them out")
    for parameter in named:
        if parameter.annotation is parameter.empty:
            raise ValueError(f"its parameter {parameter.name!r} has no type; write {parameter.name}: str")
        if parameter.name in TAKEN:
            raise ValueError(f"its parameter {parameter.name!r} has a name that LangChain keeps for itself; call it otherwise")
    return named


def _schema(tool: BaseTool) -> dict[str, Any]:
    """JSON schema of the arguments. Raises ValueError for types that have none."""
    try:
        found: dict[str, Any] = convert_to_openai_tool(tool)["function"]["parameters"]
    except PydanticUserError as error:
        raise ValueError(f"a parameter has a type that JSON does not know ({first_line(error)}); take it out") from error
    return {"properties": {}} | found


def _name(tool: Tool) -> str:
    return repr(tool.name if isinstance(tool, BaseTool) else getattr(loops.inner(tool), "__name__", type(tool).__name__))
