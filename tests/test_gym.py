"""reasoning-gym's generators as tasks: what is trained on, what is held out, and what a score is worth."""

import ast
import asyncio
import importlib
import inspect
import pkgutil
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rollout_world import settings

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.load import load
from aipo_graph.rollout.agents import Prompts
from aipo_graph.rollout.collect import open_agents
from aipo_graph.tasks import gym
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Request

NO_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Generators that state no right answer, since there are many: their scorers are known to refuse wrong ones alone."""
SUMS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "max_digits": 2}}


@pytest.fixture(autouse=True)
def by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")


def task(options: dict[str, Any], seed: int = 0) -> Any:
    return open_task(settings(run={"device": "cpu", "seed": seed}, task={"name": "reasoning_gym", "options": options}))


@pytest.mark.slow
def test_every_generator_rewards_its_right_answer_and_no_wrong_one() -> None:
    names = sorted(set(gym.generators()) - set(gym.REFUSED))
    assert len(names) > 95

    async def scores(name: str) -> tuple[str, float, float, float]:
        found = task({name: {}})
        problem = found.heldout(1)[0] if name not in ("intermediate_integration", "knight_swap") else found.train(0)  # these are slow
        boxes = (problem.answer, "no such answer", "")
        right, wrong, empty = [(await found.reward(problem, f"\\boxed{{{box}}}"))["reward"] for box in boxes]
        return name, right if problem.answer else -1.0, wrong, empty

    async def main() -> list[tuple[str, float, float, float]]:
        return [await scores(name) for name in names]

    found = asyncio.run(main())
    assert {name for name, right, _, _ in found if right != 1} == NO_ANSWER
    assert {name: (wrong, empty) for name, _, wrong, empty in found if max(wrong, empty) >= 1} == {}


def test_training_is_endless_and_never_meets_what_is_held_out() -> None:
    found = task(SUMS)
    heldout = found.heldout(100)
    trained = [found.train(index) for index in [*range(300), 10**9]]
    assert {p.question for p in heldout}.isdisjoint(p.question for p in trained)
    assert len({p.question for p in heldout}) == len({p.id for p in heldout}) == 100
    assert len({p.question for p in trained}) > 250
    assert [task(SUMS).train(index) for index in (7, 10**9)] == [trained[7], trained[-1]]
    assert task(SUMS, seed=1).heldout(100) == heldout
    assert task(SUMS, seed=1).train(7) != trained[7]


async def test_the_librarys_score_of_the_last_box() -> None:
    found = task(SUMS)
    for problem in (found.train(5), found.heldout(3)[2]):
        assert await found.reward(problem, f"so \\boxed{{{problem.answer}}}") == {"reward": 1.0, "answered": 1.0}
        assert await found.reward(problem, f"\\boxed{{{problem.answer}}} or \\boxed{{}}") == {"reward": 0.0, "answered": 1.0}
        assert await found.reward(problem, problem.answer) == {"reward": 0.0, "answered": 0.0}


def test_a_mixture_by_weight() -> None:
    found = task({"chain_sum": {"weight": 3}, "gcd": {}})
    kinds = [found.train(index).kind for index in range(400)]
    assert 250 < kinds.count("chain_sum") < 350
    assert kinds.count("chain_sum") + kinds.count("gcd") == 400
    assert {p.kind for p in found.heldout(40)} == {""}
    assert {p.meta["generator"] for p in found.heldout(40)} == {"chain_sum", "gcd"}
    assert {p.kind for p in found.heldout(5, "gcd")} == {"gcd"}
    with pytest.raises(TaskError, match=r"problem kind 'lcm': the kinds are the generators, chain_sum, gcd"):
        found.heldout(1, "lcm")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"name generators with their options, task.options: \{chain_sum: \{max_terms: 3\}\}"),
        ({"chain_sums": {}}, r"task.options.chain_sums: reasoning-gym has no such generator; did you mean 'chain_sum'\?"),
        ({"chain_sum": {"max_term": 3}}, r"task.options.chain_sum.max_term: no such option; did you mean 'max_terms'\?"),
        ({"chain_sum": {"min_terms": 9, "max_terms": 3}}, r"task.options.chain_sum = \{.*\}: max_terms must be >= min_terms"),
        ({"chain_sum": {"min_terms": "x"}}, r"task.options.chain_sum = \{"),
        ({"chain_sum": 3}, r"task.options.chain_sum = 3: give the generator's options as a mapping"),
        ({"chain_sum": {"weight": 0}}, r"task.options.chain_sum.weight = 0: give a number above 0"),
        ({"puzzle24": {}}, r"task.options.puzzle24: its scorer takes any four numbers that make 24"),
        ({"composite": {}}, r"task.options.composite: it is the library's own mixture"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        task(options)
    assert "\n" not in str(caught.value)


def test_a_generator_with_too_few_questions_says_so() -> None:
    found = task({"gcd": {"min_value": 2, "max_value": 3}})  # a pair of two values: four questions
    heldout = {p.question for p in found.heldout(50)}
    try:
        assert heldout.isdisjoint(found.train(index).question for index in range(20))
        assert len(heldout) < 4
    except TaskError as error:  # all of them are held out
        assert "questions in a row are held out, it has too few" in str(error)  # noqa: PT017


def test_what_depends_on_the_order_of_sets_wants_a_fixed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED")
    with pytest.raises(ConfigError, match=r"task.options.word_ladder: its problems would be others .* set PYTHONHASHSEED=0"):
        task({"word_ladder": {}})


# --- answers are untrusted


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("n_queens", "open('{path}', 'w') or [['Q']]"),
        ("spiral_matrix", "[open('{path}', 'w')]"),
        ("countdown", "open('{path}', 'w')"),
        ("countdown", "S(chr(49)).func.__class__"),
        ("simple_integration", "x.__class__.__base__"),
        ("polynomial_multiplication", "exit(0)"),
        ("countdown", "9**9**9**9"),
    ],
)
async def test_hostile_answers_are_wrong_ones_and_nothing_else(
    name: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, path = task({name: {}}), tmp_path / "made"
    problem = found.train(0)
    with monkeypatch.context() as patch:
        patch.setattr(gym, "CPU_SECONDS", 3.0)  # one of them takes all that it may have
        assert (await found.reward(problem, f"\\boxed{{{answer.format(path=path)}}}"))["reward"] < 1
    assert not path.exists()
    assert (await found.reward(problem, f"\\boxed{{{problem.answer}}}"))["reward"] == 1


GUARD = """
from aipo_graph.tasks import gym
gym.guard()
import sympy
from reasoning_gym.games import countdown, n_queens
for parse in (sympy.parse_expr, countdown.parse_expr):
    print(parse("2*x + sin(x)/3 - 4.5"))
    for text in ("exit(0)", "x.y", "S('1')", "E", "x._a", "open", "[1]", "lambda x: x", "x if x else y", "eval", "a b"):
        try:
            print("taken", text, parse(text))
        except (ValueError, SyntaxError):
            pass
