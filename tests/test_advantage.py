import math

import pytest
import torch

from aipo_graph.learn.advantage import ESTIMATORS, advantages

ALONE_4 = [False] * 4
ALL_4 = [True] * 4


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo", (1.5, -0.5, -0.5, -0.5)),  # mean 1/4, sample std 1/2
        ("dr_grpo", (0.75, -0.25, -0.25, -0.25)),
        ("rloo", (1.0, -1 / 3, -1 / 3, -1 / 3)),
        ("raft", (1.0, 0.0, 0.0, 0.0)),
    ],
)
def test_estimators_by_hand(estimator: str, expected: tuple[float, ...]) -> None:
    result = advantages([1, 0, 0, 0], ALONE_4, ALL_4, estimator=estimator, baseline="group")
    assert result == pytest.approx(expected)


def test_split_compares_alone_traces_with_alone_ones_only() -> None:
    rewards, helped = [1, 1, 0, 1, 0, 0], [True, True, True, False, False, False]
    split = advantages(rewards, helped, [True] * 6, estimator="dr_grpo", baseline="split")
    whole = advantages(rewards, helped, [True] * 6, estimator="dr_grpo", baseline="group")
    assert whole == pytest.approx((0.5, 0.5, -0.5, 0.5, -0.5, -0.5))
    assert split == pytest.approx((0.5, 0.5, -0.5, 2 / 3, -1 / 3, -1 / 3))


def test_split_gives_failing_alone_traces_no_push_where_all_alone_fail() -> None:
    result = advantages([1, 1, 0, 0], [True, True, False, False], ALL_4, estimator="grpo", baseline="split")
    assert result[0] == result[1] == pytest.approx(0.5 / math.sqrt(1 / 3))
    assert result[2:] == (0.0, 0.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_untrained_traces_get_zero_and_count_in_no_statistic(estimator: str) -> None:
    with_nan = advantages([1, 0, math.nan, 0], ALONE_4, [True, True, False, True], estimator=estimator, baseline="split")
    without = advantages([1, 0, 0], [False] * 3, [True] * 3, estimator=estimator, baseline="split")
    assert with_nan == (*without[:2], 0.0, without[2])


def test_raft_takes_every_accepted_trace_whatever_its_siblings_earned() -> None:
    assert advantages([1, 1], [True, True], [True, True], estimator="raft", baseline="split") == (1.0, 1.0)
    assert advantages([1], [False], [True], estimator="raft", baseline="split") == (1.0,)


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"raft"}))
def test_sets_of_one_and_sets_of_equals_give_zero(estimator: str) -> None:
    assert advantages([1.0], [False], [True], estimator=estimator, baseline="group") == (0.0,)
    assert advantages([0.1] * 7, [True] * 7, [True] * 7, estimator=estimator, baseline="group") == (0.0,) * 7
    assert advantages([1.0, 0.0], [False] * 2, [True, False], estimator=estimator, baseline="group") == (0.0, 0.0)
    assert advantages([], [], [], estimator=estimator, baseline="group") == ()


NOISE = [
    [0.1 + 0.2, 0.3, 0.3, 0.3],
    [-0.1 - 0.2, -0.3, -0.3, -0.3],
    [(0.1 + 0.2) * 1e9, 0.3e9, 0.3e9, 0.3e9],
    [(0.1 + 0.2) * 1e-9, 0.3e-9, 0.3e-9, 0.3e-9],
    [0.1 + 0.2 - 0.3, 0.0, 0.0, -0.0],
    [float(torch.tensor(0.3)), 0.3, 0.3, 0.3],
    [float(sum([torch.tensor(0.1)] * 10)), 1.0, 1.0, 1.0],
]
SIGNAL = [[0.3, 0.3001, 0.3, 0.3], [1e6, 1e6 + 1, 1e6, 1e6], [0.0, 1e-9, 0.0, 0.0], [-1e-6, 1e-6, 0.0, 0.0]]


@pytest.mark.parametrize("baseline", ["group", "split", "counterfactual"])
@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"raft"}))
@pytest.mark.parametrize("helped", [0, 2])
def test_float_noise_is_no_signal_and_a_small_difference_is(estimator: str, baseline: str, helped: int) -> None:
    flags = [True] * helped + [False] * (4 - helped)
    for noisy in NOISE:
        for rewards in (noisy, noisy[::-1]):
            assert advantages(rewards, flags, ALL_4, estimator=estimator, baseline=baseline) == (0.0,) * 4
    for rewards in SIGNAL:
        assert any(advantages(rewards, flags, ALL_4, estimator=estimator, baseline=baseline)), rewards


def test_counterfactual_credits_help_by_what_it_changed() -> None:
    helped, alone_fails, alone_solves = [True, True, False, False], [1, 0, 0, 0], [1, 0, 1, 1]
    credit = advantages(alone_fails, helped, ALL_4, estimator="dr_grpo", baseline="counterfactual")
    assert credit == pytest.approx((2 / 3, 0.0, 0.0, 0.0))
    blame = advantages(alone_solves, helped, ALL_4, estimator="dr_grpo", baseline="counterfactual")
    assert blame == pytest.approx((0.0, -2 / 3, 0.0, 0.0))
