"""The report: `python -m experiments.report` makes docs/results.md and docs/img/study/ from the stored runs of the study.

Equal runs give equal files. What has not run yet is shown as missing.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from aipo_graph import cli
from aipo_graph.cli import write_whole
from aipo_graph.errors import ConfigError
from experiments import grid
from experiments.grid import CHOOSING
from experiments.report import figures
from experiments.report.claims import LEVELS, RULE, Claim, Comparison, Verdict, claims, judge, together
from experiments.report.markdown import fold, listed, plain, table, verbatim
from experiments.report.sections import HEADINGS, Group, Section, groups, sections, variants
from experiments.report.shortcomings import shortcomings
from experiments.report.stored import Mean, Order, Run, Study, by_order, compare, read

NOTES = Path(__file__).parents[1] / "notes.md"
"""What no figure says, by hand; taken into the report as it is."""
IMAGES = "img/study"
HEAD = """\
# Results of the study

Made by `python -m experiments.report` from the stored runs ({results}, one line per run); every figure and verdict below is computed from
them. Only the abstract of the paper ([arXiv 2605.08401](https://arxiv.org/abs/2605.08401)) was available to us: coefficient, clipping and
all settings are our reconstruction, and its claims stand here in our words."""
AGAIN = """\
`python -m experiments.study` runs what has no result yet, and goes on where it was killed; with `--results DIR` it runs all of it anew,
beside what is stored. Then the command above. Each stored line holds its settings, and each section below the commands of its first seeds.
Hours are by the clock, one process on one of the shared cores, since the run's last start."""
LIMITS = """\
- The policies are tiny (some 145 k parameters), and the tasks are made for this study: no large language model was trained.
- The operator task is built so that the boundary can be counted: a rule that the base lacks has 20,000 possible values. That plain GRPO is
  stuck on it is by design; what is measured is what the alternatives do about it. What is learned is knowledge and procedure from helpers.
- An interval over seeds covers training and sampling. All seeds of a task start from one base policy and are evaluated on the same held-out
  problems, on which settings were chosen, too (the quick start's recipe on the first 64): it covers neither their choice nor that of tasks.
- Tokens are those that the policy sampled; what the helpers wrote is not counted."""
Judged = Sequence[tuple[Claim, list[Verdict]]]


def titled(study: Study, experiment: str, metric: str) -> str:
    return study.named(experiment, metric).replace("_", " ")


def some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers)))) or "none"


# --- the parts of the report


def in_short(study: Study, found: Judged) -> str:
    head = ("base", "grpo", "mask", "aipo")
    means = [f"{name} {_with_n(study.mean('coefficients', name, 'alone pass@1')) or 'not run'}" for name in head]
    lines = [f"- **{claim.untested or together(verdicts)}**: {claim.text}" for claim, verdicts in found]
    runs = sum(len(study.runs(name)) for name in study.cells)
    first = f"{runs} runs. Alone pass@1 on held-out hard problems: {'; '.join(means)}. The abstract's claims, by [the rule below](#claims):"
    return "\n\n".join(["## In short", first, "\n".join(lines)])


def how(study: Study) -> str:
    rows = []
    for name in study.cells:
        runs = study.runs(name)
        told = [listed(sorted({getattr(run, key) for run in runs} - {""})) or "–" for key in ("config", "hardware", "date", "version")]
        hours = sum(run.seconds or 0 for run in runs) / 3600
        rows.append([plain(name), some([run.seed for run in runs]), *told, _evaluated(runs), str(len(runs)), f"{hours:.1f}"])
    chosen = [run.seed for name in CHOOSING for run in study.runs(name)]
    reported = [run.seed for name in study.cells if name not in CHOOSING for run in study.runs(name)]
    both = sorted(set(chosen) & set(reported))
    seeds = f"Settings were chosen on seeds {some(chosen)}, and the quick start's recipe, before, on its seed 0; figures are reported on "
    verdict = f"seeds {some(reported)}. " + (f"**Seeds {some(both)} did both.**" if both else "No seed did both.")
    head = ["experiment", "seeds", "config", "hardware", "date", "version", "problems × samples alone", "runs", "hours"]
    return "\n\n".join(["## How it was run", AGAIN, table(head, rows, left=7), seeds + verdict, "What this cannot tell:", LIMITS])


