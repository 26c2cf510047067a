"""Data sets with the columns that the real ones have, in small: the problems under tests/fixtures are our own."""

import json
import logging
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from aipo_graph.config import Config, TaskSection
from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.tasks.datasets import MAPPINGS, DatasetTask, _text
from aipo_graph.tasks.open import open_task

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `datasets` converts stays in a folder of this test run."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def task(name: str, seed: int = 0, **settings: Any) -> DatasetTask:
    config = Config(task=TaskSection(name=name, **settings))
    found = open_task(config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})}))
    assert isinstance(found, DatasetTask)
    return found


def fixture(name: str, heldout: str | None = None) -> DatasetTask:
    return task(name.partition("_t")[0], data=str(FIXTURES / f"{name}.parquet"), heldout=heldout and str(FIXTURES / f"{heldout}.parquet"))


def everything(of: DatasetTask) -> dict[str, str]:
    """Answer by question, training and held-out problems."""
    return {p.question: p.answer for p in [*of._train, *of.heldout(1000)]}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def sums(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} + 1?", "answer": str(n + 1), **more} for n in range(count)]


def test_dapo_math_reads_each_repeated_problem_once_and_without_its_instructions():
    dapo = fixture("dapo_math")
    problems = everything(dapo)
    assert len(problems) == 30, "90 rows, each problem three times"
    assert problems["What is the remainder when $7^2$ is divided by $3$?"] == "1"
    assert problems["A rectangle has sides 7 and 3.\nFind its perimeter."] == "20"
    assert not any("Answer" in question or "step by step" in question for question in problems)
    assert len({p.id for p in [*dapo._train, *dapo.heldout(1000)]}) == 30


async def test_repeated_rows_without_an_id_are_told_apart_by_their_question(tmp_path: Path):
    import datasets

    rows = [
        {"prompt": [{"role": "user", "content": f"{n}+1?"}], "reward_model": {"ground_truth": str(n + 1)}, "extra_info": {"index": index}}
        for n, index in [(n, f"{n}" if n % 2 else None) for n in range(60)] * 2
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "own.parquet")
    assert len(everything(task("dapo_math", data=str(tmp_path / "own.parquet")))) == 60


async def test_openr1_math_reads_the_users_message_and_latex_answers():
    openr1 = fixture("openr1_math")
    problems = everything(openr1)
    assert len(problems) == 30
    assert problems["Solve $4x = 3$ for $x$."] == r"\frac{3}{4}"
    problem = next(p for p in openr1._train if p.answer == r"\sqrt{85}")
    assert await openr1.reward(problem.answer, r"so \boxed{\sqrt{85}}") == {"reward": 1, "answered": 1}
    assert await openr1.reward(problem.answer, r"so \boxed{9.2}") == {"reward": 0, "answered": 1}


def test_math_takes_the_last_box_and_leaves_out_a_solution_without_one(caplog: pytest.LogCaptureFixture):
    math = fixture("math_train", "math_test")
    assert {p.question: p.answer for p in math._train}["How many ways are there to order 4 books?"] == "24"
    assert {p.kind for p in math._train} == {"Level 1", "Level 2", "Level 3"}
    assert "Name a prime." not in everything(math)
    assert "1 of 6 rows left out: 1 without an answer that can be read" in caplog.text
    assert [p.answer for p in math.heldout(9, "Level 3")] == ["15"]
    assert {p.kind for p in math.heldout(9)} == {""}
    assert len(math.heldout(9)) == 4


def test_a_question_that_is_held_out_is_not_trained_on(caplog: pytest.LogCaptureFixture):
    math = fixture("math_train", "math_test")
    assert "What is $2^5$?" in {p.question for p in math.heldout(9)}
    assert "What is $2^5$?" not in {p.question for p in math._train}
    assert "1 of 5 problems left out of training, since they are held out" in caplog.text


async def test_gsm8k_takes_the_number_after_the_hashes():
    gsm8k = fixture("gsm8k_train", "gsm8k_test")
    problem = next(p for p in gsm8k._train if "house" in p.question)
    assert problem.answer == "12,000"
    assert (await gsm8k.reward(problem.answer, r"\boxed{12000}"))["reward"] == 1
    assert (await gsm8k.reward(problem.answer, "12000"))["reward"] == 0
    assert sorted(p.answer for p in gsm8k.heldout(9)) == ["60", "8"]


