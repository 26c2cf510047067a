"""What an evaluation reports beside pass@k, its presets, and what it does with a problem or a model that does not fit."""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import TaskError
from aipo_graph.evaluate import main
from aipo_graph.evaluation.report import caption, comparison, helpfulness, maj_at_k, remarks, sign_flip, solve_rates, summarise, table
from aipo_graph.evaluation.samples import Part, Sample, ballot, read
from aipo_graph.types import Problem

# --- estimators


def counts(answers: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Votes of right answers (capitals), of wrong ones, and how many are silent (-)."""
    votes = Counter(answers)
    right, wrong = (tuple(n for a, n in votes.items() if a != "-" and a.isupper() is wanted) for wanted in (True, False))
    return right, wrong, votes["-"]


def majority_by_enumeration(answers: Sequence[str], k: int) -> float:
    chances = []
    for drawn in itertools.combinations(answers, k):
        votes = Counter(answer for answer in drawn if answer != "-")
        first = [answer for answer, count in votes.items() if count == max(votes.values())]
        chances.append(sum(answer.isupper() for answer in first) / len(first) if first else 0.0)
    return sum(chances) / len(chances)


@pytest.mark.parametrize("answers", ["RRab-", "Rabcd", "RSSaab", "aab--", "-----", "RRRRaabbc-", "RSTUabcd", "RRaabbcc-"])
def test_maj_at_k_is_the_mean_over_all_subsets_with_ties_shared(answers: str) -> None:
    for k in range(1, len(answers) + 1):
        assert maj_at_k(*counts(answers), k) == pytest.approx(majority_by_enumeration(answers, k), abs=1e-12)


def test_maj_at_k_of_many_samples_agrees_with_draws() -> None:
    answers = ["R"] * 150 + ["a"] * 140 + [f"x{n}" for n in range(100)] + ["-"] * 634  # comb(1024, 512) is beyond a float
    rng = random.Random(1)
    drawn = np.mean([majority_by_enumeration(rng.sample(answers, 200), 200) for _ in range(4000)])
    assert maj_at_k(*counts(answers), 200) == pytest.approx(drawn, abs=4 * 0.5 / math.sqrt(4000))
    assert 0.5 < maj_at_k(*counts(answers), 512) < 1


@pytest.mark.parametrize("k", [0, 5])
def test_maj_at_k_refuses_what_is_not_defined(k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        maj_at_k((2,), (1,), 1, k)


@pytest.mark.parametrize(("gained", "lost"), [(9, 1), (1, 9), (6, 6), (15, 3), (12, 30)])
def test_the_sign_flip_test_of_greedy_results_is_mcnemars(gained: int, lost: int) -> None:
    n, tail = gained + lost, range(max(gained, lost), gained + lost + 1)
    exact = min(1.0, 2 * sum(math.comb(n, i) for i in tail) / 2**n)
    found = sign_flip([1.0] * gained + [-1.0] * lost + [0.0] * 20, seed=3)
    assert found == pytest.approx(exact, abs=1e-12 if n <= 12 else 0.01)


def test_the_sign_flip_test_rejects_a_true_null_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    p = [sign_flip(list(rng.normal(size=20)), seed=trial) for trial in range(300)]
    assert 0.01 < np.mean([value <= 0.05 for value in p]) < 0.09
    assert sign_flip([0.0, 0.0], seed=0) == 1.0
    assert sign_flip(list(rng.normal(1, 1, size=40)), seed=0) < 0.001


# --- what samples add up to


def sample(part: Part, problem: str, number: int, solved: bool = False, answer: str = "", **more: Any) -> Sample:
    tokens, status = more.pop("tokens", 10), more.pop("status", "done")
    return Sample(part.name, problem, number, status, solved, tokens, more.pop("consults", {}), answer=answer, **more)


def figures(part: Part, samples: Sequence[Sample], k: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    values: dict[str, Any] = summarise([part], {(s.part, s.problem, s.sample): s for s in samples}, k, seed=0)[part.mode]
    return values


A, B = Problem("a", "1+1?", "2"), Problem("b", "1+2?", "3")
ALONE, HELPED = Part("hard", "alone", 3, (A, B)), Part("hard", "with_agents", 3, (A, B))


def test_majorities_are_voted_on_answers_and_the_silent_do_not_vote() -> None:
    samples = [sample(ALONE, "a", 0, True, "2"), sample(ALONE, "a", 1, False, "7"), sample(ALONE, "a", 2)]
    samples += [sample(ALONE, "b", n, False, "9") for n in range(3)]
    values = figures(ALONE, samples)
    assert values["maj@2"] == pytest.approx((1 / 3 * 0.5 + 1 / 3 * 1 + 0) / 2)
    assert values["maj@3"] == 0.25
    assert values["avg@3"] == pytest.approx(values["pass@1"]) == pytest.approx(1 / 6)
    assert values["answered"] == pytest.approx(5 / 6)
    assert "maj@1" not in values


@pytest.mark.parametrize("answers", [("", ""), ("2", "")])
def test_without_boxed_answers_there_is_no_majority(answers: tuple[str, str]) -> None:
    """No boxes at all, a right answer outside of any box."""
    values = figures(Part("hard", "alone", 2, (A,)), [sample(ALONE, "a", n, True, answer) for n, answer in enumerate(answers)])
    assert values["pass@2"] == 1
    assert "maj@2" not in values


def test_lines_of_an_older_version_are_read(tmp_path: Path) -> None:
    line = '{"part":"hard/with_agents","problem":"a","sample":0,"status":"done","solved":true,"tokens":3,"consults":{"verify":[1,2]}}\n'
    (tmp_path / "samples.jsonl").write_text('{"settings":{}}\n' + line)
    assert solve_rates(list(read(tmp_path / "samples.jsonl").values())) == {"a": 1.0}


def test_helpfulness_compares_within_problems_that_have_both() -> None:
    asked: dict[str, Any] = {"consults": {"verify": (2, 9)}}
    samples = [sample(HELPED, "a", 0, True, "2", **asked), sample(HELPED, "a", 1, False, "5", **asked), sample(HELPED, "a", 2, False, "6")]
    samples += [sample(HELPED, "b", n, True, "3", **asked) for n in range(3)]  # nothing to compare with
    samples.append(sample(HELPED, "b", 3, status="failed"))
    found = helpfulness(samples, seed=0)
    assert found == {"verify": {"difference": 0.5, "interval": (0.5, 0.5), "problems": 1, "consulted": pytest.approx(5 / 6)}}
    assert helpfulness(samples[3:], seed=0)["verify"]["difference"] is None


def test_leaks_lengths_truncation_and_violations() -> None:
    consults = {"knowledge": (2, 9)}
    samples = [sample(HELPED, "a", n, True, "2", tokens=10 * n, leaks=0, violation=False, consults=consults) for n in range(3)]
    samples.append(sample(HELPED, "b", 0, tokens=100, status="length", leaks=1, violation=True, consults=consults))
    samples.append(sample(HELPED, "b", 1, status="leaked", leaks=1, violation=False, consults=consults))
    samples.append(sample(HELPED, "b", 2, status="failed", error="AgentError: down"))
    values = figures(HELPED, samples)
    assert values["leaks"] == {"traces": 0.4, "replies": 0.2}
    assert (values["truncated"], values["violations"]) == (0.25, 0.25)
    assert values["length"]["solved"] == {"mean": 10.0, "median": 10.0, "p95": pytest.approx(19.0)}
    assert values["length"]["unsolved"]["mean"] == 100
    assert values["failed"] == {"leaked": 1, "failed: AgentError": 1}


def test_long_answers_vote_by_their_hash() -> None:
    long = "x+" * 400
    assert len(ballot(long + "1")) < 60
    assert ballot(long + "1") == ballot("$" + long + "1$") != ballot(long + "2")


# --- the command: presets


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the preset `mine`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "benchmarks").mkdir(parents=True)
    write(tmp_path, task={"name": f"{__file__}:build"}, rollout={"temperature": 0.6, "max_tokens": 400})
    return tmp_path


def write(folder: Path, **sections: dict[str, Any]) -> None:
    sizes = {"problems": 4, "problems_with_agents": 2, "samples": 3}
    (folder / "configs/benchmarks/mine.yaml").write_text(yaml.safe_dump(sections | {"evaluate": sizes}))


def resolved(capsys: pytest.CaptureFixture[str], *words: str) -> Config:
    assert cli.main(main, [*words, "--dry-run"]) == 0, capsys.readouterr().err
    return Config.model_validate(yaml.safe_load(capsys.readouterr().out))


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(main, [*words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_preset_lies_over_the_run_and_under_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "runs" / "r"
    (run / "policy").mkdir(parents=True)
    own = {"task": {"name": "gsm8k", "data": "own.jsonl", "columns": {"answer": "y"}}, "rollout": {"temperature": 0.9, "max_consults": 3}}
    (run / "config.yaml").write_text(yaml.safe_dump(own))
    config = resolved(capsys, str(run / "policy"), "--preset", "mine", "--rollout.max_tokens", "300")
    assert (config.rollout.temperature, config.rollout.max_tokens, config.rollout.max_consults) == (0.6, 300, 3)
    assert (config.task.data, config.task.columns) == (None, {})  # the run's own data is no benchmark
    assert config.evaluate.samples == 3
    assert resolved(capsys, str(run / "policy")).rollout.temperature == 0.9


def test_a_preset_may_name_files_beside_it_and_long_budgets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "configs/benchmarks/data.jsonl").touch()
    write(folder, task={"name": "dataset", "data": "data.jsonl"}, rollout={"max_tokens": 32768}, train={"micro_batch_tokens": 1024})
    config = resolved(capsys, "operators", "--preset", "mine")
    assert config.task.data == str(folder / "configs/benchmarks/data.jsonl")
    assert config.rollout.max_tokens == 32768


def test_an_unknown_preset_is_one_line_with_the_nearest_and_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(capsys, "operators", "--preset", "mime")
    assert "no such preset; did you mean 'mine'?; there is" in error
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "mine" in capsys.readouterr().out
    assert "no such preset" in failure(capsys, "operators", "--preset", "../../secret")


def test_a_wrong_value_in_a_preset_is_shown_at_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "configs/benchmarks/mine.yaml").write_text("task: {name: operators}\nrollout:\n  temperature: hot\n")
    assert "benchmarks/mine.yaml:3" in failure(capsys, "operators", "--preset", "mine")


# --- the command, for real, on a task with a problem that is too long and one that cannot be graded


class Awkward:
    kinds = ("",)

    def train(self, index: int) -> Problem:
        return Problem(f"p{index}", "@1234ABC?", "0000")

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        problems = [Problem("ungraded", "@1234ABC?", ""), Problem("long", "@1234ABC?" * 60, "1"), self.train(2), self.train(3)]
        return problems[:count]

    def reward(self, answer: str, reply: str) -> float:
        if not answer:
            raise TaskError("the gold answer is empty")
        return float("7" in reply)


def build(config: Config) -> Awkward:
    return Awkward()


@pytest.mark.slow
def test_a_model_without_room_for_the_budget_is_refused_before_anything_is_sampled(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, task={"name": "operators"}, rollout={"max_tokens": 600})
    words = ["operators", "--preset", "mine", "--out", "out", "--workers", "1", "--rollout.prompts", "prompts/operators"]
    error = failure(capsys, *words)
    assert "its context is 512 tokens, the longest prompt has 9 and rollout.max_tokens is 600; give --rollout.max_tokens 503" in error
    assert len((folder / "out" / "samples.jsonl").read_text().splitlines()) == 1
    error = failure(capsys, *words, "--rollout.max_tokens", "250", "--engine.max_context", "256")
    assert "engine.max_context is 256 tokens" in error


@pytest.mark.slow
def test_problems_that_fail_are_recorded_and_the_rest_is_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["operators", "--alone-only", "--workers", "1", "--rollout.prompts", "prompts/operators", "--task.name", f"{__file__}:build"]
    assert cli.main(main, [*words, "--problems", "4", "--samples", "3", "--k", "1", "3", "--out", "one"]) == 0
    shown = capsys.readouterr().out
    values = json.loads((folder / "one" / "evaluation.json").read_text())
    assert values["alone"]["failed"] == {"failed: TaskError": 4, "failed: ContextError": 4}  # three samples and a greedy one each
    assert values["alone"]["incomplete"] == 2
    assert 0 <= values["alone"]["pass@3"] <= 1
    assert {s.problem for s in read(folder / "one" / "samples.jsonl").values()} == {"ungraded", "long", "p2", "p3"}
    assert "without a score: 4 x failed: TaskError, 4 x failed: ContextError" in shown
    assert caption(values) in shown
    assert remarks(values)[0] in shown

    again = [*words, "--rollout.temperature", "0.5", "--problems", "4", "--samples", "3", "--out", "two"]
    assert cli.main(main, again) == 0
    capsys.readouterr()
    assert cli.main(main, ["--compare", "one", "two/evaluation.json"]) == 0
    assert "heldout/alone/greedy" in capsys.readouterr().out


@pytest.mark.slow
def test_the_protocol_says_how_the_figures_came_about(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, task={"name": "operators"}, rollout={"max_tokens": 200, "temperature": 0.7})
    words = ["operators", "--preset", "mine", "--workers", "1", "--rollout.prompts", "prompts/operators", "--out", "out"]
    assert cli.main(main, words) == 0
    shown = capsys.readouterr().out
    values = json.loads((folder / "out" / "evaluation.json").read_text())
    how = values["protocol"]
    assert (how["preset"], how["task"], how["data"], how["seed"], how["temperature"]) == ("mine", "operators", "its own", 0, 0.7)
    assert (how["top_p"], how["max_tokens"], how["model_revision"]) == (1.0, 200, None)
    assert how["model_digest"] == json.loads((folder / "out" / "samples.jsonl").open().readline())["settings"]["model"]
    assert values["k"] == [1, 3]
    assert values["alone"]["answered"] > 0.5
    assert values["with_agents"]["helpfulness"]["knowledge"]["consulted"] == 1
    assert values["with_agents"]["leaks"]["replies"] < 0.2
    assert set(values["difference"]["p"]) == {"pass@1", "pass@3", "maj@3", "avg@3", "greedy"}
    assert f"weights {how['model_digest'][:12]}" in shown
    assert "maj@3" in {str(text) for text in table(values).columns[0].cells}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["one"], "give two folders"),
        (["one", "none"], "no evaluation there"),
        (["one", "other"], "share no problem"),
        (["one", "task"], "one is an evaluation on operators, task on gsm8k of test.jsonl"),
    ],
)
def test_evaluations_that_cannot_be_compared(words: list[str], text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    operators = {"task.name": "operators", "task.data": None, "task.heldout": None}
    gsm8k = operators | {"task.name": "gsm8k", "task.heldout": "data/test.jsonl"}
    for name, problem, settings in (("one", "a", operators), ("other", "b", operators), ("task", "a", gsm8k)):
        (folder / name).mkdir()
        line = {"part": "hard/alone", "problem": problem, "sample": 0, "status": "done", "solved": True, "tokens": 3, "consults": {}}
        (folder / name / "samples.jsonl").write_text(json.dumps({"settings": settings}) + "\n" + json.dumps(line) + "\n")
    assert text in failure(capsys, "--compare", *words)


def test_names_are_shown_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets in a path or a kind are no markup."""
    both = {"first": 0.5, "second": 0.7, "pass@1": None, "problems": 3, "samples": 2}
    Console(width=120).print(comparison(("runs/a", "x[/tmp]/b [old]"), {"Algebra [easy]/alone": both}))
    shown = capsys.readouterr().out
    assert "x[/tmp]/b [old]" in shown
    assert "Algebra [easy]/alone" in shown
