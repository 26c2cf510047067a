"""reasoning-gym's generators as tasks, one or a mixture (arXiv 2505.24760): endless training, held-out questions of their own.

The library imports sympy and matplotlib, and reads answers with `eval` and sympy's `parse_expr` here and there: it scores in killable
workers alone, where `guard` puts what only reads literals and formulas in their place.
"""

import ast
import base64
import dataclasses
import functools
import importlib
import json
import os
import pickle
import random
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

from aipo_graph.config import Config, refuse_problems
from aipo_graph.errors import ConfigError, TaskError, install
from aipo_graph.load import nearest
from aipo_graph.tasks.grading import judged, last_box
from aipo_graph.types import Problem, derive_seed

EXTRA = "reasoning-gym"
CHUNK = 100
"""Items that are made with one seed: some generators make all of theirs at once."""
HELDOUT_OF = 5
"""One question in so many is held out, by a hash of its text."""
TRIES = 200
"""Questions in a row of the wrong half, or seen before, after which a generator has no more."""
CPU_SECONDS = 8.0
"""Of one scoring; a worker's first pays for the library's import."""
REFUSED = {
    "composite": "it is the library's own mixture; name several generators here",
    "game_of_life_halting": "its scorer takes any text for False",
    "puzzle24": "its scorer takes any four numbers that make 24",
}
"""What of the library is no task, and why."""
BY_HASH = frozenset({"isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note", "word_ladder"})
"""Generators whose items depend on the order of Python's sets of texts, which is another in each process unless a variable fixes it."""


def generators() -> dict[str, tuple[Any, Any]]:
    """Name -> data set class and config class. Raises ConfigError without the extra."""
    try:
        return dict(importlib.import_module("reasoning_gym.factory").DATASETS)
    except ImportError as error:
        raise ConfigError(f"task.name = 'reasoning_gym': needs the extra {EXTRA}: {install(EXTRA)} ({error})") from error


@functools.lru_cache(maxsize=64)
def _made(name: str, options: str, seed: int, size: int) -> Any:
    dataset, settings = generators()[name]
    return dataset(settings(**json.loads(options), seed=seed, size=size))


class Generator:
    """One generator under its options. Raises ConfigError for a name, an option or a value that the library does not take."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        there = generators()
        if name not in there:
            raise ConfigError(f"task.options.{name}: reasoning-gym has no such generator{nearest(name, there)}")
        if name in REFUSED:
            raise ConfigError(f"task.options.{name}: {REFUSED[name]}")
        if name in BY_HASH and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ConfigError(f"task.options.{name}: its problems would be others in each process; set PYTHONHASHSEED=0 in the environment")
        known = {field.name for field in dataclasses.fields(there[name][1])} - {"seed", "size"}
        if unknown := next((key for key in options if key not in known), None):
            raise ConfigError(f"task.options.{name}.{unknown}: no such option{nearest(unknown, known)}")
        self.name, self._options = name, json.dumps(dict(options), sort_keys=True)
        try:
            _made(name, self._options, 0, CHUNK)
        except (AssertionError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"task.options.{name} = {self._options}: {reason}") from error

    def entry(self, seed: int, index: int) -> Mapping[str, Any]:
        """Item ``index`` of the endless stream of a seed."""
        return _made(self.name, self._options, derive_seed(seed, self.name, index // CHUNK) % 2**32, CHUNK)[index % CHUNK]

    def heldout(self, entry: Mapping[str, Any]) -> bool:
        return derive_seed("reasoning-gym", self.name, _key(entry)) % HELDOUT_OF == 0

    def trained(self, seed: int, index: int) -> tuple[int, Mapping[str, Any]]:
        """The index-th training item, and which attempt at it was not held out. Raises TaskError where none is."""
        for attempt in range(TRIES):
            if not self.heldout(entry := self.entry(derive_seed(seed, "train", attempt), index)):
                return attempt, entry
        raise TaskError(f"task.options.{self.name}: {TRIES} questions in a row are held out, it has too few; give it harder options")

    def apart(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The held-out items and their places, each question once; ends where no new one comes."""
        seen: set[str] = set()
        last = index = 0
        while index - last < TRIES:
            entry = self.entry(derive_seed("heldout"), index)
            if self.heldout(entry) and _key(entry) not in seen:
                seen.add(_key(entry))
                last = index
                yield index, entry
            index += 1

    async def score(self, answer: str, entry: Mapping[str, Any]) -> float:
        """The library's score of an untrusted answer, 0 where the answer breaks its scorer. Raises TaskError where the worker failed."""
        packed = base64.b64encode(pickle.dumps(dict(entry))).decode()
        return await judged(f"the scorer of {self.name} failed", _score, self.name, self._options, packed, answer, seconds=CPU_SECONDS)


def _key(entry: Mapping[str, Any]) -> str:
    return " ".join(str(entry["question"]).split())


