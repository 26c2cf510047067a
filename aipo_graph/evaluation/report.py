"""What the samples of an evaluation say: estimators, the figures of each part's lines of samples.jsonl, and tables of them."""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.markup import escape
from rich.table import Table

from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.evaluation.samples import Key, Mode, Part, Sample, Values, read, task_of
from aipo_graph.types import derive_seed

MODES: tuple[Mode, ...] = ("alone", "with_agents")
UNNAMED = "heldout"
"""The kind of problems that have none."""
RESAMPLES = 2000
FLIPS = 10_000
EXACT_FLIPS = 12
"""Up to so many problems that differ, every pattern of signs is counted."""
WIDE = np.longdouble
"""Holds counts of subsets, which are beyond a float."""
Rates = dict[str, float]
"""Problem -> its estimate."""


# --- estimators, as pure functions: pass@k, maj@k, intervals, a paired test


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
    subsets = WIDE(0)
    for index, size in enumerate(right):
        others = (*right[:index], *right[index + 1 :], *wrong)
        for votes in range(1, min(size, k) + 1):
            subsets += WIDE(math.comb(size, votes)) * _leads(others, silent, votes, k - votes)
    return float(subsets / WIDE(math.comb(n, k)))


def _leads(others: tuple[int, ...], silent: int, votes: int, rest: int) -> np.longdouble:
    """The subsets of ``rest`` samples of the others in which no answer has more than ``votes``, each counted 1 / (1 + ties)."""
    free = silent + sum(size for size in others if size < votes)
    ways = np.array([[math.comb(free, taken) for taken in range(rest + 1)]], dtype=WIDE)  # [answers that tie, samples taken so far]
    for size in (size for size in others if size >= votes):
        grown = np.zeros((len(ways) + 1, rest + 1), dtype=WIDE)
        for count in range(min(votes, rest) + 1):
            tied = int(count == votes)
            grown[tied : tied + len(ways), count:] += WIDE(math.comb(size, count)) * ways[:, : rest + 1 - count]
        ways = grown
    return np.sum(ways[:, rest] / np.arange(1, len(ways) + 1))


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


# --- figures


def summarise(parts: Sequence[Part], samples: Mapping[Key, Sample], k: Sequence[int], seed: int) -> Values:
    """``alone``, ``with_agents`` and their paired ``difference`` of the first kind, the other kinds under ``kinds``.

    Raises TaskError if every trace of a part failed.
    """
    kinds: dict[str, Values] = {}
    rates: dict[tuple[str, str], dict[str, Rates]] = defaultdict(dict)
    for part in parts:
        found = [samples[key] for p in part.problems for n in range(part.samples) if (key := (part.name, p.id, n)) in samples]
        values = kinds.setdefault(part.kind, {}).setdefault(part.mode, {"problems": len(part.problems), "intervals": {}})
        estimates = _rates(part, found, k)
        rates[part.kind, part.mode] |= estimates
        for name, found_rates in estimates.items():
            values[name], values["intervals"][name] = _mean(found_rates, seed, part.kind, name)
        _add_totals(values, part, found)
        if part.mode == "with_agents" and not part.greedy:
            values["helpfulness"] = helpfulness(found, seed, part.kind)
    for kind, modes in kinds.items():
        if len(modes) == 2:
            alone, helped = rates[kind, "alone"], rates[kind, "with_agents"]
            modes["difference"] = difference({name: (helped[name], alone[name]) for name in alone if name in helped}, seed, kind)
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
    scored = _scored(samples)
    kept = [s for found in scored.values() for s in found]
    values = {}
    for agent in sorted({agent for s in kept for agent in s.consults}):
        asked, others = (
            {p: [float(s.solved) for s in found if (agent in s.consults) is wanted] for p, found in scored.items()}
            for wanted in (True, False)
        )
        both = {problem: fmean(asked[problem]) - fmean(others[problem]) for problem in scored if asked[problem] and others[problem]}
        mean, interval = _mean(both, seed, kind, "helpfulness", agent)
        share = sum(agent in s.consults for s in kept) / len(kept)
        values[agent] = {"difference": mean, "interval": interval, "problems": len(both), "consulted": share}
    return values


