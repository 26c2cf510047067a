"""Worked solutions of the operator task, the way its policy writes them: what base policies learn from."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aipo_graph.tasks.operators import RULES, apply, check, order
from aipo_graph.types import Problem


def numbered(operators: str) -> str:
    """The operators as the policy writes them to ask for a plan.

    >>> numbered("IEB")
    '1I2E3B'
    """
    return "".join(f"{place}{letter}" for place, letter in enumerate(operators, 1))


@dataclass(frozen=True)
class Habits:
    """How a solution is written. ``slip``: the chance that one digit of a result is wrong, which is what a check is there for.
    ``lenient``: whoever checks says yes to everything, and the solution goes on from what it has.
    """

    slip: float = 0.0
    lenient: bool = False


@dataclass(frozen=True)
class Piece:
    """A stretch of a solution; ``helper`` names who said it, with the operator that it is about where it is a rule."""

    text: str
    helper: str = ""
    about: str = ""


def solution(
    problem: Problem, rules: Mapping[str, str] = RULES, steps: str = "", habits: Habits = Habits(), rng: random.Random | None = None
) -> list[Piece]:
    """A worked solution, the way the policy writes it: plan, then for each operator its rule and a step, checked and redone if wrong.

    The rules of the operators and the order of evaluation (``steps``) are the world's unless given.
    """
    rng = rng or random.Random(0)
    marker, state, operators = problem.question[0], problem.question[1:5], problem.question[5:-1]
    steps = steps or order(marker, operators)
    query, reply = marker + numbered(operators), "".join(f"{operators.index(letter) + 1}{letter}" for letter in steps)
    pieces = [Piece(f"<reasoning>{query}</reasoning><feedback>"), Piece(reply, "reasoning"), Piece("</feedback>")]
    for letter in steps:
        rule = rules[letter]
        pieces += [Piece(f"<knowledge>{letter}</knowledge><feedback>"), Piece(rule, "knowledge", letter), Piece("</feedback>")]
        tries, state = checked(f"{rule}{state}=", apply(rule, state), check, habits, rng)
        pieces += tries
    return [*pieces, Piece(f"\\boxed{{{state}}}")]


def checked(claim: str, right: str, check: Callable[[str], str], habits: Habits, rng: random.Random) -> tuple[list[Piece], str]:
    """One step, its four digits checked and redone while the check says no; and the digits that the solution goes on with."""
    pieces, verdict, result = [], "no", ""
    while verdict == "no":
        result = right
        if rng.random() < habits.slip:
            at = rng.randrange(4)
            result = result[:at] + rng.choice([d for d in "0123456789" if d != result[at]]) + result[at + 1 :]
        verdict = "yes" if habits.lenient else check(claim + result)
        pieces += [Piece(f"<verify>{claim}{result}</verify><feedback>"), Piece(verdict, "verify"), Piece("</feedback>")]
    return pieces, result
