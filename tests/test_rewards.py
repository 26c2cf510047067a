"""What a trace is worth: a user's functions, what they are given, how they fail, and the scores that come of them."""

import asyncio
import functools
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rollout_world import Exact, bpe, settings, world
from test_chat_graph import agent, build

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.rollout.stream import rollout_metrics
from aipo_graph.tasks import rewards
from aipo_graph.tasks.open import open_task
from aipo_graph.tasks.rewards import PLACES, Rewards
from aipo_graph.types import Problem, Trace, TraceGroup

PROBLEM = Problem("p", "6*7?", "42", meta={"question": "6*7?", "gold": 42, "unit": "m"})
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"], "additionalProperties": False}


def given(reply: str = "it is 42", problem: Problem = PROBLEM) -> dict[str, Any]:
    trace = Trace(problem.id, 7, False, (), ("policy",), reply=reply)
    fields = {"question": problem.question, "answer": problem.answer, "row": dict(problem.meta)}
    return {**fields, "reply": reply, "messages": None, "state": {"votes": 3}, "trace": trace, "problem": problem}


def opened(reward: Any = None, *, options: Mapping[str, Any] = {}, **task: Any) -> Rewards:
    """The rewards of a task whose own are ``reward``, under these settings."""
    return Rewards(settings(task={"name": "mine.py:build", **task, "options": options}), SimpleNamespace(reward=reward))


def score(reward: Any, reply: str = "it is 42", **task: Any) -> dict[str, float]:
    return asyncio.run(opened(reward, **task)(given(reply)))


# --- what a function is given


async def later(answer: str, reply: str) -> float:
    await asyncio.sleep(0)
    return float(answer in reply)


class Judge:
    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, reply: str) -> bool:
        return self.word in reply


def scaled(reply: str, factor: float, answer: str = "?") -> float:
    return factor * (answer in reply)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (lambda question, answer, reply: float(answer in reply and question == "6*7?"), 1.0),
        (lambda row, state, trace: row["gold"] + state["votes"] + trace.seed, 52.0),
        (lambda **everything: len(everything), float(len(rewards.GIVEN))),
        (lambda reply, tolerance=0.25: tolerance, 0.25),
        (lambda problem: problem.id == "p", 1.0),
        (later, 1.0),
        (Judge("42"), 1.0),
        (functools.partial(scaled, factor=3), 3.0),
        (functools.partial(scaled, factor=3, answer="no"), 0.0),
    ],
)
def test_a_function_is_given_what_it_names(reward: Callable[..., Any], expected: float) -> None:
    assert score(reward) == {"reward": expected}


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (
            lambda gold: 1.0,
            "nothing is given for its parameter 'gold'; there is answer, messages, .*, trace; or",
        ),
        (lambda anwser, reply: 1.0, "nothing is given for its parameter 'anwser'; did you mean 'answer'?"),
        (lambda reply, /: 1.0, "nothing is given for its parameter 'reply'"),
        (3, "a int is no function; name one"),
        (None, "it has no `reward`; say task.reward: text, math, json:SCHEMA_FILE or file.py:name"),
    ],
)
def test_what_cannot_be_called_is_said_at_the_start(reward: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        opened(reward)
    assert "\n" not in str(caught.value)


async def test_what_a_function_is_given_comes_from_the_run(root: Path) -> None:
    """The reply ends with the policy's last word, not with its control token; the state is the graph's last."""
    seen: dict[str, Any] = {}

    def look(**everything: Any) -> float:
        seen.update(everything)
        return 0.5

    task = Exact()
    task.reward = look  # type: ignore[method-assign]
    rollouts = replace(world(root, lambda text: "\\boxed{42}", []), task=task)
    trace = await rollouts.run_trace(PROBLEM, seed=0, with_agents=False)
    assert trace.segments[-1].text == "\\boxed{42}<eos>"
    assert (seen["reply"], trace.reply, trace.reward) == ("\\boxed{42}", "\\boxed{42}", 0.5)
    assert (seen["row"]["unit"], seen["answer"], seen["messages"]) == ("m", "42", None)
    assert seen["state"]["segments"] == seen["trace"].segments == trace.segments


async def test_of_a_graph_of_messages_it_gets_them(tmp_path: Path) -> None:
    task = Exact()
    task.reward = lambda messages, reply: float(messages[-1].content == reply) + len(messages)  # type: ignore
    rollouts = replace(build(tmp_path, agent(), max_tokens=20), task=task)
    trace = await rollouts.run_trace(PROBLEM, seed=1, with_agents=True)
    assert trace.reward >= 3  # the question, what was said, and that what was said last is the reply


async def test_messages_of_a_graph_that_has_none(root: Path) -> None:
    task = Exact()
    task.reward = lambda messages: 1.0  # type: ignore
    with pytest.raises(ConfigError, match=r"^task.reward names `messages`, which the state of graphs/aipo.py:build does not have"):
        await replace(world(root, lambda text: "x", []), task=task).run_trace(PROBLEM, seed=0, with_agents=False)


# --- how it fails


def breaks(reply: str) -> float:
    return float({}[reply])


async def calls_out(reply: str) -> float:
    raise TimeoutError("the judge's server")


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (breaks, rf"^breaks\(\) of task mine.py:build: raised KeyError in {re.escape(__file__)}:\d+: 'it is 42'$"),
        (calls_out, rf"^calls_out\(\) of task mine.py:build: raised TimeoutError in {re.escape(__file__)}:\d+: the judge's server$"),
        (lambda: math.nan, r", problem 'p': the reward is nan$"),
        (lambda: -math.inf, r", problem 'p': the reward is -inf$"),
        (lambda: asyncio.sleep(60), r": had not ended after 0.05 s \(task.timeout\)$"),
    ],
)
def test_where_there_is_no_verdict_there_is_no_score(reward: Callable[..., Any], said: str) -> None:
    with pytest.raises(TaskError, match=said) as caught:
        score(reward, timeout=0.05)
    assert "\n" not in str(caught.value)