def _scored(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The scored samples of each problem."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for s in samples:
        if s.scored:
            found[s.problem].append(s)
    return found


def solve_rates(samples: Sequence[Sample]) -> Rates:
    """The share of each problem's scored samples that solve it: pass@1."""
    return {problem: fmean(float(s.solved) for s in found) for problem, found in _scored(samples).items()}


def compare(one: Path, two: Path) -> dict[str, Values]:
    """Part -> pass@1 of both evaluations on the problems that both have, and the second minus the first with interval and p.

    Args:
        one, two: folders of evaluations, or a file in them. Raises ConfigError where there is none, they are of two tasks, or share no
            problem.
    """
    (task, before), (other, after) = _pass_rates(one), _pass_rates(two)
    if task != other:  # two tasks may name their problems alike
        raise ConfigError(f"{one} is an evaluation on {task}, {two} on {other}: evaluate both on the same task")
    parts: dict[str, Values] = {}
    for part in (part for part in before if part in after):
        both = [problem for problem in before[part] if problem in after[part]]
        if both:
            means = {name: sum(found[p] for p in both) / len(both) for name, found in (("first", before[part]), ("second", after[part]))}
            parts[part] = {**means, **difference({"pass@1": (after[part], before[part])}, 0, "compare", part)}
    if not parts:
        raise ConfigError(f"{one} and {two} share no problem: evaluate both on the same task, kind and mode")
    return parts


def _pass_rates(place: Path) -> tuple[str, dict[str, Rates]]:
    """The task of an evaluation, and pass@1 of each of its parts."""
    path = (place if place.is_dir() else place.parent) / "samples.jsonl"
    if not path.is_file():
        raise ConfigError(f"{place}: no evaluation there (no {path}); give the folder of one")
    samples = list(read(path).values())
    return task_of(path), {part: solve_rates([s for s in samples if s.part == part]) for part in dict.fromkeys(s.part for s in samples)}


def _rates(part: Part, samples: Sequence[Sample], k: Sequence[int]) -> dict[str, Rates]:
    """Each estimate's name -> its rates: problems with at least k scored samples for pass@k and maj@k, all scored ones for avg@n.

    maj@1 is pass@1. Where answers are not what is boxed there is no maj@k.
    """
    scored = _scored(samples)

    def passes(k: int) -> Rates:
        return {p: pass_at_k(len(found), sum(s.solved for s in found), k) for p, found in scored.items() if len(found) >= k}

    if part.greedy:
        return {"greedy": passes(1)}
    enough = [n for n in k if n <= part.samples]
    rates = {f"pass@{n}": passes(n) for n in enough}
    every = [s for found in scored.values() for s in found]
    if any(s.answer for s in every) and all(s.answer or not s.solved for s in every):
        rates |= {f"maj@{n}": {p: _majority(found, n) for p, found in scored.items() if len(found) >= n} for n in enough if n > 1}
    return rates | {f"avg@{part.samples}": solve_rates(samples)}


def _majority(samples: Sequence[Sample], k: int) -> float:
    # An answer counts with its verdict: where the grader tells apart what is written alike, so does the vote.
    votes = Counter((s.answer, s.solved) for s in samples if s.answer)
    right, wrong = (tuple(sorted(count for (_, solved), count in votes.items() if solved is wanted)) for wanted in (True, False))
    return maj_at_k(right, wrong, sum(not s.answer for s in samples), k)


def _mean(rates: Rates, seed: int, *address: str) -> tuple[float | None, tuple[float, float] | None]:
    values = list(rates.values())
    return (sum(values) / len(values), bootstrap(values, derive_seed(seed, "bootstrap", *address))) if values else (None, None)


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
    values |= {
        "samples": part.samples,
        "incomplete": sum(scored[p.id] < part.samples for p in part.problems),
        "tokens_per_trace": sum(s.tokens for s in kept) / len(kept),
        "consults_per_trace": {
            agent: {
                "calls": sum(s.consults.get(agent, (0, 0))[0] for s in kept) / len(kept),
                "tokens": sum(s.consults.get(agent, (0, 0))[1] for s in kept) / len(kept),
            }
            for agent in sorted({agent for s in kept for agent in s.consults})
        },
        "length": {
            "all": _lengths(kept),
            "solved": _lengths([s for s in kept if s.solved]),
            "unsolved": _lengths([s for s in kept if not s.solved]),
        },
        "truncated": fmean(s.status == "length" for s in kept),
        "answered": fmean(bool(s.answer) for s in kept),
    }
    if part.mode == "with_agents":
        values["violations"] = fmean(s.violation for s in kept)
        values["leaks"] = _leaks([s for s in found if s.scored or s.status == "leaked"])


def _lengths(samples: Sequence[Sample]) -> Values | None:
    """Policy tokens per trace."""
    if not samples:
        return None
    tokens = [s.tokens for s in samples]
    return {"mean": fmean(tokens), "median": float(np.median(tokens)), "p95": float(np.quantile(tokens, 0.95))}


def _leaks(samples: Sequence[Sample]) -> Values:
    """The shares of traces and of agents' replies in which a reply gave the answer away."""
    replies = sum(calls for s in samples for calls, _ in s.consults.values())
    return {"traces": fmean(s.leaks > 0 for s in samples), "replies": sum(s.leaks for s in samples) / replies if replies else 0.0}


# --- tables, the line that says how the figures came about, and what a reader must know beside them


def table(values: Values) -> Table:
    """The figures of an evaluation, each over its interval."""
    shown = Table(title=escape(f"{values['model']}: {_problems(values['kind'])}, 95 % intervals over problems"))
    modes = [("", values), *values["kinds"].items()]
    columns = [(f"{kind} {mode}".strip().replace("_", " "), found[mode]) for kind, found in modes for mode in MODES if mode in found]
    if "difference" in values:
        columns.append(("difference,\npaired", values["difference"]))
    shown.add_column("", no_wrap=True)
    for title, _ in columns:
        shown.add_column(escape(title), justify="right")
    found = [found for _, found in columns]
    for name in (*(f"pass@{k}" for k in values["k"]), *(f"maj@{k}" for k in values["k"]), "greedy"):
        if any(name in column for column in found):
            shown.add_row("pass@1 = avg@n" if name == "pass@1" else name, *(cell(column, name) for column in found))
    if 1 not in values["k"] and any("samples" in column for column in found):
        shown.add_row("avg@n", *(cell(column, f"avg@{column.get('samples')}") for column in found))
    shown.add_section()
    for name, cells in _details(found):
        shown.add_row(name, *cells)
    return shown


def _details(columns: Sequence[Values]) -> list[tuple[str, list[str]]]:
    """The rows below the estimates; those in which no column has anything to say are left out."""
    figures: dict[str, Callable[[Values], str]] = {
        "problems x samples": size,
        "tokens per trace": lambda c: _number(c.get("tokens_per_trace")),
        "tokens, median / 95 %": lambda c: _pair(c.get("length"), ("all", "median"), ("all", "p95")),
        "tokens, solved / not": lambda c: _pair(c.get("length"), ("solved", "mean"), ("unsolved", "mean")),
        "cut at the budget": lambda c: _share(c.get("truncated")),
    }
    for agent in dict.fromkeys(agent for column in columns for agent in column.get("consults_per_trace", {})):
        figures |= {
            f"{agent} calls": functools.partial(_consults, agent, "calls"),
            f"{agent} tokens": functools.partial(_consults, agent, "tokens"),
            f"{agent} helpfulness": functools.partial(_helpfulness, agent),
        }
    figures["replies with the answer"] = lambda c: _share(c["leaks"]["replies"]) if "leaks" in c and c["consults_per_trace"] else "–"
    figures["violations"] = lambda c: _share(c["violations"]) if c.get("violations") else "–"
    rows = [(name, [figure(column) for column in columns]) for name, figure in figures.items()]
    return [(name, cells) for name, cells in rows if any(text != "–" for text in cells)]


def _problems(kind: str) -> str:
    return "held-out problems" if kind == UNNAMED else f"held-out {kind} problems"


def trained_table(base: Values, trained: Values) -> Table:
    """Base and trained policy, alone and with agents, and the other kinds alone: 80 columns hold it."""
    shown = Table(title=escape(f"{_problems(base['kind'])}, 95 % intervals over problems"))
    for title in ("", "base", "trained"):
        shown.add_column(title, justify="right" if title else "left", style="bold" if title == "trained" else "")
    for kind, before, after in [
        ("", base, trained),
        *((f"{kind} ", base["kinds"][kind], trained["kinds"][kind]) for kind in base["kinds"]),
    ]:
        for mode in (mode for mode in MODES if mode in before):
            shown.add_section()
            pair = before[mode], after[mode]
            for name in (*(f"pass@{k}" for k in base["k"]), "greedy"):
                if any(found.get(name) is not None for found in pair):
                    cells = (
                        f"{mean} ({interval})" if interval else mean
                        for mean, _, interval in (cell(found, name).partition("\n") for found in pair)
                    )
                    shown.add_row(escape(f"{kind}{mode.replace('_', ' ')}, {name}"), *cells)
            shown.add_row("problems x samples", *map(size, pair), style="dim")
    return shown


def verdict(parts: Mapping[str, Values], kind: str) -> list[str]:
    """What a run's evaluations come to, a sentence for each mode: the paired difference of base and trained policy."""
    lines = []
    for mode in (mode for mode in MODES if f"{kind}/{mode}" in parts):
        found = parts[f"{kind}/{mode}"]
        low, high = found["intervals"]["pass@1"]
        p = "p < 0.001" if found["p"]["pass@1"] < 0.001 else f"p = {found['p']['pass@1']:.2g}"
        how = "beats" if low > 0 else "falls behind" if high < 0 else "is not shown to differ from"
        lines.append(
            f"{mode.replace('_', ' ')}, the trained policy {how} the base: pass@1 {found['second']:.3f} against {found['first']:.3f}, a "
            f"difference of {found['pass@1']:+.3f} ({low:+.3f} … {high:+.3f}, {p})"
        )
    return lines


def caption(values: Values) -> str:
    """How an evaluation came about, in one line."""
    how = values["protocol"]
    model = how["model_revision"] or how["model_digest"]
    preset = f"preset {how['preset']}, " if how["preset"] else ""
    return (
        f"{preset}task {how['task']}, data {how['data']}; temperature {how['temperature']:g} without top-p, {how['max_tokens']} tokens, "
        f"seed {how['seed']}; weights {model[:12]}; aipo_graph {how['aipo_graph']}, {how['date']}"
    )


def remarks(values: Values) -> list[str]:
    """What a reader must know beside the table: traces that failed, problems without all their samples."""
    lines = []
    for kind, found in {values["kind"]: values, **values["kinds"]}.items():
        for mode in (mode for mode in MODES if mode in found):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in found[mode]["failed"].items())
            if reasons:
                lines.append(
                    f"{kind}, {mode.replace('_', ' ')}: without a score: {reasons}; the same command tries those that failed again"
                )
            if found[mode]["incomplete"]:
                lines.append(
                    f"{kind}, {mode.replace('_', ' ')}: {found[mode]['incomplete']} of {found[mode]['problems']} problems have fewer than "
                    f"{found[mode]['samples']} scored samples and are left out of each pass@k that needs more than they have"
                )
    if any(agent["difference"] is not None for agent in values.get("with_agents", {}).get("helpfulness", {}).values()):
        lines.append(
            "helpfulness: success of traces that consulted the agent minus that of others of the same problem (observed, not caused)"
        )
    return lines


