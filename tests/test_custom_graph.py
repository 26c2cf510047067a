"""docs/graphs.md: its graphs do what it says, its worked example trains, its errors read as it says."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from started import run_module

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.engines.local import LocalEngine
from aipo_graph.errors import GraphError
from aipo_graph.learn.batch import pack
from aipo_graph.load import find, model
from aipo_graph.rollout.collect import Rollouts, gather
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Trace, TraceGroup

EXAMPLE = "examples/limited_checks"


def open_rollouts(*args: str) -> Rollouts:
    config, _ = cli.parse(args, Config, prog="test")
    return Rollouts.open(config, LocalEngine.load(config, model(config.policy.model)), open_task(config))


async def traces(rollouts: Rollouts, count: int = 6) -> list[Trace]:
    """Traces with agents, each checked by the ledger."""
    problems = rollouts.task.heldout(count)
    return await gather([rollouts.run_trace(problem, seed=i, with_agents=True) for i, problem in enumerate(problems)])


@pytest.fixture(scope="module")
def quickstart() -> Rollouts:
    return open_rollouts("configs/quickstart.yaml")


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs/graphs.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page_names(page: str) -> dict[str, Any]:
    """What the page's Python defines when run from top to bottom."""
    names: dict[str, Any] = {"__name__": "page"}
    for text in re.findall(r"^```python.*\n((?s:.*?))^```$", page, re.M):
        exec(compile(text, "docs/graphs.md", "exec"), names)
    return names


def test_smallest_graph_is_small(root: Path) -> None:
    assert len((root / "graphs/smallest.py").read_text(encoding="utf-8").splitlines()) <= 25


def test_python_on_the_page_runs(page_names: dict[str, Any]) -> None:
    assert set(page_names["build_stuck"]().get_graph().nodes) == {"__start__", "policy", "reasoning", "__end__"}


async def test_by_confidence_offers_a_consult_where_the_policy_is_stuck(quickstart: Rollouts, page_names: dict[str, Any]) -> None:
    """The page's graph, under prompts that the policy never saw the like of: at a hot temperature it is never sure."""
    stuck = replace(quickstart, graph=page_names["build_stuck"](), agents={"reasoning": quickstart.agents["reasoning"]}, temperature=20.0)
    assert any("reasoning" in trace.path for trace in await traces(stuck))


async def test_a_node_that_loses_a_completion_is_refused_as_the_page_says(
    page: str, quickstart: Rollouts, page_names: dict[str, Any]
) -> None:
    with pytest.raises(GraphError) as caught:
        await traces(replace(quickstart, graph=page_names["build_lossy"]()), 1)
    remedy = "a node must return append(segment) for all that it samples"
    assert remedy in str(caught.value)
    assert remedy in page


async def test_smallest_graph_consults_its_one_agent() -> None:
    config = ("configs/quickstart.yaml", "--rollout.graph", "graphs/smallest.py:build")
    rollouts = open_rollouts(*config, "--agents.use", '{"knowledge": "graphs/operators_agents.py:knowledge"}')
    found = await traces(rollouts)
    assert {node for trace in found for node in trace.path} <= {"policy", "knowledge"}
    assert all(trace.trained for trace in found)


async def test_an_agent_without_a_node_is_named(quickstart: Rollouts) -> None:
    rollouts = open_rollouts("configs/quickstart.yaml", "--rollout.graph", "graphs/smallest.py:build")
    with pytest.raises(GraphError, match="no node 'reasoning': add one, or leave it out of agents.use"):
        await traces(rollouts, 1)


async def test_two_threads_become_two_training_rows() -> None:
    rollouts = open_rollouts("configs/quickstart.yaml", "--rollout.graph", "graphs/two_threads.py:build")
    problem = rollouts.task.heldout(1)[0]
    found = await gather([rollouts.run_trace(problem, seed=seed, with_agents=True) for seed in range(4)])
    for trace in found:
        assert trace.threads == ("planner", "main")
        assert trace.path[:3] == ("planner", "hand_over", "policy")
        assert [row[0].source for row in trace.rows()] == ["context", "context"]
        assert all(any(segment.source == "policy" for segment in row) for row in trace.rows())
    rewarded = tuple(replace(trace, scores={"reward": float(i % 2)}) for i, trace in enumerate(found))
    assert pack([TraceGroup(problem, rewarded)], rollouts.config.loss).token_ids.shape[0] == 8


@pytest.fixture
def example(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The worked example, alone in an empty folder."""
    shutil.copytree(root / EXAMPLE, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine"


async def test_worked_example_runs_its_own_graph_and_agent(example: Path) -> None:
    rollouts = open_rollouts(str(example / "config.yaml"))
    assert find(rollouts.config.rollout.graph.rpartition(":")[0]) == example / "graph.py"
    found = await traces(rollouts, 24)
    replies = [(s.author, s.text) for trace in found for s in trace.segments if s.source == "agent"]
    assert {name for name, _ in replies} == {"verify", "knowledge", "reasoning"}
    assert ("knowledge", "?") in replies, "its rule book has gaps"
    checks = [sum(s.source == "agent" and s.author == "verify" for s in trace.segments) for trace in found]
    assert max(checks) == 4, "its router allows no more"
    assert all(trace.status == "budget" for trace, count in zip(found, checks, strict=True) if count == 4 and trace.path[-1] == "policy"
               and trace.segments[-1].text.endswith("</verify>"))  # fmt: skip


@pytest.mark.slow
def test_worked_example_trains_from_the_command_line(example: Path) -> None:
    small = ["--train.steps", "1", "--rollout.problems", "2", "--rollout.traces", "4", "--evaluate.problems", "2",
             "--evaluate.problems_with_agents", "2", "--evaluate.samples", "1", "--engine.workers", "1"]  # fmt: skip
    done = run_module("aipo_graph.train", ["mine/config.yaml", *small], Path.cwd())
    assert done.returncode == 0, done.stderr
    assert Path("runs/limited_checks/summary.json").is_file()
