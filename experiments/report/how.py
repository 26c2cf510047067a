"""The tables behind the verdicts: how the study was run, and every comparison of every claim."""

from experiments.grid import CHOOSING
from experiments.report.claims import Comparison, claims, judge
from experiments.report.markdown import listed, plain, table
from experiments.report.stored import Study


def runs(study: Study) -> str:
    """A line per experiment, and whether a seed that settings were chosen on reports, too."""
    rows = []
    for name in study.cells:
        own = study.runs(name)
        told = [listed(sorted({getattr(run, key) for run in own} - {""})) or "–" for key in ("config", "hardware", "date", "version")]
        hours = sum(run.seconds or 0 for run in own) / 3600
        rows.append([plain(name), ", ".join(map(str, sorted({run.seed for run in own}))), *told, str(len(own)), f"{hours:.1f}"])
    chosen, reported = (
        {run.seed for name in study.cells if (name in CHOOSING) == is_ for run in study.runs(name)} for is_ in (True, False)
    )
    both = ", ".join(map(str, sorted(chosen & reported)))
    verdict = f"**Settings were chosen on seeds {both}, which report, too.**" if both else "No seed both chose settings and reports."
    return table(["experiment", "seeds", "config", "hardware", "date", "version", "runs", "hours"], rows, left=6) + f"\n\n{verdict}"


def comparisons(study: Study) -> str:
    """Of each claim, of `aipo` and of its first form, as far as both sides have run."""
    parts = []
    for number, both in enumerate(zip(claims(study), claims(study, "signed"), strict=True), start=1):
        words = "; ".join(f"`{name}`: **{claim.words(study)}**" for name, claim in zip(("aipo", "signed"), both, strict=True))
        rows = [_told(study, test) for test in dict.fromkeys([*both[0].tests, *both[1].tests])]
        shown = [row for row in rows if row[-1] != "not run"]
        parts.append(f"### {number}. {both[0].text}\n\n{words}")
        parts += [table(["experiment", "figure", "A", "", "B", "verdict"], shown, left=6)] if shown else []
        parts += [f"{len(rows) - len(shown)} of {len(rows)} comparisons lack runs of one side or both."] if len(shown) < len(rows) else []
    return "\n\n".join(parts)


def _told(study: Study, test: Comparison) -> list[str]:
    found = [(plain(side[1]), study.mean(*side, test.metric)) for side in (test.left, test.right)]
    left, right = (f"{name} {own}, n {own.n}" if own else name for name, own in found)
    return [test.left[0], study.named(test.left[0], test.metric), left, test.wanted, right, judge(study, test)]
