"""AIPO's graph with a limit of its own: after a few checks the policy must do without Verify."""

import operator
from typing import Annotated, Any

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from aipo_graph.rollout import Context, Graph, State, agent_node, by_request, policy_node

CHECKS = 4


class Counted(State):
    checks: Annotated[int, operator.add]


ask_verify = agent_node("verify")


async def verify(state: Counted, runtime: Runtime[Context]) -> dict[str, Any]:
    return {**await ask_verify(state, runtime), "checks": 1}


def route(state: Counted, runtime: Runtime[Context]) -> str:
    target = by_request(state, runtime)
    return END if target == "verify" and state["checks"] >= CHECKS else target


def build() -> Graph:
    graph = StateGraph(Counted, context_schema=Context)
    graph.add_node("policy", policy_node())
    graph.add_node("verify", verify)
    graph.add_node("knowledge", agent_node("knowledge"))
    graph.add_node("reasoning", agent_node("reasoning"))
    for name in ("verify", "knowledge", "reasoning"):
        graph.add_edge(name, "policy")
    graph.add_edge(START, "policy")
    graph.add_conditional_edges("policy", route, ["policy", "verify", "knowledge", "reasoning", END])
    return graph.compile()
