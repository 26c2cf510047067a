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
COUNTERFACTUAL: Settings = {"loss.baseline": "counterfactual"}
LEVELS = {"10": "wrong_10", "25": "wrong_25", "50": "wrong_50", "same30": "same_30", "same40": "same_40", "same60": "same_60"}
METHODS = ("aipo", "gated", "sft", "luffy", "ppo", "mask", "signed")
ALGORITHMS = ("grpo", "dapo", "dr_grpo", "rloo", "cispo", "gspo")

CHANGES: Mapping[str, Settings] = (
    {"aipo": agent("aipo"), "negative_0.3": agent("aipo") | {"loss.negative": "0.3"}, "signed": agent("signed")}
    | {f"floor_{floor}": agent("aipo") | {"loss.floor": floor} for floor in ("0.03", "0.1", "1")}
    | {f"ceiling_{ceiling}": agent("aipo") | {"loss.ceiling": ceiling} for ceiling in ("0.5", "1")}
    | {f"lambda_{weight}": agent("aipo") | {"loss.agent_weight": weight} for weight in ("0.3", "3")}
)
"""Of the coefficient's settings, one at a time; the rest as the config has it (floor 0.3, ceiling 2, lambda 1, and 0 where A < 0)."""

WORDY_VARIANTS: dict[str, Settings] = {"base": WORDY} | {name: agent(name) | WORDY for name in METHODS}

EXPERIMENTS: Mapping[str, Experiment] = {
    "tuning": Experiment(
        {f"grpo_{lr}": ALONE | {"optimizer.lr": lr} for lr in ("3e-5", "1e-4", "3e-4")}
        | {f"floor_{floor}": agent("signed") | {"loss.floor": floor} for floor in ("0.03", "0.1", "0.3", "1")}
        | {"ceiling_1": agent("signed") | {"loss.ceiling": "1"}}
        | {f"lambda_{weight}": agent("signed") | {"loss.agent_weight": weight} for weight in ("0.3", "3")}
        | {"agent_gated": agent("gated"), "baseline_counterfactual": agent("signed") | COUNTERFACTUAL}
    ),
    "choice": Experiment(
        {f"same30/{change}": settings | helpers(knowledge="same_30") for change, settings in CHANGES.items()}
        | {f"wordy/{name}": agent(name) | WORDY | {"rollout.max_tokens": "240"} for name in ("aipo", "signed")}
        | {"clean/aipo": agent("aipo")},
        bases={"wordy": "wordy"},
    ),
    "coefficients": Experiment(
        {"base": {}}
        | {name: agent(name) for name in (*METHODS, "credit")}
        | {"echo": agent("echo") | {"loss.agent_weight": "0.1"}}
        | {"grpo": GRPO}
        | {"raft": {"rollout.with_agents": "1", "loss.advantage": "raft", "loss.agent": "gated"}}
    ),
    "faulty": Experiment(
        {
            f"{name}@{level}": agent(name) | helpers(knowledge=factory)
            for level, factory in LEVELS.items()
            for name in (METHODS if level != "same60" else METHODS[:4])
        }
        | {f"credit@{level}": agent("credit") | helpers(knowledge=LEVELS[level]) for level in ("50", "same30")}
        | {"counterfactual@same30": agent("signed") | COUNTERFACTUAL | helpers(knowledge="same_30")}
        | {f"{name}@50x3": agent(name) | helpers(knowledge="wrong_50") | {"train.steps": "225"} for name in ("aipo", "gated")}
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
        {"base": {}} | {name: agent(name) for name in METHODS} | {"aipo_no_mu": agent("aipo") | helpers(knowledge="expert_no_mu")},
        settings=helpers(knowledge="expert"),
        helper="expert",
    ),
    "ablations": Experiment(
        {name: helpers(**{name.removeprefix("no_"): name}) for name in ("no_verify", "no_knowledge", "no_reasoning")}
        | {"floor_0": {"loss.floor": "0"}},
        settings={"loss.negative": "0"},
    ),
    "generality": Experiment(
        {
            f"{architecture}/{algorithm}/{method}": {"loss.algorithm": algorithm} | (ALONE if method == "alone" else agent(method))
            for architecture, algorithm, method in product(("llama", "qwen3", "gemma3"), ALGORITHMS, ("aipo", "alone"))
            if (architecture, algorithm, method) != ("llama", "grpo", "aipo")  # of `coefficients`
        },
        bases={"qwen3": "qwen3", "gemma3": "gemma3"},
    ),
    "boundary": Experiment(
        {name: {} for name in ("base", "aipo", "grpo")},
        settings={"evaluate.problems": "48", "evaluate.samples": "256"},
        policies_of="coefficients",
        kinds=("hard",),
        modes=("alone",),
        k=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    ),
    "transfer": Experiment(
        {name: {} for name in ("base", "aipo", "grpo", "mask")},
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
        | {"lag_4_uncapped": {"rollout.max_lag": "4", "loss.mismatch_cap": "1e9"}},
        settings={"run.checkpoint_every": "50"},  # the embedded engine starts afresh after each
    ),
}

