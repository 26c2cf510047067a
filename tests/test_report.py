"""The report on runs made here: its statistics, verdicts, missing cells, errors, and that equal runs give equal files."""

import json
import math
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from aipo_graph import cli
from experiments.report import __main__ as report
from experiments.report.claims import Comparison, judge, together
from experiments.report.stored import compare, mean, read

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
def store(tmp_path: Path) -> Write:
    """Writes rows where the study does; returns the folder."""

    def write(rows: Sequence[Row]) -> Path:
        folder = tmp_path / "study"
        folder.mkdir(exist_ok=True)
        for name in {found["experiment"] for found in rows}:
            lines = [json.dumps(found) for found in rows if found["experiment"] == name]
            (folder / f"{re.sub(r'[^a-z]', '-', name)}.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return write


def made(folder: Path) -> str:
    """The report of what the folder holds, beside it."""
    out = folder.parent / "results.md"
    assert cli.main(report.main, ["--results", str(folder), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


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
    text = made(store(cell("coefficients", "aipo", HIGH)))
    name, n, pass_1, *_ = cells(section(text, "Coefficients and baselines"), "aipo")
    assert (name, n, pass_1) == ("aipo", "3", f"0.820 ({0.82 - half:.3f} … {0.82 + half:.3f})")
    assert "1: 0.800, 2: 0.840, 3: 0.820" in text


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


@pytest.mark.parametrize(
    ("aipo", "ppo", "word", "order"), [(HIGH, LOW, "supported", "**above** ppo"), (LOW, HIGH, "contradicted", "**below** ppo")]
)
def test_the_words_flip_with_the_data(aipo: Sequence[float], ppo: Sequence[float], word: str, order: str, store: Write) -> None:
    rows = cell("coefficients", "aipo", aipo) + cell("coefficients", "ppo", ppo) + cell("ablations", "floor_0", ppo)
    text = made(store(rows))
    (claim,) = [line for line in section(text, "In short").splitlines() if "vanishing" in line]
    assert claim.startswith(f"- **{word}**: ")
    assert order in section(text, "Coefficients and baselines")
    bullets = section(text, "What did not work, and what we do not know")
    assert ("aipo above ppo (coefficients, alone pass@1)" in bullets) == (word == "contradicted")


def test_missing_cells_show_as_missing(store: Write) -> None:
    """No evaluation has every figure, no experiment every cell, and most have none."""
    bare = row("coefficients", "gated", 1, 0.5, trained={"alone": {"pass@1": 0.5, "greedy": math.nan}}, curve={}, tokens=None, steps=None)
    text = made(store([*cell("coefficients", "aipo", HIGH), bare]))
    table = section(text, "Coefficients and baselines")
    assert cells(table, "gated") == ["gated", "1", "0.500", "–", "–", "–", "–", "–", "–"]
    assert cells(table, "raft")[:3] == ["raft", "0", "not run"]
    assert section(text, "A second task").endswith("**Not run.**\n")
    bullets = section(text, "What did not work, and what we do not know")
    assert re.search(r"^- Not run: .*\bfaulty\b.*\bsecond\b", bullets, re.M)
    assert re.search(r"^- coefficients, cells without a run: .*\braft\b", bullets, re.M)
    assert "coefficients, fewer than 5 seeds: 1 for gated; 3 for aipo." in bullets


def test_the_unchanged_end_of_a_series_comes_from_coefficients(store: Write) -> None:
    """As long as it ran from the same config."""
    rows = cell("coefficients", "aipo", HIGH) + cell("ablations", "floor_0", LOW)
    assert cells(section(made(store(rows)), "Ablations"), "aipo (from coefficients)")[1] == "3"
    other = cell("coefficients", "aipo", HIGH) + cell("ablations", "floor_0", LOW, config="other.yaml")
    assert read(store(other)).cell("ablations", "aipo") == []
    assert len(read(store(cell("coefficients", "aipo", HIGH) + cell("faulty", "aipo@10", LOW))).cell("faulty", "aipo@0")) == 3


def test_what_went_wrong_is_told(store: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("We tried gates per token.")
    monkeypatch.setattr(report, "NOTES", notes)
    forgot = {"alone": {"pass@1": 0.0}, "kinds": {"easy": {"alone": {"pass@1": 0.2}}}}
    rows = [
        *cell("coefficients", "base", (0, 0, 0), tokens=0),
        *cell("coefficients", "aipo", HIGH),
        *cell("coefficients", "mask", LOW),
        *cell("coefficients", "grpo", (0, 0, 0), trained=forgot, tokens=6000, stopped="3 bad steps in a row"),
        *cell("tuning", "grpo_1e-4", LOW),
    ]
    text = made(store(rows))
    bullets = section(text, "What did not work, and what we do not know")
    assert "easy pass@1 lies below the untrained policy's 0.900 (0.900 … 0.900) for grpo 0.200" in bullets
    assert "off the median of 0.00 M: grpo 0.01 M" in bullets
    assert "grpo 3 x 3 bad steps in a row" in bullets
    assert bullets.rstrip().endswith("We tried gates per token.")
    assert "**Seeds 1, 2, 3 did both.**" in section(text, "How it was run")


@pytest.fixture
def everything() -> list[Row]:
    """Something of every section, and names that are anybody's."""
    rows = [*cell("coefficients", "base", (0, 0, 0)), *cell("coefficients", "aipo", HIGH), *cell("coefficients", "gated", LOW)]
    rows += [*cell("faulty", "aipo@same30", HIGH), *cell("faulty", "sft@same30", LOW), *cell("second", "aipo", HIGH)]
    rows += [*cell("boundary", "base", LOW), *cell("boundary", "aipo", HIGH), *cell("transfer", "aipo", LOW)]
    rows += [*cell("generality", "qwen3/dapo/aipo", HIGH), *cell("generality", "qwen3/dapo/alone", LOW)]
    return [*rows, row("odd|<b>", HOSTILE, 1, 0.5), row("coefficients", HOSTILE, 1, 0.5)]


@pytest.mark.slow
def test_a_rerun_gives_equal_files(everything: list[Row], store: Write) -> None:
    """And takes away the figures of runs that are gone."""
    folder = store(everything)

    def files() -> Mapping[str, bytes]:
        made(folder)
        return {path.name: path.read_bytes() for path in folder.parent.rglob("*") if path.suffix in (".md", ".png", ".svg")}

    first = files()
    linked = set(re.findall(r"img/study/([\w.]+)", first["results.md"].decode()))
    assert linked == set(first) - {"results.md"}
    kinds = ("bars", "pass_at_k", "training", "consults", "ratios")
    assert {f"coefficients_{kind}.{ending}" for kind in kinds for ending in ("png", "svg")} <= linked
    assert files() == first
    (folder / "faulty.jsonl").unlink()
    assert set(first) - set(files()) == {"faulty_bars.png", "faulty_bars.svg"}


def test_hostile_names_stay_in_their_cell(everything: list[Row], store: Write) -> None:
    text = made(store(everything))
    outside = re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)
    assert set(re.findall(r"</?\w[^>]*>", outside)) == {"<details>", "</details>", "<summary>", "</summary>"}
    assert "](b)" not in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) > 20
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


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
    assert not out.exists()


def test_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "none", tmp_path):
        assert cli.main(report.main, ["--results", str(folder)]) == 2
        error = capsys.readouterr().err
        assert str(folder) in error
        assert "run the study first" in error


def test_a_report_that_cannot_be_written(store: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "results.md"
    assert cli.main(report.main, ["--results", str(store(cell("coefficients", "aipo", HIGH))), "--out", str(out)]) == 2
    assert f"--out {out}" in capsys.readouterr().err