def _evaluated(runs: Sequence[Run]) -> str:
    """How many problems of the first kind, with how many samples."""
    sizes = {tuple(run.trained.alone.get(name) for name in ("problems", "samples")) for run in runs}
    return listed(sorted(f"{problems} × {samples}" for problems, samples in sizes if problems and samples)) or "–"


def claim_tables(study: Study, found: Judged) -> str:
    parts = ["## Claims", RULE]
    head = ["experiment", "figure", "A", "", "B", "verdict"]
    for number, (claim, verdicts) in enumerate(found, start=1):
        parts.append(f"### {number}. {claim.text}\n\nVerdict: **{claim.untested or together(verdicts)}**.")
        rows = [[*_told(study, test), word] for test, word in zip(claim.tests, verdicts, strict=True) if word != "not run"]
        parts += [table(head, rows, left=6)] if rows else []
        missing = f"{len(claim.tests) - len(rows)} of its {len(claim.tests)} comparisons lack runs of one side or both."
        parts += [missing] if 0 < len(rows) < len(claim.tests) else []
    return "\n\n".join(parts)


def _told(study: Study, test: Comparison) -> list[str]:
    sides = [f"{plain(side[1])} {_with_n(study.mean(*side, test.metric))}" for side in (test.left, test.right)]
    return [test.left[0], titled(study, test.left[0], test.metric), sides[0], test.wanted, sides[1]]


def _with_n(found: Mean | None) -> str:
    return f"{found}, n {found.n}" if found else ""


def where_it_matters(study: Study) -> str:
    """The coefficients against weight one and π/(π+γ), condition by condition."""
    conditions = [("coefficients", ""), *(("faulty", f"@{level}") for level in LEVELS[1:]), ("verbose", ""), ("foreign", "")]
    others = ("gated", "luffy", "sft", "ppo")
    rows = []
    for coefficient in ("aipo", "signed"):
        for experiment, tail in conditions:
            for metric in ("alone pass@1", "alone greedy"):
                own = study.mean(experiment, f"{coefficient}{tail}", metric)
                words = [compare(own, study.mean(experiment, f"{method}{tail}", metric)) for method in others]
                if set(words) == {"not run"}:
                    continue
                shown = [f"**{word}**" if word in ("above", "below") else word for word in words]
                rows.append([coefficient, f"{experiment}{tail}", metric, _with_n(own), *shown])
    head = ["coefficient", "condition", "figure", "", *(f"against {method}" for method in others)]
    text = "Each coefficient is above, below, or not separated from the alternatives, by the first rule under [Claims](#claims):"
    if not rows:
        return "## Where a coefficient matters, and where not\n\n**Not run.**"
    return "\n\n".join(["## Where a coefficient matters, and where not", text, table(head, rows, left=3)])


