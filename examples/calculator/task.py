"""Products of two numbers of two digits: more than the tiny policy can do in its head."""

import random

from aipo_graph.config import Config
from aipo_graph.tasks.grading import last_box
from aipo_graph.types import Problem, derive_seed

HELDOUT_OF = 5
"""One product in so many is held out."""


class Products:
    kinds = ("",)

    def __init__(self, seed: int) -> None:
        self._seed = seed
        pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
        random.Random(0).shuffle(pairs)
        self._heldout, self._train = pairs[::-HELDOUT_OF], [pair for i, pair in enumerate(reversed(pairs)) if i % HELDOUT_OF]

    def train(self, index: int) -> Problem:
        return _problem(*random.Random(derive_seed(self._seed, "products", index)).choice(self._train))

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        return [_problem(a, b) for a, b in self._heldout[:count]]

    async def reward(self, answer: str, reply: str) -> float:
        return float(last_box(reply) == answer)


def _problem(a: int, b: int) -> Problem:
    return Problem(f"{a}*{b}", f"{a}*{b}", str(a * b))


def build(config: Config) -> Products:
    return Products(config.run.seed)
