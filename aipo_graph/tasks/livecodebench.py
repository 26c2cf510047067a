"""LiveCodeBench, code generation (arXiv 2403.07974): programs written by the policy, run on tests in the jail. See docs/evaluate.md.

Data in the format of ``livecodebench/code_generation_lite``, whose own loading script is never run: its .jsonl files are read as they
are. The private tests hold most of its gigabytes, so a problem keeps only where its row is, and they are read when it is scored.
"""

import asyncio
import base64
import functools
import json
import logging
import pickletools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

from pydantic import NonNegativeInt, PositiveFloat, StringConstraints

from aipo_graph.config import Config, Section, task_options
from aipo_graph.errors import ConfigError, TaskError, ToolError
from aipo_graph.load import find, record
from aipo_graph.tasks.datasets import Split, kept_for_training, open_dataset
from aipo_graph.tools import jail
from aipo_graph.types import Problem, derive_seed

log = logging.getLogger(__name__)

NAME = "livecodebench"
HUB = "livecodebench/code_generation_lite"
FILES = ("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl", "test6.jsonl")
"""What each release added."""
COLUMNS = (
    "question_content", "question_id", "contest_date", "starter_code", "difficulty", "public_test_cases", "private_test_cases", "metadata",
)  # fmt: skip
LONGEST_LINE = 256 << 20
LONGEST_TESTS = 1 << 30
OUTPUT = 1 << 16
"""Bytes of output that a program may write beyond twice what is expected."""
_RELEASE = r"release_v[1-6]|release_latest|v[1-6](_v[1-6])?"
_DATE = r"\d{4}-\d\d-\d\d"

PROGRAM = "Read the input from stdin and write the answer to stdout. Give the whole program once, at the end, in one block:"
STARTER = "Complete the starter code below. Give all of it once, at the end, in one block that begins with it:"

# As LiveCodeBench runs programs: with the names of these modules at hand, and deep recursion. -S leaves out quit and exit.
PRELUDE = """
for _name in ("string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json builtins "
              "typing").split():
    exec(f"from {_name} import *")
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator, io, sys, json
sys.setrecursionlimit(50000)
quit = exit = sys.exit
"""
# The program's own prints go nowhere, so that stdout holds the value that its function returned and nothing else.
FUNCTION = """
import json as _json, os as _os, sys as _sys
_arguments = [_json.loads(line) for line in _sys.stdin.read().split("\\n")]
_answers = _os.dup(1)
_os.dup2(2, 1)
exec(compile({source!r}, "solution.py", "exec"), globals())
_owner = Solution() if "Solution" in globals() else _sys.modules["__main__"]
_value = getattr(_owner, {name!r})(*_arguments)
with _os.fdopen(_answers, "w") as _file:
    _file.write(_json.dumps(_value))
"""


class Options(Section):
    """``task.options`` of livecodebench."""

    release: Annotated[str, StringConstraints(pattern=f"^({_RELEASE})$")] = "release_latest"
    """Which files of the data set: release_v1 to release_v6 (all up to it), release_latest, one file (v5) or a range (v4_v6)."""
    window: Annotated[str, StringConstraints(pattern=rf"^({_DATE}\.\.{_DATE})?$")] = ""
    """Contest dates, first and last: 2024-08-01..2025-01-31; default: all."""
    sandbox: jail.Wanted = "auto"
    """auto: the strongest layer of this machine, refused below L1; L1; L2; none: programs run with your own rights."""
    tests: NonNegativeInt = 0
    """Tests per problem at most, the first ones; 0 runs all."""
    cpu_seconds: PositiveFloat = 6.0
    """CPU time of one test; LiveCodeBench's time limit is 6 s, of the clock."""
    memory_gib: PositiveFloat = 2.0
    """Address space of one test."""


@dataclass(frozen=True, slots=True)
class Case:
    """``function``: the name of the function to call with the input's lines as its arguments; "": the input is stdin."""

    input: str
    output: str
    function: str = ""


Row = Mapping[str, Any]


