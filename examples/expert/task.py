"""Codes of two letters: what nobody can work out, only know."""

import random
from itertools import permutations

from aipo_graph.config import Config
from aipo_graph.tasks.grading import last_box
from aipo_graph.types import Problem, derive_seed

CODES = {letter: f"{random.Random(derive_seed('code', letter)).randrange(1000):03}" for letter in "ABCDEFGHIJKL"}
HELDOUT_OF = 4
"""One pair of letters in so many is held out."""


class Pairs:
    kinds = ("",)

    def __init__(self, seed: int) -> None:
        self._seed = seed
        pairs = ["".join(pair) for pair in permutations(CODES, 2)]
        random.Random(0).shuffle(pairs)
        self._heldout, self._train = pairs[::HELDOUT_OF], [pair for i, pair in enumerate(pairs) if i % HELDOUT_OF]

    def train(self, index: int) -> Problem:
        return _problem(random.Random(derive_seed(self._seed, "pairs", index)).choice(self._train))

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        return [_problem(pair) for pair in self._heldout[:count]]

    async def reward(self, answer: str, reply: str) -> float:
        return float(last_box(reply) == answer)


def _problem(pair: str) -> Problem:
    return Problem(pair, pair, "".join(CODES[letter] for letter in pair))


def build(config: Config) -> Pairs:
    return Pairs(config.run.seed)
