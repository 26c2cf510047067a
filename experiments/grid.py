"""What the study runs: experiments, their variants as settings over a config, and the order in which they are worth it.

Seeds 1 to 5 are reported; every choice (learning rate, coefficient, floor, ceiling, lambda) was made on TUNING_SEEDS and on seed 0.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from aipo_graph.evaluation.report import MODES
from aipo_graph.evaluation.samples import Mode

Settings = dict[str, str]
"""Names as on the command line (loss.agent) -> values."""

TUNING_SEEDS = (100, 101)
QUICKSTART = "configs/quickstart.yaml"
EVALUATION: Settings = {"evaluate.problems": "128", "evaluate.samples": "16", "evaluate.problems_with_agents": "32"}
ALONE: Settings = {"rollout.with_agents": "0"}
GRPO: Settings = ALONE | {"optimizer.lr": "1e-4"}
"""Plain GRPO. In the experiment `tuning` no learning rate left 0 on hard problems alone; this one did best on easy ones."""


@dataclass(frozen=True)
class Experiment:
    """Variants of one question. The variant ``base`` is never trained, only evaluated."""

    variants: Mapping[str, Settings]
    config: str = QUICKSTART
    settings: Settings = field(default_factory=dict)
    """Of all its variants."""
    bases: Mapping[str, str] = field(default_factory=dict)
    """First part of a variant's name -> its base policy in study.BASES, "*" for all others; default: the policy that the config names."""
    helper: str = ""
    """The one of study.BASES that is a helper here."""
    policies_of: str = ""
    """Evaluates what this other experiment trained under the same variants and seeds, and trains nothing."""
    kinds: Sequence[str] = ()
    """Kinds of held-out problems (default: all of the task's)."""
    modes: Sequence[Mode] = MODES
    k: Sequence[int] | None = None
    """The k of pass@k (default: evaluate's)."""


def helpers(**changed: str) -> Settings:
    """The quick start's helpers, with those that are named taken from helpers.py."""
    ours = {name: f"graphs/operators_agents.py:{name}" for name in ("verify", "knowledge", "reasoning")}
    return {"agents.use": json.dumps(ours | {name: f"experiments/helpers.py:{other}" for name, other in changed.items()})}


def agent(name: str) -> Settings:
    """A coefficient by its name in the study: `signed` is `aipo` as it was at first, with the ratio's weight where A < 0, too."""
    own = {"aipo": {"loss.negative": "0"}, "signed": {"loss.agent": "aipo", "loss.negative": "1"}, "credit": {"loss.negative": "0"}}
    return {"loss.agent": name} | own.get(name, {})


WORDY = helpers(verify="wordy_verify", knowledge="wordy_knowledge", reasoning="wordy_reasoning")
WORDY_MU = helpers(verify="wordy_verify_mu", knowledge="wordy_knowledge_mu", reasoning="wordy_reasoning_mu")
COUNTERFACTUAL: Settings = {"loss.baseline": "counterfactual"}
LEVELS = {"10": "wrong_10", "25": "wrong_25", "50": "wrong_50", "same30": "same_30", "same40": "same_40", "same60": "same_60"}
ALGORITHMS = ("grpo", "dapo", "dr_grpo", "rloo", "cispo", "gspo")

CONDITIONS: Mapping[str, Settings] = {
    "clean": {},
    "same30": helpers(knowledge="same_30"),
    "wordy": WORDY | {"rollout.max_tokens": "240"},
}
CHANGES: Mapping[str, Settings] = (
    {"aipo": agent("aipo"), "negative_0.3": agent("aipo") | {"loss.negative": "0.3"}, "signed": agent("signed")}
    | {f"floor_{floor}": agent("aipo") | {"loss.floor": floor} for floor in ("0.03", "0.1", "1")}
    | {f"ceiling_{ceiling}": agent("aipo") | {"loss.ceiling": ceiling} for ceiling in ("0.5", "1")}
    | {f"lambda_{weight}": agent("aipo") | {"loss.agent_weight": weight} for weight in ("0.3", "3")}
)
"""Of the coefficient's settings, one at a time; the rest as the config has it (floor 0.3, ceiling 2, lambda 1, and 0 where A < 0)."""

