"""The types in which rollout and learner meet: frozen, slotted, tuples only, standard library only.

Column ``t`` of every array describes token ``t``: ``logprobs[t] = log p(token t | tokens < t)``.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Source = Literal["context", "policy", "agent"]
Stop = str | tuple[int, ...]
"""Where sampling stops: a string in the decoded text, or a sequence of token ids."""
Status = Literal["done", "length", "budget", "failed", "timeout", "leaked"]
"""How a trace ended. ``done``, ``length`` and ``budget`` are the policy's own doing and are trained on; the rest carry no gradient."""
TRAINED: frozenset[Status] = frozenset({"done", "length", "budget"})


def derive_seed(*parts: int | str) -> int:
    """The seed of one random draw: 63 bits, a pure function of its address (run seed, step, problem, sample, call).

    >>> derive_seed(0, 3, "hard-17", 2) == derive_seed(0, 3, "hard-17", 2) != derive_seed(0, 3, "hard-17", 3)
    True
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def spelt(text: str) -> str:
    r"""Without lone surrogates, which JSON, YAML and names of files can hold and nothing can write: they become question marks.

    >>> spelt("1\ud83d")
    '1?'
    """
    return text.encode(errors="replace").decode()


def differ(rewards: Iterable[float]) -> bool:
    """Whether finite rewards say which traces are better: by more than the float noise of how each was worked out.

    Noise is a few roundings in float32, by the size of the rewards; near 0, where a sum cancelled, 1e-12.

    >>> differ([0.1 + 0.2, 0.3]), differ([0.1 + 0.2 - 0.3, 0.0]), differ([0.3, 0.3001]), differ([]), differ([1.0])
    (False, False, True, False, False)
    """
    found = list(rewards)
    return bool(found) and not math.isclose(min(found), max(found), rel_tol=5e-7, abs_tol=1e-12)


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with a checkable answer.

    >>> Problem("add-1", question="What is 1+1?", answer="2").answer
    '2'
    """

    id: str
    question: str
    answer: str
    kind: str = ""
    """The subset it belongs to, reported on its own (``easy``, ``hard``, a subject)."""
    meta: Mapping[str, Any] = field(default_factory=dict)


FIELDS = ("question", "answer", "id", "kind")
"""What every problem has; the rest is ``meta``, its row."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one request: exactly the tokens it sampled.

    ``logprobs`` are those of the distribution sampled from (temperature included), under weights ``version``, and from each
    ``updates`` (token index, version) on under newer ones.

    >>> Completion((5, 7), (-0.1, -2.0), stop="stop", version=3, updates=((1, 4),)).token_ids  # 5 under version 3, 7 under 4
    (5, 7)
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: Literal["stop", "length"]
    version: int
    updates: tuple[tuple[int, int], ...] = ()
    """Where the weights changed while it was sampled."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one source. A trace is a tuple of segments, only ever appended to.

    ``context``: prompt, templates, tool text; never trained, but tags around a reply with ``loss.tags``.
    ``policy``: sampled by the policy, logprobs mandatory.
    ``agent``: a helper's words spliced in; logprobs only if the helper's own sampler gave them for exactly these tokens.

    >>> Segment("policy", "policy", (5, 7), text="ab", logprobs=(-0.1, -2.0), version=3).source
    'policy'
    """

    source: Source
    author: str
    """The graph node that appended it."""
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] | None = None
    version: int = -1
    """The weights a policy segment was sampled under, its first token at least; -1 elsewhere."""
    updates: tuple[tuple[int, int], ...] = ()
    """(token index, version) from which on newer weights sampled, where they changed within the segment."""
    thread: str = "main"
    masked: bool = False
    """Kept out of the loss (a reply that gave the answer away)."""

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"segment of {self.author!r}: {len(self.token_ids)} tokens but {len(self.logprobs)} logprobs")
        if self.source == "policy" and self.logprobs is None:
            raise ValueError(f"policy segment of {self.author!r} without behaviour logprobs")
        if self.source == "context" and self.logprobs is not None:
            raise ValueError(f"context segment of {self.author!r} with logprobs")


@dataclass(frozen=True, slots=True)
class Request:
    """A consult: which agent, and what the policy asked it.

    >>> Request("knowledge", "B", seed=7).agent
    'knowledge'
    """

    agent: str
    query: str
    question: str = ""
    """The problem's question. The answer never travels to an agent."""
    transcript: str = ""
    """What policy and helpers wrote on the thread so far, the author before each line, control tokens neutralised."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """A helper's words; ids and logprobs only if its own sampler used the policy's tokenizer.

    >>> Reply("2695-").logprobs is None
    True
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """One finished graph run.

    >>> prompt = Segment("context", "policy", (1, 2), text="1+1?")
    >>> answer = Segment("policy", "policy", (3,), text="2", logprobs=(-0.5,), version=0)
    >>> trace = Trace("add-1", seed=0, with_agents=False, segments=(prompt, answer), path=("policy",), scores={"reward": 1.0})
    >>> trace.reward, [[segment.text for segment in row] for row in trace.rows()]
    (1.0, [['1+1?', '2']])
    """

    problem_id: str
    seed: int
    with_agents: bool
    segments: tuple[Segment, ...]
    path: tuple[str, ...]
    """The graph's nodes in the order they ran."""
    status: Status = "done"
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    reply: str = ""
    """The text that is scored: what the policy, or the graph, said in the end."""

    @property
    def reward(self) -> float:
        return self.scores.get("reward", 0.0)

    @property
    def solved(self) -> bool:
        """A reward of 1 or more, but for float noise."""
        return self.reward >= 1 or not differ([self.reward, 1.0])

    @property
    def trained(self) -> bool:
        return self.status in TRAINED

    @property
    def threads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(segment.thread for segment in self.segments))

    def rows(self) -> list[tuple[Segment, ...]]:
        """One token row per thread, in order of first appearance."""
        return [tuple(s for s in self.segments if s.thread == thread) for thread in self.threads]