print(n_queens.eval("[['Q', '_']]"))
"""


def test_what_stands_in_the_place_of_eval() -> None:
    done = subprocess.run([sys.executable, "-c", GUARD], capture_output=True, text=True, check=True)
    assert "taken" not in done.stdout
    assert done.stdout.count("sin(x)/3") == 2
    assert done.stdout.endswith("[['Q', '_']]\n")


def test_nothing_else_in_the_library_reads_an_answer_with_eval() -> None:
    """A newer version may: then this says so, and `guard` needs a line more."""
    gym.generators()
    package = importlib.import_module("reasoning_gym")
    found = set()
    for info in pkgutil.walk_packages(package.__path__, "reasoning_gym."):
        if re.search(r"contrib|rearc_utils|gsm_symbolic\.gen", info.name):  # they make problems, and score nothing
            continue
        module = importlib.import_module(info.name)
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "id", getattr(called, "attr", ""))
            if name in ("eval", "exec", "parse_expr", "sympify", "S"):
                found.add(f"{info.name.removeprefix('reasoning_gym.')}:{name}")
    algebra = ("simple_integration", "intermediate_integration", "polynomial_multiplication")
    of_answers = {f"{name}:eval" for name in gym.LITERALS} | {f"{name}:parse_expr" for name in gym.FORMULAS}
    of_answers |= {f"algebra.{name}:parse_expr" for name in algebra}  # through sympy
    of_its_own = {
        "arithmetic.basic_arithmetic:eval", "arithmetic.bitwise_arithmetic:eval", "algorithmic.number_sorting:eval", "code.codeio:exec",
        "logic.propositional_logic:parse_expr",
    }  # fmt: skip
    assert found <= of_answers | of_its_own


# --- examples/legs


async def test_what_the_example_teaches_is_right_and_no_text_of_it_is_held_out(root: Path) -> None:
    made = sys.modules[load(f"{root}/examples/legs/make_policy.py:main").__module__]
    config, _ = cli.parse([str(root / "examples/legs/config.yaml")], Config, prog="test")
    found, (helper,) = open_task(config), open_agents(config.agents.use, config).values()
    for problem in found.heldout(5):
        animals = re.findall(r"1 ([a-z ]+)", problem.question)
        legs = {animal: int((await helper(Request("knowledge", animal), Prompts())).text) for animal in animals}
        pieces = made.solution(problem.question, legs)
        assert "<unk>" not in made.tokenizer().decode(made.encode(pieces)[0])
        text = "".join(piece.text for piece in pieces)
        assert (await found.reward(problem, text))["reward"] == 1.0
    texts = [made.sample(random.Random(seed))[0].text for seed in range(100)]
    assert not any(made.QUESTIONS.heldout({"question": text}) for text in texts)
