"""What each experiment asks, what it should hold, and what is compared with what in it."""

from dataclasses import dataclass

from experiments.grid import EXPERIMENTS
from experiments.report.claims import arms
from experiments.report.stored import Study


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    title: str
    question: str
    metrics: tuple[str, ...] = ("alone pass@1", "alone greedy", "alone pass@max", "with_agents pass@1", "easy pass@1")
    decided: tuple[str, ...] = ("alone pass@1", "alone greedy")
    """Metrics on which the text compares."""
    drawn: tuple[str, ...] = ("alone pass@1", "alone greedy", "alone pass@max", "easy pass@1")
    expected: tuple[str, ...] = ()
    """Variants that count as missing where they are, before those of the grid."""


@dataclass(frozen=True, slots=True)
class Group:
    """Variants of an experiment that are compared with ``reference``."""

    heading: str
    reference: str
    others: tuple[str, ...]


SECTIONS = (
    Section(
        "coefficients",
        "Coefficients and baselines",
        "What must the loss do with the helpers' tokens for the policy to do alone what it did with help? `base` is the untrained policy; "
        "`grpo` is plain GRPO without helpers, at the learning rate that [Choosing settings](#choosing-settings) gave; `raft` is "
        "fine-tuning on accepted transcripts with helpers; `shortfall` was a coefficient of our own, max(0, 1 − ρ) where A > 0.",
    ),
    Section(
        "faulty",
        "Faulty helpers",
        "Knowledge is wrong: at random in 10, 25 or 50 % of its replies, or (`same`) in 30, 40 or 60 % of them, always with one and the "
        "same wrong rule of an operator.",
        drawn=("alone pass@1", "alone greedy"),
        expected=tuple(f"{method}@0" for method in ("aipo", "gated", "sft", "luffy")),
    ),
    Section(
        "verbose",
        "Wordy helpers",
        "Replies wrap the fact in tokens that are not worth learning. Does a coefficient earn its place over weight one gated by reward? "
        "`_mu`: the helper's own probabilities of its words are known, else μ = 1.",
    ),
    Section(
        "foreign",
        "Wordy helpers in a style that the policy never wrote",
        "The same replies, but the untrained policy gives the words around the fact next to no probability. `aipo_lambda_0.1`: a tenth of "
        "the weight on agent tokens.",
    ),
    Section(
        "ablations",
        "Ablations",
        "What does each part do? `aipo` is the config as it is (floor 0.3, ceiling 2, λ 1, half of the traces with helpers), each other "
        "variant changes one thing of it. `no_verify` is a helper that says yes to everything, `no_knowledge` and `no_reasoning` one that "
        "knows nothing (`?`); `negative_floor` has the floor for A < 0, too; `mu_0.5` takes μ as 0.5, not 1.",
        expected=("aipo",),
    ),
    Section(
        "boundary",
        "The boundary: pass@k",
        "Does training add problems that the untrained policy does not solve in any of its samples?",
        decided=(),
        metrics=(),
    ),
    Section(
        "generality",
        "Other policies and algorithms",
        "Each row: a policy architecture of the same size and a policy-token algorithm, with AIPO and (`alone`) without helpers at the "
        "same settings, which were chosen for AIPO.",
        metrics=("alone pass@1", "alone greedy", "alone pass@max"),
        drawn=("alone pass@1", "alone greedy"),
    ),
    Section(
        "transfer",
        "Longer problems than trained on",
        "Does what was learned carry over to problems with more operators?",
        metrics=("alone pass@1", "alone greedy", "alone pass@max", "with_agents pass@1"),
        drawn=("alone pass@1", "alone greedy", "alone pass@max", "with_agents pass@1"),
    ),
    Section(
        "second",
        "A second task",
        "Does the claim rest on one task? Word problems on prices, which stand in a small corpus that a helper searches.",
    ),
    Section("tuning", "Choosing settings", "Learning rates of plain GRPO; floor, ceiling and λ of `signed`.", decided=()),
    Section(
        "choice",
        "Choosing the coefficient",
        "`aipo` (floor 0.3, ceiling 2, λ 1, and 0 where A < 0), with one setting changed at a time, where helpers are right and terse, "
        "where Knowledge repeats one wrong rule in 30 % of its replies, and where helpers are wordy. Seeds of their own.",
        decided=(),
    ),
)


def sections(study: Study) -> list[Section]:
    """All of ours, and one for each other experiment that is stored."""
    known = {section.name for section in SECTIONS}
    return [*SECTIONS, *(Section(name, name, "An experiment beyond the study's plan.") for name in study.cells if name not in known)]


def variants(study: Study, section: Section) -> list[str]:
    """The expected ones and the grid's in their order, then the others as stored."""
    planned = EXPERIMENTS[section.name].variants if section.name in EXPERIMENTS else ()
    return list(dict.fromkeys([*section.expected, *planned, *study.cells.get(section.name, {})]))


def groups(study: Study, section: Section) -> list[Group]:
    """Which variants are compared with which: all with aipo; of `faulty` level by level, of `generality` policy by policy."""
    names = variants(study, section)
    if section.name == "generality":
        return [Group(pair, on, (off,)) for pair, on, off in arms(study)]
    if section.name != "faulty":
        return [Group("", "aipo", tuple(name for name in names if name != "aipo"))]
    levels: dict[str, list[str]] = {}
    for name in names:
        levels.setdefault(name.partition("@")[2], []).append(name)
    return [Group(level, f"aipo@{level}", tuple(name for name in of if name != f"aipo@{level}")) for level, of in levels.items()]


HEADINGS = {
    "0": "none wrong",
    **{level: f"{level} % wrong" for level in ("10", "25", "50")},
    **{f"same{level}": f"{level} % the same wrong rule" for level in ("30", "40", "60")},
}
"""Groups of `faulty` in words."""
