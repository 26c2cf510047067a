"""Evaluation on the shipped base policy: figures, sharding, kills, and one line for what cannot be used."""

import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import AipoError, ConfigError, TaskError
from aipo_graph.evaluate import main, measure, plan
from aipo_graph.evaluation.report import bootstrap, pass_at_k, summarise
from aipo_graph.evaluation.samples import Part, Sample, begin, model_digest
from aipo_graph.evaluation.samples import settings as depends
from aipo_graph.load import data
from aipo_graph.log import hold
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Problem
from aipo_graph.workers import units

PROBLEMS, SAMPLES = 6, 6
SETTINGS: dict[str, Any] = {
    "rollout": {"prompts": "prompts/operators"},
    "engine": {"max_batch": 6, "workers": 2},  # units of 12 traces: several of them for each worker
    "evaluate": {"problems": PROBLEMS, "problems_with_agents": 4, "samples": SAMPLES},
}


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({name: SETTINGS.get(name, {}) | sections.get(name, {}) for name in {*SETTINGS, *sections}})


def result(config: Config, folder: Path, kinds: tuple[str, ...] = ("",)) -> dict[str, Any]:
    return measure(config, "operators", folder, kinds=kinds)[0]


# --- pass@k


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 6), (6, 0, 4), (7, 7, 2), (8, 3, 5)])
def test_pass_at_k_is_the_share_of_all_draws_of_k_that_hold_a_right_one(n: int, c: int, k: int) -> None:
    draws = [any(index < c for index in draw) for draw in itertools.combinations(range(n), k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-15)


def test_pass_at_k_stays_exact_where_factorials_overflow() -> None:
    by_product = 1 - math.prod(1 - 64 / i for i in range(4096 - 3 + 1, 4096 + 1))  # the form of Chen et al., for c = 3
    assert pass_at_k(4096, 3, 64) == pytest.approx(by_product, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 1), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_is_not_defined(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(400):
        low, high = bootstrap(list(rng.beta(1, 2, size=64)), seed=trial)
        covered += low <= 1 / 3 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_bootstrap_is_a_function_of_its_seed() -> None:
    values = [index**2 / 900 for index in range(31)]
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)


# --- what samples add up to


def line(part: str, problem: str, sample: int, solved: bool = False, status: str = "done", **more: Any) -> Sample:
    return Sample(part, problem, sample, status, solved, tokens=10, consults=more.get("consults", {}), error=more.get("error"))


def summary(samples: list[Sample], *parts: Part, k: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return summarise(parts, {(s.part, s.problem, s.sample): s for s in samples}, k, seed=0)


A, B = Problem("a", "1+1?", "2"), Problem("b", "1+2?", "3")


def test_the_difference_is_paired_on_the_problems_that_both_modes_have() -> None:
    alone, helped = Part("hard", "alone", 2, (A, B)), Part("hard", "with_agents", 2, (A,))
    samples = [line("hard/alone", "a", 0, True), line("hard/alone", "a", 1), line("hard/alone", "b", 0), line("hard/alone", "b", 1)]
    samples += [line("hard/with_agents", "a", n, True, consults={"verify": (2, 6)}) for n in range(2)]
    values = summary(samples, helped, alone)
    assert (values["alone"]["pass@1"], values["alone"]["pass@2"], values["with_agents"]["pass@1"]) == (0.25, 0.5, 1.0)
    assert values["difference"]["pass@1"] == 0.5
    assert values["difference"]["problems"]["pass@1"] == 1
    assert values["with_agents"]["consults_per_trace"] == {"verify": {"calls": 2.0, "tokens": 6.0}}
    assert (values["alone"]["tokens"], values["alone"]["tokens_per_trace"]) == (40, 10.0)


def test_failed_traces_have_no_score_and_are_counted_by_reason() -> None:
    samples = [line("hard/alone", "a", 0, True), line("hard/alone", "a", 1, status="failed", error="EngineError: gone")]
    samples += [line("hard/alone", "b", 0), line("hard/alone", "b", 1, status="timeout")]
    values = summary(samples, Part("hard", "alone", 2, (A, B)))["alone"]
    assert values["pass@1"] == 0.5
    assert values["pass@2"] is None
    assert values["incomplete"] == 2
    assert values["failed"] == {"failed: EngineError": 1, "timeout": 1}


def test_a_part_without_any_score_is_an_error_that_gives_the_reason() -> None:
    samples = [line("hard/alone", "a", n, status="failed", error="AgentError: agent 'verify': down") for n in range(2)]
    with pytest.raises(TaskError, match="all 2 failed, most with AgentError: agent 'verify': down"):
        summary(samples, Part("hard", "alone", 2, (A,)))


def test_units_are_cut_the_same_whatever_is_done_and_failed_traces_come_again() -> None:
    part = Part("hard", "alone", 2, (A, B))
    done = {(part.name, p, n): line(part.name, p, n) for p, n in [("a", 0), ("a", 1), ("b", 0)]}
    assert units([part], {}, 2) == [(0, [(0, 0), (0, 1)]), (0, [(1, 0), (1, 1)])]
    assert units([part], done, 2) == [(0, [(1, 1)])]
    done[part.name, "a", 1] = line(part.name, "a", 1, status="timeout")
    assert units([part], done, 2) == [(0, [(0, 1)]), (0, [(1, 1)])]


# --- the real thing


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in (folder / "samples.jsonl").read_text().splitlines()[1:]]
    return sorted(found, key=lambda sample: (sample["part"], sample["problem"], sample["sample"]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation by two workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result(config(), folder, kinds=("hard", "easy"))
    return folder


def test_an_evaluation_holds_each_sample_once_and_its_figures(undisturbed: Path) -> None:
    values = json.loads((undisturbed / "evaluation.json").read_text())
    sampled, easy = (PROBLEMS + 4) * SAMPLES, PROBLEMS * 4
    assert len({(s["part"], s["problem"], s["sample"]) for s in lines(undisturbed)}) == len(lines(undisturbed))
    assert len(lines(undisturbed)) == sampled + easy + 4 + 2 * PROBLEMS
    assert values["kind"] == "hard"
    assert values["k"] == [1, 4]
    assert (values["alone"]["problems"], values["with_agents"]["problems"]) == (PROBLEMS, 4)
    assert values["difference"]["problems"] == {"pass@1": 4, "pass@4": 4, "maj@4": 4, f"avg@{SAMPLES}": 4, "greedy": 4}
    assert values["alone"]["pass@4"] < 0.2 < values["with_agents"]["pass@1"]  # it lacks the rules, not the skill
    assert values["kinds"]["easy"]["alone"]["problems"] == PROBLEMS
    assert values["with_agents"]["consults_per_trace"]["knowledge"]["calls"] > 1
    assert values["alone"]["consults_per_trace"] == {}
    assert values["alone"]["tokens"] == sum(s["tokens"] for s in lines(undisturbed) if s["part"].startswith("hard/alone"))


def test_samples_do_not_depend_on_the_number_of_workers(undisturbed: Path, tmp_path: Path) -> None:
    result(config(engine=SETTINGS["engine"] | {"workers": 1}), tmp_path, kinds=("hard", "easy"))
    assert lines(tmp_path) == lines(undisturbed)
    one, two = (json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path, undisturbed))
    for values in (one, two):  # they may lie on two sides of midnight
        del values["protocol"]["date"]
    assert one == two


WORDS = [
    *("operators", "--problems", str(PROBLEMS), "--evaluate.problems_with_agents", "4", "--samples", str(SAMPLES)),
    *("--engine.max_batch", "6", "--rollout.prompts", "prompts/operators"),
]


def test_an_evaluation_killed_half_way_goes_on_to_the_same_samples(
    undisturbed: Path, warm_python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = subprocess.Popen(
        [warm_python, "-m", "aipo_graph.evaluate", *WORDS, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert command.stdout is not None
    command.stdout.readline()  # the first line of progress: a tenth is done
    command.kill()
    command.wait()
    # The workers hold the other end of the pipe: it closes when the last of them has ended.
    command.stdout.read()
    before = (tmp_path / "samples.jsonl").read_text()
    assert 1 < before.count("\n") < len([s for s in lines(undisturbed) if s["part"].startswith("hard")])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"part":"hard/alone","problem":"heldout-ha')
    assert cli.main(main, [*WORDS, "--k", "1", "4", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "samples.jsonl").read_text().startswith(before)
    assert lines(tmp_path) == [s for s in lines(undisturbed) if s["part"].startswith("hard")]
    shown = capsys.readouterr().out
    assert "pass@4" in shown
    assert "knowledge calls" in shown


class Left(Exception):
    pass


def test_leaving_an_evaluation_early_ends_its_workers_and_frees_its_folder(tmp_path: Path) -> None:
    workers: list[Any] = []

    def leave(done: int, total: int, failed: int) -> None:
        workers.extend(multiprocessing.active_children())
        with pytest.raises(ConfigError, match="evaluation .* is in use by process"):
            result(config(), tmp_path)
        raise Left

    with pytest.raises(Left):
        measure(config(), "operators", tmp_path, report=leave)
    assert len(workers) == 2
    assert not any(process.is_alive() for process in workers)
    hold(tmp_path, "evaluation", "--out").close()


def test_what_a_worker_raises_is_raised_here(tmp_path: Path) -> None:
    lost = config(rollout=SETTINGS["rollout"] | {"graph": "nowhere.py:build"}, engine=SETTINGS["engine"] | {"workers": 1})
    with pytest.raises(ConfigError, match=r"no file 'nowhere\.py'"):
        result(lost, tmp_path)
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_one_clear_error(tmp_path: Path) -> None:
    def kill(done: int, total: int, failed: int) -> None:
        victim = multiprocessing.active_children()[0]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)

    with pytest.raises(AipoError, match=r"a worker ended with exit code -9 .* run the same command to go on"):
        measure(config(), "operators", tmp_path, report=kill)
    assert not multiprocessing.active_children()


# --- what cannot be used


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["operators", "--k", "1", "128"], "--k 128: larger than evaluate.samples = 16"),
        (["operators", "--kind", "odd"], "problem kind 'odd'"),
        (["no/such/model"], "no model 'no/such/model'"),
        (["x" * 300], "no model 'xxx"),
        (["operators", "--task.name", "operator"], "no such task; did you mean 'operators'?"),
        (["operators", "--task.name", "builtins:repr"], "the str it names has no 'train'"),
        (["operators", "--k"], "expected one argument"),
        (["operators", "none.yaml"], "no file 'none.yaml'"),
        (["operators", "--modes", "together"], "together"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.chdir(tmp_path)
    assert cli.main(main, words) == 2
    error = capsys.readouterr().err
    assert re.search(text, error), error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_settings_is_refused_naming_the_first_difference(undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds an evaluation with rollout.temperature = 1.0, not 0.5; choose another --out"):
        result(config(rollout=SETTINGS["rollout"] | {"temperature": 0.5}), undisturbed)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(ConfigError, match="not the first line of an evaluation"):
        result(config(), tmp_path)
    assert (tmp_path / "samples.jsonl").read_text() == '{"mine": 1}\n'


class NoProblems:
    kinds = ("",)

    def train(self, index: int) -> Problem:
        return A

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        return []

    def reward(self) -> float:
        return 0.0


def no_problems(config: Config) -> NoProblems:
    return NoProblems()


def test_a_task_without_heldout_problems_is_refused() -> None:
    empty = config(task={"name": f"{__file__}:no_problems"})
    assert open_task(empty).heldout(4) == []
    with pytest.raises(TaskError, match="has no held-out problems: nothing to evaluate"):
        plan(empty, open_task(empty), ("",), ("alone",), greedy_only=False)


def test_problems_of_one_id_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their samples would take each other's place."""
    given = config(task={"name": f"{__file__}:no_problems"})
    task = open_task(given)
    monkeypatch.setattr(task, "heldout", lambda count, kind="": [Problem(id, f"{i}?", "1") for i, id in enumerate(("a", "b", "a"))])
    with pytest.raises(TaskError, match="has several held-out problems of the id 'a'; give each its own"):
        plan(given, task, ("",), ("alone",), greedy_only=False)


def test_an_edited_graph_is_another_evaluation(tmp_path: Path, root: Path) -> None:
    graph = tmp_path / "mine.py"
    shutil.copy(root / "graphs/solo.py", graph)
    settings = config(rollout={"prompts": "prompts/operators", "solo": f"{graph}:build"})
    before = depends(settings, str(data("operators")), [])
    graph.write_text(graph.read_text() + "# edited\n")
    after = depends(settings, str(data("operators")), [])
    assert [key for key in before if before[key] != after[key]] == ["graph, agent, prompt and data files"]


def test_an_edited_task_is_another_evaluation(tmp_path: Path) -> None:
    task = tmp_path / "mine.py"
    shutil.copy(__file__, task)
    settings = config(task={"name": f"{task}:no_problems", "options": {"level": 1.0}})
    given = depends(settings, str(data("operators")), [])
    assert given["task.options"] == {"level": 1.0}
    (tmp_path / "samples.jsonl").write_text(json.dumps({"settings": given}) + "\n{}\n")
    task.write_text(task.read_text() + "# edited\n")
    now = depends(settings, str(data("operators")), [])
    with pytest.raises(ConfigError, match="holds an evaluation with graph, agent, prompt and data files = "):
        begin(tmp_path / "samples.jsonl", now)
    begin(tmp_path / "samples.jsonl", now, aside=True)
    aside = [path for path in tmp_path.glob("samples-*.jsonl") if path.read_text().endswith("\n{}\n")]
    assert len(aside) == 1
    assert json.loads((tmp_path / "samples.jsonl").read_text())["settings"] == now
    for settings_then in (given, now):  # and back, and again: what was kept first stays
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write('{"other": 1}\n')
        begin(tmp_path / "samples.jsonl", settings_then, aside=True)
    assert [path for path in tmp_path.glob("samples-*.jsonl") if path.read_text().endswith("\n{}\n")] == aside


CHANGES = {
    "chat_template.jinja": True, "generation_config.json": True, "tokenizer.json": True, "tokenizer_config.json": True, "merges.txt": True,
    "tokenizer.model": True, "additional_chat_templates/tool.jinja": True, "model.safetensors": True, "README.md": False,
}  # fmt: skip


@pytest.mark.parametrize(("name", "counts"), CHANGES.items())
def test_what_changes_a_models_samples_changes_its_digest(name: str, counts: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(data("operators"), folder)
    before = model_digest(str(folder))
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert (model_digest(str(folder)) != before) == counts


def test_other_problems_are_another_evaluation_wherever_they_come_from() -> None:
    def given(answer: str) -> object:
        return depends(config(), str(data("operators")), [Part("", "alone", 1, (Problem("p", "1+1?", answer),))])

    assert given("2") == given("2") != given("3")
