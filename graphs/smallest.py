"""The smallest graph of one's own: the policy may ask one agent, `knowledge`, whose reply goes back to it."""

from langgraph.graph import END, START, StateGraph

from aipo_graph.rollout import Context, Graph, State, agent_node, by_request, policy_node


def build() -> Graph:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy_node())
    graph.add_node("knowledge", agent_node("knowledge"))
    graph.add_edge(START, "policy")
    graph.add_conditional_edges("policy", by_request, ["policy", "knowledge", END])
    graph.add_edge("knowledge", "policy")
    return graph.compile()
