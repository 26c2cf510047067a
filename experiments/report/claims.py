"""The claims of the paper's abstract, each as comparisons of stored cells, and the rule that turns these into a verdict."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.grid import EXPERIMENTS
from experiments.report.stored import LEAST, Mean, Study, compare

Verdict = Literal["supported", "contradicted", "not shown", "one seed", "not run"]
VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "not shown", "one seed", "not run")
SILENT: tuple[Verdict, ...] = ("one seed", "not run")
"""Those that say nothing about the claim."""
MARGIN = 0.05
"""How far above the base's mean "within the boundary" may reach."""
RULE = f"""\
A cell is the mean over n seeds with its 95 % t-interval. *A above B* is **supported** where the whole interval of A lies above that of B
and the means are at least {LEAST} apart, **contradicted** where it lies below by as much, else **not shown**. *A within B* is supported
where the upper end of A is at most {MARGIN} above B's mean, contradicted where A is above B by the first rule, else not shown. A single
seed has no interval and gets no verdict; the untrained policy has no seed of training, and evaluated once (n 1) it has the bootstrap
interval over problems of that evaluation. A claim of several comparisons gets one word only where all that have a verdict agree; else
they are counted. Nothing is corrected for the number of comparisons, the ends of an interval are not cut at 0 and 1, and one of width 0
says only that its seeds are equal."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """``left`` above or within ``right``; both are (experiment, variant)."""

    left: tuple[str, str]
    right: tuple[str, str]
    metric: str
    wanted: Literal["above", "within"] = "above"


@dataclass(frozen=True, slots=True)
class Claim:
    text: str
    tests: tuple[Comparison, ...]
    untested: str = ""
    """Why nothing here can speak for it."""


def verdict(test: Comparison, left: Mean | None, right: Mean | None) -> Verdict:
    order = compare(left, right)
    if order in ("one seed", "not run") or left is None or right is None:
        return "one seed" if order == "one seed" else "not run"
    if test.wanted == "within":
        return "supported" if left.high <= right.mean + MARGIN else "contradicted" if order == "above" else "not shown"
    return "supported" if order == "above" else "contradicted" if order == "below" else "not shown"


def judge(study: Study, test: Comparison) -> Verdict:
    return verdict(test, study.mean(*test.left, test.metric), study.mean(*test.right, test.metric))


def together(verdicts: Sequence[Verdict]) -> str:
    """One word where all agree, else how many of each; what has no verdict is counted beside.

    >>> together(["supported", "supported"]), together(["not shown", "supported", "supported"])
    ('supported', 'mixed, of 3: 2 supported, 1 not shown')
    >>> together(["not shown", "one seed", "not run"]), together(["one seed", "not run"])
    ('not shown, as far as compared: 1 of 3 (1 one seed, 1 not run)', 'no verdict: 1 one seed, 1 not run')
    """
    if len(set(verdicts)) < 2:
        return verdicts[0] if verdicts else "not run"
    counts = Counter(verdicts)
    told = {word: f"{counts[word]} {word}" for word in VERDICTS if counts[word]}
    decided, silent = [word for word in told if word not in SILENT], [told[word] for word in SILENT if word in told]
    if len(decided) > 1:
        return f"mixed, of {len(verdicts)}: " + ", ".join(told.values())
    without = ", ".join(silent)
    return f"{decided[0]}, as far as compared: {counts[decided[0]]} of {len(verdicts)} ({without})" if decided else f"no verdict: {without}"


def _pairs(experiment: str, left: str, rights: Sequence[str], metric: str = "alone pass@1") -> tuple[Comparison, ...]:
    return tuple(Comparison((experiment, left), (experiment, right), metric) for right in rights)


def claims(study: Study) -> list[Claim]:
    """The abstract's claims in our words."""
    wide = "alone pass@max"
    main, boundary, weights = "coefficients", "boundary", ("sft", "gated", "luffy")
    return [
        Claim(
            "Reinforcement learning with verifiable rewards by itself explores within what the policy can do already.",
            (
                Comparison((main, "grpo"), (main, "base"), wide, "within"),
                Comparison((boundary, "grpo"), (boundary, "base"), wide, "within"),
            ),
        ),
        Claim(
            "Consulting helpers during training, and learning from their words, moves that boundary.",
            (
                *_pairs(main, "aipo", ["base", "grpo", "mask"], wide),
                *_pairs(boundary, "aipo", ["base", "grpo"], wide),
                *_pairs("second", "aipo", ["base", "grpo", "mask"], wide),
            ),
        ),
        Claim(
            "After training the policy solves alone, without helpers, what it could not before.",
            (
                *_pairs(main, "aipo", ["base"]),
                *_pairs(main, "aipo", ["base"], "alone greedy"),
                *_pairs("second", "aipo", ["base"]),
                *_pairs("second", "aipo", ["base"], "alone greedy"),
            ),
        ),
        Claim(
            "Help where it is needed beats whole expert trajectories (nearest here: fine-tuning on accepted transcripts with help).",
            (*_pairs(main, "aipo", ["raft"]), *_pairs(main, "aipo", ["raft"], "alone greedy")),
        ),
        Claim(
            "The coefficient with its clipping cures the vanishing gradient of the helpers' tokens (against the exact ratio).",
            (*_pairs(main, "aipo", ["ppo"]), *_pairs("ablations", "aipo", ["floor_0"])),
        ),
        Claim(
            "The coefficient with its clipping mitigates the bias of off-policy tokens (against weight one, gated or not, and π/(π+γ)).",
            (
                *_pairs(main, "aipo", weights),
                *(t for level in LEVELS[1:] for t in _pairs("faulty", f"aipo@{level}", [f"{weight}@{level}" for weight in weights])),
                *_pairs("verbose", "aipo", weights),
            ),
        ),
        Claim(
            "Each of the three helpers, Verify, Knowledge and Reasoning, does its part.",
            _pairs("ablations", "aipo", ["no_verify", "no_knowledge", "no_reasoning"]),
        ),
        Claim(
            "It carries over to other policy models and other RLVR algorithms.",
            tuple(Comparison(("generality", on), ("generality", off), "alone pass@1") for _, on, off in arms(study)),
        ),
        Claim("It improves AIME, MATH-500, GPQA-Diamond and LiveCodeBench.", (), "not tested: no model of that size was trained here"),
    ]


LEVELS = ("0", "10", "25", "50", "same30", "same40", "same60")
"""Of faulty helpers: per cent of wrong Knowledge replies; "same": always with one and the same wrong rule."""


def arms(study: Study) -> list[tuple[str, str, str]]:
    """(architecture/algorithm, its variant with AIPO, its variant without) of `generality`, planned or stored."""
    found: dict[str, dict[bool, str]] = {}
    for variant in dict.fromkeys([*EXPERIMENTS["generality"].variants, *study.cells.get("generality", {})]):
        pair, _, arm = variant.rpartition("/")
        if pair and arm != "base":
            found.setdefault(pair, {})[arm == "aipo"] = variant
    return [(pair, arm.get(True, f"{pair}/aipo"), arm.get(False, f"{pair}/alone")) for pair, arm in found.items()]
