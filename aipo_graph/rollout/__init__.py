"""What a graph is written with: `from aipo_graph.rollout import State, Context, policy_node, agent_node, append, by_request`."""

import os

# Before langgraph is imported: its default serializer can be made to run code by a crafted checkpoint.
os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")

from aipo_graph.rollout.agents import Agent
from aipo_graph.rollout.chat import PolicyChatModel
from aipo_graph.rollout.graph import Budget, Context, Graph, State, Update, agent_node, append, by_confidence, by_request, policy_node
from aipo_graph.rollout.tokens import parse_request

__all__ = [
    "Agent",
    "Budget",
    "Context",
    "Graph",
    "PolicyChatModel",
    "State",
    "Update",
    "agent_node",
    "append",
    "by_confidence",
    "by_request",
    "parse_request",
    "policy_node",
]
