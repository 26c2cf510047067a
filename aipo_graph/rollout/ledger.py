"""The ledger: every completion that a graph run was given must stand in its trace, once, where it was sampled."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from langgraph.runtime import get_runtime

from aipo_graph.errors import GraphError
from aipo_graph.types import Completion, Engine, Segment, Stop


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded request to the engine, with the LangGraph task and attempt that made it."""

    prompt_ids: tuple[int, ...]
    completion: Completion
    task: str
    attempt: int


class Ledger:
    """Records each completion that a graph run was given, then checks that the trace holds exactly those.

    Each completion must stand once as a policy segment, directly after exactly the prompt that it was sampled from; only a node
    attempt that LangGraph retried may have lost its own.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.calls: list[Call] = []

    async def generate(
        self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        prompt = tuple(prompt_ids)
        completion = await self._engine.generate(prompt, seed=seed, max_tokens=max_tokens, stop=stop, temperature=temperature)
        info = get_runtime().execution_info
        self.calls.append(Call(prompt, completion, info.task_id if info else "", info.node_attempt if info else 1))
        return completion

    def forget(self, completions: Iterable[Completion]) -> None:
        """Leaves out what a failed attempt sampled, where the attempt was not of the task that called: of one around it."""
        gone = {id(completion) for completion in completions}
        self.calls = [made for made in self.calls if id(made.completion) not in gone]

    def check(self, segments: tuple[Segment, ...], *, complete: bool) -> None:
        """Raises GraphError for a lost, edited, moved or invented completion.

        Args:
            complete: whether every superstep ended; a failed one may have lost its siblings' completions.
        """
        last_attempts: dict[str, int] = {}
        for made in self.calls:
            last_attempts[made.task] = max(made.attempt, last_attempts.get(made.task, 0))
        open_calls = [made for made in self.calls if made.attempt == last_attempts[made.task]]
        prefixes: dict[str, tuple[int, ...]] = {}
        for segment in segments:
            prefix = prefixes.get(segment.thread, ())
            if segment.source == "policy":
                call = next((call for call in open_calls if _is(segment, call) and call.prompt_ids == prefix), None)
                if call is None:
                    raise GraphError(self._explain(segment, open_calls))
                open_calls.remove(call)
            prefixes[segment.thread] = prefix + segment.token_ids
        if open_calls and complete:
            raise GraphError(
                f"{len(open_calls)} of {len(self.calls)} completions were sampled but are not in the trace (the first has "
                f"{len(open_calls[0].completion.token_ids)} tokens): a node must return append(segment) for all that it samples"
            )

    @staticmethod
    def _explain(segment: Segment, calls: list[Call]) -> str:
        place = f"policy segment of node {segment.author!r} (thread {segment.thread!r}, {len(segment.token_ids)} tokens)"
        if any(_is(segment, call) for call in calls):
            return f"{place} does not follow the prompt it was sampled from: a node edited or dropped history, or used another thread"
        return f"{place} is not what the engine sampled: a node changed its tokens or logprobs, or appended it twice"


def _is(segment: Segment, call: Call) -> bool:
    completion = call.completion
    written = (segment.token_ids, segment.logprobs, segment.version, segment.updates)
    return written == (completion.token_ids, completion.logprobs, completion.version, completion.updates)
