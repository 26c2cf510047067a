"""Estimators over samples and problems, as pure functions: pass@k, maj@k, intervals, a paired test."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
FLIPS = 10_000
EXACT_FLIPS = 12
"""Up to so many problems that differ, every pattern of signs is counted."""
Values = dict[str, Any]
Rates = dict[str, float]
"""Problem -> its estimate."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples is right, unbiased, from n samples of which c were: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), section 2.1; in exact integers. Raises ValueError for k > n.

    >>> pass_at_k(n=4, c=1, k=1), pass_at_k(n=4, c=1, k=4), round(pass_at_k(n=4, c=2, k=2), 3)
    (0.25, 1.0, 0.833)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right among {n} samples is not defined")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@functools.lru_cache(maxsize=65536)
def maj_at_k(right: tuple[int, ...], wrong: tuple[int, ...], silent: int, k: int) -> float:
    """The chance that the most frequent answer of k samples is right, over all subsets of k: the expectation, without drawing any.

    Args:
        right, wrong: how many samples gave each right and each wrong answer.
        silent: how many gave none; they have no vote. A tie is broken at random, so that each of t answers counts 1/t; no vote is wrong.

    Majority voting is that of Wang et al. 2022 (arXiv 2203.11171). Raises ValueError for k > n.

    >>> round(maj_at_k((2,), (1,), 0, 1), 6), maj_at_k((2,), (1,), 0, 3), maj_at_k((1,), (1,), 1, 3)
    (0.666667, 1.0, 0.5)
    """
    n = sum(right) + sum(wrong) + silent
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} of {n} samples is not defined")
    if k == n:
        most = max((*right, *wrong), default=0)
        return right.count(most) / (right.count(most) + wrong.count(most)) if most else 0.0
    chance = 0.0
    for index, size in enumerate(right):
        others = (*right[:index], *right[index + 1 :], *wrong)
        for votes in range(1, min(size, k) + 1):
            chance += _binomial(size, votes, k / n) * _leads(others, silent, votes, k, n)
    # Counts of a subset of k are independent binomials (of any share; k/n keeps them in range), given that they add up to k.
    return chance / _binomial(n, k, k / n)


def _leads(others: tuple[int, ...], silent: int, votes: int, k: int, n: int) -> float:
    """E[1 / (1 + ties)] where no other answer has more than ``votes`` and all others have k - votes samples together.

    1 / (1 + t) is the integral of y^t over [0, 1], so each tied answer is a factor y; Gauss-Legendre is exact for such polynomials.
    """
    free = silent + sum(size for size in others if size < votes)
    nodes, weights = np.polynomial.legendre.leggauss(k // votes // 2 + 1)
    y, weights = (nodes + 1) / 2, weights / 2
    rest = k - votes
    chances = np.tile([_binomial(free, count, k / n) for count in range(rest + 1)], (len(y), 1))  # [nodes, samples taken so far]
    for size in (size for size in others if size >= votes):
        grown = np.zeros_like(chances)
        for count in range(min(votes, rest) + 1):
            share = _binomial(size, count, k / n) * (y[:, None] if count == votes else 1.0)
            grown[:, count:] += share * chances[:, : rest + 1 - count]
        chances = grown
    return float(weights @ chances[:, rest])


@functools.lru_cache(maxsize=65536)
def _binomial(n: int, count: int, p: float) -> float:
    """The chance of ``count`` of n, for 0 < p < 1; by logarithms, for factorials overflow."""
    if count > n:
        return 0.0
    log_ways = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
    return math.exp(log_ways + count * math.log(p) + (n - count) * math.log1p(-p))


def bootstrap(values: Sequence[float], seed: int, level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over problems: RESAMPLES draws with replacement, a function of the seed.

    It says nothing where all values are equal (its ends coincide) and is somewhat too narrow below some 20 problems. NaN for none.

    >>> bootstrap([0.5, 0.5, 0.5], seed=0)
    (0.5, 0.5)
    """
    if not len(values):
        return math.nan, math.nan
    rng, array = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    # In slices of 100, so that ten thousand problems do not take gigabytes.
    means = [array[rng.integers(len(array), size=(100, len(array)))].mean(axis=1) for _ in range(RESAMPLES // 100)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_flip(differences: Sequence[float], seed: int) -> float:
    """The two-sided p of paired differences over problems: how often random signs give a sum at least as far from 0.

    Where each is -1, 0 or 1 (greedy decoding) this is McNemar's test. Up to EXACT_FLIPS differences other than 0 it counts all
    patterns; beyond, FLIPS draws and the observed one, a function of the seed. 1.0 where nothing differs.

    >>> sign_flip([1, 1, 1, 0, 1, 1], seed=0)
    0.0625
    """
    given = np.array([value for value in differences if value != 0], dtype=np.float64)
    observed = abs(given.sum()) - 1e-9
    if len(given) <= EXACT_FLIPS:
        patterns = (np.arange(2 ** len(given))[:, None] >> np.arange(len(given))) & 1
        return float((abs((1 - 2 * patterns) @ given) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits = sum(int((abs(rng.choice((-1.0, 1.0), size=(1000, len(given))) @ given) >= observed).sum()) for _ in range(FLIPS // 1000))
    return (hits + 1) / (FLIPS + 1)
