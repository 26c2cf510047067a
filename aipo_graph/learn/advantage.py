"""Advantages of the traces of one problem, from their rewards alone."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from aipo_graph.errors import ConfigError
from aipo_graph.load import own
from aipo_graph.types import differ

Estimator = Callable[[float, Sequence[float]], float]


ESTIMATORS: dict[str, Estimator] = {
    # (r - mean) / std with the sample standard deviation: DeepSeekMath, arXiv 2402.03300, section 4.1.2
    "grpo": lambda reward, rewards: (reward - fmean(rewards)) / stdev(rewards),
    # r - mean, without a division, which would favour problems of low variance: arXiv 2503.20783, section 3.2
    "dr_grpo": lambda reward, rewards: reward - fmean(rewards),
    # r - mean of the others, written as n / (n - 1) * (r - mean): arXiv 2402.14740, equation 7
    "rloo": lambda reward, rewards: len(rewards) / (len(rewards) - 1) * (reward - fmean(rewards)),
    # r itself, whatever the others'; with rewards of 0 and 1, fine-tuning on accepted traces: RAFT, arXiv 2304.06767
    "raft": lambda reward, rewards: reward,
}


def estimate(estimator: str, reward: float, peers: Sequence[float]) -> float:
    """The advantage of a reward among those of its peers. Raises ConfigError where an estimator of yours gives no finite number."""
    value = (ESTIMATORS.get(estimator) or own("loss.advantage", estimator))(reward, peers)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"loss.advantage = {estimator!r}: gave {value!r} for a reward of {reward:g}; a finite number is wanted")
    return float(value)


def advantages(
    rewards: Sequence[float], with_agents: Sequence[bool], trained: Sequence[bool], *, estimator: str, baseline: str
) -> tuple[float, ...]:
    """One advantage per trace of a group [G].

    ``group`` compares each trace with all. ``split`` compares traces with agents with the whole group and traces alone with the
    alone ones only, so that what fails only for want of help is not pushed down. ``counterfactual`` (ours) compares a trace with agents
    with the alone ones and itself: help counts by what it changed, and is not blamed for a failure that came without it, too. Untrained
    traces get 0 and count in no statistic; a set whose rewards do not `differ`, or of one trace, gives 0 (``raft`` compares nothing).
    ``estimator``: one of ESTIMATORS, or yours, file.py:name, of the same arguments. Raises ConfigError.

    >>> advantages([1, 1, 0, 0], [True, True, False, False], [True] * 4, estimator="dr_grpo", baseline="split")
    (0.5, 0.5, 0.0, 0.0)
    >>> advantages([0, 1, 0, 0], [True, True, False, False], [True] * 4, estimator="rloo", baseline="counterfactual")
    (0.0, 1.0, 0.0, 0.0)
    """
    everyone = [r for r, t in zip(rewards, trained, strict=True) if t]
    alone = [r for r, t, a in zip(rewards, trained, with_agents, strict=True) if t and not a]
    result = []
    for reward, helped, counts in zip(rewards, with_agents, trained, strict=True):
        peers = everyone if baseline == "group" or (helped and baseline == "split") else [*alone, reward] if helped else alone
        result.append(estimate(estimator, reward, peers) if counts and (estimator == "raft" or differ(peers)) else 0.0)
    return tuple(result)
