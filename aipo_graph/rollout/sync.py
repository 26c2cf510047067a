"""Did a weight load take effect? The engine's logprobs of a fixed text are compared with the learner's."""

from collections.abc import Sequence
from dataclasses import dataclass

from aipo_graph.errors import EngineError

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest mean gap between two implementations of one model. In bfloat16 their roundings differ in every layer."""
MOVED = 1e-4
"""A learner's logprob that changed by more has changed."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A text and the learner's logprobs of its tokens but the first, at temperature 1."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class SyncCheck:
    """Compares after each load, and with the load before: an engine that still says the very same has not taken new weights."""

    def __init__(self, dtype: str) -> None:
        self._tolerance = TOLERANCE[dtype]
        self._before: tuple[Probe, tuple[float, ...]] | None = None

    def __call__(self, probe: Probe, found: Sequence[float], version: int) -> dict[str, float]:
        """The mean and the largest gap, for the log. Raises EngineError if the engine does not sample with the learner's weights."""
        gaps = [abs(ours - theirs) for ours, theirs in zip(probe.logprobs, found, strict=True)]
        mean, largest = sum(gaps) / len(gaps), max(gaps)
        if not mean <= self._tolerance:
            raise EngineError(
                f"weights {version} did not reach the engine: its logprobs of a probe text differ from the learner's by {mean:.2g} on "
                f"average (at most {self._tolerance:g}); restart the server with the policy's model and dtype, then run the same command"
            )
        if self._before is not None:
            old, answer = self._before
            moved = max(abs(a - b) for a, b in zip(probe.logprobs, old.logprobs, strict=True))
            if moved > MOVED and answer == tuple(found):
                raise EngineError(
                    f"weights {version} did not reach the engine: the learner's logprobs of a probe text moved by {moved:.2g}, the "
                    "engine's did not move at all; restart the server, then run the same command"
                )
        self._before = probe, tuple(found)
        return {"sync_gap": mean, "sync_gap_max": largest}
