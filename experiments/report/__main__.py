"""The report: `python -m experiments.report` fills docs/results.md, the pages behind it and the quick start's table, and draws.

From stored runs: equal runs give equal files. What has not run yet is shown as missing.
"""

import argparse
import sys
from pathlib import Path

from aipo_graph import cli
from aipo_graph.cli import write_whole
from aipo_graph.errors import ConfigError
from experiments import grid
from experiments.report import experiments, how, summary
from experiments.report.experiments import METRICS
from experiments.report.markdown import filled
from experiments.report.stored import Study, read


def texts(study: Study, out: Path) -> dict[Path, str]:
    """The page and those behind it, filled. Raises ConfigError where a page or a place in it lacks, OSError."""
    tables = {out.parent.parent / "README.md": ("alone pass@1", "with_agents pass@1"), out.parent / "quick-start.md": METRICS}
    pages = {path.stem: path for path in (out.parent / "results").glob("*.md")}
    names = list(dict.fromkeys([*grid.EXPERIMENTS, *study.cells]))
    if absent := [name for name in names if name not in pages]:
        raise ConfigError(f"{out.parent}/results: experiment {absent[0]!r} has no page; write it, with '<!-- runs -->' and '<!-- end -->'")
    return {
        **{pages[name]: filled(pages[name], {"runs": experiments.text(study, name)}) for name in names},
        pages["how"]: filled(pages["how"], {"runs": how.runs(study), "claims": how.comparisons(study)}),
        out: filled(out, summary.parts(study)),
        **{page: filled(page, {"quick start": summary.quick_start(study, metrics)}) for page, metrics in tables.items() if page.is_file()},
    }


def draw(study: Study, folder: Path) -> None:
    """The figures; those of an earlier report go. Raises OSError."""
    drawn = {name: experiments.drawn(study, name) for name in study.cells}
    for path in folder.glob("*_*"):
        if path.stem not in [name for names in drawn.values() for name in names]:
            path.unlink()
    for experiment, names in drawn.items():
        for name in names:
            experiments.draw(study, experiment, folder / name)
    summary.draw(study, folder / "conditions")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"), help="folder of the stored runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="the page; those behind it are in results/ beside it")
    options = parser.parse_args(argv)
    if not options.results.is_dir():
        raise ConfigError(f"--results {options.results}: no such folder; run the study first")
    study = read(options.results)
    try:
        found = texts(study, options.out)
        draw(study, options.out.parent / "img/study")
        for path, text in found.items():
            write_whole(path, text)
    except OSError as error:
        raise ConfigError(f"--out {options.out}: cannot be written: {error}") from error
    print(f"written to {options.out}")


if __name__ == "__main__":
    sys.exit(cli.main(main))