class LiveCodeBench(Split):
    """The task over one set of problems to evaluate on and, if given, one to train on; no problem is in both.

    A problem's kind is its difficulty. Raises ConfigError, TaskError: not to be found or read, no such column, nothing in the window.
    """

    def __init__(self, heldout: str, data: str | None, options: Options, seed: int = 0) -> None:
        self._options = options
        self._cell = jail.Jail(jail.choose(options.sandbox, "task.options.sandbox"))
        self._rows: dict[str, Callable[[], Row]] = {}
        self._tests = functools.lru_cache(maxsize=8)(self._read_tests)

        def train() -> list[Problem]:
            problems = [(_plain(problem), problem) for problem in self._read("task.data", str(data), "")]
            return kept_for_training(str(data), problems, {_plain(problem) for problem in self._heldout}, apart=True)

        super().__init__(NAME, seed, self._read("task.heldout", heldout, options.window), train if data else None)

    async def reward(self, problem: Problem, reply: str) -> Mapping[str, float]:
        """``reward``: 1 if the last code block passes every test. ``passed``: the share of tests before the first that it fails.

        ``answered``: 1 if there is a closed last block. Raises TaskError if the jail failed, or the problem's tests are unreadable.
        """
        source = await asyncio.to_thread(last_block, reply)  # a million empty lines take a third of a second
        if source is None:
            return {"reward": 0.0, "passed": 0.0, "answered": 0.0}
        tests = await asyncio.to_thread(self._tests, problem.id)
        passed = 0
        for test in tests:
            if not await self._passes(problem, source, test):
                break
            passed += 1
        return {"reward": float(passed == len(tests)), "passed": passed / len(tests), "answered": 1.0}

    async def _passes(self, problem: Problem, source: str, test: Case) -> bool:
        options = self._options
        memory, output = int(options.memory_gib * (1 << 30)), OUTPUT + 2 * len(test.output.encode(errors="replace"))
        try:
            run = await self._cell.run(
                program(source, test.function), test.input.encode(errors="replace"), jail.Limits(options.cpu_seconds, memory, output)
            )
        except ToolError as error:
            raise TaskError(f"the sandbox failed on {problem.id}: {error}") from error
        if run.verdict != "ok":
            return False
        return await asyncio.to_thread(same_value if test.function else same_lines, run.output.decode(errors="replace"), test.output)

    def _read(self, setting: str, source: str, window: str) -> list[Problem]:
        """The problems of one source, in the order of a hash."""
        problems: dict[str, Problem] = {}
        dates = []
        first, _, last = window.partition("..")
        for where, row, again in _rows(setting, source, self._options.release):
            if lacking := next((column for column in COLUMNS if column not in row), None):
                raise ConfigError(f"{where}: no column {lacking!r}; the columns there: {', '.join(row)[:300]}; see docs/evaluate.md")
            date, name = str(row["contest_date"])[:10], f"{NAME}-{row['question_id']}"
            dates.append(date)
            if name in problems or (window and not first <= date <= last):
                continue
            problems[name] = _problem(name, row)
            self._rows[name] = again
        if not dates:
            raise TaskError(f"{setting} = {source!r}: no problem in it")
        if not problems:
            raise TaskError(f"{source}: none of its {len(dates)} problems is of {window}; they are of {min(dates)}..{max(dates)}")
        return sorted(problems.values(), key=lambda problem: derive_seed(NAME, problem.id))

    def _read_tests(self, name: str) -> tuple[Case, ...]:
        row = self._rows[name]()
        try:
            function = str((json.loads(row["metadata"]) if row["metadata"] else {}).get("func_name") or "")
            cases = [*_cases(row["public_test_cases"]), *_cases(row["private_test_cases"])]
            tests = tuple(Case(case["input"], case["output"], function) for case in cases[: self._options.tests or None])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error) as error:
            raise TaskError(f"{name}: its tests cannot be read ({type(error).__name__}: {error})") from error
        if not tests:
            raise TaskError(f"{name}: it has no tests")
        return tests


def build(config: Config) -> LiveCodeBench:
    """The task of a run. Raises ConfigError for columns of other names: the format is LiveCodeBench's."""
    task = config.task
    if task.columns:
        raise ConfigError(f"task.columns = {task.columns!r}: {NAME} reads the columns of {HUB}; leave it out")
    return LiveCodeBench(task.heldout or HUB, task.data, task_options(task, Options), config.run.seed)


def last_block(text: str) -> str | None:
    """What stands in the last fenced code block; None if there is none, or if the last one is not closed. Linear time.

    A fence that names a language opens a block, whatever is open: a stray one before it takes nothing away.

    >>> last_block("first ```no```\\n```python\\nprint(1)\\n```\\nso there")
    'print(1)'
    """
    lines = text.split("\n")
    fences = [at for at, line in enumerate(lines) if line.lstrip().startswith("```") and "```" not in line.lstrip()[3:]]
    opened, block = -1, None
    for at in fences:
        if opened < 0 or lines[at].strip() != "```":
            opened, block = at, None
        else:
            opened, block = -1, lines[opened + 1 : at]
    return None if block is None else "\n".join(block)


def program(source: str, function: str) -> str:
    """What the jail runs: the policy's code, and for a function the call."""
    if function:
        return PRELUDE + FUNCTION.format(source=source, name=function)
    return PRELUDE + f"exec(compile({source!r}, 'solution.py', 'exec'), globals())\n"


def same_lines(output: str, expected: str) -> bool:
    """Whether two texts agree line by line without outer blanks, or where they do not, number by number, exactly.

    >>> same_lines("1.50 2\\nyes \\n", "1.5 2.0\\nyes"), same_lines("YES", "yes"), same_lines("1\\n\\n2", "1\\n2")
    (True, False, False)
    """
    lines, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (output, expected))
    return len(lines) == len(wanted) and all(one == other or _same_numbers(one, other) for one, other in zip(lines, wanted, strict=True))