class ReasoningGym:
    """The task over one generator, or several by weight."""

    kinds = ("",)

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        if not options:
            raise ConfigError("task.name = 'reasoning_gym': name generators with their options, task.options: {chain_sum: {max_terms: 3}}")
        self._seed = seed
        self._generators: dict[str, Generator] = {}
        self._weights: list[float] = []
        for name, given in options.items():
            if not isinstance(given, dict | None):
                raise ConfigError(f"task.options.{name} = {given!r}: give the generator's options as a mapping, {{}} for none")
            own = dict(given or {})
            weight = own.pop("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
                raise ConfigError(f"task.options.{name}.weight = {weight!r}: give a number above 0")
            self._generators[name] = Generator(name, own)
            self._weights.append(float(weight))

    def _chosen(self, *address: int | str) -> str:
        return random.Random(derive_seed(*address)).choices([*self._generators], self._weights)[0]

    def _problem(self, name: str, place: tuple[int, int], entry: Mapping[str, Any], *, kind: bool) -> Problem:
        """``place``: the training item's index and attempt, or the held-out one's and -1."""
        answer = "" if entry["answer"] is None else str(entry["answer"]).strip()
        where = f"heldout-{place[0]}" if place[1] < 0 else f"train-{place[0]}"
        row = {"generator": name, "index": place[0], "attempt": place[1]}
        return Problem(f"{name}-{where}", str(entry["question"]), answer, name if kind else "", row)

    def train(self, index: int) -> Problem:
        """An item of one of the generators, by weight: endless, none of a held-out question."""
        name = self._chosen(self._seed, "reasoning-gym", index)
        attempt, entry = self._generators[name].trained(self._seed, index)
        return self._problem(name, (index, attempt), entry, kind=len(self._generators) > 1)

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        """The same questions whatever the run's seed; of all generators by weight, or of the one that ``kind`` names."""
        if kind and kind not in self._generators:
            raise TaskError(f"problem kind {kind!r}: the kinds are the generators, {', '.join(self._generators)}")
        streams = {name: generator.apart() for name, generator in self._generators.items()}
        found: list[Problem] = []
        for number in range(count if kind else 2 * count):
            name = kind or self._chosen("reasoning-gym", "heldout", number)
            if len(found) < count and (item := next(streams[name], None)) is not None:
                found.append(self._problem(name, (item[0], -1), item[1], kind=bool(kind)))
        return found

    async def reward(self, problem: Problem, reply: str) -> dict[str, float]:
        """``reward``: the library's score, from 0 to 1, of what stands in the last box. ``answered``: 1 if there is a closed last box."""
        box = last_box(reply)
        if box is None:
            return {"reward": 0.0, "answered": 0.0}
        generator = self._generators[problem.meta["generator"]]
        index, attempt = problem.meta["index"], problem.meta["attempt"]
        seed = derive_seed("heldout") if attempt < 0 else derive_seed(self._seed, "train", attempt)
        return {"reward": await generator.score(box, generator.entry(seed, index)), "answered": 1.0}


def build(config: Config) -> ReasoningGym:
    """The factory that ``task.name = reasoning_gym`` stands for. Raises ConfigError for a data file: generators make their own problems."""
    refuse_problems(config.task)
    return ReasoningGym(config.task.options, config.run.seed)


# In a worker


LITERALS = ("games.n_queens", "algorithmic.spiral_matrix", "algorithmic.string_insertion", "algorithmic.binary_matrix")
"""Modules whose scorers call `eval` on an answer."""
FORMULAS = ("games.puzzle24", "games.countdown")
"""Modules that import `parse_expr` by its name for that; others reach it through sympy."""
_FORMULA = re.compile(r"[-+*/^()., 0-9a-zA-Z]{1,2000}")
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "pi"}
)


@functools.cache
def guard() -> None:
    """What a model wrote reaches no `eval`: literals are read as such, formulas only of numbers, one-letter symbols and known functions."""
    import sympy
    from sympy.parsing import sympy_parser

    raw = sympy_parser.parse_expr

    def parse_formula(text: str, *args: Any, **kwargs: Any) -> Any:
        symbols = {*string.ascii_lowercase, *(kwargs.get("local_dict") or ()), *_FUNCTIONS}
        if not _FORMULA.fullmatch(text) or not {*re.findall(r"[A-Za-z]\w*", text)} <= symbols or re.search(r"\.\s*[A-Za-z]", text):
            raise ValueError("no formula")
        return raw(text, *args, **kwargs)

    sympy.parse_expr = sympy_parser.parse_expr = parse_formula
    for name in LITERALS:
        importlib.import_module(f"reasoning_gym.{name}").__dict__["eval"] = ast.literal_eval
    for name in FORMULAS:
        importlib.import_module(f"reasoning_gym.{name}").__dict__["parse_expr"] = parse_formula


def _score(name: str, options: str, packed: str, answer: str) -> float:
    generators()
    guard()
    return float(_made(name, options, 0, CHUNK).score_answer(answer, pickle.loads(base64.b64decode(packed))))
