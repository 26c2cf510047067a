"""The operator task: a small world whose rules the base policy lacks, so that what consulting teaches it can be counted exactly.

A problem is a marker, a state of four digits and three operators: ``%6475IEB?``. The marker gives the order of evaluation:
``@`` left to right, ``%`` right to left, ``&`` rotated left by one. An operator's rule is a 4-digit key and a sign: ``8813+`` turns
the state x into 8813 + x, ``8813-`` turns it into 8813 - x, digit by digit mod 10 without carry. Sums and reflections do not
commute, so the order matters. The answer is the final state, a string of four digits.

The world is one constant: 12 operators, 4 whose rule the base policy knows, 4 novel ones, 4 about which it was taught a wrong rule.
"""

import random
import re
from collections.abc import Iterable, Mapping
from itertools import combinations

from aipo_graph.config import Config, Fraction, Section, refuse_problems, task_options
from aipo_graph.errors import TaskError
from aipo_graph.tasks.grading import last_box
from aipo_graph.types import Problem, derive_seed

KNOWN, NOVEL, MISBELIEVED = "ABCD", "EFGH", "IJKL"
OPERATORS = KNOWN + NOVEL + MISBELIEVED
MARKERS = "@%&"
UNKNOWN = "?"
"""What a helper replies to a request that it cannot read."""

_WORLD = "operators-1"


def _key(name: str, letter: str, avoid: str = "0000") -> str:
    """A key without zeros that differs from ``avoid`` in every digit."""
    rng = random.Random(derive_seed(_WORLD, name, letter))
    return "".join(rng.choice([d for d in "123456789" if d != old]) for old in avoid)


RULES: Mapping[str, str] = {letter: _key("true", letter) + sign for letter, sign in zip(OPERATORS, "+-" * 6, strict=True)}
"""The true rule of each operator."""
BELIEFS: Mapping[str, str] = {x: _key("believed", x, RULES[x][:4]) + "-+"["+-".index(RULES[x][4])] for x in MISBELIEVED}
"""The wrong rules of pretraining: they differ from the true ones in the sign and in every digit."""


def _split(kind: str, operators: Iterable[tuple[str, ...]]) -> tuple[list[str], list[str]]:
    """Sets of three operators in the order of their hash; the first fifth, rounded up, is held out."""
    triples = sorted(("".join(triple) for triple in operators), key=lambda triple: derive_seed(_WORLD, kind, triple))
    cut = -(-len(triples) // 5)
    return triples[cut:], triples[:cut]


_SETS = {
    "easy": _split("easy", combinations(KNOWN, 3)),
    "hard": _split("hard", (t for t in combinations(OPERATORS, 3) if sum(letter in KNOWN for letter in t) <= 1)),
}
TRAIN_TRIPLES: Mapping[str, tuple[str, ...]] = {kind: tuple(sets[0]) for kind, sets in _SETS.items()}
HELDOUT_TRIPLES: Mapping[str, tuple[str, ...]] = {kind: tuple(sets[1]) for kind, sets in _SETS.items()}


def order(marker: str, operators: str) -> str:
    """The operators in their order of evaluation."""
    return {"@": operators, "%": operators[::-1], "&": operators[1:] + operators[:1]}[marker]


def apply(rule: str, state: str) -> str:
    """The state after one rule: key plus state or key minus state, digit by digit mod 10."""
    sign = 1 if rule[4] == "+" else -1
    return "".join(str((int(k) + sign * int(s)) % 10) for k, s in zip(rule[:4], state, strict=True))


def plan(query: str) -> str:
    """The Reasoning helper: marker and numbered operators to the same in order of evaluation.

    >>> plan("%1I2E3B"), plan("&1I2E3B"), plan("what?")
    ('3B2E1I', '2E3B1I', '?')
    """
    if not re.fullmatch(f"[{MARKERS}]([1-9][{OPERATORS}]){{1,9}}", query):
        return UNKNOWN
    places = re.findall("[1-9].", query[1:])
    return "".join({"@": places, "%": places[::-1], "&": places[1:] + places[:1]}[query[0]])


def check(claim: str) -> str:
    """The Verify helper: exact digit-wise arithmetic on one step. What is not a step is "no".

    >>> check("8813-6475=2448"), check("8813-6475=2338"), check("1=1")
    ('yes', 'no', 'no')
    """
    step = re.fullmatch("([0-9]{4}[+-])([0-9]{4})=([0-9]{4})", claim)
    return "yes" if step and apply(step[1], step[2]) == step[3] else "no"


class Options(Section):
    """``task.options`` of the operator task."""

    easy_share: Fraction = 0.25
    """Share of training problems that the base policy can already solve."""


class Operators:
    """Problems of two kinds. ``hard``: at least two operators that the base policy does not know, any marker, and the order matters.
    ``easy``: known operators, left to right. A fifth of the operator sets of either kind stands in held-out problems only.
    """

    kinds = ("hard", "easy")
    notation = "%6475IEB?: apply the rules of I, E and B to 6475; @ from left to right, % from right to left, & the first one last."

    def __init__(self, seed: int, easy_share: float):
        self._seed = seed
        self._easy_share = easy_share

    def train(self, index: int) -> Problem:
        rng = random.Random(derive_seed(self._seed, "operators", "train", index))
        kind = "easy" if rng.random() < self._easy_share else "hard"
        return _draw(f"train-{index}", kind, TRAIN_TRIPLES[kind], rng)

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        """The same problems whatever the run's seed. Raises TaskError for a kind that the task does not have.

        ``long``, which is never trained: a fourth operator, of those that the base policy does not know, after three held-out ones.
        """
        kind = kind or "hard"
        if kind not in (*self.kinds, "long"):
            raise TaskError(f"problem kind {kind!r}: the operator task has hard, easy and long")
        rngs = (random.Random(derive_seed("operators", "heldout", kind, index)) for index in range(count))
        triples = HELDOUT_TRIPLES["hard" if kind == "long" else kind]
        return [_draw(f"heldout-{kind}-{index}", kind, triples, rng) for index, rng in enumerate(rngs)]

    def solve(self, question: str) -> str | None:
        """The answer of any question of this form, for the demo; None for what is not one."""
        form = re.fullmatch(f"([{MARKERS}])([0-9]{{4}})([{OPERATORS}]{{1,12}})\\?", question)
        return evaluate(form[2], order(form[1], form[3])) if form else None

    async def reward(self, answer: str, reply: str) -> float:
        """1 if the last box holds exactly the answer's four digits; leading zeros count."""
        return float(last_box(reply) == answer)


def _draw(name: str, kind: str, triples: tuple[str, ...], rng: random.Random) -> Problem:
    while True:
        operators = "".join(rng.sample(rng.choice(triples), 3))
        if kind == "long":
            operators += rng.choice([letter for letter in NOVEL + MISBELIEVED if letter not in operators])
        marker = "@" if kind == "easy" else rng.choice(MARKERS)
        state = f"{rng.randrange(10000):04}"
        answer = evaluate(state, order(marker, operators))
        if marker == "@" or answer != evaluate(state, operators):
            return Problem(name, f"{marker}{state}{operators}?", answer, kind)


def evaluate(state: str, steps: str) -> str:
    """The state after the operators' true rules, in the order given."""
    for letter in steps:
        state = apply(RULES[letter], state)
    return state


def build(config: Config) -> Operators:
    """The factory that ``task.name = operators`` stands for. Raises ConfigError for a data file: this task makes its own problems."""
    refuse_problems(config.task)
    return Operators(config.run.seed, task_options(config.task, Options).easy_share)