def test_a_call_without_an_end_is_left_behind_and_too_many_of_them_end_the_run() -> None:
    end = threading.Event()
    held = opened(lambda: end.wait() and 1.0, timeout=0.01)

    async def calls(count: int) -> list[Any]:
        return await asyncio.gather(*(held(given()) for _ in range(count)), return_exceptions=True)

    async def main() -> None:
        assert {type(error) for error in await calls(PLACES - 1)} == {TaskError}
        last = await calls(1)
        assert isinstance(last[0], ConfigError)
        assert f"and {PLACES} such calls still run: look for a loop without an end" in str(last[0])
        end.set()

    asyncio.run(main())


def test_calls_wait_for_a_place() -> None:
    at_once, most = 0, 0

    async def counted() -> float:
        nonlocal at_once, most
        at_once, most = at_once + 1, max(most, at_once + 1)
        await asyncio.sleep(0)
        at_once -= 1
        return 1.0

    held = opened(counted)

    async def main() -> None:
        await asyncio.gather(*(held(given()) for _ in range(2 * PLACES)))

    asyncio.run(main())
    assert most == PLACES


# --- several, with weights


def test_several_by_name_with_weights() -> None:
    several = {"right": "math", "short": lambda reply: len(reply) < 20, "style": lambda: {"reward": 0.5, "commas": 3}}
    found = score(several, reply="\\boxed{42}", weights={"short": 0.2, "style": -1})
    assert found == pytest.approx({"reward": 1 + 0.2 - 0.5, "right": 1, "answered": 1, "short": 1, "style": 0.5, "commas": 3})


