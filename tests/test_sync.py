"""A weight load that took no effect must not go unnoticed, whatever the precision."""

import pytest

from aipo_graph.errors import EngineError
from aipo_graph.rollout.stream import SyncCheck


def test_agreement_is_measured() -> None:
    check = SyncCheck("float32")
    gaps = check((-1.0, -2.0), (-1.0, -2.0002), 1)
    assert gaps == pytest.approx({"sync_gap": 1e-4, "sync_gap_max": 2e-4})


@pytest.mark.parametrize(("dtype", "off"), [("float32", 0.01), ("bfloat16", 0.5), ("float32", float("nan"))])
def test_an_engine_with_other_weights_is_refused(dtype: str, off: float) -> None:
    with pytest.raises(EngineError, match="weights 3 did not reach the engine: its logprobs of a probe text differ from the learner's by"):
        SyncCheck(dtype)((-1.0, -2.0), (-1.0 + off, -2.0 + off), 3)


def test_an_engine_that_does_not_move_is_refused_even_within_the_tolerance() -> None:
    """In bfloat16 an update is smaller than the gap between two implementations, but an engine that took it cannot say the very same."""
    check = SyncCheck("bfloat16")
    check((-1.0, -2.0), (-1.01, -2.02), 1)
    check((-1.001, -2.0), (-1.013, -2.02), 2)
    check((-1.00101, -2.0), (-1.013, -2.02), 3)  # the learner did not move to speak of
    with pytest.raises(EngineError, match="weights 4 did not reach the engine: .* moved by 0.003.*did not move at all; restart"):
        check((-1.004, -2.0), (-1.013, -2.02), 4)
