"""samples.jsonl of an evaluation: what each trace came to, one line each, in a file that survives a kill."""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from aipo_graph.errors import ConfigError
from aipo_graph.tools.notation import LONGEST, compact, number, plain
from aipo_graph.types import TRAINED, Problem

Mode = Literal["alone", "with_agents"]
LONGEST_ANSWER = 80
_LETTER = re.compile(r"\(?([A-J])(?:[.:)].*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the things that an evaluation samples: a kind of problem, alone or with agents, at T or greedily."""

    kind: str
    mode: Mode
    samples: int
    """Per problem; 1 where greedy."""
    problems: tuple[Problem, ...]
    greedy: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.mode}" + "/greedy" * self.greedy


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of samples.jsonl: what a trace came to. ``consults``: agent -> (calls, tokens of its replies).

    The fields from ``answer`` on are None in lines that were written before there were such fields.
    """

    part: str
    problem: str
    sample: int
    status: str
    solved: bool
    tokens: int
    """Sampled by the policy."""
    consults: Mapping[str, tuple[int, int]]
    error: str | None = None
    answer: str | None = None
    """What the policy boxed last, as `ballot` writes it; "" for no box."""
    leaks: int | None = None
    """Replies that gave the answer away."""
    violation: bool | None = None
    """Whether the policy wrote feedback tags itself in a run with agents."""

    @property
    def scored(self) -> bool:
        return self.status in TRAINED


def ballot(answer: str | None) -> str:
    r"""An untrusted answer as it votes: a number by value, a choice by its letter, the rest as plain text; a long one by its hash.

    Answers that only a grader finds equal (``x=5``, ``5``) are two, right or wrong alike: whoever votes has no gold answer.

    >>> ballot("$\\frac12$"), ballot("0.50"), ballot("(B)"), ballot("B) 3 cm"), ballot(None)
    ('1/2', '1/2', 'B', 'B', '')
    """
    text = compact(plain((answer or "")[: 2 * LONGEST]))
    if written := number(text):
        text = str(written.value)
    elif letter := _LETTER.fullmatch(text):
        text = letter[1]
    return text if len(text) <= LONGEST_ANSWER else f"{text[:40]}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"


SAMPLE = TypeAdapter(Sample)
Key = tuple[str, str, int]


class Store:
    """samples.jsonl of one evaluation: its settings in the first line, then a line per sample. Held by one process.

    Raises ConfigError where another process has it, or it was made with other settings (the first differing key is named), unless
    ``aside``: then those samples are kept beside it, and it starts anew.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, aside: bool = False) -> None:
        self.path, self._aside = folder / "samples.jsonl", aside
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _open(self.path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"{folder} cannot hold an evaluation: {error.strerror}; choose another --out") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check(to_json({"settings": settings}) + b"\n")
        except BlockingIOError:
            self.close()
            raise ConfigError(f"{folder}: another process is evaluating there; wait for it, or choose another --out") from None
        except ConfigError:
            self.close()
            raise

    def _check(self, header: bytes) -> None:
        """Drops a half line at the end, then compares the first line with this evaluation's."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        first, _, rest = data[:whole].partition(b"\n")
        if first + b"\n" == header:
            os.ftruncate(self._file, whole)
            return
        try:
            before, now = json.loads(first or b'{"settings": {}}')["settings"], json.loads(header)["settings"]
            different = next((key for key in [*now, *before] if before.get(key) != now.get(key)), None)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self.path}:1: not the first line of an evaluation; choose another --out") from error
        if rest and different is None:
            os.ftruncate(self._file, whole)
            return
        if rest and self._aside:
            self.path.rename(self.path.with_name(f"samples-{hashlib.sha256(first).hexdigest()[:8]}.jsonl"))
            os.close(self._file)
            self._file = _open(self.path)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif rest:
            raise ConfigError(
                f"{self.path.parent} holds an evaluation with {different} = {before.get(different)!r}, not {now.get(different)!r}; "
                "choose another --out, or delete it"
            )
        os.ftruncate(self._file, 0)
        append(self._file, header)

    def read(self) -> dict[Key, Sample]:
        """The samples so far."""
        return read(self.path)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


def read(path: Path) -> dict[Key, Sample]:
    """The samples of a file. Lines that cannot be read are left out, so that theirs are drawn again."""
    found: dict[Key, Sample] = {}
    with path.open("rb") as lines:
        for line in lines:
            try:
                sample = SAMPLE.validate_json(line)
            except ValidationError:
                continue
            found[sample.part, sample.problem, sample.sample] = sample
    return found


def task_of(path: Path) -> str:
    """The task and its held-out data in the first line of a file, by name, not by place. Raises ConfigError for another first line."""
    try:
        with path.open("rb") as lines:
            settings = json.loads(next(lines, b""))["settings"]
        named = [settings["task.name"], settings["task.heldout"] or settings["task.data"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}:1: not the first line of an evaluation") from error
    return " of ".join(Path(str(name)).name for name in named if name)


def append(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
