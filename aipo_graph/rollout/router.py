"""Where a graph goes next: a route is a plain function of the state (and the run's context) that returns a node's name."""

from collections.abc import Callable

from langgraph.graph import END
from langgraph.runtime import Runtime

from aipo_graph.rollout.graph import Context, State, last_policy_segment, last_words
from aipo_graph.rollout.protocol import parse_request, writes_feedback

Route = Callable[[State, Runtime[Context]], str]


def by_request(state: State, runtime: Runtime[Context]) -> str:
    """To the agent that the policy asked for; back to `policy` while it is unfinished; END at its end of text or out of budget."""
    return _route(state, runtime.context, policy="policy")


def by_confidence(threshold: float, agent: str, policy: str = "policy") -> Route:
    """Like `by_request`, and offers a consult unasked where the policy is stuck.

    Stuck means that the mean logprob of its last segment is below ``threshold`` while it is neither finished nor asking; pair it with
    `policy_node(segment_tokens=n)`, which hands control back every n tokens.
    """

    def route(state: State, runtime: Runtime[Context]) -> str:
        target = _route(state, runtime.context, policy)
        last = last_policy_segment(state)
        stuck = target == policy and sum(last.logprobs or ()) < threshold * len(last.token_ids)
        return agent if stuck and runtime.context.consults_left(state) > 0 else target

    return route


def _route(state: State, context: Context, policy: str) -> str:
    last = last_policy_segment(state)
    text = last_words(state)
    if writes_feedback(text) or last.token_ids[-1] in context.tokenizer.eos_ids or context.tokens_left(state) <= 0:
        return END
    request = parse_request(text, context.agents)
    if request is None:
        return policy
    return request[0] if context.consults_left(state) > 0 else END
