"""The report on runs made here: its statistics, verdicts, missing cells, errors, and that equal runs give equal files."""

import json
import math
import random
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from aipo_graph import cli
from experiments.grid import EXPERIMENTS, METHODS
from experiments.report import __main__ as report
from experiments.report import summary
from experiments.report.claims import MARGIN, Comparison, judge, together
from experiments.report.stored import LEAST, compare, mean, read

Row = dict[str, Any]
HIGH, LOW = (0.80, 0.84, 0.82), (0.10, 0.14, 0.12)
HOSTILE = "evil|name<script>`$x$`\n| # [a](b)"


def row(experiment: str, variant: str, seed: int, rate: float, **changed: object) -> Row:
    """A stored run whose figures all follow from ``rate``."""
    alone = {f"pass@{k}": 1 - (1 - rate) ** k for k in (1, 4, 16)} | {"greedy": rate, "intervals": {"pass@1": [0, 1]}}
    rng = random.Random(seed)
    curve = {
        "step": [1, 2, 3, 4],
        "tokens/policy": [1000, 1100, 900, 1000],
        "reward/alone/hard": [0.0, None, rate / 2, rate],
        "consults/knowledge": [2 - rng.random() / 4 for _ in range(4)],
        **{
            f"agent_ratio_below/{bound}": [share] * 4
            for bound, share in (("0.001", 0.1), ("0.01", 0.2), ("0.1", 0.3), ("0.3", 0.4), ("1", 0.7))
        },
    }
    evaluation = {"alone": alone, "with_agents": {"pass@1": 0.9}, "kinds": {"easy": {"alone": {"pass@1": 0.9, "greedy": 0.9}}}, "new": 1}
    known = {
        "experiment": experiment,
        "variant": variant,
        "seed": seed,
        "config": "configs/quickstart.yaml",
        "settings": {"loss.agent": "x"},
    }
    spent = {"tokens": 4000, "steps": 4, "stopped": None, "seconds": 60, "command": f"python -m aipo_graph.train --run.seed {seed}"}
    return known | spent | {"trained": evaluation, "curve": curve, "hardware": "2 cores", "date": "2026-11-22", "version": "0.1"} | changed


def cell(experiment: str, variant: str, rates: Sequence[float], **changed: object) -> list[Row]:
    return [row(experiment, variant, seed, rate, **changed) for seed, rate in enumerate(rates, start=1)]


Write = Callable[[Sequence[Row]], Path]


