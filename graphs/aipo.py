"""AIPO: the policy writes until it asks; the agent it asked answers; the policy goes on, until it ends."""

from langgraph.graph import END, START, StateGraph

from aipo_graph.rollout import Context, Graph, State, agent_node, by_request, policy_node

AGENTS = ("verify", "knowledge", "reasoning")


def build() -> Graph:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy_node())
    for name in AGENTS:
        graph.add_node(name, agent_node(name))
        graph.add_edge(name, "policy")
    graph.add_edge(START, "policy")
    graph.add_conditional_edges("policy", by_request, ["policy", *AGENTS, END])
    return graph.compile()
