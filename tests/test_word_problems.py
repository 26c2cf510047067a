import re
from collections import Counter
from pathlib import Path

import pytest

from aipo_graph.cli import parse
from aipo_graph.config import Config, TaskSection
from aipo_graph.errors import TaskError
from aipo_graph.rollout.collect import open_agents
from aipo_graph.rollout.prompts import Prompts
from aipo_graph.tasks.word_problems import CORPUS, WordProblems, build
from aipo_graph.tools import symbolic
from aipo_graph.tools.retrieval import Corpus
from aipo_graph.types import Request

TASK = WordProblems()
ALL = [*TASK._train, *TASK._heldout]


async def test_every_step_of_every_shipped_answer_is_right():
    assert len(ALL) == 120
    for problem in ALL:
        steps = re.findall(r"<<(.+?)=(.+?)>>(\S+?)\b", problem.meta["solution"])
        assert steps, problem.id
        for expression, value, said in steps:
            assert await symbolic.check(f"{expression} = {value}") == "yes", (problem.question, expression, value)
            assert value.startswith(said)
        assert steps[-1][1] == problem.answer


async def test_an_answer_in_the_last_box_is_rewarded():
    problem = TASK.train(0)
    assert await TASK.score(problem, rf"so it is \boxed{{{problem.answer}}}.") == {"reward": 1, "answered": 1}
    assert await TASK.score(problem, rf"\boxed{{{problem.answer}}}, no: \boxed{{-1}}") == {"reward": 0, "answered": 1}
    assert await TASK.score(problem, problem.answer) == {"reward": 0, "answered": 0}


def test_training_and_held_out_problems_differ_and_none_is_lost():
    train = {TASK.train(i).question for i in range(len(TASK._train))}
    heldout = {problem.question for problem in TASK.heldout(10_000)}
    assert len(train) + len(heldout) == 120
    assert not train & heldout
    assert 12 <= len(heldout) <= 40
    assert TASK.heldout(5) == TASK.heldout(10_000)[:5]
    assert TASK.heldout(5, "no such kind") == []


def test_every_epoch_holds_every_problem_once_in_an_order_of_its_own():
    size = len(TASK._train)
    epochs = [[TASK.train(epoch * size + i).id for i in range(size)] for epoch in range(3)]
    assert all(Counter(epoch) == Counter(epochs[0]) and max(Counter(epoch).values()) == 1 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [WordProblems().train(size + i).id for i in range(size)] == epochs[1]
    assert [WordProblems(seed=1).train(i).id for i in range(size)] != epochs[0]


def test_the_split_does_not_depend_on_the_order_of_the_file(tmp_path):
    lines = (CORPUS.parent / "word_problems.jsonl").read_text().splitlines()
    path = tmp_path / "reversed.jsonl"
    path.write_text("\n".join(reversed(lines)))
    assert WordProblems(path).heldout(1000) == TASK.heldout(1000)


def test_the_data_file_comes_from_the_config(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(f'{{"question": "What is {n} + 1?", "answer": "#### {n + 1:,}"}}' for n in range(1000, 1040)))
    task = build(Config(task=TaskSection(name="word_problems", data=str(path))))
    problem = task.train(0)
    assert int(problem.answer.replace(",", "")) == int(problem.question.split()[2]) + 1
    assert build(Config()).train(0) == TASK.train(0)


def test_the_corpus_has_the_facts_that_the_problems_need():
    corpus = Corpus.read(CORPUS)
    facts = {"gross": "144", "fortnight": "14", "furlong": "220", "fathom": "6", "ream": "500", "carat": "0.2", "stone": "14", "hand": "4"}
    for word, value in facts.items():
        assert value in corpus.search(f"How much is a {word}?")[0].text.replace(",", "").split(" "), word


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Q?", "answer": "42"}', ":2: the answer does not end in '#### '"),
        ('{"question": "Q?", "answer": "#### "}', ":2: the answer does not end"),
        ('{"question": "Q?", "answer": "#### many"}', ":2: the answer does not end"),
        ('{"problem": "Q?", "answer": "#### 42"}', ":2: field 'question' is missing; the fields there: problem, answer"),
        ('{"question": "Q?", "answer": 42}', ":2: field 'answer' is 42, not text"),
        ("question,answer", ":2: not a JSON record"),
    ],
)
def test_a_bad_line_is_refused_by_name_and_line(tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n' + line)
    with pytest.raises(TaskError, match=r"own\.jsonl" + re.escape(message)):
        WordProblems(path)


def test_an_empty_file_and_one_too_small_to_split_are_refused(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("")
    with pytest.raises(TaskError, match="no records"):
        WordProblems(path)
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n' * 3)
    with pytest.raises(TaskError, match="add more problems"):
        WordProblems(path)


async def test_its_agents_answer_from_sympy_and_the_corpus(root: Path) -> None:
    config, _ = parse([str(root / "configs/word_problems.yaml")], Config, prog="test")
    agents = open_agents(config.agents.use, config)
    replies = {
        query: (await agents[name](Request(name, query), Prompts.empty())).text
        for name, query in [("verify", "3*(4+5) = 27"), ("verify", "3*(4+5) = 28"), ("knowledge", "how many pieces are in a gross")]
    }
    assert replies["3*(4+5) = 27"] == "yes"
    assert replies["3*(4+5) = 28"] == "no"
    assert "144" in replies["how many pieces are in a gross"]
