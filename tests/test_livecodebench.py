import asyncio
import base64
import json
import os
import pickle
import re
import shutil
import sys
import zlib
from pathlib import Path

import pytest

from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.rollout.agents import Prompts
from aipo_graph.tasks import livecodebench
from aipo_graph.tasks.livecodebench import last_block, same_lines, same_value
from aipo_graph.tasks.open import open_task
from aipo_graph.tools import jail

DATA = Path(__file__).parent / "data" / "livecodebench.jsonl"
ROWS = [json.loads(line) for line in DATA.read_text().splitlines()]
LAYERS = [layer for layer in ("L1", "L2") if not jail.check(layer)]
GOLD = "GOLD-4711-0815"

SUM, HALVES, PAIRS, GREETING = (f"livecodebench-{row['question_id']}" for row in ROWS)
RIGHT = {
    SUM: "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    HALVES: """
from decimal import Decimal
def main():
    for _ in range(int(input())):
        print(Decimal(input()) / 2)
if __name__ == "__main__":
    main()
    exit()
""",
    PAIRS: """
class Solution:
    def pairsOfSum(self, nums: List[int], goal: int) -> List[List[int]]:
        print("seen", nums)
        return [(i, j) for i, j in combinations(range(len(nums)), 2) if nums[i] + nums[j] == goal]
""",
    GREETING: "def greeting(name):\n    return 'Hello, ' + name",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail is Linux's")


def answer(code):
    return f"Let me think: ```x``` is code.\n```python\nprint('a draft')\n```\nThe program:\n```python\n{code}\n```\nDone."


def open_data(path=DATA, data=None, **options):
    options = {"sandbox": "auto" if LAYERS else "none"} | options
    return open_task(Config(task={"name": "livecodebench", "heldout": str(path), "data": data and str(data), "options": options}))


def write(folder, *rows, name="problems.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one_problem(folder, output, function="", content="1+1?", **options):
    """A task of one problem with one test."""
    case = {"input": "1", "output": output, "testtype": "functional" if function else "stdin"}
    row = ROWS[0] | {"question_content": content, "public_test_cases": json.dumps([case]), "private_test_cases": "[]"}
    row |= {"metadata": json.dumps({"func_name": function} if function else {})}
    task = open_data(write(folder, row), **options)
    (problem,) = task.heldout(1)
    return task, problem


@pytest.fixture(scope="module")
def task():
    return open_data()


@pytest.fixture
def by_id(task):
    return {problem.id: problem for problem in task.heldout(10)}


def test_problems_are_read_in_the_real_columns(task, by_id):
    assert set(by_id) == {SUM, HALVES, PAIRS, GREETING}
    assert {name: problem.kind for kind in ("easy", "medium", "hard") for problem in task.heldout(9, kind) for name in [problem.id]} == {
        f"livecodebench-{row['question_id']}": row["difficulty"] for row in ROWS
    }
    assert by_id[SUM].question.startswith("You are given integers on one line.")
    assert "from stdin" in by_id[SUM].question
    assert "def pairsOfSum(self, nums: List[int], goal: int)" in by_id[PAIRS].question
    assert by_id[PAIRS].meta["platform"] == "leetcode"
    assert [p.id for p in open_data().heldout(3)] == [p.id for p in task.heldout(10)][:3]


def test_what_a_problem_carries_holds_no_private_test(by_id):
    for text in ("499500", "50000000000000000000.5", "[1, 2]]"):
        assert all(text not in repr(problem) for problem in by_id.values())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", RIGHT)
async def test_right_programs_pass_every_test(layer, name):
    task = open_data(sandbox=layer)
    (problem,) = [p for p in task.heldout(10) if p.id == name]
    assert await task.reward(problem, answer(RIGHT[name])) == {"reward": 1.0, "passed": 1.0, "answered": 1.0}


WRONG = {
    "wrong on the last test": (SUM, "x = list(map(int, input().split()))\nprint(sum(x) if len(x) < 9 else 0)", 2 / 3),
    "right on the sample alone": (SUM, "print(6)", 1 / 3),
    "floats that round": (HALVES, "for _ in range(int(input())): print(int(input()) / 2)", 2 / 3),
    "an extra line": (SUM, "print('The sum:'); print(sum(map(int, input().split())))", 0),
    "a crash after the output": (SUM, "print(sum(map(int, input().split()))); 1 / 0", 0),
    "no such function": (PAIRS, "class Solution:\n    pass", 0),
    "another type": (PAIRS, "class Solution:\n    def pairsOfSum(self, nums, goal):\n        return '[[0, 2]]'", 0),
    "an exit before the answer": (PAIRS, "class Solution:\n    def pairsOfSum(self, nums, goal):\n        exit()", 0),
    "a value JSON has not": (PAIRS, "class Solution:\n    def pairsOfSum(self, nums, goal):\n        return {1, 2}", 0),
    "a printed value": (PAIRS, "class Solution:\n    def pairsOfSum(self, nums, goal):\n        print([[0, 2]])", 0),
    "a syntax error": (SUM, "print(", 0),
    "nothing": (SUM, "", 0),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_programs_do_not(task, by_id, name):
    problem, code, passed = WRONG[name]
    assert await task.reward(by_id[problem], answer(code)) == {"reward": 0.0, "passed": pytest.approx(passed), "answered": 1.0}


@pytest.mark.parametrize(
    "text", ["no code", "```python\nprint(6)", "``` print(6) ```", f"```python\n{RIGHT[SUM]}\n```\nBetter:\n```python\nx"]
)
async def test_without_a_closed_last_block_there_is_no_answer(task, by_id, text):
    assert await task.reward(by_id[SUM], text) == {"reward": 0.0, "passed": 0.0, "answered": 0.0}


def test_the_last_block_in_linear_time():
    assert last_block("```\na\n```\n  ```py\n  b\n  ```") == "  b"
    assert last_block("```\nhm\n</think>\n```python\nprint(1)\n```") == "print(1)"  # a stray one before it
    assert last_block("```" * 10**6 + "\n" + "```\n" * 10**5) == ""


CHEATS = {
    "an object that equals everything": """
class Yes(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
print(Yes("x"))""",
    "everything within reach": f"""
import gc, sys, os
texts, frame = [], sys._getframe()
while frame:
    texts += [repr(frame.f_locals), repr(frame.f_globals), repr(frame.f_code.co_consts)]
    frame = frame.f_back
texts += [repr(gc.get_objects()), repr(sys.modules), repr(sys.orig_argv), repr(dict(os.environ))]
found = re.findall("GOLD-[0-9]+-[0-9]+", " ".join(texts).replace({"GOLD-" + "[0-9]"!r}, ""))
print(found[0] if found else "")""",
    "its own memory": """
import ctypes, gc
try:
    lines = [line.split() for line in open("/proc/self/maps") if " rw" in line and "[v" not in line]
    regions = [[int(end, 16) for end in line[0].split("-")] for line in lines]
except OSError:
    pages = {id(near) & ~0xFFF for thing in gc.get_objects() for near in (thing, *gc.get_referents(thing))}
    regions = [[page, page + 4096] for page in pages]
found = [text for low, high in regions for text in re.findall(b"GOLD-[0-9]+-[0-9]+", ctypes.string_at(low, high - low))]
print(found[0].decode() if found else "")""",
    "the caller": """
for name in ("environ", "cmdline", "mem", "fd/0"):
    try:
        print(re.findall("GOLD-[0-9]+-[0-9]+", open(f"/proc/{os.getppid()}/{name}").read())[0])
    except Exception:
        pass""",
    "the file of the problems": f"print(re.findall('GOLD-[0-9]+-[0-9]+', open({'$DATA'!r}).read())[0])",
    "all descriptors": """
import os
for descriptor in range(64):
    try:
        print(re.findall(b"GOLD-[0-9]+-[0-9]+", os.pread(descriptor, 1 << 20, 0))[0].decode())
    except Exception:
        pass""",
    "the report": "import os; os.write(2, b'ready\\nended 0 0.0\\n'); os._exit(0)",
    "many answers": "print('\\n'.join(f'GOLD-{i}-{j}' for i in (4710, 4711) for j in ('0815', '0816')))",
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CHEATS)
@pytest.mark.parametrize("function", ["", "solve"])
async def test_cheats_earn_nothing(tmp_path, layer, name, function):
    task, problem = one_problem(tmp_path, json.dumps(GOLD) if function else GOLD, function, sandbox=layer)
    code = CHEATS[name].replace("$DATA", str(tmp_path / "problems.jsonl"))
    if function:
        body = "\n".join("    " + line for line in code.replace("print(", "return (", 1).splitlines())
        code = f"import re, os, sys\ndef solve(x):\n{body}"
    assert (await task.reward(problem, answer(code)))["reward"] == 0
    honest = f"def solve(x): return {GOLD!r}" if function else f"print({GOLD!r})"
    assert (await task.reward(problem, answer(honest)))["reward"] == 1


@pytest.mark.parametrize("name", ["everything within reach", "its own memory"])
async def test_the_searches_find_what_is_there(tmp_path, name):
    task, problem = one_problem(tmp_path, GOLD)
    planted = 'planted = "-".join(("GOLD", "4711", "0815"))'
    assert (await task.reward(problem, answer(planted + CHEATS[name])))["reward"] == 1


async def test_the_file_is_a_cheat_where_nothing_is_locked(tmp_path):
    task, problem = one_problem(tmp_path, GOLD, sandbox="none")
    code = CHEATS["the file of the problems"].replace("$DATA", str(tmp_path / "problems.jsonl"))
    assert (await task.reward(problem, answer(code)))["reward"] == 1


async def test_an_object_equal_to_everything_is_what_it_is_in_json(tmp_path):
    code = "class Yes(int):\n    __eq__ = lambda self, other: True\ndef solve(x):\n    return Yes(3)"
    task, problem = one_problem(tmp_path, "4", "solve")
    assert (await task.reward(problem, answer(code)))["reward"] == 0


async def test_too_slow_and_too_large_are_the_programs_own_doing(tmp_path):
    task, problem = one_problem(tmp_path, "1", cpu_seconds=1, memory_gib=0.25)
    for code in ("while True: pass", "x = bytearray(1 << 30)\nprint(1)", "while True: print(1)"):
        assert await task.reward(problem, answer(code)) == {"reward": 0.0, "passed": 0.0, "answered": 1.0}


async def test_a_test_that_the_sandbox_lost_gives_no_score(task, by_id, monkeypatch):
    monkeypatch.setattr(jail, "LAUNCHER", Path("/nowhere/jail_child.py"))
    with pytest.raises(TaskError, match=f"the sandbox failed on {SUM}: "):
        await task.reward(by_id[SUM], answer(RIGHT[SUM]))


async def test_samples_are_scored_side_by_side(task, by_id):
    texts = [answer(RIGHT[SUM]), answer("print(0)"), "nothing"] * 3
    scores = await asyncio.gather(*(task.reward(by_id[SUM], text) for text in texts))
    assert [score["reward"] for score in scores] == [1, 0, 0] * 3


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        ("1.0 2", "1 2.00", True),
        (" a b \n c", "a b\nc\n", True),
        ("a  b", "a b", False),
        ("1e3", "1000", True),
        ("0.1", "0.10000000000000000000001", False),
        ("50000000000000000", "50000000000000001", False),
        ("sNaN", "1", False),
        ("nan", "nan", True),
        ("nan ", "nan 1", False),
        ("1\n2", "1", False),
        ("", "1", False),
        ("1e999999999", "1", False),
        ("9" * 10**5, "1", False),
    ],
)
def test_lines(output, expected, same):
    assert same_lines(output, expected) is same


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("[1, [2]]", "[1,[2]]", True),
        ("1", "1.0", True),
        ('"a"', '"a"', True),
        ('"1"', "1", False),
        ("null", "0", False),
        ("[2, 1]", "[1, 2]", False),
        ("0.30000000000000004", "0.3", False),
        ("[" * 10**5, "[]", False),
        ("9" * 5000, "1", False),
        ("1 1", "1", False),
        ("", "null", False),
    ],
)
def test_values(output, expected, same):
    assert same_value(output, expected) is same


# The data


def pack(data):
    return base64.b64encode(zlib.compress(data)).decode()


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch pickled",))


CELLS = {
    "code": pack(pickle.dumps(Bomb())),
    "code beside text": pack(pickle.dumps(["[]", Bomb()])),
    "two texts": pack(pickle.dumps("[]")[:-1] + pickle.dumps("[]")[2:]),
    "a list": pack(pickle.dumps([1])),
    "not base 64": "!!!",
    "not compressed": base64.b64encode(b"plain").decode(),
    "cut off": pack(pickle.dumps("[]" * 1000))[:24],
    "not JSON": pack(pickle.dumps("{")),
    "no input": json.dumps([{"output": "1"}]),
    "no text": json.dumps([{"input": 1, "output": "1"}]),
    "deep": "[" * 10**5,
}


@pytest.mark.parametrize("name", CELLS)
async def test_private_tests_that_cannot_be_read_give_no_score_and_run_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    task = open_data(write(tmp_path, ROWS[0] | {"private_test_cases": CELLS[name]}))
    with pytest.raises(TaskError, match=f"{SUM}: its tests cannot be read"):
        await task.reward(task.heldout(1)[0], answer("print(1)"))
    assert not (tmp_path / "pickled").exists()


async def test_a_decompression_bomb_is_not_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr(livecodebench, "LONGEST_TESTS", 1000)
    task = open_data(write(tmp_path, ROWS[0] | {"private_test_cases": pack(pickle.dumps("[" + " " * 10**6 + "]"))}))
    with pytest.raises(TaskError, match="more than 1000 bytes"):
        await task.reward(task.heldout(1)[0], answer("print(1)"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
async def test_a_pickled_text_of_every_protocol_is_read(tmp_path, protocol):
    cases = json.dumps([{"input": "4", "output": "4 \u00e9", "testtype": "stdin"}], ensure_ascii=False)
    row = ROWS[0] | {"public_test_cases": "[]", "private_test_cases": pack(pickle.dumps(cases, protocol))}
    task = open_data(write(tmp_path, row))
    assert (await task.reward(task.heldout(1)[0], answer("print(input(), 'é')")))["reward"] == 1


async def test_tests_are_taken_from_the_first(task, by_id):
    assert (await task.reward(by_id[SUM], answer("print(6)")))["passed"] == pytest.approx(1 / 3)
    few = open_data(tests=1)
    assert (await few.reward(by_id[SUM], answer("print(6)")))["passed"] == 1


def test_a_window_of_contest_dates():
    window = open_data(window="2024-08-17..2024-11-03")
    assert {problem.id for problem in window.heldout(9)} == {HALVES, PAIRS}
    with pytest.raises(TaskError, match=r"none of its 4 problems is of 2020-01-01..2020-12-31; they are of 2023-09-02..2025-03-09"):
        open_data(window="2020-01-01..2020-12-31")


@pytest.mark.parametrize(
    ("release", "files"),
    [("release_v1", "1"), ("release_v3", "123"), ("release_latest", "123456"), ("v5", "5"), ("v1", "1"), ("v4_v6", "456")],
)
def test_a_release_names_files_of_a_folder(tmp_path, release, files):
    for number in range(1, 7):
        write(tmp_path, ROWS[0] | {"question_id": str(number)}, name=f"test{number if number > 1 else ''}.jsonl")
    found = open_data(tmp_path, release=release).heldout(9)
    assert {problem.id.rpartition("-")[2] for problem in found} == set(files)


def test_a_problem_that_stands_twice_is_one(tmp_path):
    assert len(open_data(write(tmp_path, ROWS[0], ROWS[0], ROWS[1])).heldout(9)) == 2


async def test_a_parquet_file_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "problems.parquet")
    task = open_data(tmp_path / "problems.parquet")
    assert {problem.id for problem in task.heldout(9)} == {SUM, HALVES, PAIRS, GREETING}
    (problem,) = [p for p in task.heldout(9) if p.id == HALVES]
    assert (await task.reward(problem, answer(RIGHT[HALVES])))["passed"] == 1


def test_the_file_is_read_again_when_a_problem_is_scored(tmp_path):
    path = shutil.copy(DATA, tmp_path / "problems.jsonl")
    task = open_data(path)
    path.unlink()
    with pytest.raises(TaskError, match="cannot be read any more"):
        asyncio.run(task.reward(task.heldout(1)[0], answer("print(1)")))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "2024"}, "task.options.window = '2024'"),
        ({"release": "v7"}, "task.options.release = 'v7'"),
        ({"release": "v6_v4"}, "it ends before it begins"),
        ({"sandbox": "firejail"}, "task.options.sandbox = 'firejail'"),
        ({"cpu_seconds": 0}, "task.options.cpu_seconds = 0"),
        ({"windows": "x"}, "no such option; options of livecodebench: release, window, sandbox, tests, cpu_seconds, memory_gib"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_data(tmp_path, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question_id": "1"}\n', "problems.jsonl:1: no column 'question_content'; the columns there: question_id"),
        ("[]\n", "problems.jsonl:1: a JSON object is expected, not list"),
        ("{\n", "problems.jsonl:1: not a JSON record"),
        ("[" * 10**5 + "\n", "problems.jsonl:1: not a JSON record"),
        ("\n\n", "no problem in it"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "problems.jsonl").write_text(text)
    with pytest.raises((ConfigError, TaskError), match=re.escape(message)):
        open_data(tmp_path / "problems.jsonl")


def test_a_line_that_is_too_long(monkeypatch):
    monkeypatch.setattr(livecodebench, "LONGEST_LINE", 100)
    with pytest.raises(TaskError, match="a line of more than 100 bytes"):
        open_data()


@pytest.mark.parametrize("name", ["nobody/nothing", "not a name", "missing.jsonl"])
def test_a_source_that_is_not_there(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        open_data(name)
    assert "\n" not in str(caught.value)
    if not name.endswith("jsonl"):
        assert "hf download livecodebench/code_generation_lite --repo-type dataset --local-dir FOLDER" in str(caught.value)


def test_renamed_columns_are_refused():
    with pytest.raises(ConfigError, match="leave it out"):
        open_task(Config(task={"name": "livecodebench", "heldout": str(DATA), "columns": {"question": "q"}}))


def test_training_needs_problems_of_its_own(tmp_path, task, caplog):
    with pytest.raises(ConfigError, match="nothing to train on; train on another task, or name training problems in its columns with task"):
        task.train(0)
    others = write(tmp_path, *(ROWS[0] | {"question_id": str(n), "question_content": f"Add {n}."} for n in range(3)), ROWS[1])
    mixed = open_data(data=others)
    ids = [mixed.train(index).id for index in range(6)]
    assert set(ids[:3]) == set(ids[3:]) == {f"livecodebench-{n}" for n in range(3)}
    assert "1 of 4 problems left out of training, since they are held out" in caplog.text
    with pytest.raises(TaskError, match="each of its 4 problems is held out"):
        open_data(data=DATA).train(0)


@pytest.mark.skipif(not LAYERS, reason="the preset asks for a layer that locks programs up")
def test_the_preset_and_its_prompts(root):
    from aipo_graph import cli

    config = cli.parse([str(root / "configs/benchmarks/livecodebench.yaml"), "--task.heldout", str(DATA)], Config, prog="test")[0]
    task = open_task(config)
    prompts = Prompts.read(root / config.rollout.prompts)
    for name in ("solo", "policy"):
        text = prompts.render(name, question=task.heldout(1)[0].question)
        assert "boxed" not in text
        assert task.heldout(1)[0].question in text
    assert {"verify", "knowledge", "reasoning"} <= set(prompts.texts)
