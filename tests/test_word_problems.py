import json
import re
from collections import Counter
from pathlib import Path

import pytest

from aipo_graph.cli import parse
from aipo_graph.config import Config, Run, TaskSection
from aipo_graph.errors import TaskError
from aipo_graph.load import records
from aipo_graph.rollout.agents import Prompts
from aipo_graph.rollout.collect import open_agents
from aipo_graph.tasks.datasets import CORPUS, MAPPINGS, DatasetTask, build
from aipo_graph.tools import symbolic
from aipo_graph.tools.retrieval import Corpus
from aipo_graph.types import Request


def word_problems(path: str | Path | None = None, seed: int = 0) -> DatasetTask:
    return build(Config(run=Run(seed=seed), task=TaskSection(name="word_problems", data=path and str(path))))


TASK = word_problems()
ALL = {p.question: p for p in [*TASK._train, *TASK._heldout]}


async def test_every_step_of_every_shipped_answer_is_right():
    assert len(ALL) == 120
    for where, record in records(MAPPINGS["word_problems"].data, "question", "answer"):
        problem = ALL[record["question"]]
        steps = re.findall(r"<<(.+?)=(.+?)>>(\S+?)\b", record["answer"])
        assert steps, where
        for expression, value, said in steps:
            assert await symbolic.check(f"{expression} = {value}") == "yes", (problem.question, expression, value)
            assert value.startswith(said)
        assert steps[-1][1] == problem.answer


async def test_an_answer_in_the_last_box_is_rewarded():
    problem = TASK.train(0)
    assert await TASK.reward(problem.answer, rf"so it is \boxed{{{problem.answer}}}.") == {"reward": 1, "answered": 1}
    assert await TASK.reward(problem.answer, rf"\boxed{{{problem.answer}}}, no: \boxed{{-1}}") == {"reward": 0, "answered": 1}
    assert await TASK.reward(problem.answer, problem.answer) == {"reward": 0, "answered": 0}


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
    assert [word_problems().train(size + i).id for i in range(size)] == epochs[1]
    assert [word_problems(seed=1).train(i).id for i in range(size)] != epochs[0]


def test_the_split_does_not_depend_on_the_order_of_the_file(tmp_path):
    lines = (CORPUS.parent / "word_problems.jsonl").read_text().splitlines()
    path = tmp_path / "reversed.jsonl"
    path.write_text("\n".join(reversed(lines)))
    assert word_problems(path).heldout(1000) == TASK.heldout(1000)


def test_the_data_file_comes_from_the_config(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(f'{{"question": "What is {n} + 1?", "answer": "#### {n + 1:,}"}}' for n in range(1000, 1040)))
    problem = word_problems(path).train(0)
    assert int(problem.answer.replace(",", "")) == int(problem.question.split()[2]) + 1


def test_the_corpus_has_the_facts_that_the_problems_need():
    corpus = Corpus.read(CORPUS)
    facts = {"gross": "144", "fortnight": "14", "furlong": "220", "fathom": "6", "ream": "500", "carat": "0.2", "stone": "14", "hand": "4"}
    for word, value in facts.items():
        assert value in corpus.search(f"How much is a {word}?")[0].text.replace(",", "").split(" "), word


@pytest.mark.parametrize("answer", ["42", "#### ", "#### many", 42, None])
def test_an_answer_without_its_number_is_left_out_and_counted(tmp_path, caplog, answer):
    path = tmp_path / "own.jsonl"
    lines = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(40)] + [{"question": "Q?", "answer": answer}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    task = word_problems(path)
    assert len(task._train) + len(task._heldout) == 40
    assert "own.jsonl: 1 of 41 rows left out: 1 without an answer that can be read" in caplog.text


def test_a_line_that_is_no_record_is_refused_by_file_and_line(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\nquestion,answer')
    with pytest.raises(TaskError, match=r"own\.jsonl:2: not a JSON record"):
        word_problems(path)


def test_an_empty_file_and_one_too_small_to_split_are_refused(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("")
    with pytest.raises(TaskError, match="no records"):
        word_problems(path)
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n' * 3)
    with pytest.raises(TaskError, match="each of its 1 problems is held out"):
        word_problems(path).train(0)


async def test_its_agents_answer_from_sympy_and_the_corpus(root: Path) -> None:
    config, _ = parse([str(root / "configs/word_problems.yaml")], Config, prog="test")
    agents = open_agents(config.agents.use, config)
    replies = {
        query: (await agents[name](Request(name, query), Prompts())).text
        for name, query in [("verify", "3*(4+5) = 27"), ("verify", "3*(4+5) = 28"), ("knowledge", "how many pieces are in a gross")]
    }
    assert replies["3*(4+5) = 27"] == "yes"
    assert replies["3*(4+5) = 28"] == "no"
    assert "144" in replies["how many pieces are in a gross"]