@pytest.fixture
def store(tmp_path: Path, root: Path) -> Write:
    """Writes rows where the study does, beside the pages of the tree; returns the folder."""
    shutil.copytree(root / "docs/results", tmp_path / "results", ignore=lambda *_: ["study"])
    shutil.copy(root / "docs/results.md", tmp_path)

    def write(rows: Sequence[Row]) -> Path:
        folder = tmp_path / "study"
        folder.mkdir(exist_ok=True)
        for name in {found["experiment"] for found in rows}:
            lines = [json.dumps(found) for found in rows if found["experiment"] == name]
            (folder / f"{re.sub(r'[^a-z]', '-', name)}.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return write


def made(folder: Path) -> str:
    """The page of what the folder holds, filled; without figures, which take long."""
    out = folder.parent / "results.md"
    for path, text in report.texts(read(folder), out).items():
        path.write_text(text, encoding="utf-8")
    return out.read_text(encoding="utf-8")


def behind(folder: Path, name: str) -> str:
    return (folder.parent / f"results/{name}.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def cells(text: str, first: str) -> list[str]:
    """The cells of the first row of a table that begins with this one."""
    (line,) = re.findall(rf"^\| {re.escape(first)} \|.*$", text, re.M)[:1]
    return [part.strip() for part in line.strip("|").split("|")]


def test_means_and_intervals_are_students(store: Write) -> None:
    """0.80, 0.84, 0.82: mean 0.82, half width t(0.975, 2) = 4.303 times 0.02 / sqrt(3)."""
    half = 4.303 * 0.02 / math.sqrt(3)
    found = mean(HIGH)
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (pytest.approx(0.82), pytest.approx(0.82 - half), pytest.approx(0.82 + half), 3)
    folder = store(cell("coefficients", "aipo", HIGH) + cell("coefficients", "gated", HIGH))
    assert cells(made(folder), "right and terse")[1:3] == [
        f".820±{half:.3f} (3)".replace("0.", "."),
        f".820±{half:.3f} (3) =".replace("0.", "."),
    ]
    page = behind(folder, "coefficients")
    assert cells(page, "aipo")[:3] == ["aipo", "3", f"0.820 ({0.82 - half:.3f} … {0.82 + half:.3f}) ="]
    assert cells(page.partition("<details>")[2], "gated")[2:4] == ["1", "0.800"]


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of 4,000 sets of four draws from a normal distribution 95 % of the intervals hold its mean; the normal quantile would give 86 %."""
    rng = random.Random(0)
    intervals = [mean([rng.gauss(0, 1) for _ in range(4)]) for _ in range(4000)]
    held = statistics.fmean(found.low < 0 < found.high for found in intervals if found)
    assert held == pytest.approx(0.95, abs=0.01)


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    one, three = mean([0.9]), mean(LOW)
    assert str(one) == "0.900"
    assert compare(one, three) == compare(three, one) == "one seed"
    assert compare(one, None) == "not run"


def test_the_untrained_policy_has_its_evaluations_interval(store: Write) -> None:
    """Its one evaluation is compared; so is no variant whose name only begins like its."""
    alone = {"pass@1": 0.1, "intervals": {"pass@1": [0.05, 0.15]}}
    other = [row("coefficients", name, 1, 0.1, trained={"alone": alone}) for name in ("base", "baseline_group")]
    study = read(store([*cell("coefficients", "aipo", HIGH), *other]))
    aipo, base, group = (study.mean("coefficients", name, "alone pass@1") for name in ("aipo", "base", "baseline_group"))
    assert str(base) == "0.100 (0.050 … 0.150)"
    assert (compare(aipo, base), compare(aipo, group)) == ("above", "one seed")


def test_seeds_that_coincide_do_not_make_a_difference() -> None:
    assert compare(mean([0.992, 0.992]), mean([0.984, 0.984])) == "not separated"
    assert compare(mean([0.992, 0.992]), mean([0.96, 0.96])) == "above"


@pytest.mark.parametrize(
    ("left", "right", "above", "within"),
    [
        (HIGH, LOW, "supported", "contradicted"),
        (LOW, HIGH, "contradicted", "supported"),
        (HIGH, (0.70, 0.90, 0.74), "not shown", "not shown"),  # the intervals overlap, and reach 0.05 beyond
        ((0.0, 0.0), (0.0, 0.0), "not shown", "supported"),
        ((0.03, 0.03), (0.0, 0.0), "supported", "supported"),  # above, but by less than the margin
        ((0.9,), LOW, "one seed", "one seed"),
        ((), LOW, "not run", "not run"),
    ],
)
def test_verdicts_follow_the_rule(left: Sequence[float], right: Sequence[float], above: str, within: str, store: Write) -> None:
    study = read(store(cell("coefficients", "aipo", left) + cell("coefficients", "mask", right)))
    sides = ("coefficients", "aipo"), ("coefficients", "mask")
    assert judge(study, Comparison(*sides, "alone pass@1")) == above
    assert judge(study, Comparison(*sides, "alone pass@1", "within")) == within


def test_verdicts_of_several_comparisons() -> None:
    assert together(["supported", "supported"]) == "supported"
    assert together(["not run", "supported", "contradicted", "supported"]) == "mixed, of 4: 2 supported, 1 contradicted, 1 not run"


@pytest.mark.parametrize(("aipo", "ppo", "word", "mark"), [(HIGH, LOW, "supported", "▼"), (LOW, HIGH, "contradicted", "▲")])
def test_the_words_flip_with_the_data(aipo: Sequence[float], ppo: Sequence[float], word: str, mark: str, store: Write) -> None:
    folder = store(cell("coefficients", "aipo", aipo) + cell("coefficients", "ppo", ppo) + cell("ablations", "floor_0", ppo))
    text = made(folder)
    (claim,) = [line for line in text.splitlines() if "vanishing" in line]
    assert claim.endswith(f"**{word}** (not run)")
    assert cells(text, "right and terse")[5].endswith(mark)
    assert cells(behind(folder, "coefficients"), "ppo")[2].endswith(mark)
    assert ("aipo above ppo (coefficients)" in section(text, "What did not work")) == (word == "contradicted")
    assert cells(section(behind(folder, "how"), "The claims, comparison by comparison"), "ablations")[-1] == word


def test_the_main_table_counts_where_the_default_is_above_and_below(store: Write) -> None:
    """Methods that are above it nowhere and below it everywhere reach the goal; one that is above it in one condition misses it."""
    others = [name for name in METHODS if name != "aipo"]
    rows = [
        row
        for experiment, tail in summary.CONDITIONS.values()
        for name in METHODS
        for row in cell(experiment, f"{name}{tail}", HIGH if name == "aipo" else LOW)
    ]
    told = summary.counted(read(store(rows)))
    assert told.startswith(f"**Of 9 conditions `aipo` is separated above / below {', '.join(f'`{name}` in 9 / 0' for name in others)}.**")
    assert told.endswith("reached, with 54 of 54 pairs compared.")
    better = [row for row in rows if (row["experiment"], row["variant"]) != ("verbose", "gated")] + cell(
        "verbose", "gated", (0.97, 0.98, 0.97)
    )
    told = summary.counted(read(store(better)))
    assert "`gated` in 8 / 1, `sft` in 9 / 0" in told
    assert "missed, below gated, with" in told
    told = summary.counted(read(store([row for row in rows if not row["variant"].startswith("mask")])))
    assert told.endswith("open, nowhere above mask, with 45 of 54 pairs compared.")
    told = summary.counted(read(store([row for row in rows if row["variant"] != "mask@10"])))
    assert told.endswith("reached so far, with 53 of 54 pairs compared.")


def test_missing_cells_show_as_missing(store: Write) -> None:
    """No evaluation has every figure, no experiment every cell, and most have none."""
    bare = row("coefficients", "gated", 1, 0.5, trained={"alone": {"pass@1": 0.5, "greedy": math.nan}}, curve={}, tokens=None, steps=None)
    folder = store([*cell("coefficients", "aipo", HIGH), bare])
    text = made(folder)
    page = behind(folder, "coefficients")
    assert cells(page, "gated") == ["gated", "1", "0.500", "–", "–", "–", "–", "–", "–"]
    assert cells(page, "raft")[:3] == ["raft", "0", "not run"]
    assert "**Not run.**" in behind(folder, "second")
    assert cells(text, "right and terse")[2:4] == [".500 (1)", "–"]
    assert re.findall(r"\[!\[([\w ]+)\]", section(text, "The abstract's claims")) == ["coefficients curves"]
    missing = section(text, "What has not run")
    assert "4 runs are stored" in missing
    assert re.search(
        r"without a run: .*\[coefficients\]\(results/coefficients.md\) 9 of 11,.* \[second\]\(results/second.md\) 5 of 5", missing
    )
    assert "On fewer than 5 seeds: coefficients 2." in missing


def test_the_unchanged_end_of_a_series_comes_from_coefficients(store: Write) -> None:
    """As long as it ran from the same config."""
    folder = store(cell("coefficients", "aipo", HIGH) + cell("ablations", "floor_0", LOW) + cell("generality", "llama/grpo/alone", LOW))
    made(folder)
    assert cells(behind(folder, "ablations"), "aipo (from coefficients)")[1] == "3"
    assert cells(behind(folder, "generality"), "llama/grpo/aipo (from coefficients)")[1] == "3"
    other = cell("coefficients", "aipo", HIGH) + cell("ablations", "floor_0", LOW, config="other.yaml")
    assert read(store(other)).cell("ablations", "aipo") == []


def test_what_went_wrong_is_told(store: Write) -> None:
    forgot = {"alone": {"pass@1": 0.0}, "kinds": {"easy": {"alone": {"pass@1": 0.2}}}}
    rows = [
        *cell("coefficients", "base", (0, 0, 0), tokens=0),
        *cell("coefficients", "signed", HIGH),
        *cell("coefficients", "raft", HIGH),
        *cell("coefficients", "grpo", (0, 0, 0), trained=forgot, tokens=6000, steps=3),
        *cell("tuning", "grpo_1e-4", LOW),
        *cell("generality", "llama/grpo/alone", (0, 0, 0), trained=forgot),
        *cell("generality", "qwen3/grpo/alone", (0, 0, 0), trained=forgot),  # another model's base is not known
    ]
    folder = store(rows)
    bullets = section(made(folder), "What did not work")
    assert "**Not shown**: signed above raft (coefficients)." in bullets
    assert "Worse on easy problems than untrained: grpo (coefficients), llama/grpo/alone (generality)." in bullets
    assert cells(behind(folder, "coefficients"), "grpo")[-2:] == ["0.01", "3"]
    assert "**Settings were chosen on seeds 1, 2, 3, which report, too.**" in behind(folder, "how")


def test_the_pages_say_the_rule_and_are_all_there(root: Path) -> None:
    rule = section((root / "docs/results/how.md").read_text(encoding="utf-8"), "The rule")
    assert f"at least {LEAST} apart" in rule
    assert f"at most {MARGIN} above" in rule
    assert set(EXPERIMENTS) | {name for name, _ in summary.CONDITIONS.values()} <= {
        path.stem for path in (root / "docs/results").glob("*.md")
    }


@pytest.fixture
def everything() -> list[Row]:
    """Something of every section, and names that are anybody's."""
    rows = [*cell("coefficients", "base", (0, 0, 0)), *cell("coefficients", "aipo", HIGH), *cell("coefficients", "gated", LOW)]
    rows += [*cell("faulty", "aipo@same30", HIGH), *cell("faulty", "sft@same30", LOW), *cell("second", "aipo", HIGH)]
    rows += [*cell("boundary", "base", LOW), *cell("boundary", "aipo", HIGH), *cell("transfer", "aipo", LOW)]
    rows += [*cell("generality", "qwen3/dapo/aipo", HIGH), *cell("generality", "qwen3/dapo/alone", LOW)]
    return [*rows, row("coefficients", HOSTILE, 1, 0.5)]


@pytest.mark.slow
def test_a_rerun_gives_equal_files(store: Write) -> None:
    """And takes away the figures of runs that are gone."""
    rows = [*cell("coefficients", "base", (0, 0, 0)), *cell("coefficients", "aipo", HIGH)]
    folder = store([*rows, *cell("faulty", "sft@same60", LOW), row("coefficients", HOSTILE, 1, 0.5)])

    def images() -> Mapping[str, bytes]:
        assert cli.main(report.main, ["--results", str(folder), "--out", str(folder.parent / "results.md")]) == 0
        return {path.name: path.read_bytes() for path in (folder.parent / "img/study").iterdir()}

    first, text = images(), (folder.parent / "results.md").read_text()
    linked = "".join(path.read_text() for path in folder.parent.rglob("*.md"))
    assert set(re.findall(r"img/study/([\w.]+)", linked)) == set(first)
    kinds = ("coefficients_bars", "coefficients_pass_at_k", "coefficients_curves", "faulty_bars", "conditions")
    assert set(first) == {f"{kind}.{ending}" for kind in kinds for ending in ("png", "svg")}
    assert made(folder) == text
    (folder / "faulty.jsonl").unlink()
    assert {name: image for name, image in first.items() if not name.startswith("faulty")} == images()


def test_hostile_names_stay_in_their_cell(everything: list[Row], store: Write) -> None:
    folder = store(everything)
    text = made(folder) + behind(folder, "coefficients") + behind(folder, "how")
    assert set(re.findall(r"</?\w[^>]*>", text)) == {"<details>", "</details>", "<summary>", "</summary>"}
    assert "](b)" not in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) >= 8
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_an_experiment_or_a_place_without_a_page_is_named(store: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = store([row("../odd", "aipo", 1, 0.5)])
    out = folder.parent / "results.md"
    assert cli.main(report.main, ["--results", str(folder), "--out", str(out)]) == 2
    assert "experiment '../odd' has no page; write it, with" in capsys.readouterr().err
    folder = store(cell("coefficients", "aipo", HIGH))
    (folder / "---odd.jsonl").unlink()
    out.write_text(out.read_text().replace("<!-- failures -->", ""))
    assert cli.main(report.main, ["--results", str(folder), "--out", str(out)]) == 2
    assert f"{out}: the place from '<!-- failures -->' to '<!-- end -->' stands 0 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"experiment": "coefficients", "var', "Invalid JSON"),
        ('{"experiment": "coefficients"}', "variant: Field required"),
        (json.dumps(row("coefficients", "mask", 1, 0.5, curve={"entropy": ["high"]})), "curve.entropy.0: "),
        (json.dumps(row("coefficients", "mask", 1, 0.5, trained={"alone": 3})), "trained.alone: "),
        (json.dumps(row("coefficients", "aipo", 2, 0.5)), "coefficients/aipo, seed 2, stands already at"),
    ],
)
def test_a_bad_line_is_named(line: str, says: str, store: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = store(cell("coefficients", "aipo", HIGH))
    path = folder / "coefficients.jsonl"
    path.write_text(f"{path.read_text()}\n{line}\n")
    out = folder.parent / "results.md"
    assert cli.main(report.main, ["--results", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{path}:5: " in error
    assert says in error
    assert error.count("\n") == 1
    assert not (folder.parent / "img").exists()


def test_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "none", tmp_path):
        assert cli.main(report.main, ["--results", str(folder)]) == 2
        error = capsys.readouterr().err
        assert str(folder) in error
        assert "run the study first" in error


def test_a_report_that_cannot_be_written(store: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = store(cell("coefficients", "aipo", HIGH))
    out = folder.parent / "results.md"
    out.unlink()
    out.mkdir()
    assert cli.main(report.main, ["--results", str(folder), "--out", str(out)]) == 2
    assert f"--out {out}" in capsys.readouterr().err
