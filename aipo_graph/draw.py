"""Show a graph: `python -m aipo_graph.draw [GRAPH]` prints it as Mermaid."""

import sys
from typing import Any

from langchain_core.runnables.graph import Graph as Drawing
from langgraph.graph import END, START
from langgraph.prebuilt import ToolNode
from pydantic_settings import CliPositionalArg

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.rollout.collect import open_graph
from aipo_graph.view.read import layout


class Draw(Config):
    """A graph as Mermaid on the standard output, which GitHub, MkDocs and https://mermaid.live draw."""

    graph: CliPositionalArg[str] = ""
    """path.py:function, or package.module:function; default: rollout.graph."""


def picture(drawing: Drawing, agents: frozenset[str]) -> dict[str, Any]:
    """Lays a graph out for the pages; nodes of these names, or with such tools, are agents."""
    roles = {}
    for name, node in drawing.nodes.items():
        tools = frozenset(node.data.tools_by_name) if isinstance(node.data, ToolNode) else frozenset()
        roles[name] = "end" if name in (START, END) else "agent" if agents & {name, *tools} else "tool" if tools else "policy"
    return layout(roles, {(edge.source, edge.target): edge.conditional for edge in drawing.edges})


def command(argv: list[str]) -> None:
    settings, _ = cli.parse(argv, Draw, prog="python -m aipo_graph.draw")
    print(open_graph(settings.graph or settings.rollout.graph).get_graph().draw_mermaid(), end="")


if __name__ == "__main__":
    sys.exit(cli.main(command))
