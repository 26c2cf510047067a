"""The policy alone: nobody stops it at a request, so it writes the feedback itself."""

from langgraph.graph import END, START, StateGraph

from aipo_graph.rollout import Context, Graph, State, policy_node


def build() -> Graph:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy_node(prompt="solo", consults=False))
    graph.add_edge(START, "policy")
    graph.add_edge("policy", END)
    return graph.compile()
