"""Problems to train on and held-out ones, served in a fixed order."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from aipo_graph.types import Problem, derive_seed


class Split:
    """What a task over a finite set of problems is, but for its grader: ``train`` and ``heldout`` of `types.Task`.

    ``read`` gives the training problems when the first is asked for, so that an evaluation reads none. Raises what it raises.
    """

    kinds = ("",)

    def __init__(self, name: str, seed: int, heldout: Sequence[Problem], read: Callable[[], list[Problem]]) -> None:
        self._name, self._seed, self._heldout, self._read_train = name, seed, heldout, read
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    @functools.cached_property
    def _train(self) -> list[Problem]:
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