REPORTED = (1, 2, 3, 4, 5)
CHOOSING = ("tuning", "choice")
"""Experiments that chose settings; every other one reports."""
ORDER: Sequence[tuple[str, Sequence[str], Sequence[int]]] = (
    ("coefficients", ("aipo", "gated", "sft", "luffy", "ppo", "mask", "signed", "grpo"), (1, 2, 3)),
    ("faulty", tuple(f"{name}@same30" for name in METHODS), (1, 2, 3)),
    ("verbose", ("base", *METHODS), (1, 2, 3)),
    ("faulty", tuple(f"{name}@{level}" for level in ("10", "25") for name in METHODS[:6]), (1, 2, 3)),
    ("choice", tuple(EXPERIMENTS["choice"].variants), TUNING_SEEDS[:1]),
    ("generality", ("qwen3/grpo/aipo", "qwen3/grpo/alone", "gemma3/grpo/aipo", "gemma3/grpo/alone"), (1, 2)),
    ("faulty", tuple(f"{name}@same40" for name in METHODS[:6]), (1, 2, 3)),
    ("generality", tuple(name for name in EXPERIMENTS["generality"].variants if name.startswith("llama")), (1, 2)),
    ("faulty", tuple(f"{name}@50" for name in METHODS[:6]), (1, 2, 3)),
    ("foreign", ("aipo_tags", "aipo_tags_x2"), (1, 2, 3)),
    ("language_model", (*METHODS[:6], "aipo_no_mu"), (1, 2, 3)),
    ("second", ("aipo", "mask", "grpo"), (1, 2, 3)),
    ("ablations", tuple(EXPERIMENTS["ablations"].variants), (1, 2, 3)),
    ("faulty", tuple(f"{name}@same60" for name in METHODS[:4]), (1, 2, 3)),
    ("foreign", tuple(EXPERIMENTS["foreign"].variants), (1, 2, 3)),
    ("choice", ("same30/aipo", "wordy/aipo", "clean/aipo"), TUNING_SEEDS[1:]),
    *((name, tuple(EXPERIMENTS[name].variants), (1, 2, 3)) for name in ("boundary", "transfer", "third", "lag")),
    *((name, tuple(EXPERIMENTS[name].variants), (1, 2, 3)) for name in ("language_model", "second")),
    ("generality", tuple(EXPERIMENTS["generality"].variants), (1, 2)),
    ("faulty", tuple(EXPERIMENTS["faulty"].variants), (1, 2, 3)),
    ("coefficients", tuple(EXPERIMENTS["coefficients"].variants), (1, 2, 3)),
    *((name, METHODS, REPORTED) for name in ("coefficients", "verbose")),
    ("faulty", tuple(f"{name}@{level}" for level in LEVELS if level != "same60" for name in METHODS), REPORTED),
    ("tuning", tuple(EXPERIMENTS["tuning"].variants), TUNING_SEEDS[:1]),
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
    return iter(dict.fromkeys(run for run in everything if run.variant != "base" or run.seed == 1))