def test_own_columns_nested_ones_and_numbers(tmp_path: Path):
    rows = [{"task": {"text": f"{n} + 1 = ?"}, "gold": n + 1, "no": n, "topic": "sums"} for n in range(60)]
    columns = {"question": "task.text", "answer": "gold", "id": "no", "kind": "topic"}
    of = task("dataset", data=write(tmp_path / "own.jsonl", *rows), columns=columns)
    assert everything(of) == {f"{n} + 1 = ?": str(n + 1) for n in range(60)}
    problem = next(p for p in of._train if p.answer == "8")
    assert (problem.id, problem.kind) == ("dataset-7", "sums")


def test_of_messages_the_users_last_one_is_the_question(tmp_path: Path):
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    examples = [turn("user", "1+1?"), turn("assistant", "2")]
    rows = [{"question": [*examples, turn("user", f"{n}+1?"), turn("assistant", "Let me see.")], "answer": n + 1} for n in range(60)]
    assert everything(task("dataset", data=write(tmp_path / "own.jsonl", *rows))) == {f"{n}+1?": str(n + 1) for n in range(60)}


def test_jsonl_and_parquet_of_one_content_give_the_same_problems(tmp_path: Path):
    import datasets

    rows = sums(80)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "own.parquet")
    one, two = task("dataset", data=write(tmp_path / "own.jsonl", *rows)), task("dataset", data=str(tmp_path / "own.parquet"))
    assert [one.train(i) for i in range(200)] == [two.train(i) for i in range(200)]
    assert one.heldout(9) == two.heldout(9)


def test_a_local_folder_and_a_slice_are_read_like_a_hub_data_set(tmp_path: Path):
    import datasets

    datasets.Dataset.from_list(sums(70)).to_parquet(tmp_path / "train-00000.parquet")
    assert len(everything(task("dataset", data=f"{tmp_path}:train"))) == 70
    assert len(everything(task("dataset", data=f"{tmp_path}:default:train[:60]"))) == 60


def test_training_problems_are_a_function_of_data_seed_and_index(tmp_path: Path):
    path = write(tmp_path / "own.jsonl", *sums(100))
    one, again, other = task("dataset", data=path), task("dataset", data=path), task("dataset", seed=1, data=path)
    size = len(one._train)
    later = [one.train(i) for i in range(3 * size)]
    assert [again.train(i) for i in (2 * size + 5, 3, size)] == [later[2 * size + 5], later[3], later[size]], "in any order of asking"
    epochs = [[p.id for p in later[k * size : (k + 1) * size]] for k in range(3)]
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == size for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [other.train(i).id for i in range(size)] != epochs[0]


def test_the_held_out_twentieth_is_the_same_whatever_the_order_and_the_seed(tmp_path: Path):
    rows = sums(400)
    one = task("dataset", data=write(tmp_path / "a.jsonl", *rows))
    two = task("dataset", seed=5, data=write(tmp_path / "b.jsonl", *reversed(rows)))
    assert one.heldout(1000) == two.heldout(1000)
    assert 8 <= len(one.heldout(1000)) <= 40
    assert not {p.question for p in one.heldout(1000)} & {p.question for p in one._train}
    assert len(everything(one)) == 400


def test_unusable_rows_are_counted_and_repeated_ones_collapse(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    bad = [{"question": " ", "answer": "1"}, {"question": "Why?", "answer": ""}, {"question": "How?", "answer": None}, {"answer": "1"}]
    assert _text(math.nan) == _text(True) == ""  # pandas writes NaN for what is missing
    assert (_text(True, whole=True), _text({"a": 1}, whole=True), _text(None, whole=True)) == ("true", '{"a": 1}', "")  # a reward reads it
    assert _text("1\ud83d?") == "1??"  # half a character, which JSON can hold and no tokenizer takes
    long = {"question": "Prove it.", "answer": "because " * 100}
    again = {"question": "What  is 3 +\n1?", "answer": "5"}
    of = task("dataset", data=write(tmp_path / "own.jsonl", *sums(60), *bad, long, again))
    assert everything(of) == {row["question"]: row["answer"] for row in sums(60)}, "the first of repeated rows counts"
    assert "5 of 66 rows left out: 2 without a question" in caplog.text
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1


def test_rows_that_share_an_id_stay_apart(tmp_path: Path):
    of = task("dataset", data=write(tmp_path / "own.jsonl", *sums(60, source="book")), columns={"id": "source"})
    assert len({p.id for p in [*of._train, *of.heldout(1000)]}) == 60


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (
            [{"problem": "Q?", "answer": "1"}],
            {},
            r"no column 'question'; the columns there: problem, answer; say task.columns: {qu",
        ),
        (sums(3), {"columns": {"kind": "topic"}}, r"no column 'topic'; the columns there: question, answer; say task.columns: {kind: "),
        (
            [{"question": {"en": "Q?"}, "answer": "1"}],
            {"columns": {"question": "question.de"}},
            r"'question.de'; .*: question.en, answer",
        ),
        (
            [{"question": "Q?", "answer": ""}],
            {},
            r"no problem in it \(1 without an answer that can be read \(first: row 1\)\); see task.columns",
        ),
        ([], {}, "no records"),
        (sums(1), {}, "each of its 1 problems is held out; give other training or held-out problems"),
    ],
)
def test_data_that_cannot_be_used_is_named_with_the_remedy(tmp_path: Path, rows: Any, settings: Any, said: str):
    with pytest.raises((ConfigError, TaskError), match=said) as caught:
        task("dataset", data=write(tmp_path / "own.jsonl", *rows), **settings).train(0)
    assert "own.jsonl" in str(caught.value)


