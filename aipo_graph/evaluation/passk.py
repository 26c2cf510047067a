"""What samples say: pass@k, its uncertainty, and the summary of an evaluation, as pure functions."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aipo_graph.errors import TaskError
from aipo_graph.sampling import Key, Part, Sample
from aipo_graph.types import derive_seed

RESAMPLES = 2000
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


def summarise(parts: Sequence[Part], samples: Mapping[Key, Sample], k: Sequence[int], seed: int) -> Values:
    """``alone``, ``with_agents`` and their paired ``difference`` of the first kind, the other kinds under ``kinds``.

    Raises TaskError if every trace of a part failed.
    """
    kinds: dict[str, Values] = {}
    rates: dict[tuple[str, str, str], Rates] = {}
    for part in parts:
        found = [samples[key] for p in part.problems for n in range(part.samples) if (key := (part.name, p.id, n)) in samples]
        values = kinds.setdefault(part.kind, {}).setdefault(part.mode, {"problems": len(part.problems), "intervals": {}})
        names = {"greedy": 1} if part.greedy else {f"pass@{n}": n for n in k if n <= part.samples}
        for name, n in names.items():
            rates[part.kind, part.mode, name] = found_rates = _rates(found, n)
            values[name], values["intervals"][name] = _mean(found_rates, seed, part.kind, name)
        _add_totals(values, part, found)
    for kind, modes in kinds.items():
        if len(modes) == 2:
            shared = [name for name in modes["alone"]["intervals"] if name in modes["with_agents"]["intervals"]]
            modes["difference"] = _difference(
                {name: (rates[kind, "with_agents", name], rates[kind, "alone", name]) for name in shared}, seed, kind
            )
    first, *others = kinds
    return {"kind": first, **kinds[first], "kinds": {kind: kinds[kind] for kind in others}}


def _rates(samples: Sequence[Sample], k: int) -> Rates:
    """pass@k of each problem with at least k scored samples."""
    scored, solved = Counter(s.problem for s in samples if s.scored), Counter(s.problem for s in samples if s.scored and s.solved)
    return {problem: pass_at_k(n, solved[problem], k) for problem, n in scored.items() if n >= k}


def _mean(rates: Rates, seed: int, *address: str) -> tuple[float | None, tuple[float, float] | None]:
    values = list(rates.values())
    if not values:
        return None, None
    return sum(values) / len(values), bootstrap(values, derive_seed(seed, "bootstrap", *address))


def _difference(pairs: Mapping[str, tuple[Rates, Rates]], seed: int, kind: str) -> Values:
    """With agents minus alone, on the problems that both have."""
    values: Values = {"intervals": {}, "problems": {}}
    for name, (helped, alone) in pairs.items():
        paired = {problem: rate - alone[problem] for problem, rate in helped.items() if problem in alone}
        values[name], values["intervals"][name] = _mean(paired, seed, kind, name, "difference")
        values["problems"][name] = len(paired)
    return values


def _add_totals(values: Values, part: Part, found: Sequence[Sample]) -> None:
    """Counts of one part, added to those of its mode: samples, tokens, consults per trace, failures by reason."""
    scored = Counter(s.problem for s in found if s.scored)
    failed = Counter(f"{s.status}: {s.error.partition(':')[0]}" if s.error else s.status for s in found if not s.scored)
    if not scored:
        errors = Counter(s.error or s.status for s in found).most_common(1)
        raise TaskError(f"no trace of {part.name} could be scored: all {len(found)} failed, most with {errors[0][0] if errors else '?'}")
    values["tokens"] = values.get("tokens", 0) + sum(s.tokens for s in found)
    values["failed"] = dict(Counter(values.get("failed", {})) + failed)
    if part.greedy and "samples" in values:
        return
    kept = [s for s in found if s.scored]
    values["samples"] = part.samples
    values["incomplete"] = sum(scored[p.id] < part.samples for p in part.problems)
    values["tokens_per_trace"] = sum(s.tokens for s in kept) / len(kept)
    values["consults_per_trace"] = {
        agent: {
            "calls": sum(s.consults.get(agent, (0, 0))[0] for s in kept) / len(kept),
            "tokens": sum(s.consults.get(agent, (0, 0))[1] for s in kept) / len(kept),
        }
        for agent in sorted({agent for s in kept for agent in s.consults})
    }
