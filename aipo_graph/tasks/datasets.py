r"""Problems from a data set: the Hugging Face hub's, or a local .parquet, .jsonl or .csv file. The answer is what the policy boxes last.

The field's benchmarks are held-out problems alone, in the columns of their pages; see docs/evaluate.md.

No code of a data set is ever run: `datasets` 5 refuses loading scripts, and reads Parquet, JSON and the like as data.
"""

import csv
import functools
import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import NonNegativeInt

from aipo_graph.config import Config, Section, task_options
from aipo_graph.errors import ConfigError, TaskError, install
from aipo_graph.load import OBJECT, data, find, load, records
from aipo_graph.tasks import grading, rewards
from aipo_graph.tools.notation import LONGEST, number, plain
from aipo_graph.types import FIELDS, Problem, derive_seed, spelt

log = logging.getLogger(__name__)

CORPUS = data("word_problems_corpus.jsonl")
BATCH = 1000
LOCAL = ".jsonl, .csv or .parquet"
_LACKING = object()
_HUB = re.compile(r"(?P<name>[^:]+)(?::(?P<config>[^:\[\]]+))?:(?P<split>[^:\[\]]+(?:\[.*\])?)")
_DAPO_OPENING = re.compile(r"\A\s*Solve the following math problem step by step\. The last line[^\n]*\n+")
_DAPO_CLOSING = re.compile(r"\n+Remember to put your answer on its own line[^\n]*\s*\Z")


def after_hashes(text: str) -> str:
    """The number after the last ``####``; nothing where there is none.

    >>> after_hashes("6*7 = <<6*7=42>>42 #### 1,042"), after_hashes("42")
    ('1,042', '')
    """
    _, mark, gold = text.rpartition("####")
    gold = plain(gold)
    return gold if mark and number(gold) is not None else ""


def boxed(text: str) -> str:
    """The last box of a solution; nothing where there is none."""
    return grading.last_box(text) or ""


def stated(text: str) -> str:
    """What follows ``####``, else the last box, else the text itself."""
    return text.rpartition("####")[2].strip() if "####" in text else boxed(text) or text


def without_instructions(prompt: str) -> str:
    r"""The bare question of a prompt of DAPO-Math-17k: what is asked of the form of the answer stands in our own prompt files.

    >>> without_instructions('Solve the following math problem step by step. The last line of …\n\n1+1?\n\nRemember to put your answer on its own line after "Answer:".')
    '1+1?'
    """  # noqa: E501
    return _DAPO_CLOSING.sub("", _DAPO_OPENING.sub("", prompt)).strip()


