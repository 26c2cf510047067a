"""What a rollout graph is made of: its state, its run context, the nodes that sample and consult, and the routes between them."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import dropwhile, groupby, takewhile
from typing import Annotated, Any, Protocol

from langgraph.graph import END
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypedDict  # pydantic makes no schema of typing's own before Python 3.12

from aipo_graph.errors import ConfigError, GraphError
from aipo_graph.rollout.agents import Agent, Prompts
from aipo_graph.rollout.tokens import Tokenizer, parse_request, quoted, tags, writes_feedback
from aipo_graph.types import Generate, Problem, Reply, Request, Segment, derive_seed

Graph = CompiledStateGraph[Any, Any, Any, Any]
"""What a graph's `build()` returns."""


def extend(segments: tuple[Segment, ...], new: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The reducer of `State.segments`. Raises GraphError for what is not a tuple of segments."""
    if not isinstance(new, tuple) or not all(isinstance(segment, Segment) for segment in new):
        raise GraphError(f"a node returned segments = {str(new)[:80]!r}: return append(segment, ...)")
    return segments + new


class State(TypedDict):
    """The state of a rollout graph. Segments are only ever appended to; a graph may add keys of its own by subclassing."""

    problem: Problem
    segments: Annotated[tuple[Segment, ...], extend]


class Update(TypedDict):
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """What one trace may use: policy tokens, consults, tokens of one reply."""

    tokens: int
    consults: int
    reply_tokens: int


@dataclass(frozen=True, slots=True)
class Context:
    """What the nodes of one graph run share: LangGraph's run context, one per trace."""

    generate: Generate
    tokenizer: Tokenizer
    agents: Mapping[str, Agent]
    consult: Callable[[Agent, Request], Awaitable[Reply]]
    prompts: Prompts
    budget: Budget
    seed: int
    temperature: float = 1.0

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        """LangGraph's server asks every graph for the JSON schema of its context, and these are live objects: anything."""
        return core_schema.any_schema()

    def opening(self, prompt: str, *, thread: str = "main", author: str = "", **fields: str) -> Segment:
        """A thread's first segment: a prompt file with its fields filled in, control tokens in the fields neutralised."""
        clean = {name: self.tokenizer.neutralise(text) for name, text in fields.items()}
        return self.tokenizer.render(self.prompts.render(prompt, **clean), author=author or prompt, thread=thread)

    def tokens_left(self, state: State) -> int:
        """Policy tokens that the trace may still sample, over all threads."""
        return self.budget.tokens - sum(len(s.token_ids) for s in state["segments"] if s.source == "policy")

    def consults_left(self, state: State) -> int:
        return self.budget.consults - sum(s.source == "agent" for s in state["segments"])


class Node(Protocol):
    """A node that samples or consults: the state and LangGraph's runtime in, an update out."""

    def __call__(self, state: State, runtime: Runtime[Context]) -> Awaitable[Update]: ...


def append(*segments: Segment) -> Update:
    """The update that a node returns: these segments, after all that stand already.

    >>> append(Segment("context", "notes", (1, 2), text="ab"))["segments"][0].author
    'notes'
    """
    return {"segments": segments}


def last_policy_segment(state: State, thread: str | None = None) -> Segment:
    """The newest policy segment, of one thread or of any. Raises GraphError if there is none."""
    for segment in reversed(state["segments"]):
        if segment.source == "policy" and thread in (None, segment.thread):
            return segment
    raise GraphError(f"a route or an agent node ran before any policy node (thread {thread or 'any'}): put a policy node before it")


def last_words(state: State, thread: str | None = None) -> str:
    """The text of the newest run of policy segments, of one thread or of the newest one's: a request may span several segments."""
    thread = last_policy_segment(state, thread).thread
    newest = dropwhile(lambda s: s.source != "policy", (s for s in reversed(state["segments"]) if s.thread == thread))
    return "".join(s.text for s in reversed([*takewhile(lambda s: s.source == "policy", newest)]))


def _transcript(state: State, thread: str, neutralise: Callable[[str], str]) -> str:
    """What policy and helpers wrote on a thread, line by line with the author: a helper's words reach another one as what they are."""
    said = (s for s in state["segments"] if s.thread == thread and s.source != "context")
    runs = groupby(said, key=lambda s: "policy" if s.source == "policy" else s.author)
    return "\n".join(quoted(author, neutralise("".join(s.text for s in run))) for author, run in runs)


def policy_node(thread: str = "main", *, prompt: str = "policy", consults: bool = True, segment_tokens: int | None = None) -> Node:
    """A node that lets the policy write on its thread until it asks, ends, or runs out of budget.

    Args:
        thread: the policy context it continues; each thread is one training row.
        prompt: prompt file that opens the thread.
        consults: stop at the closing tag of a request. Without, the policy writes its own feedback.
        segment_tokens: hand control back to the graph at least every so many tokens.
    """

    async def policy(state: State, runtime: Runtime[Context]) -> Update:
        context = runtime.context
        left = context.tokens_left(state)
        if left <= 0:
            return append()
        written = [s for s in state["segments"] if s.thread == thread]
        opening = () if written else (context.opening(prompt, thread=thread, question=state["problem"].question),)
        stop = tuple(tags(name)[1] for name in context.agents) if consults else ()
        completion = await context.generate(
            [token for s in (*opening, *written) for token in s.token_ids],
            seed=derive_seed(context.seed, thread, sum(s.source == "policy" for s in written)),
            max_tokens=min(left, segment_tokens or left),
            stop=stop,
            temperature=context.temperature,
        )
        count = len(completion.token_ids)
        more = segment_tokens is not None and segment_tokens <= count < left and completion.token_ids[-1] not in context.tokenizer.eos_ids
        sampled = Segment(
            "policy",
            author="policy" if thread == "main" else thread,
            token_ids=completion.token_ids,
            text=context.tokenizer.continued(
                [*takewhile(lambda s: s.source == "policy", reversed(written))][::-1], completion.token_ids, more=more
            ),
            logprobs=completion.logprobs,
            version=completion.version,
            updates=completion.updates,
            thread=thread,
        )
        return append(*opening, sampled)

    return policy


def agent_node(name: str, thread: str = "main") -> Node:
    """A node that passes the policy's request to an agent and splices the reply in as feedback.

    Where the route offered the consult unasked, the query is the policy's last segment. Raises AgentError if the agent fails.
    """

    async def consult(state: State, runtime: Runtime[Context]) -> Update:
        context = runtime.context
        if name not in context.agents:
            raise ConfigError(f"the graph has a node for agent {name!r}, but agents.use names only {', '.join(context.agents) or 'none'}")
        last = last_policy_segment(state, thread)
        request = parse_request(last_words(state, thread), context.agents)
        neutralise = context.tokenizer.neutralise
        reply = await context.consult(
            context.agents[name],
            Request(
                name,
                query=neutralise(request[1] if request else last.text).strip(),
                question=neutralise(state["problem"].question),
                transcript=_transcript(state, thread, neutralise),
                seed=derive_seed(context.seed, thread, name, context.consults_left(state)),
            ),
        )
        return append(*context.tokenizer.wrap(reply, author=name, thread=thread, limit=context.budget.reply_tokens))

    return consult


# --- routes: plain functions of the state (and the run's context) that return a node's name

Route = Callable[[State, Runtime[Context]], str]


def by_request(state: State, runtime: Runtime[Context], policy: str = "policy") -> str:
    """To the agent that the policy asked for; back to ``policy`` while it is unfinished; END at its end of text or out of budget."""
    context = runtime.context
    last = last_policy_segment(state)
    text = last_words(state)
    if writes_feedback(text) or last.token_ids[-1] in context.tokenizer.eos_ids or context.tokens_left(state) <= 0:
        return END
    request = parse_request(text, context.agents)
    if request is None:
        return policy
    return request[0] if context.consults_left(state) > 0 else END


def by_confidence(threshold: float, agent: str, policy: str = "policy") -> Route:
    """Like `by_request`, and offers a consult unasked where the policy is stuck.

    Stuck means that the mean logprob of its last segment is below ``threshold`` while it is neither finished nor asking; pair it with
    `policy_node(segment_tokens=n)`, which hands control back every n tokens.
    """

    def route(state: State, runtime: Runtime[Context]) -> str:
        target = by_request(state, runtime, policy)
        last = last_policy_segment(state)
        stuck = target == policy and sum(last.logprobs or ()) < threshold * len(last.token_ids)
        return agent if stuck and runtime.context.consults_left(state) > 0 else target

    return route
