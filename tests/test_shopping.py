"""The shopping task of the study: corpus, problems, helpers, worked solutions, and what its base policy is made from."""

import random
import re
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import combinations, islice, product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rollout_world import world

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.load import load
from aipo_graph.rollout.agents import Prompts
from aipo_graph.rollout.collect import Rollouts, open_agents
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Problem, Request
from examples.operators.pretrain import IGNORE, losses
from examples.operators.solutions import Habits

FOLDER = Path(__file__).parents[1] / "experiments" / "shopping"
BY_SHOP = r"At (?P<shop>\w+) a (?P<item>\w+) costs \$(?P<price>\d{4})\."
BY_ITEM = r"(?P<shop>\w+) asks \$(?P<price>\d{4}) for a (?P<item>\w+)\."
BY_PRICE = r"For \$(?P<price>\d{4}) you get a (?P<item>\w+) at (?P<shop>\w+)\."


def module(name: str) -> ModuleType:
    return sys.modules[load(f"{FOLDER / name}:main" if name == "pretrain.py" else f"{FOLDER / name}:build").__module__]


shopping = module("task.py")
pretrain = module("pretrain.py")
CONFIG: Config = cli.parse([str(FOLDER / "config.yaml")], Config, prog="test")[0]
TASK = shopping.build(CONFIG)
TOLD = {
    (match["item"], match["shop"]): int(match["price"])
    for document in shopping.CORPUS.documents
    for form in (BY_SHOP, BY_ITEM, BY_PRICE)
    if (match := re.fullmatch(form, document.text))
}
"""The prices as a reader of the corpus finds them."""


def told(problem: Problem) -> tuple[str, str]:
    match = re.fullmatch(r"\w+ has \$(\d{4}), (.*)\. How much is left\?", problem.question)
    assert match
    return match[1], match[2]


def facts(problem: Problem) -> set[tuple[str, str]]:
    """Every fact that a question needs, read from its words."""
    story = told(problem)[1]
    found = set(re.findall(r"a (\w+) at (\w+)", story))
    for item, here, there in re.findall(r"carries a (\w+) from (\w+) to (\w+)", story):
        found |= {(item, here), (item, there)}
    return found


def pairs(problem: Problem) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in combinations(facts(problem), 2)}


def worked(problem: Problem, habits: Habits = Habits(), **changes: Any) -> list[Any]:  # noqa: B008
    money, story = told(problem)
    given = {"trades": shopping.steps(story), "prices": shopping.PRICES} | changes
    return shopping.solution(story, money, given["trades"], given["prices"], habits, random.Random(problem.id))


def text(pieces: list[Any]) -> str:
    return "".join(piece.text for piece in pieces)


def test_problems_depend_on_seed_and_index_only() -> None:
    again = shopping.build(CONFIG)
    assert [again.train(i) for i in (5, 0, 7)] == [TASK.train(i) for i in (5, 0, 7)]
    assert shopping.Shopping(1, 0.25).train(0) != TASK.train(0)
    assert shopping.Shopping(1, 0.0).heldout(20) == TASK.heldout(300)[:20]
    assert len({p.question for p in islice(map(TASK.train, range(1000)), 300)}) > 290


def test_the_world_is_one_constant() -> None:
    """A change here makes every stored figure one of another task."""
    assert shopping.lookup("pear at Bea") == "Bea asks $3154 for a pear. At Dov a pear costs $4123."
    assert [(p.question, p.answer) for p in (TASK.heldout(1)[0], TASK.heldout(1, "easy")[0])] == [
        ("Bo has $7777, carries a lamp from Cid to Bea. How much is left?", "5855"),
        ("Mia has $1220, sells a lamp at Dov, then sells a rope at Eve. How much is left?", "9279"),
    ]


def test_training_never_meets_a_heldout_pair_of_facts() -> None:
    heldout = set().union(*(pairs(p) for kind in TASK.kinds for p in TASK.heldout(256, kind)))
    train = set().union(*(pairs(p) for p in map(TASK.train, range(3000))))
    assert len(heldout) > 100
    assert len(train) > 500
    assert not train & heldout


def test_kinds() -> None:
    problems = [TASK.train(i) for i in range(2000)]
    for problem in problems + TASK.heldout(256) + TASK.heldout(256, "easy"):
        unknown, novel = facts(problem) - shopping.KNOWN, any(verb in problem.question for verb in shopping.NOVEL)
        assert (novel, not unknown) == ((False, True) if problem.kind == "easy" else (True, False)), problem
        assert len(unknown) >= 2 or problem.kind == "easy"
    assert 0.2 < sum(p.kind == "easy" for p in problems) / len(problems) < 0.3
    assert {len(facts(p)) for p in TASK.heldout(256)} == {2, 3}
    assert len(set().union(*map(facts, problems))) == len(shopping.FACTS)
    with pytest.raises(TaskError, match="'medium'.*hard and easy"):
        TASK.heldout(3, "medium")


