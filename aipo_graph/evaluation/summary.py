"""What the samples of an evaluation say: its figures, from each part's lines of samples.jsonl."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.evaluation.passk import Rates, Values, bootstrap, maj_at_k, pass_at_k, sign_flip
from aipo_graph.evaluation.samples import Key, Part, Sample, read, task_of
from aipo_graph.types import derive_seed


def summarise(parts: Sequence[Part], samples: Mapping[Key, Sample], k: Sequence[int], seed: int) -> Values:
    """``alone``, ``with_agents`` and their paired ``difference`` of the first kind, the other kinds under ``kinds``.

    Raises TaskError if every trace of a part failed.
    """
    kinds: dict[str, Values] = {}
    rates: dict[tuple[str, str, str], Rates] = {}
    for part in parts:
        found = [samples[key] for p in part.problems for n in range(part.samples) if (key := (part.name, p.id, n)) in samples]
        values = kinds.setdefault(part.kind, {}).setdefault(part.mode, {"problems": len(part.problems), "intervals": {}})
        for name, found_rates in _rates(part, found, k).items():
            rates[part.kind, part.mode, name] = found_rates
            values[name], values["intervals"][name] = _mean(found_rates, seed, part.kind, name)
        _add_totals(values, part, found)
        if part.mode == "with_agents" and not part.greedy:
            values["helpfulness"] = helpfulness(found, seed, part.kind)
    for kind, modes in kinds.items():
        if len(modes) == 2:
            shared = [name for name in modes["alone"]["intervals"] if name in modes["with_agents"]["intervals"]]
            modes["difference"] = difference(
                {name: (rates[kind, "with_agents", name], rates[kind, "alone", name]) for name in shared}, seed, kind
            )
    first, *others = kinds
    return {"kind": first, **kinds[first], "kinds": {kind: kinds[kind] for kind in others}}


def difference(pairs: Mapping[str, tuple[Rates, Rates]], seed: int, *address: str) -> Values:
    """The first minus the second of each pair of estimates, on the problems that both have, with intervals and sign-flip p."""
    values: Values = {"intervals": {}, "problems": {}, "p": {}, "test": "sign-flip permutation over problems, two-sided"}
    for name, (one, two) in pairs.items():
        paired = {problem: rate - two[problem] for problem, rate in one.items() if problem in two}
        values[name], values["intervals"][name] = _mean(paired, seed, *address, name, "difference")
        values["problems"][name] = len(paired)
        values["p"][name] = sign_flip(list(paired.values()), derive_seed(seed, "sign-flip", *address, name)) if paired else None
    return values


def helpfulness(samples: Sequence[Sample], seed: int, kind: str = "") -> dict[str, Values]:
    """Of each agent: how much more often the traces that consulted it succeed than traces of the same problem that did not.

    ``difference`` is the mean over the ``problems`` that have scored traces of both sorts, drawn with agents at the same settings, with
    its bootstrap ``interval``; None where no problem has both. ``consulted`` is the share of traces that did. The policy chose whether
    to ask: an observation, which no intervention stands behind. An agent that is asked when the policy is lost looks harmful.
    """
    kept = [s for s in samples if s.scored]
    values = {}
    for agent in sorted({agent for s in kept for agent in s.consults}):
        asked: dict[str, list[float]] = defaultdict(list)
        unasked: dict[str, list[float]] = defaultdict(list)
        for s in kept:
            (asked if agent in s.consults else unasked)[s.problem].append(float(s.solved))
        both = {problem: fmean(asked[problem]) - fmean(unasked[problem]) for problem in asked if problem in unasked}
        mean, interval = _mean(both, seed, kind, "helpfulness", agent)
        share = sum(agent in s.consults for s in kept) / len(kept)
        values[agent] = {"difference": mean, "interval": interval, "problems": len(both), "consulted": share}
    return values


def solve_rates(samples: Sequence[Sample]) -> Rates:
    """The share of each problem's scored samples that solve it: pass@1."""
    solved: dict[str, list[float]] = defaultdict(list)
    for s in samples:
        if s.scored:
            solved[s.problem].append(float(s.solved))
    return {problem: fmean(found) for problem, found in solved.items()}