WORDY_VARIANTS: dict[str, Settings] = (
    {"base": WORDY}
    | {name: agent(name) | WORDY for name in ("aipo", "signed", "gated", "sft", "luffy", "mask", "ppo")}
    | {"aipo_mu": agent("aipo") | WORDY_MU}
    | {"counterfactual": agent("signed") | COUNTERFACTUAL | WORDY}
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "tuning": Experiment(
        {f"grpo_{lr}": ALONE | {"optimizer.lr": lr} for lr in ("3e-5", "1e-4", "3e-4", "7e-4")}
        | {f"floor_{floor}": agent("signed") | {"loss.floor": floor} for floor in ("0.03", "0.1", "0.3", "1")}
        | {f"ceiling_{ceiling}": agent("signed") | {"loss.ceiling": ceiling} for ceiling in ("1", "2")}
        | {f"lambda_{weight}": agent("signed") | {"loss.agent_weight": weight} for weight in ("0.3", "1", "3")}
        | {f"agent_{name}": agent(name) for name in ("gated", "sft")}
        | {"baseline_counterfactual": agent("signed") | COUNTERFACTUAL}
    ),
    "choice": Experiment(
        {
            f"{condition}/{change}": settings | condition_settings
            for condition, condition_settings in CONDITIONS.items()
            for change, settings in CHANGES.items()
        }
        | {"50/credit": agent("credit") | helpers(knowledge="wrong_50"), "same30/credit": agent("credit") | helpers(knowledge="same_30")},
        bases={"wordy": "wordy"},
    ),
    "coefficients": Experiment(
        {"base": {}}
        | {name: agent(name) for name in ("aipo", "signed", "gated", "sft", "luffy", "mask", "ppo", "credit")}
        | {"echo": agent("echo") | {"loss.agent_weight": "0.1"}}
        | {"grpo": GRPO}
        | {"raft": {"rollout.with_agents": "1", "loss.advantage": "raft", "loss.agent": "gated"}}
    ),
    "faulty": Experiment(
        {
            f"{name}@{level}": agent(name) | helpers(knowledge=factory)
            for level, factory in LEVELS.items()
            for name in ("aipo", "signed", "gated", "sft", "luffy", "mask", "ppo", "credit")
        }
        | {f"counterfactual@{level}": agent("signed") | COUNTERFACTUAL | helpers(knowledge=factory) for level, factory in LEVELS.items()}
        | {f"{name}@50x3": agent(name) | helpers(knowledge=LEVELS["50"]) | {"train.steps": "225"} for name in ("aipo", "gated")}
    ),
    "verbose": Experiment(WORDY_VARIANTS, settings={"rollout.max_tokens": "240"}, bases={"*": "wordy"}),
    "foreign": Experiment(
        WORDY_VARIANTS
        | {f"aipo_lambda_{weight}": agent("aipo") | WORDY | {"loss.agent_weight": weight} for weight in ("0.1", "0.3")}
        | {"aipo_tags": agent("aipo") | WORDY | {"loss.agent_weight": "0.3", "loss.tags": "true"}}
        | {"aipo_tags_x2": agent("aipo") | WORDY | {"loss.agent_weight": "0.3", "loss.tags": "true", "train.steps": "150"}},
        settings={"rollout.max_tokens": "240"},
        bases={"*": "reader"},
    ),
    "language_model": Experiment(
        {"base": {}}
        | {name: agent(name) for name in ("aipo", "signed", "gated", "sft", "luffy", "mask", "ppo")}
        | {"aipo_no_mu": agent("aipo") | helpers(knowledge="expert_no_mu")},
        settings=helpers(knowledge="expert"),
        helper="expert",
    ),
    "ablations": Experiment(
        {name: helpers(**{name.removeprefix("no_"): name}) for name in ("no_verify", "no_knowledge", "no_reasoning")}
        | {f"floor_{floor}": {"loss.floor": floor} for floor in ("0", "0.03", "0.1", "1")}
        | {"ceiling_0.5": {"loss.ceiling": "0.5"}, "ceiling_1": {"loss.ceiling": "1"}}
        | {f"lambda_{weight}": {"loss.agent_weight": weight} for weight in ("0.3", "3")}
        | {f"share_{share}": {"rollout.with_agents": share} for share in ("0.25", "0.75", "1")}
        | {"baseline_group": {"loss.baseline": "group"}, "mu_0.5": {"loss.behaviour": "0.5"}},
        settings={"loss.negative": "0"},
    ),
    "generality": Experiment(
        {
            f"{architecture}/{algorithm}/{method}": {"loss.algorithm": algorithm} | (ALONE if method == "alone" else agent(method))
            for architecture, algorithm, method in product(("llama", "qwen3", "gemma3"), ALGORITHMS, ("aipo", "alone"))
        },
        bases={"qwen3": "qwen3", "gemma3": "gemma3"},
    ),
    "boundary": Experiment(
        {name: {} for name in ("base", "aipo", "signed", "grpo", "mask", "sft")},
        settings={"evaluate.problems": "48", "evaluate.samples": "256"},
        policies_of="coefficients",
        kinds=("hard",),
        modes=("alone",),
        k=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    ),
    "transfer": Experiment(
        {name: {} for name in ("base", "aipo", "signed", "grpo", "mask", "sft")},
        settings={"rollout.max_tokens": "240"},
        policies_of="coefficients",
        kinds=("long",),
    ),
    "second": Experiment(
        {"base": {}, "aipo": agent("aipo"), "signed": agent("signed"), "mask": agent("mask"), "gated": agent("gated"), "grpo": GRPO},
        config="experiments/shopping/config.yaml",
        bases={"*": "shopping"},
    ),
    "third": Experiment(
        {"base": {}, "aipo": agent("aipo"), "gated": agent("gated"), "mask": agent("mask"), "grpo": ALONE},
        config="examples/legs/config.yaml",
        bases={"*": "legs"},
    ),
    "lag": Experiment(
        {f"lag_{lag}": {"rollout.max_lag": str(lag)} for lag in (0, 1, 2, 4)}
        | {f"lag_{lag}_uncapped": {"rollout.max_lag": str(lag), "loss.mismatch_cap": "1e9"} for lag in (2, 4)},
        settings={"run.checkpoint_every": "50"},  # the embedded engine starts afresh after each
    ),
}