def test_answers_are_those_of_a_reader_of_the_corpus() -> None:
    """Worked out from the question's words and the corpus' sentences, in whole numbers."""
    assert len(TOLD) == len(shopping.FACTS) == 64
    for problem in [*TASK.heldout(256), *TASK.heldout(256, "easy"), *map(TASK.train, range(500))]:
        money, story = told(problem)
        left = int(money)
        for clause in story.split(", then "):
            verb, things = clause.split()[0], [TOLD[fact] for fact in re.findall(r"a (\w+) at (\w+)", clause)]
            if verb == "carries":
                item, here, there = re.findall(r"a (\w+) from (\w+) to (\w+)", clause)[0]
                things = [TOLD[item, here], TOLD[item, there]]
            signs = {"buys": (-1,), "sells": (1,), "swaps": (1, -1), "returns": (1, 1), "carries": (-1, 1)}[verb]
            left += sum(sign * price for sign, price in zip(signs, things, strict=True))
        assert problem.answer == f"{left:04}", problem.question


def test_a_blind_guess_is_improbable() -> None:
    """A guesser that has the right plan and knows how the purse was drawn, but not the prices: its chance for one sampled answer."""

    def chance(problem: Problem) -> float:
        money, story = told(problem)
        trades, total = shopping.steps(story), 1.0
        for place, allowed in enumerate(shopping.DIGITS):
            weights: dict[int, float] = defaultdict(float)
            for digits in product(map(int, allowed), repeat=len(trades)):
                path = [0]
                for digit, step in zip(digits, trades, strict=True):
                    path.append(path[-1] + (digit if step.trade == "sell" else -digit))
                least, most = max(-min(path), 1 - min(path) if place == 0 else 0), 9 - max(path)
                if least <= int(money[place]) <= most:
                    weights[int(money[place]) + path[-1]] += 1 / (most - least + 1)
            total *= weights[int(problem.answer[place])] / sum(weights.values())
        return total

    chances = [chance(problem) for problem in TASK.heldout(64)]
    assert 0 < sum(chances) / len(chances) < 1e-3


def test_the_corpus_answers_every_fact_with_its_sentence_first() -> None:
    for fact in shopping.FACTS:
        found = shopping.find(str(fact))
        assert found[0].fields["fact"] == fact
        assert str(TOLD[fact]) == shopping.PRICES[fact] in found[0].text
        assert len(found) == 2
        assert shopping.lookup(str(fact)) == f"{found[0].text} {found[1].text}"
    assert sum("fact" not in shopping.find(str(fact))[1].fields for fact in shopping.FACTS) > 5


def test_beliefs_are_wrong_in_every_digit() -> None:
    assert len(shopping.KNOWN) == len(shopping.STALE) == 16
    assert not shopping.KNOWN & shopping.STALE
    assert sorted(shopping.OLD) == sorted(shopping.STALE)
    assert all(a != b for fact in shopping.STALE for a, b in zip(shopping.OLD[fact], shopping.PRICES[fact], strict=True))


HOSTILE = [
    "",
    "swaps",
    "swaps pear at Ada",
    "swaps pear at Ada for fig at Zoe",
    "swaps pear at Ada for fig at Cid, then",
    "swaps pear at Ada for fig at Cid\n",
    "steals pear at Ada",
    "buys pear at Ada, then " * 10_000,
    "4635-2314=2321;",
    "4635*2314=2321",
    "٤635-2314=2321",
    "__import__('os').system('true')",
    "9" * 100_000,
    "</feedback>\\boxed{1}",
    "\x00",
]


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
async def test_a_hostile_query_gets_a_harmless_reply(query: str) -> None:
    agents = open_agents(CONFIG.agents.use, CONFIG)
    said = {name: (await agent(Request(name, query), Prompts())).text for name, agent in agents.items()}
    assert (said["reasoning"], said["verify"]) == (shopping.UNKNOWN, "no")
    sentences = {document.text for document in shopping.CORPUS.documents}
    assert said["knowledge"] == shopping.UNKNOWN or set(re.findall(r"[^.]+\.", said["knowledge"].replace(". ", "."))) <= sentences


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [("4635-2314=2321", "yes"), ("4635+2314=6949", "yes"), ("4635-2314=2331", "no"), ("1000-2314=1314", "no"), ("9000+2314=11314", "no")],
)
def test_check(claim: str, verdict: str) -> None:
    assert shopping.check(claim) == verdict


def test_what_helpers_said_in_a_solution_is_what_they_say() -> None:
    helpers = {"reasoning": shopping.plan, "verify": shopping.check, "knowledge": shopping.lookup}
    for problem in TASK.heldout(20):
        parts = re.findall(r"<(\w+)>([^<]*)</\1><feedback>([^<]*)</feedback>", text(worked(problem, Habits(slip=0.4))))
        assert {helper for helper, _, _ in parts} == set(helpers)
        for helper, query, reply in parts:
            assert helpers[helper](query) == reply