def section_text(study: Study, section: Section, images: Sequence[tuple[str, str]]) -> str:
    parts = [f"## {plain(section.title)}", section.question]
    if not study.runs(section.name):
        return "\n\n".join([*parts, "**Not run.**"])
    if not section.metrics:
        section = dataclasses.replace(section, metrics=tuple(f"alone pass@{k}" for k in study.ks(section.name)))
    names, heads = variants(study, section), [titled(study, section.name, metric) for metric in section.metrics]
    parts.append(table(["variant", "n", *heads, "policy tokens, M", "steps"], [_row(study, section, name) for name in names]))
    parts += ["\n".join(sentences)] if (sentences := _comparisons(study, section)) else []
    parts += [f"![{caption}]({IMAGES}/{name}.png)\n\n{caption} ([SVG]({IMAGES}/{name}.svg))" for name, caption in images]
    cells = {name: cell for name in names if (cell := study.cell(section.name, name))}
    figures_ = {
        name: [[f"{run.seed}: {_number(run, study, section, m)}" for run in cell] for m in section.metrics] for name, cell in cells.items()
    }
    each = [[plain(name), *map(", ".join, columns)] for name, columns in figures_.items()]
    settings = [[plain(name), listed(f"{key}={value}" for key, value in cell[0].settings.items()) or "–"] for name, cell in cells.items()]
    planned = grid.EXPERIMENTS[section.name].variants if section.name in grid.EXPERIMENTS else ()
    own = [grid.Run(section.name, name, runs[0].seed) for name, runs in study.cells[section.name].items() if name in planned]
    commands = [run.command for run in own]
    folded = [table(["variant", *heads], each), table(["variant", "settings over the config"], settings, left=2), verbatim(commands)]
    return "\n\n".join([*parts, fold("Each seed's figures, settings, and the command of the first seed", *folded)])


def _row(study: Study, section: Section, name: str) -> list[str]:
    cell = study.cell(section.name, name)
    if not cell:
        return [plain(name), "0", *["not run"] * len(section.metrics), "", ""]
    origin = "" if name in study.cells[section.name] else " (from coefficients)"
    tokens = [run.tokens for run in cell if run.tokens]
    steps = sorted({run.steps for run in cell if run.steps})
    means = [str(study.mean(section.name, name, metric) or "–") for metric in section.metrics]
    spent = f"{statistics.fmean(tokens) / 1e6:.2f}" if tokens else "–"
    return [plain(name) + origin, str(len(cell)), *means, spent, "–".join(dict.fromkeys(map(str, [*steps[:1], *steps[-1:]]))) or "–"]


def _number(run: Run, study: Study, section: Section, metric: str) -> str:
    value = run.value(study.named(section.name, metric))
    return "–" if value is None else f"{value:.3f}"


def _comparisons(study: Study, section: Section) -> list[str]:
    """A sentence per metric and group: what the reference is above, below, and not separated from. Pairs are told together."""
    sentences, found = [], groups(study, section)
    pairs = len(found) > 1 and all(len(group.others) == 1 for group in found)
    for metric in section.decided:
        title = titled(study, section.name, metric)
        if pairs:
            orders = by_order({group.heading: _order(study, section, group, group.others[0], metric) for group in found})
            told = "; ".join(f"{ORDER_TEXT[order]} its counterpart for {listed(names)}" for order, names in orders.items())
            sentences += [f"- {title}: aipo is {told}."] if told else []
            continue
        for group in found:
            own = study.mean(section.name, group.reference, metric)
            orders = by_order({name: _order(study, section, group, name, metric) for name in group.others})
            if own and orders:
                told = "; ".join(f"{ORDER_TEXT[order]} {listed(names)}" for order, names in orders.items())
                heading = f"{HEADINGS.get(group.heading, plain(group.heading))}, " if group.heading else ""
                sentences.append(f"- {heading}{title}: {plain(group.reference)} {own} is {told}.")
    return sentences


def _order(study: Study, section: Section, group: Group, name: str, metric: str) -> Order:
    return compare(study.mean(section.name, group.reference, metric), study.mean(section.name, name, metric))


ORDER_TEXT: dict[Order, str] = {
    "above": "**above**",
    "below": "**below**",
    "not separated": "not separated from",
    "one seed": "of too few seeds to compare with",
}


def frank(study: Study, found: Judged) -> str:
    lines = "\n".join(f"- {line}" for line in shortcomings(study, found)) or "Nothing that the runs show by rule."
    notes = [NOTES.read_text(encoding="utf-8").strip()] if NOTES.is_file() else []
    return "\n\n".join(["## What did not work, and what we do not know", lines, *notes])


# --- figures