REPORTED = (1, 2, 3, 4, 5)
CHOOSING = ("tuning", "choice")
"""Experiments that chose settings; every other one reports."""
ORDER: Sequence[tuple[str, Sequence[str], Sequence[int]]] = (
    ("coefficients", ("aipo", "gated", "sft", "luffy", "ppo", "mask", "signed", "grpo"), (1, 2, 3)),
    ("faulty", tuple(f"{name}@same30" for name in ("aipo", "gated", "sft", "luffy", "ppo", "mask")), (1, 2, 3)),
    ("verbose", ("aipo", "gated", "sft", "luffy", "ppo", "mask"), (1, 2, 3)),
    ("faulty", ("aipo@10", "sft@10", "luffy@10", "aipo@same40", "sft@same40", "luffy@same40"), (1, 2, 3)),
    ("faulty", ("aipo@25", "ppo@25", "mask@25", "aipo@50", "gated@50"), (1, 2, 3)),
    ("generality", tuple(f"llama/{algorithm}/{method}" for algorithm in ALGORITHMS[1:] for method in ("aipo", "alone")), (1,)),
    ("language_model", ("aipo", "gated", "sft", "luffy", "ppo", "mask"), (1, 2, 3)),
    ("faulty", tuple(f"{name}@50" for name in ("sft", "luffy", "ppo", "mask")), (1, 2, 3)),
    ("second", ("aipo", "mask", "grpo"), (1, 2, 3)),
    ("generality", ("qwen3/grpo/aipo", "gemma3/grpo/aipo", "qwen3/grpo/alone", "gemma3/grpo/alone"), (1,)),
    ("language_model", ("aipo_no_mu",), (1, 2, 3)),
    ("foreign", ("aipo_tags", "aipo_lambda_0.3", "aipo", "aipo_tags_x2"), (1, 2, 3)),
    ("faulty", ("ppo@10", "mask@10", "ppo@same40", "mask@same40"), (1, 2, 3)),
    ("choice", ("same30/aipo", "wordy/aipo", "clean/aipo"), (101,)),
    ("ablations", ("no_verify", "no_knowledge", "no_reasoning"), (1, 2, 3)),
    ("boundary", ("aipo", "grpo"), (1, 2, 3)),
    ("transfer", ("aipo", "grpo", "mask"), (1, 2)),
    ("third", tuple(EXPERIMENTS["third"].variants), (1, 2, 3)),
    ("lag", tuple(EXPERIMENTS["lag"].variants), (1, 2, 3)),
    ("generality", tuple(EXPERIMENTS["generality"].variants), (1, 2)),
    ("faulty", tuple(EXPERIMENTS["faulty"].variants), (1, 2, 3)),
    ("coefficients", tuple(EXPERIMENTS["coefficients"].variants), REPORTED),
    ("faulty", tuple(EXPERIMENTS["faulty"].variants), REPORTED),
    ("verbose", tuple(EXPERIMENTS["verbose"].variants), REPORTED),
    ("foreign", tuple(EXPERIMENTS["foreign"].variants), (1, 2, 3)),
    ("second", tuple(EXPERIMENTS["second"].variants), (1, 2, 3)),
    ("transfer", tuple(EXPERIMENTS["transfer"].variants), REPORTED),
    ("boundary", tuple(EXPERIMENTS["boundary"].variants), REPORTED),
    ("ablations", tuple(EXPERIMENTS["ablations"].variants), (1, 2, 3)),
    ("tuning", tuple(EXPERIMENTS["tuning"].variants), TUNING_SEEDS),
    ("choice", tuple(EXPERIMENTS["choice"].variants), TUNING_SEEDS),
    ("language_model", tuple(EXPERIMENTS["language_model"].variants), (1, 2, 3)),
)
"""By worth, first to last: where the time ends, what stands last is missing."""


@dataclass(frozen=True)
class Run:
    """One training of the study and its evaluation."""

    experiment: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder under runs/study."""
        return f"{self.experiment}-{self.variant}-{self.seed}".replace("/", "+").replace("@", "=")

    @property
    def command(self) -> str:
        """What trains and evaluates it anew, whatever is stored."""
        only = shlex.join(["--only", self.experiment, "--variants", self.variant, "--seeds", str(self.seed)])
        return f"python -m experiments.study --results again {only}"

    @property
    def of(self) -> Experiment:
        return EXPERIMENTS[self.experiment]

    @property
    def base(self) -> str:
        return self.of.bases.get(self.variant.partition("/")[0], self.of.bases.get("*", ""))

    @property
    def settings(self) -> Settings:
        return {**self.of.settings, **self.of.variants[self.variant]}


def runs() -> Iterator[Run]:
    """Every run once, the worthiest first."""
    everything = (Run(experiment, variant, seed) for experiment, variants, seeds in ORDER for seed in seeds for variant in variants)
    return iter(dict.fromkeys(everything))