def _same_numbers(line: str, wanted: str) -> bool:
    try:
        return [Decimal(word) for word in line.split()] == [Decimal(word) for word in wanted.split()]
    except InvalidOperation:
        return False


def same_value(output: str, expected: str) -> bool:
    """Whether two JSON texts are equal as Python has it: a tuple came back as a list, 1 equals 1.0, "1" does not equal 1.

    >>> same_value("[1, 2.0]", "[1, 2]"), same_value('"1"', "1"), same_value("[NaN]", "[NaN]")
    (True, False, False)
    """
    try:
        return bool(json.loads(output, parse_constant=float) == json.loads(expected, parse_constant=float))
    except (ValueError, RecursionError):
        return False


def _plain(problem: Problem) -> str:
    return " ".join(problem.question.split())


def _problem(name: str, row: Row) -> Problem:
    starter = str(row["starter_code"] or "").rstrip()
    ask = f"{STARTER}\n```python\n{starter}\n```" if starter else f"{PROGRAM}\n```python\n# the program\n```"
    meta = {key: str(row[key]) for key in ("question_title", "platform", "contest_id", "contest_date") if key in row}
    # No text is the answer; this one is what no reply can give away.
    return Problem(name, f"{str(row['question_content']).strip()}\n\n{ask}", f"passes the tests of {name}", str(row["difficulty"]), meta)


def _cases(cell: Any) -> list[dict[str, str]]:
    """The tests of a cell: JSON, or (the private ones) JSON that was pickled as one string, compressed, and written in base 64."""
    if isinstance(cell, str) and not cell.lstrip().startswith("["):
        if not cell.strip():
            return []
        engine = zlib.decompressobj()
        data = engine.decompress(base64.b64decode(cell, validate=True), LONGEST_TESTS)
        if engine.unconsumed_tail or not engine.eof:
            raise ValueError(f"cut off, or more than {LONGEST_TESTS} bytes")
        cell = data.decode() if data.lstrip().startswith(b"[") else _pickled_text(data)
    cases = json.loads(cell) if isinstance(cell, str) else list(cell)
    for case in cases:
        if not (isinstance(case["input"], str) and isinstance(case["output"], str)):
            raise TypeError("input and output of a test are to be text")
    return cases


def _pickled_text(data: bytes) -> str:
    """The one string of a pickle that holds nothing else. Nothing is unpickled: its operations are read, and any other is refused."""
    texts = []
    for operation, value, _ in pickletools.genops(data):
        if operation.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"):
            texts.append(str(value))
        elif operation.name not in ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"):
            raise ValueError(f"a pickle of more than one string ({operation.name})")
    (text,) = texts
    return text


# Where the rows are


def _rows(setting: str, source: str, release: str) -> Iterator[tuple[str, Row, Callable[[], Row]]]:
    """(place, row, how to read it again) of each problem; a row may lack the content of its private tests, which are most of a file."""
    if source.endswith(".parquet") or ":" in source:
        dataset = open_dataset(setting, source, {column: column for column in COLUMNS}).with_format("arrow")
        light = dataset.select_columns([name for name in dataset.column_names if name != "private_test_cases"])
        present = {"private_test_cases": ""} if "private_test_cases" in dataset.column_names else {}
        for at in range(len(dataset)):
            yield source, _row(light, at) | present, functools.partial(_row, dataset, at)
        return
    for path in _files(setting, source, release):
        with open(path, "rb") as file:
            for count, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if line.strip():
                    where = f"{path}:{count}"
                    again = functools.partial(_record_at, path, file.tell() - len(line), count)
                    yield where, record(line, where, longest=LONGEST_LINE), again


def _row(dataset: Any, at: int) -> dict[str, Any]:
    return dataset[at : at + 1].to_pylist()[0]


def _record_at(path: Path, offset: int, count: int) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return record(file.readline(LONGEST_LINE + 1), f"{path}:{count}", longest=LONGEST_LINE)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read any more ({error.strerror})") from error


def _files(setting: str, source: str, release: str) -> list[Path]:
    """The .jsonl files: the one named, or those of the release in a folder or on the hub."""
    if source.endswith(".jsonl"):
        return [find(source)]
    first, last = re.fullmatch(r"(?:release_)?(?:v(\d)|latest)(?:_v(\d))?", release).groups()  # type: ignore[union-attr]
    start = 1 if release.startswith("release") else int(first)
    names = FILES[start - 1 : int(last or first or len(FILES))]
    if not names:
        raise ConfigError(f"task.options.release = {release!r}: it ends before it begins; write v4_v6")
    if Path(source).is_dir():
        return [find(Path(source) / name) for name in names]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return [Path(hf_hub_download(source, name, repo_type="dataset")) for name in names]
    except (OSError, HFValidationError) as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{setting} = {source!r}: {said}; where there is a network, hf download {HUB} --repo-type dataset --local-dir FOLDER, and give "
            f"that folder, or a .jsonl or .parquet file of its columns: {setting}: FOLDER"
        ) from error
