"""A planner and a solver: two threads of one policy. Each thread has a prompt and a context of its own and becomes one training row;
the solver sees the question and the plan, and may consult the agents."""

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from aipo_graph.rollout import Context, Graph, State, Update, agent_node, append, by_request, policy_node

AGENTS = ("verify", "knowledge", "reasoning")
PLAN_TOKENS = 48


def hand_over(state: State, runtime: Runtime[Context]) -> Update:
    """Opens the solver's thread, `main`, with prompts/solver.md, whose {transcript} is what the planner wrote."""
    context = runtime.context
    plan = "".join(s.text for s in state["segments"] if s.thread == "planner" and s.source == "policy")
    return append(context.opening("solver", author="hand_over", question=state["problem"].question, transcript=plan))


def build() -> Graph:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("planner", policy_node("planner", prompt="planner", segment_tokens=PLAN_TOKENS))
    graph.add_node("hand_over", hand_over)
    graph.add_node("policy", policy_node())
    for name in AGENTS:
        graph.add_node(name, agent_node(name))
        graph.add_edge(name, "policy")
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "hand_over")
    graph.add_edge("hand_over", "policy")
    graph.add_conditional_edges("policy", by_request, ["policy", *AGENTS, END])
    return graph.compile()