def lettered(cells: Mapping[str, str], seed: int) -> tuple[str, str]:
    """The question with its choices under A to D, and the right one's letter; "" where a choice is missing or equals the right one.

    >>> cells = {"question": "1+1?", "answer": "2", "wrong1": "3", "wrong2": "4", "wrong3": "5"}
    >>> lettered(cells, seed=1)
    ('1+1?\\n\\nA) 2\\nB) 4\\nC) 3\\nD) 5\\n\\nAnswer with the letter of the right choice.', 'A')
    """
    question, right = cells["question"], " ".join(cells["answer"].split())
    choices = sorted([right, *(" ".join(cells[name].split()) for name in ("wrong1", "wrong2", "wrong3"))])
    random.Random(derive_seed(seed, question, *choices)).shuffle(choices)
    lines = [f"{letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    clear = all(choices) and choices.count(right) == 1
    text = "\n".join([question, "", *lines, "", "Answer with the letter of the right choice."])
    return text if question else "", "ABCD"[choices.index(right)] if clear else ""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the problems of a task are, and how a row is read."""

    data: str = ""
    heldout: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    """question, answer, id, kind, and what ``compose`` reads -> column; ``a.b`` is field b of column a. Of a list of messages, the user's
    last one is read."""
    gold: Callable[[str], str] = stated
    """The answer's cell to the gold answer; "" if it holds none."""
    question: Callable[[str], str] = str.strip
    compose: Callable[..., tuple[str, str]] | None = None
    """All cells, and a seed, to question and gold answer, where one column each does not hold them."""
    repeats: bool = False
    """The file repeats each problem many times: rows of an id that was seen are passed over unread."""
    own: bool = False
    """Rewarded by functions of the user's: an answer may have any length, or not be there."""
    rows: bool = False
    """Rows are kept whole in `Problem.meta`."""
    apart: tuple[str, ...] = ()
    """Columns that make two problems of one question."""
    heldout_of: int = 20
    """Without held-out problems of its own, one question in so many is held out, by a hash of its text."""

    def read(self, cells: Mapping[str, str]) -> tuple[str, str]:
        """Question and gold answer of one row."""
        return self.question(cells["question"]), grading.only(self.gold(cells.get("answer", ""))).strip()


MAPPINGS: Mapping[str, Layout] = {
    "word_problems": Layout(
        data=str(data("word_problems.jsonl")), columns={"question": "question", "answer": "answer"}, gold=after_hashes, heldout_of=5
    ),
    "gsm8k": Layout(
        data="openai/gsm8k:main:train",
        heldout="openai/gsm8k:main:test",
        columns={"question": "question", "answer": "answer"},
        gold=after_hashes,
    ),
    "math": Layout(
        data="DigitalLearningGmbH/MATH-lighteval:train",
        heldout="DigitalLearningGmbH/MATH-lighteval:test",
        columns={"question": "problem", "answer": "solution", "kind": "level"},
        gold=boxed,
    ),
    # 17 thousand problems in 1.8 million rows.
    "dapo_math": Layout(
        data="BytedTsinghua-SIA/DAPO-Math-17k:train",
        columns={"question": "prompt", "answer": "reward_model.ground_truth", "id": "extra_info.index"},
        question=without_instructions,
        repeats=True,
    ),
    # The data set of LUFFY (arXiv 2504.14945): its `prompt` opens with a system message, its `target` (R1's solutions) is not used.
    "openr1_math": Layout(
        data="Elliott/Openr1-Math-46k-8192:train",
        columns={"question": "prompt", "answer": "reward_model.ground_truth", "id": "extra_info.index"},
    ),
    "dataset": Layout(columns={"question": "question", "answer": "answer"}),
}
"""task.name -> layout, of what can be trained on. Our word problems are 120 from hand-written patterns, in GSM8K's columns."""


BENCHMARKS: Mapping[str, Layout] = {
    "aime2024": Layout(
        heldout="HuggingFaceH4/aime_2024:train", columns={"question": "problem", "answer": "answer", "id": "id"}, gold=str.strip
    ),
    "aime2025": Layout(heldout="math-ai/aime25:test", columns={"question": "problem", "answer": "answer", "id": "id"}, gold=str.strip),
    "math500": Layout(
        heldout="HuggingFaceH4/MATH-500:test",
        columns={"question": "problem", "answer": "answer", "id": "unique_id", "kind": "level"},
        gold=str.strip,
    ),
    "gpqa_diamond": Layout(
        heldout="Idavidrein/gpqa:gpqa_diamond:train",
        columns={
            "question": "Question",
            "answer": "Correct Answer",
            "wrong1": "Incorrect Answer 1",
            "wrong2": "Incorrect Answer 2",
            "wrong3": "Incorrect Answer 3",
            "id": "Record ID",
            "kind": "High-level domain",
        },
        compose=lettered,
    ),
}
"""task.name -> layout, of what is evaluated on alone."""


class Split:
    """What a task over a finite set of problems is, but for its grader: ``train`` and ``heldout`` of `types.Task`.

    ``read`` gives the training problems when the first is asked for, so that an evaluation reads none; None where there are none.
    """

    kinds = ("",)

    def __init__(self, name: str, seed: int, heldout: Sequence[Problem], read: Callable[[], list[Problem]] | None) -> None:
        self._name, self._seed, self._heldout, self._read_train = name, seed, heldout, read
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    @functools.cached_property
    def _train(self) -> list[Problem]:
        if self._read_train is None:
            raise ConfigError(
                f"task.name = {self._name!r} has held-out problems alone: nothing to train on; train on another task, or name training "
                "problems in its columns with task.data"
            )
        return self._read_train()

    def train(self, index: int) -> Problem:
        """The index-th training problem: each epoch holds every one once, in an order of its own. Raises ConfigError if there are none."""
        epoch, position = divmod(index, len(self._train))
        return self._train[self._order(epoch)[position]]

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        """The first ``count`` held-out problems, fewer if there are not so many, in the order of a hash: of one kind, or of all."""
        if not kind:
            return [replace(p, kind="") for p in self._heldout[:count]]  # they are evaluated together, under no kind's name
        return [p for p in self._heldout if p.kind == kind][:count]

    def _shuffled(self, epoch: int) -> tuple[int, ...]:
        order = list(range(len(self._train)))
        random.Random(derive_seed(self._seed, self._name, epoch)).shuffle(order)
        return tuple(order)


class Options(Section):
    """``task.options`` of the tasks whose answers are graded as mathematics."""

    rounded_digits: NonNegativeInt = 0
    """A decimal of at least so many significant digits also stands for an exact answer that it is the correct rounding of; 0: none does."""


class ChoiceOptions(Section):
    """``task.options`` of gpqa_diamond."""

    shuffle_seed: NonNegativeInt = 0
    """Seed of the order of the choices. The order is a function of it and of the problem, whatever the run's seed."""


class DatasetTask(Split):
    """The task over one data set and, if given, one of held-out problems.

    Rows without a question or without a readable answer are left out and counted in the log, repeated questions collapse, and a
    question that is held out is not trained on. Raises ConfigError, TaskError: not to be found or read, no such column, nothing left.
    """

    def __init__(self, name: str, layout: Layout, required: frozenset[str], seed: int = 0, rounded_digits: int = 0) -> None:
        self.reward = functools.partial(rewards.math, rounded_digits=rounded_digits)
        problems = functools.cache(functools.partial(_read, name, "task.data", layout.data, layout, required))
        if layout.heldout:
            heldout = _read(name, "task.heldout", layout.heldout, layout, required)
        else:
            heldout = {key: p for key, p in problems().items() if derive_seed(name, key) % layout.heldout_of == 0}
            heldout = heldout or dict([min(problems().items(), key=lambda problem: derive_seed(name, problem[0]))])
        in_order = [heldout[key] for key in sorted(heldout, key=lambda key: derive_seed(name, key))]

        def train() -> list[Problem]:
            return kept_for_training(layout.data, problems().items(), heldout.keys(), apart=bool(layout.heldout))

        super().__init__(name, seed, in_order, train if layout.data else None)


def kept_for_training(source: str, problems: Collection[tuple[str, Problem]], heldout: Collection[str], apart: bool) -> list[Problem]:
    """Those (question in plain whitespace, problem) whose question is not held out; where that has a source ``apart``, the others are
    counted in the log. Raises TaskError if none is left.
    """
    kept = [problem for key, problem in problems if key not in heldout]
    if not kept:
        raise TaskError(f"{source}: each of its {len(problems)} problems is held out; give other training or held-out problems")
    if apart and len(kept) < len(problems):
        lost = len(problems) - len(kept)
        log.warning("%s: %d of %d problems left out of training, since they are held out", source, lost, len(problems))
    return kept


def build(config: Config) -> DatasetTask:
    """The task of a run: the layout that ``task.name`` names, with what ``task.data``, ``task.heldout`` and ``task.columns`` say.

    Raises ConfigError, TaskError.
    """
    task, layout = config.task, {**MAPPINGS, **BENCHMARKS}[config.task.name]
    compose, rounded_digits = layout.compose, 0
    if compose:
        compose = functools.partial(compose, seed=task_options(task, ChoiceOptions).shuffle_seed)
    else:
        rounded_digits = task_options(task, Options).rounded_digits
    unneeded = {"id", "kind", *(["answer"] if task.reward else [])}
    inputs = config.rollout.inputs.values()
    required = frozenset({*layout.columns} - unneeded | {*task.columns})
    layout = replace(
        layout,
        data=task.data or layout.data,
        heldout=task.heldout or layout.heldout,
        columns=dict([*layout.columns.items(), *task.columns.items()]),
        compose=compose,
        own=bool(task.reward),
        rows=bool(task.reward or inputs),
        apart=tuple(sorted({*inputs}.difference(FIELDS))),
    )
    if not (layout.data or layout.heldout):
        raise ConfigError(f"task.name = {task.name!r}: name the problems with task.data, a {LOCAL} file or a hub data set")
    return DatasetTask(task.name, layout, required, config.run.seed, rounded_digits)


def _read(name: str, setting: str, source: str, layout: Layout, required: frozenset[str]) -> dict[str, Problem]:
    """The problems of one source by their question, its whitespace made plain, in the order of the rows."""
    problems: dict[str, Problem] = {}
    ids: set[str] = set()
    left_out: Counter[str] = Counter()
    first: dict[str, int] = {}
    columns: dict[str, str] = {}
    for count, row in enumerate(_rows(setting, source, layout)):
        if count == 0:
            columns = _columns(source, row, layout.columns, required)
        cells = {what: _text(_cell(row, column), layout.own and what == "answer") for what, column in columns.items()}
        question, gold = (layout.compose or layout.read)(cells)
        key = " ".join(question.split())
        if key and layout.apart:
            key += json.dumps([row.get(column) for column in layout.apart], default=str)
        if reason := _fault(key, gold, layout.own):
            left_out[reason] += 1
            first.setdefault(reason, count + 1)
        elif key not in problems:
            given = cells.get("id") or f"{derive_seed(name, key):016x}"
            given = f"{given}-{derive_seed(name, key):016x}" if given in ids else given
            ids.add(given)
            problems[key] = Problem(f"{name}-{given}", question, gold, cells.get("kind", ""), row if layout.rows else {})
    faults = ", ".join(f"{n} {reason} (first: row {first[reason]})" for reason, n in left_out.items())
    if not problems:
        raise TaskError(f"{setting} = {source!r}: no problem in it{f' ({faults})' if faults else ': it has no rows'}; see task.columns")
    if faults:
        log.warning("%s: %d of %d rows left out: %s", source, left_out.total(), count + 1, faults)
    return problems


def _fault(question: str, gold: str, own: bool) -> str:
    if not question:
        return "without a question"
    if own:
        return ""
    if not gold or gold.casefold() == "nan":  # a table's mark of an empty cell
        return "without an answer that can be read"
    if re.fullmatch(r"\[\s*([\"'])[^\"']*\1(?:\s*,\s*\1[^\"']*\1)+\s*\]", gold):
        return "with a list of answers, of which none is said to be the right one"
    return f"with an answer of more than {LONGEST} characters" if len(gold) > LONGEST else ""


def _columns(source: str, row: Mapping[str, Any], wanted: Mapping[str, str], required: frozenset[str]) -> dict[str, str]:
    """The columns that the data has. Raises ConfigError for one that it lacks, unless it is a layout's own id or kind."""
    found = {what: column for what, column in wanted.items() if _cell(row, column, _LACKING) is not _LACKING}
    lacking = next((what for what in wanted if what in required and what not in found), None)
    if lacking:
        there = [name for key, value in row.items() for name in ([f"{key}.{k}" for k in value] if isinstance(value, dict) else [key])]
        known = lacking in FIELDS
        remedy = f"say task.columns: {{{lacking}: COLUMN}}" if known else f"name one of them {wanted[lacking]} in the file"
        raise ConfigError(f"{source}: no column {wanted[lacking]!r}; the columns there: {', '.join(there)[:300]}; {remedy}")
    return found


def _cell(row: Mapping[str, Any], column: str, lacking: Any = None) -> Any:
    """What stands in a column, or in field b of column a for ``a.b``; ``lacking`` where there is no such column."""
    top, _, inner = column.partition(".")
    fields = row.get(top)
    return row[column] if column in row else fields.get(inner, lacking) if isinstance(fields, dict) else lacking


def _text(cell: Any, whole: bool = False) -> str:
    """Text, a number, either as a list of one, or the user's last message, as text; anything else is none, or ``whole`` as JSON."""
    if isinstance(cell, list) and cell and all(isinstance(entry, (str, int, float)) for entry in cell):
        cell = cell[0] if len(cell) == 1 else json.dumps([str(entry) for entry in cell])
    if isinstance(cell, list):
        cell = next((m.get("content") for m in reversed(cell) if isinstance(m, dict) and m.get("role") == "user"), None)
    if isinstance(cell, (bool, dict)) or (isinstance(cell, float) and not math.isfinite(cell)):
        return json.dumps(cell, default=str) if whole and not isinstance(cell, float) else ""
    return spelt(str(cell).strip()) if isinstance(cell, (str, int, float)) else ""


def _rows(setting: str, source: str, layout: Layout) -> Iterator[Mapping[str, Any]]:
    if source.startswith(OBJECT):
        return _given(source)
    if source.endswith(".jsonl"):
        return (record for _, record in records(find(source)))
    if source.endswith(".csv"):
        return _table(setting, source)
    dataset = open_dataset(setting, source, layout.columns)
    tops = {column if column in dataset.column_names else column.partition(".")[0] for column in layout.columns.values()}
    if len(dataset) and tops <= set(dataset.column_names):
        dataset = dataset if layout.rows else dataset.select_columns(sorted(tops))
        if layout.repeats and "id" in layout.columns:
            first: dict[str, int] = {}
            for at, row in enumerate(_plain_rows(dataset.select_columns([layout.columns["id"].partition(".")[0]]))):
                first.setdefault(_text(_cell(row, layout.columns["id"])) or f"without an id, row {at}", at)
            dataset = dataset.select(list(first.values()))
    return _plain_rows(dataset)


def _given(source: str) -> Iterator[Mapping[str, Any]]:
    """The rows that a call gave."""
    rows = load(source)
    for row in rows if isinstance(rows, Iterable) else [rows]:
        if not isinstance(row, Mapping):
            raise ConfigError(f"{source.removeprefix(OBJECT)}: a row is a {type(row).__name__}, no mapping of columns to values")
        yield row


def _table(setting: str, source: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a .csv file, every cell the text that stands there: 0.50 stays 0.50, and None a word."""
    try:
        with open(find(source), encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, restkey="")
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{setting} = {source!r}: not a .csv file in UTF-8 with a first line of columns: {error}") from error


def _plain_rows(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """Rows as Arrow has them: images and sounds are not decoded."""
    for batch in dataset.with_format("arrow").iter(BATCH):
        yield from batch.to_pylist()


def open_dataset(setting: str, source: str, columns: Mapping[str, str]) -> Any:
    """A `datasets.Dataset`. Raises ConfigError: the extra is missing, the name is none, what the hub or the file said."""
    if source.endswith(".parquet"):
        request = {"path": "parquet", "data_files": str(find(source)), "split": "train"}
        remedy = "write the file again"
    elif parts := _HUB.fullmatch(source):
        request = {"path": parts["name"], "name": parts["config"], "split": parts["split"]}
        wanted = ", ".join(column for what, column in columns.items() if what not in ("id", "kind"))
        remedy = (
            f"check the name, accept its terms on the hub if it has some and log in (hf auth login), or download it and give a "
            f"{LOCAL} file with the columns {wanted}: {setting}: FILE"
        )
    else:
        raise ConfigError(f"{setting} = {source!r}: name a {LOCAL} file, or a hub data set with its split, NAME:SPLIT or NAME:CONFIG:SPLIT")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError(f"{setting} = {source!r}: needs the extra data: {install('data')}") from error
    try:
        return load_dataset(**request)
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:
        raise ConfigError(f"{setting} = {source!r}: {' '.join(str(error).split())}; {remedy}") from error
