"""The study: its grid, its helpers, and a short version of it through the real command, resumed."""

import json
from collections import Counter
from pathlib import Path

import pytest

from aipo_graph import cli, load
from aipo_graph.config import Config
from aipo_graph.learn.model import load_model
from aipo_graph.log import read_metrics
from aipo_graph.rollout.agents import Prompts
from aipo_graph.tasks.operators import OPERATORS, RULES
from aipo_graph.types import Reply, Request
from experiments import helpers, probe, study
from experiments.grid import CHOOSING, EXPERIMENTS, TUNING_SEEDS, Run, runs


async def replies(agent: helpers.Changed, query: str, count: int = 400) -> list[Reply]:
    return [await agent(Request(agent.name, query, seed=seed), Prompts()) for seed in range(count)]


def test_every_run_is_a_config_and_no_seed_both_chooses_and_reports(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    everything = list(runs())
    assert {run.experiment for run in everything} == set(EXPERIMENTS)
    assert len({run.name for run in everything}) == len(everything)
    tried = set[tuple[str, ...]]()
    for run in everything:
        settings = {(run.of.config, *setting) for setting in run.settings.items()}
        if settings - tried:
            assert study.config_of(run, {}).run.name == run.name
        tried |= settings
    assert {run.seed for run in everything if run.experiment in CHOOSING} <= set(TUNING_SEEDS)
    assert {run.seed for run in everything if run.experiment not in CHOOSING}.isdisjoint({0, *TUNING_SEEDS})


async def test_wrong_replies_come_at_their_share_and_again_with_the_same_seed() -> None:
    agent = helpers.wrong_25(Config())
    said = [reply.text for reply in await replies(agent, "B")]
    assert said == [reply.text for reply in await replies(agent, "B")]
    assert 0.17 < sum(text != RULES["B"] for text in said) / len(said) < 0.33
    assert len(set(said)) > 50


async def test_same_wrong_tells_one_lie_per_operator() -> None:
    agent = helpers.same_60(Config())
    for letter in OPERATORS:
        said = Counter(reply.text for reply in await replies(agent, letter, 200))
        assert len(said) == 2
        assert 0.28 < said[RULES[letter]] / 200 < 0.52


async def test_wordy_replies_hold_the_fact_between_signs_of_each_reply() -> None:
    said = [reply.text for reply in await replies(helpers.wordy_knowledge(Config()), "B", 20)]
    assert {text[helpers.WORDY : -helpers.WORDY] for text in said} == {RULES["B"]}
    assert {*"".join(said).replace(RULES["B"], "")} == {*helpers.SIGNS}
    assert len({*said}) == len(said)


def test_a_line_that_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "faulty.jsonl").write_text('{"experiment": "faulty"}\n')
    assert cli.main(study.main, ["--results", str(tmp_path), "--list"]) == 2
    assert "faulty.jsonl:1: not a result of the study; delete the line" in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_study_puts_mask_below_aipo_and_goes_on_where_it_was(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The point of it all, in small: helpers' words are learned with aipo and not when masked, and with them what the policy does alone."""
    monkeypatch.chdir(root)
    short = {
        "train.steps": 4, "train.epochs": 6, "train.minibatches": 8, "optimizer.warmup_steps": 20, "run.dir": tmp_path / "runs",
        "run.trackers": "[]", "evaluate.problems": 24, "evaluate.problems_with_agents": 2, "evaluate.samples": 2,
    }  # fmt: skip
    words = [
        "--only",
        "coefficients",
        "--seeds",
        "1",
        "--results",
        str(tmp_path),
        *(w for pair in short.items() for w in ("--set", *map(str, pair))),
    ]
    assert cli.main(study.main, [*words, "--variants", "aipo", "mask"]) == 0
    before = (tmp_path / "coefficients.jsonl").read_text()
    rows = {row["variant"]: row for row in map(json.loads, before.splitlines())}
    aipo, mask = (rows[name]["trained"]["alone"]["pass@1"] for name in ("aipo", "mask"))
    assert mask < 0.02
    assert aipo > 0.2
    known = {}  # log p of the rules that Knowledge replies with; with aipo, they are learned within the first step
    for name in rows:
        metrics = read_metrics(tmp_path / "runs" / Run("coefficients", name, 1).name / "metrics.jsonl")
        known[name] = [row["agent_logprob/knowledge"] for row in metrics if "agent_logprob/knowledge" in row]
    gained = {name: (sum(found[-3:]) - sum(known["mask"][:3])) / 3 for name, found in known.items()}
    assert gained["aipo"] > 1
    assert gained["mask"] < gained["aipo"] / 2
    assert len(rows["aipo"]["curve"]["reward/alone/hard"]) == 4
    assert cli.main(study.main, [*words, "--variants", "aipo", "mask", "base"]) == 0
    after = (tmp_path / "coefficients.jsonl").read_text()
    assert after.startswith(before)
    assert [json.loads(line)["variant"] for line in after.removeprefix(before).splitlines()] == ["base"]


def test_a_run_is_one_folder(tmp_path: Path) -> None:
    assert Run("generality", "qwen3/grpo/aipo", 1).name == "generality-qwen3+grpo+aipo-1"
    assert Run("faulty", "aipo@same60", 2).name == "faulty-aipo=same60-2"


def test_the_base_policy_plans_for_three_operators_alone_and_does_not_see_its_slips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBLEMS", 24)
    model = load_model(load.model("operators"), dtype="float32", device="cpu").eval()
    slips, after_right, after_slip = probe.verdicts(model)
    assert slips == pytest.approx(0.12, abs=0.04)  # pretrain.SLIP
    assert after_right == pytest.approx(after_slip, abs=0.02)
    assert probe.lengths(model, 4)[0] == 0
    asks, plans, follows = probe.lengths(model, 3)
    assert min(asks, follows) > 0.8 > plans >= 0.3  # of three orders it knows one