@dataclass(frozen=True, slots=True)
class Learned:
    """What the first update of a batch made of each token of a trace, in the order of its segments; None where a token is outside the
    loss (context, masked, first of its thread, bad behaviour logprob) or a value is not finite.

    ``logprobs``: the learner's before it, at the sampling temperature. ``ratios``: exp(that - behaviour logprob), of an agent's token
    without one, that / loss.behaviour, not clamped. ``advantages``: A. ``coefficients``: what multiplies A * grad log pi in the loss's
    gradient, in units of 1 / (trained tokens of its source in the batch), without ``loss.agent_weight`` (0 if that is 0) and the KL
    term; None where A is 0. Agent tokens of ``echo``, which uses no A: what multiplies grad log pi.

    >>> Learned(logprobs=(None, -0.7), ratios=(None, 0.5), advantages=(None, 2.0), coefficients=(None, 0.5)).coefficients[1]
    0.5
    """

    logprobs: tuple[float | None, ...]
    ratios: tuple[float | None, ...]
    advantages: tuple[float | None, ...]
    coefficients: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class TraceGroup:
    """The G traces of one problem: the unit over which advantages are computed."""

    problem: Problem
    traces: tuple[Trace, ...]


class Generate(Protocol):
    """Samples from the policy: token ids in, a completion out. Raises EngineError."""

    async def __call__(
        self,
        prompt_ids: Sequence[int],
        *,
        seed: int,
        max_tokens: int,
        stop: tuple[Stop, ...] = (),
        temperature: float = 1.0,
    ) -> Completion: ...


class Engine(Protocol):
    """Where the policy is sampled. ``eos_ids`` end a text; ``version`` is that of the weights in use."""

    eos_ids: frozenset[int]
    version: int
    takes: Literal["weights", "adapter"]
    """What `load_weights` is given: every tensor under its name in the model, or those of a LoRA adapter under peft's names."""
    in_flight: bool
    """Whether new weights may come while requests are served."""

    @property
    def generate(self) -> Generate: ...

    def run(self, key: str) -> AbstractContextManager[None]:
        """Entered around each graph run, so that an engine can wait for all runs before it forms a batch."""

    def busy(self) -> AbstractContextManager[None]:
        """Entered around each consult: the run will ask again."""

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Takes new weights by name. Raises EngineError if they do not fit, or, unless ``in_flight``, while a request is served."""

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """log p(token t | tokens < t) for t = 1, 2, … at temperature 1 under the weights in use: shows whether a load took effect."""

    async def sleep(self) -> None:
        """Gives memory back to the learner until the next `load_weights`; nothing is being served. May do nothing."""

    async def close(self) -> None:
        """Ends what the engine started."""


class Task(Protocol):
    """Where problems come from and what an answer is worth."""

    kinds: tuple[str, ...]
    """The kinds of held-out problems, the main one first; the others are evaluated alone, to see what is forgotten."""

    def train(self, index: int) -> Problem:
        """The index-th training problem, index = 0, 1, 2, …: deterministic, never ending, so that one integer is the data cursor."""

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        """Up to ``count`` evaluation problems of one kind (default: the task's main one); never overlapping training."""

    @property
    def reward(self) -> Any:
        """What a trace is worth, where `task.reward` names nothing else: a function, or several by name (docs/rewards.md)."""