def comparison(names: tuple[str, str], parts: dict[str, Values]) -> Table:
    """Part -> the paired difference of two evaluations' pass@1 there."""
    shown = Table(title=escape(f"{names[1]}\nminus {names[0]}"), caption="95 % intervals over problems; p: sign-flip permutation test")
    for title in ("", "first", "second", "difference", "problems"):
        shown.add_column(title, justify="right" if title else "left")
    for part, values in parts.items():
        shown.add_row(escape(part), _number(values["first"], 3), _number(values["second"], 3), cell(values, "pass@1"), size(values))
    return shown


def cell(found: Values, name: str) -> str:
    if found.get(name) is None:
        return "–"
    low, high = found["intervals"][name]
    p = found.get("p", {}).get(name)
    return f"{found[name]:.3f}\n{low:.3f} … {high:.3f}" + ("" if p is None else f"\np = {p:.2g}" if p >= 0.001 else "\np < 0.001")


def size(found: Values) -> str:
    return str(max(found["problems"].values())) if isinstance(found["problems"], dict) else f"{found['problems']} x {found['samples']}"


def _consults(agent: str, figure: str, column: Values) -> str:
    return _number(column.get("consults_per_trace", {}).get(agent, {}).get(figure))


def _helpfulness(agent: str, column: Values) -> str:
    found = column.get("helpfulness", {}).get(agent)
    if not found or found["difference"] is None:
        return "–"
    low, high = found["interval"]
    return f"{found['difference']:+.3f}\n{low:+.3f} … {high:+.3f}\n{found['problems']} problems"


def _pair(found: Values | None, *keys: tuple[str, str]) -> str:
    return " / ".join(f"{part[figure]:.0f}" if (part := found[name]) else "–" for name, figure in keys) if found else "–"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
