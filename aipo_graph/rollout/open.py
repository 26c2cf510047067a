"""The graphs and agents that a config names by path."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace

from langchain_core.language_models import BaseChatModel
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph

from aipo_graph.config import Config
from aipo_graph.errors import ConfigError
from aipo_graph.load import call, load
from aipo_graph.rollout.agents import Agent
from aipo_graph.rollout.apart import apart
from aipo_graph.rollout.graph import Graph
from aipo_graph.rollout.protocol import FEEDBACK
from aipo_graph.rollout.tools import check_alone


def open_graph(path: str) -> Graph:
    """The compiled graph behind a path: a graph, or a function without arguments that returns one. Raises ConfigError.

    Nothing that it keeps outlives a trace: see :func:`apart`, which raises GraphError.
    """
    found = load(path)
    graph = call(path, found) if callable(found) and not isinstance(found, (StateGraph, CompiledStateGraph)) else found
    if isinstance(graph, StateGraph):
        graph = graph.compile()
    if not isinstance(graph, CompiledStateGraph):
        raise ConfigError(f"{path}: a {type(graph).__name__} is not a LangGraph graph; name a StateGraph or a function that returns one")
    return apart(graph, path)


def without_tracers() -> None:
    """Turns off, for this process and those it starts, the tracers that LangChain's environment variables turn on: what they send is
    questions, token ids and replies. Values are set, not removed, so that a graph's own `load_dotenv()` does not bring them back.
    """
    ours = ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2")
    given = (name for name in os.environ if re.fullmatch(r"LANG(SMITH|CHAIN)_(\w+_)?TRACING(_V2)?", name))
    os.environ.update(dict.fromkeys((*ours, *given), "false"))
    os.environ.pop("LANGCHAIN_HANDLER", None)


def open_agents(paths: Mapping[str, str], config: Config, chats: Mapping[str, BaseChatModel] | None = None) -> dict[str, Agent]:
    """The agents by name, each built by its factory from the config, with its language model where ``chats`` has one.

    An empty path is a model alone. Raises ConfigError.
    """
    return {name: _open_agent(name, path, config, (chats or {}).get(name)) for name, path in paths.items()}


def _open_agent(name: str, path: str, config: Config, chat: BaseChatModel | None) -> Agent:
    if name == FEEDBACK:
        raise ConfigError(f"agents.use.{name}: the tag <{FEEDBACK}> is that of every reply; give the agent another name")
    if not path and chat is None:
        raise ConfigError(f"agents.use.{name} is empty, a model alone, but agents.models names none; add agents.models.{name}")
    found = load(path) if path else Agent(name, model=chat)
    agent = found if isinstance(found, Agent) else call(path, found, config)
    if not isinstance(agent, Agent):
        raise ConfigError(f"agents.use.{name}: {path} returned a {type(agent).__name__}, not an Agent")
    if agent.name != name:
        raise ConfigError(f"agents.use.{name}: {path} is the agent {agent.name!r}; write Agent({name!r}, ...), or agents.use.{agent.name}")
    settings, chat = config.agents, chat or agent.model
    if chat is None:
        check_alone(name, agent.tools[0])
    return replace(
        agent,
        model=chat,
        attempts=settings.attempts,
        timeout=settings.timeout,
        max_tokens=settings.max_tokens * agent.max_turns,
        concurrency=settings.concurrency,
    )
