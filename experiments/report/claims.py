"""The claims of the paper's abstract, each as comparisons of stored cells, and the rule that turns these into a verdict."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.grid import EXPERIMENTS
from experiments.report.stored import Study, compare, untrained

Verdict = Literal["supported", "contradicted", "not shown", "one seed", "not run"]
VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "not shown", "one seed", "not run")
SILENT: tuple[Verdict, ...] = ("one seed", "not run")
"""Those that say nothing about the claim."""
MARGIN = 0.05
"""How far above the base's mean "within the boundary" may reach."""


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
    figure: str = ""
    """What shows it."""

    def words(self, study: Study) -> str:
        """Its verdict."""
        return self.untested or together([judge(study, test) for test in self.tests])


def judge(study: Study, test: Comparison) -> Verdict:
    left, right = study.mean(*test.left, test.metric), study.mean(*test.right, test.metric)
    order = compare(left, right)
    if order in ("one seed", "not run") or left is None or right is None:
        return "one seed" if order == "one seed" else "not run"
    if test.wanted == "within":
        return "supported" if left.high <= right.mean + MARGIN else "contradicted" if order == "above" else "not shown"
    return "supported" if order == "above" else "contradicted" if order == "below" else "not shown"


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


def _above(experiment: str, left: str, rights: Sequence[str], metric: str = "alone pass@1") -> tuple[Comparison, ...]:
    return tuple(Comparison((experiment, left), (experiment, right), metric) for right in rights)


def claims(study: Study, ours: str = "aipo") -> list[Claim]:
    """The abstract's claims in our words, of this coefficient."""
    wide, greedy = "alone pass@max", "alone greedy"
    main, weights = "coefficients", ("sft", "gated", "luffy")
    ablated = "" if ours == "aipo" else f"{ours}_"
    return [
        Claim(
            "Reinforcement learning with verifiable rewards by itself explores within what the policy can do already.",
            tuple(Comparison((place, "grpo"), (place, "base"), wide, "within") for place in (main, "boundary")),
        ),
        Claim(
            "Consulting helpers in training, and learning from their words, moves that boundary.",
            (
                *_above(main, ours, ["base", "grpo", "mask"], wide),
                *_above("boundary", ours, ["base", "grpo"], wide),
                *_above("second", ours, ["base", "grpo", "mask"], wide),
            ),
            figure="boundary_pass_at_k",
        ),
        Claim(
            "After training the policy solves alone, without helpers, what it could not before.",
            tuple(
                test for place in (main, "second") for metric in ("alone pass@1", greedy) for test in _above(place, ours, ["base"], metric)
            ),
            figure="second_bars",
        ),
        Claim(
            "Help where it is needed beats whole expert trajectories (nearest here: `raft`, fine-tuning on accepted ones with help).",
            (*_above(main, ours, ["raft"]), *_above(main, ours, ["raft"], greedy)),
        ),
        Claim(
            "The coefficient with its clipping cures the vanishing gradient of the helpers' tokens (against the exact ratio).",
            (*_above(main, ours, ["ppo"]), *_above("ablations", ours, [f"{ablated}floor_0"])),
            figure="coefficients_curves",
        ),
        Claim(
            "It mitigates the bias of off-policy tokens (against weight one, gated or not, and π/(π+γ)).",
            (
                *_above(main, ours, weights),
                *(t for level in LEVELS[1:] for t in _above("faulty", f"{ours}@{level}", [f"{weight}@{level}" for weight in weights])),
                *_above("verbose", ours, weights),
            ),
        ),
        Claim(
            "Each of the three helpers, Verify, Knowledge and Reasoning, does its part.",
            _above("ablations", ours, [f"{ablated}no_{name}" for name in ("verify", "knowledge", "reasoning")]),
            figure="ablations_bars",
        ),
        Claim(
            "It carries over to other policy models and other RLVR algorithms.",
            tuple(test for pair in pairs(study) for test in _above("generality", f"{pair}/{ours}", [f"{pair}/alone"])),
            figure="generality_bars",
        ),
        Claim("It improves AIME, MATH-500, GPQA-Diamond and LiveCodeBench.", (), "not tested: no model of that size was trained"),
    ]


LEVELS = ("0", "10", "25", "50", "same30", "same40", "same60")
"""Of faulty helpers: per cent of wrong Knowledge replies; "same": always with one and the same wrong rule."""


def pairs(study: Study) -> list[str]:
    """Each architecture/algorithm of `generality`, planned or stored."""
    names = [*EXPERIMENTS["generality"].variants, *study.cells.get("generality", {})]
    return list(dict.fromkeys(name.rpartition("/")[0] for name in names if "/" in name and not untrained(name)))