@pytest.mark.parametrize(
    ("several", "weights", "said"),
    [
        (
            {"reward": "text", "short": "text"},
            {},
            r"task.reward.reward: the whole reward, or what the rollout counts itself, has",
        ),
        ({"leaks": "text"}, {}, r"task.reward.leaks: the whole reward, or what the rollout counts itself, has that name; give it another"),
        ({"right": "text"}, {"rihgt": 1.0}, r"task.weights.rihgt: task.reward has no 'rihgt'; did you mean 'right'\?"),
        ("text", {"text": 1.0}, r"task.weights.text: task.reward has no 'text'; weights are those of rewards by name"),
        ("style", {}, r"task.reward = 'style': no such reward; there is json:SCHEMA_FILE, math, text; write path/to/rewards.py:name"),
    ],
)
def test_settings_that_name_no_reward(several: Any, weights: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        opened(reward=several, weights=weights)


def test_two_scores_of_one_name() -> None:
    with pytest.raises(ConfigError, match=r"gave a score named 'right', as another reward does; rename one"):
        score({"right": lambda: 1.0, "other": lambda: {"reward": 1.0, "right": 2.0}})


# --- those that are here


def test_text_and_mathematics() -> None:
    assert [score("text", reply)["reward"] for reply in ("42", " 42\n", "42.", "it is 42")] == [1, 1, 0, 0]
    assert score("math", "so \\boxed{42.0}") == {"reward": 1, "answered": 1}
    assert score("math", "so 42") == {"reward": 0, "answered": 0}
    third = Problem("p", "1/3?", "1/3")
    for digits, expected in ((0, 0.0), (3, 1.0)):
        held = opened("math", options={"rounded_digits": digits})
        assert asyncio.run(held(given("\\boxed{0.333}", third)))["reward"] == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"age": 3}', 1), ('```json\n{"age": 3}\n```', 1), (' {"age": 3}\n', 1), ('{"age": -1}', 0), ('{"age": "3"}', 0), ("{}", 0),
        ('{"age": 3, "x": 1}', 0), ("age: 3", 0), ("", 0), ("[" * 100_000, 0), ('{"age": 1e999}', 0), ('{"age": NaN}', 0),
    ],
)  # fmt: skip
def test_json_by_schema(reply: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "person.json").write_text(json.dumps(SCHEMA))
    assert score(f"json:{tmp_path}/person.json", reply) == {"reward": expected}


def test_a_pattern_that_explodes_on_a_reply_scores_0(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps({"type": "string", "pattern": "^(a+)+$"}))
    assert score(f"json:{tmp_path}/words.json", json.dumps("a" * 40 + "!"))["reward"] == 0
    assert score(f"json:{tmp_path}/words.json", json.dumps("aaa"))["reward"] == 1


@pytest.mark.parametrize("text", ["{", '{"type": "nonsense"}'])
def test_a_file_that_is_no_schema(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=r"bad.json': not a JSON schema \("):
        opened(f"json:{tmp_path}/bad.json")


# --- in a run


REWARDS = """
def close(answer, reply):
    return 1 - min(1, abs(len(answer) - len(reply)) / 10)

def polite(row, reply):
    return {"reward": row["word"] in reply, "letters": len(reply)}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "person.json").write_text(json.dumps(SCHEMA))
    rows = [{"question": f"what is p{i}?", "word": "please", "note": None} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*lines: str) -> Config:
    Path("run.yaml").write_text("task:\n" + "".join(f"  {line}\n" for line in ("name: dataset", "data: rows.jsonl", *lines)))
    return cli.parse(["run.yaml"], Config, prog="test")[0]


async def test_scores_of_a_run_are_in_metrics(folder: Path, root: Path) -> None:
    """Rows without an answer, whole rows for who asks, each score averaged."""
    several = config("reward: {near: rewards.py:close, polite: rewards.py:polite}", "weights: {polite: 2}")
    task = open_task(several)
    problem = task.train(3)
    assert (problem.answer, problem.meta["word"]) == ("", "please")
    rollouts = replace(world(root, lambda text: "one, please", [], tokenizer=bpe()), config=several, task=task)
    traces = [await rollouts.run_trace(problem, seed=seed, with_agents=False) for seed in range(2)]
    metrics = rollout_metrics([TraceGroup(problem, tuple(traces))], [], 0)
    found = {name: value for name, value in metrics.items() if name.startswith("score/")}
    assert found == {"score/near": 0, "score/polite": 1, "score/letters": len("one, please")}
    assert metrics["reward"] == 2


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["reward: rewards.py:clse"], r"rewards.py has no 'clse'; did you mean 'close'\?"),
        (["reward: no.py:close"], "no file 'no.py'"),
        (["reward: json:no.json"], "no file 'no.json'"),
        (["reward: 3"], "task.reward"),
    ],
)
def test_a_reward_that_does_not_load_is_said_at_the_start(lines: list[str], said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        open_task(config(*lines))