def compare(one: Path, two: Path) -> dict[str, Values]:
    """Part -> pass@1 of both evaluations on the problems that both have, and the second minus the first with interval and p.

    Args:
        one, two: folders of evaluations, or a file in them. Raises ConfigError where there is none, they are of two tasks, or share no
            problem.
    """
    rates: list[dict[str, Rates]] = []
    tasks: list[str] = []
    for place in (one, two):
        path = (place if place.is_dir() else place.parent) / "samples.jsonl"
        if not path.is_file():
            raise ConfigError(f"{place}: no evaluation there (no {path}); give the folder of one")
        tasks.append(task_of(path))
        samples = list(read(path).values())
        rates.append({part: solve_rates([s for s in samples if s.part == part]) for part in dict.fromkeys(s.part for s in samples)})
    if tasks[0] != tasks[1]:  # two tasks may name their problems alike
        raise ConfigError(f"{one} is an evaluation on {tasks[0]}, {two} on {tasks[1]}: evaluate both on the same task")
    parts: dict[str, Values] = {}
    for part in (part for part in rates[0] if part in rates[1]):
        first, second = rates[0][part], rates[1][part]
        both = [problem for problem in first if problem in second]
        if both:
            means = {name: sum(found[p] for p in both) / len(both) for name, found in (("first", first), ("second", second))}
            parts[part] = {**means, **difference({"pass@1": (second, first)}, 0, "compare", part)}
    if not parts:
        raise ConfigError(f"{one} and {two} share no problem: evaluate both on the same task, kind and mode")
    return parts


def _rates(part: Part, samples: Sequence[Sample], k: Sequence[int]) -> dict[str, Rates]:
    """Each estimate's name -> its rates: problems with at least k scored samples for pass@k and maj@k, all scored ones for avg@n.

    maj@1 is pass@1. Where answers are not what is boxed, or were not recorded, there is no maj@k.
    """
    scored: dict[str, list[Sample]] = defaultdict(list)
    for s in samples:
        if s.scored:
            scored[s.problem].append(s)

    def passes(k: int) -> Rates:
        return {p: pass_at_k(len(found), sum(s.solved for s in found), k) for p, found in scored.items() if len(found) >= k}

    if part.greedy:
        return {"greedy": passes(1)}
    enough = [n for n in k if n <= part.samples]
    rates = {f"pass@{n}": passes(n) for n in enough}
    every = [s for found in scored.values() for s in found]
    if any(s.answer for s in every) and all(s.answer or (s.answer == "" and not s.solved) for s in every):
        rates |= {f"maj@{n}": {p: _majority(found, n) for p, found in scored.items() if len(found) >= n} for n in enough if n > 1}
    return rates | {f"avg@{part.samples}": solve_rates(samples)}


def _majority(samples: Sequence[Sample], k: int) -> float:
    # An answer counts with its verdict: where the grader tells apart what is written alike, so does the vote.
    votes = Counter((s.answer, s.solved) for s in samples if s.answer)
    right, wrong = (tuple(sorted(count for (_, solved), count in votes.items() if solved is wanted)) for wanted in (True, False))
    return maj_at_k(right, wrong, sum(not s.answer for s in samples), k)


def _mean(rates: Rates, seed: int, *address: str) -> tuple[float | None, tuple[float, float] | None]:
    values = list(rates.values())
    if not values:
        return None, None
    return sum(values) / len(values), bootstrap(values, derive_seed(seed, "bootstrap", *address))


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
    values["length"] = {
        "all": _lengths(kept),
        "solved": _lengths([s for s in kept if s.solved]),
        "unsolved": _lengths([s for s in kept if not s.solved]),
    }
    values["truncated"] = fmean(s.status == "length" for s in kept)
    values["answered"] = fmean(bool(s.answer) for s in kept) if all(s.answer is not None for s in kept) else None
    if part.mode == "with_agents":
        recorded = all(s.violation is not None for s in kept)
        values["violations"] = fmean(bool(s.violation) for s in kept) if recorded else None
        values["leaks"] = _leaks([s for s in found if s.scored or s.status == "leaked"])


def _lengths(samples: Sequence[Sample]) -> Values | None:
    """Policy tokens per trace."""
    if not samples:
        return None
    tokens = [s.tokens for s in samples]
    return {"mean": fmean(tokens), "median": float(np.median(tokens)), "p95": float(np.quantile(tokens, 0.95))}


def _leaks(samples: Sequence[Sample]) -> Values | None:
    """The shares of traces and of agents' replies in which a reply gave the answer away; None where it was not recorded."""
    replies = sum(calls for s in samples for calls, _ in s.consults.values())
    found = [s.leaks for s in samples if s.leaks is not None]
    if not found or len(found) < len(samples):
        return None
    return {"traces": fmean(leaks > 0 for leaks in found), "replies": sum(found) / replies if replies else 0.0}