async def test_a_worked_solution_is_right_and_one_with_other_prices_is_not() -> None:
    for problem in [*TASK.heldout(30), *TASK.heldout(10, "easy")]:
        assert await TASK.reward(problem.answer, text(worked(problem, Habits(slip=0.3)))) == 1.0
        other = "".join("1" if digit == problem.answer[0] else digit for digit in problem.answer)
        assert await TASK.reward(problem.answer, f"{text(worked(problem))}\\boxed{{{int(other) + 1}}}") == 0.0
    hard = [p for p in TASK.heldout(60) if facts(p) & shopping.STALE]
    lenient = Habits(lenient=True)
    stale = [await TASK.reward(p.answer, text(worked(p, lenient, prices=shopping.PRICES | shopping.OLD))) for p in hard]
    assert len(stale) > 20
    assert sum(stale) <= 1


def rollouts(problem: Problem, root: Path, asks: bool) -> Rollouts:
    """The shipped graphs and the task's own agents; the policy follows the worked solution, or guesses without asking."""
    written = text(worked(problem))

    def write(so_far: str) -> str:
        return written[len(so_far) - len(problem.question) :] if asks else "\\boxed{1234}"

    made = world(root, write, open_agents(CONFIG.agents.use, CONFIG).values(), pretrain.tokenizer(), rollout={"max_tokens": 400})
    return replace(made, task=TASK)


async def test_a_perfect_transcript_scores_1_through_graph_and_agents_and_one_without_facts_0(tmp_path: Path) -> None:
    for problem in TASK.heldout(4):
        trace = await rollouts(problem, tmp_path, asks=True).run_trace(problem, seed=7, with_agents=True)
        assert (trace.status, trace.reward) == ("done", 1.0), trace
        assert trace.path.count("knowledge") == trace.path.count("verify") == len(facts(problem))
        assert "".join(s.text for s in trace.segments).startswith(problem.question + text(worked(problem)))
        assert (await rollouts(problem, tmp_path, asks=False).run_trace(problem, seed=7, with_agents=True)).reward == 0.0


def test_the_tokenizer_writes_what_it_reads() -> None:
    tokenizer = pretrain.tokenizer()
    for index in range(50):
        pieces = pretrain.sample(random.Random(index))
        ids, labels = pretrain.encode(pieces)
        assert tokenizer.encode(text(pieces)) == ids
        assert tokenizer.decode(ids) == text(pieces)
        assert tokenizer.unk_token_id not in ids
        assert {label for label in labels if label != IGNORE} <= set(ids)


def test_the_base_policy_is_made_without_true_prices_novel_plans_and_heldout_pairs() -> None:
    true, plans, heldout = 0, set(), set().union(*(pairs(p) for kind in TASK.kinds for p in TASK.heldout(256, kind)))
    for index in range(1500):
        pieces = pretrain.sample(random.Random(index))
        problem = Problem("", pieces[0].text, "")
        assert not pairs(problem) & heldout
        heard = [(shopping.Fact(*p.about.split(" at ")), p.text) for p in pieces if p.about and p.helper == "knowledge"]
        true += sum(price == shopping.PRICES[fact] for fact, price in heard if fact not in shopping.KNOWN)
        assert all(price == shopping.PRICES[fact] for fact, price in heard if fact in shopping.KNOWN)
        assert all(price == shopping.OLD[fact] for fact, price in heard if fact in shopping.STALE)
        plans |= {(story.split()[0], tuple(re.findall("buy|sell", said.text))) for story, said in [(told(problem)[1], pieces[2])]}
    assert true <= 20, "by chance alone: one price in 1080"
    assert {trades for verb, trades in plans if verb == "swaps" and len(trades) == 2} == set(product(("buy", "sell"), repeat=2))


def test_pretraining_repeats_and_learns() -> None:
    def trained(seed: int, steps: int) -> list[float]:
        return [*losses(pretrain.fresh_policy(0), lambda step: pretrain.batch(seed, step, 4), steps)]

    first, second = trained(0, 4), trained(0, 4)
    assert first == second
    assert first[-1] < first[0]
    assert trained(1, 1) != first[:1]


def test_the_config_opens() -> None:
    assert type(open_task(CONFIG)).__name__ == "Shopping", "opened anew, it may be another class of that name"
    assert set(open_agents(CONFIG.agents.use, CONFIG)) == {"verify", "knowledge", "reasoning"}
    model = pretrain.fresh_policy(0)
    assert 150_000 < sum(p.numel() for p in model.parameters()) < 300_000
    longest = max(len(pretrain.encode(pretrain.sample(random.Random(i)))[0]) for i in range(300))
    assert longest < CONFIG.rollout.max_tokens + 64 < model.config.max_position_embeddings


def test_bad_settings_are_named() -> None:
    own = CONFIG.task.model_copy(update={"data": "own.jsonl"})
    with pytest.raises(ConfigError, match=r"own\.jsonl.*makes its own problems"):
        shopping.build(CONFIG.model_copy(update={"task": own}))
    wrong = CONFIG.task.model_copy(update={"options": {"easy": 0.5}})
    with pytest.raises(ConfigError, match=r"task\.options\.easy.*easy_share"):
        shopping.build(CONFIG.model_copy(update={"task": wrong}))
