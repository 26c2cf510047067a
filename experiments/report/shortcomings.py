"""What did not work and what nobody knows, as far as the stored runs tell it by rule."""

import statistics
from collections import Counter
from collections.abc import Sequence

from experiments.grid import CHOOSING
from experiments.report.claims import Claim, Verdict
from experiments.report.markdown import listed, plain
from experiments.report.sections import sections, variants
from experiments.report.stored import SEEDS, Run, Study, compare, untrained

UNEQUAL = 0.05
"""How far the sampled tokens of a variant may lie from the median of its experiment before the report says so."""


def shortcomings(study: Study, found: Sequence[tuple[Claim, list[Verdict]]]) -> list[str]:
    """Sentences: missing cells, few seeds, claims that failed, unequal budgets, forgotten problems, runs that ended early."""
    return [*_missing(study), *_failed(study, found), *_unequal(study), *_forgotten(study), *_ended(study)]


def _missing(study: Study) -> list[str]:
    lines = []
    absent = [section.name for section in sections(study) if not study.runs(section.name)]
    if absent:
        lines.append(f"Not run: {listed(absent)}.")
    for section in sections(study):
        names = variants(study, section) if section.name not in absent else []
        counts = {name: len(study.cell(section.name, name)) for name in names}
        missing = [name for name, n in counts.items() if not n]
        if missing:
            lines.append(f"{plain(section.name)}, cells without a run: {listed(missing)}.")
        few = sorted({n for name, n in counts.items() if 0 < n < SEEDS and not untrained(name)}) if section.name not in CHOOSING else []
        if few:
            by_n = [f"{n} for {listed(name for name in names if counts[name] == n and not untrained(name))}" for n in few]
            lines.append(f"{plain(section.name)}, fewer than {SEEDS} seeds: {'; '.join(by_n)}.")
    return lines


def _failed(study: Study, found: Sequence[tuple[Claim, list[Verdict]]]) -> list[str]:
    lines = []
    for claim, verdicts in found:
        for word in ("contradicted", "not shown"):
            told = [
                f"{plain(test.left[1])} {test.wanted} {plain(test.right[1])} ({test.left[0]}, {study.named(test.left[0], test.metric)})"
                for test, own in zip(claim.tests, verdicts, strict=True)
                if own == word
            ]
            if told:
                lines.append(f"**{word.capitalize()}**: {'; '.join(told)}. The claim: {claim.text}")
    return lines


def _trained(study: Study, experiment: str) -> dict[str, list[Run]]:
    return {name: cell for name, cell in study.cells[experiment].items() if not untrained(name)}


def _unequal(study: Study) -> list[str]:
    lines = []
    for experiment in study.cells:
        spent = {
            name: statistics.fmean(tokens)
            for name, cell in _trained(study, experiment).items()
            if (tokens := [run.tokens for run in cell if run.tokens])
        }
        median = statistics.median(spent.values()) if spent else 0.0
        far = [f"{name} {tokens / 1e6:.2f} M" for name, tokens in spent.items() if abs(tokens / median - 1) > UNEQUAL]
        if far:
            lines.append(
                f"{plain(experiment)}, sampled tokens more than {UNEQUAL:.0%} off the median of {median / 1e6:.2f} M: {listed(far)}."
            )
    return lines


def _forgotten(study: Study) -> list[str]:
    """Variants below the untrained policy of their experiment on easy problems."""
    lines = []
    for experiment in study.cells:
        for metric in ("easy pass@1", "easy greedy"):
            base = study.mean(experiment, "base", metric)
            means = {name: study.mean(experiment, name, metric) for name in _trained(study, experiment)}
            below = [f"{plain(name)} {found}" for name, found in means.items() if compare(found, base) == "below"]
            if below:
                lines.append(f"{plain(experiment)}, forgotten: {metric} lies below the untrained policy's {base} for {', '.join(below)}.")
    return lines


def _ended(study: Study) -> list[str]:
    lines = []
    for experiment in study.cells:
        reasons = Counter((run.variant, run.stopped) for run in study.runs(experiment) if run.stopped)
        if reasons:
            told = listed(f"{variant} {count} x {reason}" for (variant, reason), count in sorted(reasons.items()))
            lines.append(f"{plain(experiment)}, runs that ended before their last step: {told}.")
    return lines
