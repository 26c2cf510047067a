"""From what a person types to a problem, with its answer where it is known."""

import random
from functools import cache

from aipo_graph.errors import ConfigError
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.types import Problem

POOL = 256
"""Held-out problems of a kind that are drawn from, and whose answers are known."""


class Questions:
    """Turns words into problems, with the answer where it is known: a held-out problem's, or one that the task can solve itself."""

    def __init__(self, rollouts: Rollouts, seed: int) -> None:
        self._tokenizer = rollouts.tokenizer
        self._task = rollouts.task
        self._answers: dict[str, Problem] = {}
        self._held_out = cache(self._read_held_out)
        # Optional beside the Task protocol: solve(question) -> answer, or None for what is not one of its questions.
        self._solve = getattr(rollouts.task, "solve", lambda question: None)
        self._rng = random.Random(seed)
        self._held_out("")

    def _read_held_out(self, kind: str) -> list[Problem]:
        found = self._task.heldout(POOL, kind)
        self._answers |= {problem.question: problem for problem in found}
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        return self._task.kinds

    @property
    def example(self) -> str:
        held_out = self._held_out("")
        return held_out[0].question if held_out else ""

    @property
    def notation(self) -> str:
        """How to read a question, where the task says so."""
        return str(getattr(self._task, "notation", ""))

    def sample(self, kind: str = "") -> Problem:
        """A held-out problem of a kind (default: the task's main one). Raises ConfigError, TaskError."""
        held_out = self._held_out(kind)
        if not held_out:
            raise ConfigError("this task has no held-out problems to draw from: type a question")
        return self._rng.choice(held_out)

    def read(self, question: str) -> Problem:
        """Raises ConfigError for characters that the model's tokenizer cannot write."""
        unknown = [c for c in dict.fromkeys(question) if not c.isspace() and not self._tokenizer.plain(c)[0]]
        if unknown:
            raise ConfigError(
                f"the model's tokenizer does not know {' '.join(unknown)!r}: a question of this task looks like {self.example!r}"
            )
        known = self._answers.get(question)
        return known or Problem("demo", question, self._solve(question) or "")
