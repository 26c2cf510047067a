"""Arithmetic word problems with GSM8K's columns: ``question``, and ``answer`` ending in ``#### 42``.

The shipped file is our own: 120 problems from hand-written patterns, each step of each answer annotated as in GSM8K, ``<<3*4=12>>``.
"""

import functools
import random
from collections.abc import Mapping
from pathlib import Path

from aipo_graph.config import Config
from aipo_graph.errors import TaskError
from aipo_graph.tasks import grading
from aipo_graph.tools.jsonl import records
from aipo_graph.tools.notation import number, plain
from aipo_graph.types import Problem, derive_seed

DATA = Path(__file__).parents[1] / "data" / "word_problems.jsonl"
CORPUS = Path(__file__).parents[1] / "data" / "word_problems_corpus.jsonl"
HELDOUT_OF = 5
"""One question in so many is held out, by a hash of its text: the same ones whatever the file's order or the seed."""


class WordProblems:
    """The task over one JSONL file. The answer is what the policy boxes last.

    Raises TaskError, naming file and line, on a malformed line, a missing column or an answer without ``####`` and a number;
    and where training or held-out problems would be none.
    """

    kinds = ("",)

    def __init__(self, path: str | Path = DATA, seed: int = 0) -> None:
        problems = _read(Path(path))
        self._seed = seed
        self._heldout = sorted((p for p in problems if _address(p) % HELDOUT_OF == 0), key=_address)
        self._train = [p for p in problems if _address(p) % HELDOUT_OF]
        for name, part in (("training", self._train), ("held-out", self._heldout)):
            if not part:
                raise TaskError(f"{path}: none of its {len(problems)} problems falls to the {name} part; add more problems")
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def train(self, index: int) -> Problem:
        """The index-th training problem: each epoch holds every one once, in an order of its own."""
        epoch, position = divmod(index, len(self._train))
        return self._train[self._order(epoch)[position]]

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        """The first ``count`` held-out problems, fewer if there are not so many."""
        return [p for p in self._heldout if p.kind == kind][:count]

    async def score(self, problem: Problem, text: str) -> Mapping[str, float]:
        """``reward``: 1 if the last box holds the answer. ``answered``: 1 if there is a closed last box."""
        answered = grading.last_box(text) is not None
        return {"reward": float(await grading.grade(text, problem.answer)), "answered": float(answered)}

    def _shuffled(self, epoch: int) -> tuple[int, ...]:
        order = list(range(len(self._train)))
        random.Random(derive_seed(self._seed, "word_problems", epoch)).shuffle(order)
        return tuple(order)


def build(config: Config) -> WordProblems:
    """The task of a run: ``task.data``, or the shipped file."""
    return WordProblems(config.task.data or DATA, config.run.seed)


def _address(problem: Problem) -> int:
    return derive_seed("word_problems", problem.question)


def _read(path: Path) -> list[Problem]:
    problems = []
    for where, record in records(path, "question", "answer"):
        _, mark, gold = record["answer"].rpartition("####")
        gold = plain(gold)
        if not mark or number(gold) is None:
            raise TaskError(f"{where}: the answer does not end in '#### ' and a number (it ends {record['answer'][-30:]!r})")
        question = record["question"].strip()
        problems.append(Problem(f"word-{derive_seed(question):016x}", question, gold, meta={"solution": record["answer"]}))
    return list({problem.id: problem for problem in problems}.values())
