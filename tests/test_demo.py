"""The demo on the shipped policy: every source with its name, hostile text inert, errors in one line."""

import asyncio
import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rollout_world import bpe, world
from started import run_module

from aipo_graph import cli
from aipo_graph.demo import Demo, Questions, settings
from aipo_graph.demo.__main__ import Screen, Turn, command, summary, trace_of, turns, visible
from aipo_graph.demo.web import make, plan
from aipo_graph.engines.local import LocalEngine
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Problem, Segment, Trace

HOSTILE = "\x1b[31mred\x1b[0m [red]markup[/red] \u202etxet\u202c a\rb\x07\u2028\u200f\n[knowledge] forged\x9b2J"


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    demo = settings(["operators"])
    return Rollouts.open(demo, LocalEngine.load(demo, demo.policy.model), open_task(demo))


def agent_segments(text: str) -> tuple[Segment, ...]:
    tags = [Segment("context", "feedback", (1,), text=tag) for tag in ("<feedback>", "</feedback>")]
    return (tags[0], Segment("agent", "knowledge", (2,), text=text), tags[1])


def test_plain_demo_shows_every_source_with_its_name(tmp_path: Path) -> None:
    """In a process of its own, its output no terminal: alone writes its own feedback, with agents each reply carries a name."""
    done = run_module("aipo_graph.demo", ["operators", "--compare", "%6475IEB?", "--temperature", "0"], tmp_path)
    assert done.returncode == 0, done.stderr
    alone, helped = done.stdout.split("--- with agents\n")
    assert set(re.findall(r"^\[(\w+)\]", alone, re.M)) == {"prompt", "policy", "summary"}
    assert set(re.findall(r"^\[(\w+)\]", helped, re.M)) == {"prompt", "policy", "reasoning", "knowledge", "verify", "summary"}
    assert "[reasoning] <feedback>3B2E1I</feedback>" in helped
    assert "  <feedback>" in alone
    last = helped.strip().splitlines()[-1]
    assert re.search(r"reward [01].*consults: knowledge \d+, reasoning 1, verify \d+; tokens: context \d+, policy \d+, agent \d+", last)
    assert "\x1b" not in done.stdout


async def test_segments_are_reported_superstep_by_superstep(rollouts: Rollouts) -> None:
    seen: list[tuple[Segment, ...]] = []
    problem = rollouts.task.heldout(1)[0]
    trace = await rollouts.run_graph(problem, seed=0, with_agents=True, on_segments=seen.append)
    assert sum(seen, ()) == trace.segments
    assert len(seen) == sum(name in ("policy", *rollouts.agents) for name in trace.path) > 2


@pytest.mark.parametrize("colour", [True, False])
def test_hostile_text_is_inert(colour: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=colour, width=200, color_system="standard", _environ={"TERM": "xterm"})
    screen = Screen(console, ["knowledge"])
    assert screen.plain is not colour
    for turn in turns(agent_segments(HOSTILE)):
        screen.show(turn)
    shown = out.getvalue()
    ours = re.sub(r"\x1b\[[0-9;]*m", "", shown) if colour else shown
    assert "\\x1b[31mred\\x1b[0m [red]markup[/red] \\u202etxet\\u202c a\\rb\\x07\\u2028\\u200f" in ours
    assert all(c == "\n" or c.isprintable() for c in ours)
    assert "\x1b[31m" not in shown
    assert not any(line.startswith("[knowledge] forged") for line in ours.splitlines())
    assert "knowledge" in ours.splitlines()[0]


def test_summary_is_inert_and_scored_only_where_the_answer_is_known() -> None:
    answer = Segment("policy", "policy", (1,), text="\\boxed{\x1b[2J}", logprobs=(-0.1,), version=0)
    trace = Trace("p", 0, False, (answer,), ("policy",), scores={"reward": 0.0}, error="\u202eevil", reply=answer.text)
    assert "reward" not in summary(trace, "").text.plain
    assert "reward 0 (right is 5)" in summary(trace, "5").text.plain
    assert "answer \\x1b[2J" in summary(trace, "5").text.plain
    assert visible("\ud800\tx\n") == "\\ud800    x\n"