SMOOTHED = f"means over seeds of running means of {figures.WINDOW} steps"
BANDS = f"95 % bands from {figures.BANDED} seeds on"
CAPTIONS = {
    "bars": "Bars: means over seeds; circles: the seeds; lines: 95 % intervals, cut at 0 and 1",
    "pass_at_k": f"pass@k alone: means over seeds, {BANDS}",
    "training": f"Reward in training: {SMOOTHED}, {BANDS}",
    "consults": f"Consults of each helper per trace with helpers over training: {SMOOTHED}, {BANDS}",
    "ratios": "The helpers' tokens by their raw ratio over training, before floor and ceiling clip it (μ = 1 where the helper gives none): "
    f"{SMOOTHED}, {BANDS}",
}
DRAWN = {
    "coefficients": ("bars", "pass_at_k", "training", "consults", "ratios"),
    "boundary": ("pass_at_k",),
    "verbose": ("bars", "ratios"),
    "second": ("bars", "training", "consults"),
    "tuning": (),
}
"""Section -> its figures; bars for all others."""


def draw(study: Study, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Draws what there is data for; section -> the names and captions of its figures. Those of an earlier report go."""
    shown: dict[str, list[tuple[str, str]]] = {}
    for number, section in enumerate(sections(study)):
        name = section.name if section.name.isidentifier() and section.name.isascii() else f"experiment_{number}"
        for kind, caption in CAPTIONS.items():
            path = folder / f"{name}_{kind}"
            wanted = kind in DRAWN.get(section.name, ("bars",)) and study.runs(section.name)
            if wanted and (draw_bars(study, section, path) if kind == "bars" else figures.LINES[kind](study, section.name, path)):
                shown.setdefault(section.name, []).append((path.name, caption))
            else:
                for ending in (".png", ".svg"):
                    path.with_suffix(ending).unlink(missing_ok=True)
    return shown


def draw_bars(study: Study, section: Section, path: Path) -> bool:
    """Bars of ``section.drawn``, group by group; pairs stand without headings, groups without a run not at all."""
    found = [group for group in groups(study, section) if any(study.cell(section.name, name) for name in (group.reference, *group.others))]
    pairs = len(found) > 1 and all(len(group.others) == 1 for group in found)
    bars: dict[str, list[figures.Bar]] = {}
    for group in found:
        heading = "" if pairs else cli.printable(HEADINGS.get(group.heading, group.heading))
        for name in (group.reference, *group.others):
            short = name.removesuffix(group.heading).removeprefix(group.heading).strip("@/") or name
            means = [study.mean(section.name, name, metric) for metric in section.drawn]
            bars.setdefault(heading, []).append(figures.Bar(cli.printable(name if pairs else short), figures.colour(short), means))
    if bars:
        figures.bars(path, [titled(study, section.name, metric) for metric in section.drawn], bars)
    return bool(bars)


# --- the command


def write(study: Study, out: Path, results: str) -> None:
    """The report and its figures. Raises OSError."""
    found = [(claim, [judge(study, test) for test in claim.tests]) for claim in claims(study)]
    images = draw(study, out.parent / IMAGES)
    parts = [HEAD.format(results=plain(results)), in_short(study, found), how(study), claim_tables(study, found), where_it_matters(study)]
    parts += [section_text(study, section, images.get(section.name, [])) for section in sections(study)]
    write_whole(out, "\n\n".join([*parts, frank(study, found)]) + "\n")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"), help="folder of the stored runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="the report; figures go to img/study/ beside it")
    options = parser.parse_args(argv)
    if not options.results.is_dir():
        raise ConfigError(f"--results {options.results}: no such folder; run the study first")
    study = read(options.results)
    try:
        write(study, options.out, options.results.as_posix())
    except OSError as error:
        raise ConfigError(f"--out {options.out}: cannot be written: {error}") from error
    print(f"written to {options.out}")


if __name__ == "__main__":
    sys.exit(cli.main(main))