def test_nothing_left_to_train_on(tmp_path: Path):
    path = write(tmp_path / "own.jsonl", *sums(5))
    of = task("dataset", data=path, heldout=path)
    assert len(of.heldout(9)) == 5, "an evaluation needs no training problems"
    with pytest.raises(TaskError, match="each of its 5 problems is held out"):
        of.train(0)


def test_training_problems_are_not_read_to_evaluate_held_out_ones(tmp_path: Path):
    of = task("dataset", data="openai/gsm8k:main:train", heldout=write(tmp_path / "own.jsonl", *sums(5)))
    assert len(of.heldout(9)) == 5
    with pytest.raises(ConfigError, match="task.data = 'openai/gsm8k:main:train'"):
        of.train(0)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "task.name = 'dataset': name the problems with task.data"),
        ("nowhere.jsonl", "no file 'nowhere.jsonl'"),
        ("nowhere.parquet", "no file 'nowhere.parquet'"),
        ("mine.csv", "no file 'mine.csv'"),
        ("{scripted}/damaged.csv", "not a .csv file in UTF-8 with a first line of columns: 'utf-8' codec can't decode"),
        ("mine.txt", "task.data = 'mine.txt': name a .jsonl, .csv or .parquet file, or a hub data set with its split"),
        ("openai/gsm8k", "hub data set with its split, NAME:SPLIT or NAME:CONFIG:SPLIT"),
        (
            "openai/gsm8k:main:train",
            r"Couldn't reach 'openai/gsm8k' on the Hub.*log in \(hf auth login\), or download it and give a .* columns question, answer",
        ),
        ("{folder}:nope", r"Unknown split \"nope\". Should be one of \['train'\]"),
        ("{folder}:nope:train", r"BuilderConfig 'nope' not found. Available: \['default'\]"),
        ("{scripted}/damaged.parquet", "Either the file is corrupted or this is not a parquet file"),
        ("{scripted}:train", "scripts are no longer supported, but found scripted.py; check"),
    ],
)
def test_a_source_that_cannot_be_opened_is_named_with_the_remedy(tmp_path: Path, data: str | None, said: str):
    folder, scripted = tmp_path / "folder", tmp_path / "scripted"
    folder.mkdir()
    scripted.mkdir()
    write(folder / "train.jsonl", *sums(3))
    (scripted / "damaged.parquet").write_bytes(b"PAR1 but no more")
    (scripted / "damaged.csv").write_bytes(b"question,answer\n\xff,1\n")
    (scripted / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    where = data and data.format(folder=folder, scripted=scripted)
    with pytest.raises(ConfigError, match=said) as caught:
        task("dataset", data=where)
    assert str(caught.value).startswith(("task.", "no file"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_without_the_extra_the_remedy_is_named(tmp_path: Path):
    """In a process of its own, where `datasets` cannot be imported: JSONL is read all the same."""
    path = write(tmp_path / "own.jsonl", *sums(60))
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from aipo_graph.config import Config, TaskSection\n"
        "from aipo_graph.tasks.open import open_task\n"
        f"print(open_task(Config(task=TaskSection(name='dataset', data={path!r}))).train(0).question)\n"
        "open_task(Config(task=TaskSection(name='gsm8k')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("What is ")
    assert "ConfigError: task.heldout = 'openai/gsm8k:main:test': needs the extra data: pip install 'datasets<6,>=5'" in done.stderr


def test_every_mapping_is_a_task_and_names_question_and_answer():
    assert set(MAPPINGS) == {"word_problems", "gsm8k", "math", "dapo_math", "openr1_math", "dataset"}
    assert all({"question", "answer"} <= set(layout.columns) for layout in MAPPINGS.values())