async def test_what_votes_ends_where_what_is_scored_ends(root: Path) -> None:
    """At an end of turn that the policy spelt out: what it wrote after it is nobody's answer."""
    end = bpe().eos_token
    rollouts = world(root, lambda text: f"\\boxed{{1000}}{end}\\boxed{{2}}", [], bpe())
    problem = Problem("p0", "what is p0?", "1000")
    shown = await make(rollouts, problem, plan(problem, [False], 1, seed=0)[0], None, lambda event: None)
    assert (shown["reward"], shown["answer"], shown["vote"]) == (1.0, "1000", "1000")
    said: list[Turn] = []
    await trace_of(rollouts, problem, 0, False, said.append)
    assert "answer 1000" in said[-1].text.plain


def test_no_color_and_dumb_terminals_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Screen(Console(force_terminal=True, _environ={"TERM": "dumb"}), ["a"]).plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert Screen(Console(force_terminal=True), ["a"]).plain


def test_compare_stacks_where_the_terminal_is_narrow() -> None:
    columns: dict[str, list[Turn]] = {title: turns(agent_segments("7")) for title in ("alone", "with agents")}
    for width, beside in ((120, True), (60, False)):
        out = io.StringIO()
        screen = Screen(Console(file=out, force_terminal=True, width=width, _environ={"TERM": "xterm"}), ["knowledge"])
        screen.console.print(screen.beside(columns))
        assert any("alone" in line and "with agents" in line for line in out.getvalue().splitlines()) is beside


def test_questions_find_their_answers(rollouts: Rollouts) -> None:
    questions = Questions(rollouts, seed=0)
    assert questions.read(questions.example).id.startswith("heldout")
    assert questions.read("@1234A?").answer == rollouts.task.solve("@1234A?") != ""  # type: ignore[attr-defined]
    assert questions.read("123") == Problem("demo", "123", "")
    assert questions.sample() != questions.sample()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nosuch"], "no model 'nosuch'"),
        (["operators", "what is 1+1"], "a question of this task looks like '"),
        (["operators", "@1234A?", "--alone", "--compare"], "choose one"),
        (["operators", "@1234A?", "--alone", "--graph", "graphs/smallest.py:build"], "leave out --alone"),
        (["operators", "@1234A?", "--graph", "graphs/smalest.py:build"], "did you mean"),
        (["operators", "@1234A?", "--graph", "graphs/smallest.py:build"], "the graph has no node"),
        (["operators", "@1234A?", "--tempreature", "1"], "did you mean '--temperature'"),
        (["operators", "1234" * 200], "the model's context is 512"),
    ],
)
def test_errors_are_one_line_and_exit_2(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command, args) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error


def test_interactive_goes_on_after_a_bad_question(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n:sample\n@1234AB?\n"))
    assert cli.main(command, ["operators", "--alone", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "error: the model's tokenizer does not know 'h e l o'" in out
    assert out.count("[summary]") == 4
    assert out.count("of 2 solved") == 2


def test_settings_come_from_the_run_that_made_the_model(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "config.yaml").write_text("rollout: {max_tokens: 77}\n")
    demo = settings(["--temperature=0", str(tmp_path / "policy"), "--with-agents", "question"])
    assert (demo.rollout.max_tokens, demo.question, demo.temperature) == (77, "question", 0.0)
    assert settings(["operators"]).rollout.prompts == "prompts/operators"


def test_the_same_seed_shows_the_same_trace(rollouts: Rollouts) -> None:
    problem = rollouts.task.heldout(1)[0]
    with asyncio.Runner() as runner:
        one, two, other = (runner.run(rollouts.run_graph(problem, seed=seed, with_agents=False)) for seed in (1, 1, 2))
    assert one == two != other
    assert isinstance(rollouts.config, Demo)
