"""The shopping task: word problems whose facts stand in a small corpus, so that a policy without them has to look them up.

``Bo has $4635, swaps a pear at Ada for a fig at Cid, then buys a plum at Eve. How much is left?`` A shop buys and sells an item at the
same price, four digits, which a sentence of the corpus tells (``At Ada a pear costs $2314.``). Two verbs the base policy knows: who
*buys* pays the price, who *sells* gets it. Three are novel to it, and each stands for two such steps: who *swaps* one thing for another
sells the first and buys the second, who *returns* two sells both, who *carries* one from a shop to another buys it there and sells it here.

Of 64 prices the base policy knows 16; of 16 others it believes those of last year. Prices and purse are such that no sum carries and none
is below 0. The world is one constant; a run's seed draws its training problems.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import NamedTuple

from aipo_graph.config import Config, Fraction, Section, task_options
from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.tasks.grading import last_box
from aipo_graph.tools.retrieval import Corpus, Document
from aipo_graph.types import Problem, derive_seed
from examples.operators.solutions import Habits, Piece, checked

SHOPS = ("Ada", "Bea", "Cid", "Dov", "Eve", "Fay", "Gus", "Hal")
ITEMS = ("pear", "fig", "plum", "lamp", "rope", "drum", "kite", "vase")
PEOPLE = ("Bo", "Kim", "Lev", "Mia")
NOVEL = ("swaps", "returns", "carries")
"""Verbs that the base policy does not know."""
UNKNOWN = "?"
"""What a helper replies to a request that it cannot read."""
SENTENCES = 2
"""Sentences in a reply from the corpus: the one asked for and the next best."""
THIRD = 0.4
"""Share of hard problems that have a third fact."""

_WORLD = "shopping-1"
_HELDOUT_OF = 4
"""One pair of facts in so many is held out."""


class Fact(NamedTuple):
    """What a price is asked of. As text it is what the policy asks."""

    item: str
    shop: str

    def __str__(self) -> str:
        return f"{self.item} at {self.shop}"


class Step(NamedTuple):
    """One trade: ``buy`` takes the price from the purse, ``sell`` adds it."""

    trade: str
    fact: Fact


Steps = tuple[Step, ...]

FACTS = tuple(Fact(item, shop) for item in ITEMS for shop in SHOPS)
KNOWN, STALE = (
    frozenset(Fact(item, SHOPS[(row + shift) % 8]) for row, item in enumerate(ITEMS) for shift in shifts) for shifts in ((0, 3), (1, 5))
)
"""Two of each item and of each shop: facts that the base policy knows, and facts of which it believes what was true last year."""
DIGITS = ("12345", "012345", "012345", "012345")
"""The digits that a price may have, by place."""
PRICES: Mapping[Fact, str] = dict(
    zip(FACTS, random.Random(derive_seed(_WORLD, "prices")).sample([*map("".join, product(*DIGITS))], len(FACTS)), strict=True)
)
"""The true price of each fact; no two are equal."""
OLD: Mapping[Fact, str] = {
    fact: "".join(
        random.Random(derive_seed(_WORLD, "old", str(fact), place)).choice(DIGITS[place].replace(digit, ""))
        for place, digit in enumerate(PRICES[fact])
    )
    for fact in sorted(STALE)
}
"""Last year's prices: they differ from the true ones in every digit."""

_TELLS = ("At {0.shop} a {0.item} costs $", "{0.shop} asks $", "For $"), (".", " for a {0.item}.", " you get a {0.item} at {0.shop}.")
_GOSSIP = ("{} opens at noon.", "{} keeps a cat.", "{} is by the mill.", "{} is never late.")
_RUMOURS = ("A {} lasts for years.", "Nobody needs a {}.", "Every child likes a {}.", "A {} is hard to carry.")


def tell(fact: Fact) -> tuple[str, str]:
    """The words of a fact's sentence, before and after its price."""
    form = FACTS.index(fact) % 5 % 3
    return _TELLS[0][form].format(fact), _TELLS[1][form].format(fact)


def _documents() -> list[Document]:
    told: list[tuple[str, Mapping[str, Fact]]] = [(PRICES[fact].join(tell(fact)), {"fact": fact}) for fact in FACTS]
    told += [(_GOSSIP[row % 4].format(shop), {}) for row, shop in enumerate(SHOPS)]
    told += [(_RUMOURS[row % 4].format(item), {}) for row, item in enumerate(ITEMS)]
    random.Random(derive_seed(_WORLD, "order")).shuffle(told)
    return [Document(f"s{number}", text, fields) for number, (text, fields) in enumerate(told)]


CORPUS = Corpus(_documents())
"""A sentence for each fact, whose document names it in ``fields``, and some that tell no price."""


def find(query: str) -> list[Document]:
    """The best sentences of the corpus for a query, by BM25; none that shares no word with it."""
    return CORPUS.search(query, SENTENCES)


def lookup(query: str) -> str:
    """The Knowledge helper: what the corpus says."""
    return " ".join(document.text for document in find(query)) or UNKNOWN


# Clause -> its steps, in the order in which the verb has them
_THING = f"(?:a )?({'|'.join(ITEMS)})"
_FACT = rf"{_THING} at ({'|'.join(SHOPS)})"
_FORMS: tuple[tuple[str, Callable[..., Steps]], ...] = (
    (f"buys {_FACT}", lambda *f: (Step("buy", Fact(*f)),)),
    (f"sells {_FACT}", lambda *f: (Step("sell", Fact(*f)),)),
    (f"swaps {_FACT} for {_FACT}", lambda *f: (Step("sell", Fact(*f[:2])), Step("buy", Fact(*f[2:])))),
    (f"returns {_FACT} and {_FACT}", lambda *f: (Step("sell", Fact(*f[:2])), Step("sell", Fact(*f[2:])))),
    (
        f"carries {_THING} from ({'|'.join(SHOPS)}) to ({'|'.join(SHOPS)})",
        lambda item, here, there: (Step("buy", Fact(item, here)), Step("sell", Fact(item, there))),
    ),
)
_JOINT = ", then "
_LONGEST_STORY = 500


def steps(story: str) -> Steps | None:
    """The trades of a story, in order; None for what is none.

    >>> steps("swaps a pear at Ada for a fig at Cid")
    (Step(trade='sell', fact=Fact(item='pear', shop='Ada')), Step(trade='buy', fact=Fact(item='fig', shop='Cid')))
    """
    found: Steps = ()
    for clause in story[:_LONGEST_STORY].split(_JOINT):
        match = next(((form, m) for pattern, form in _FORMS if (m := re.fullmatch(pattern, clause))), None)
        if match is None:
            return None
        found += match[0](*match[1].groups())
    return found


PLACES = ("first", "second", "third")
"""What the trades of a plan are numbered with; longer stories have no plan."""


def say(trades: Sequence[Step]) -> str:
    """The trades as a plan in words."""
    return ", ".join(f"{place} {step.trade} the {step.fact}" for place, step in zip(PLACES, trades, strict=False)) + "."


def plan(query: str) -> str:
    """The Reasoning helper: a story into plain trades.

    >>> plan("carries pear from Ada to Cid, then buys fig at Eve"), plan("what?")
    ('first buy the pear at Ada, second sell the pear at Cid, third buy the fig at Eve.', '?')
    """
    trades = steps(query)
    return say(trades) if trades and len(trades) <= len(PLACES) else UNKNOWN


def apply(trade: str, purse: str, price: str) -> str:
    """The purse after a trade, four digits."""
    return f"{int(purse) + (int(price) if trade == 'sell' else -int(price)):04}"


def check(claim: str) -> str:
    """The Verify helper: exact arithmetic on one trade. What is none is "no".

    >>> check("4635-2314=2321"), check("4635-2314=2331"), check("1=1")
    ('yes', 'no', 'no')
    """
    sides = re.fullmatch("([0-9]{4})([+-])([0-9]{4})=([0-9]{4})", claim)
    return "yes" if sides and apply("sell" if sides[2] == "+" else "buy", sides[1], sides[3]) == sides[4] else "no"


def purse(trades: Sequence[Step], prices: Mapping[Fact, str], rng: random.Random) -> str | None:
    """Money to begin with, such that no digit carries on the way; None where there is none."""
    digits = ""
    for place in range(4):
        total, low, high = 0, 0, 0
        for trade, fact in trades:
            total += int(prices[fact][place]) * (1 if trade == "sell" else -1)
            low, high = min(low, total), max(high, total)
        least = max(-low, 1 - low if place == 0 else 0)
        if least > 9 - high:
            return None
        digits += str(rng.randint(least, 9 - high))
    return digits


def heldout(facts: Iterable[Fact]) -> bool | None:
    """Whether all pairs of these facts are held out, or none is; None where some are."""
    pairs = [derive_seed(_WORLD, *sorted(map(str, pair))) % _HELDOUT_OF == 0 for pair in combinations(facts, 2)]
    return pairs[0] if len(set(pairs)) == 1 else None


def story(kind: str, held: bool, rng: random.Random) -> str:
    """What somebody does, in a problem of this kind: facts of which every pair is held out, or none is."""
    plain = ("buys a {} at {}", "sells a {} at {}")
    verb, third = rng.choice(NOVEL), rng.random() < THIRD
    while True:
        if kind == "easy":
            clauses = [rng.choice(plain).format(*fact) for fact in rng.sample(sorted(KNOWN), 2)]
        else:
            a, b = rng.sample(sorted(set(FACTS) - KNOWN), 2)
            novel = {
                "swaps": f"swaps a {a} for a {b}",
                "returns": f"returns a {a} and a {b}",
                "carries": f"carries a {a.item} from {a.shop} to {b.shop}",
            }
            clauses = [novel[verb]]
            if third:
                clauses.insert(rng.randrange(2), rng.choice(plain).format(*rng.choice(FACTS)))
        told = _JOINT.join(clauses)
        facts = {step.fact for step in steps(told) or ()}
        meant = len(facts - KNOWN) > 1 and len(facts) == len(clauses) + 1 if kind == "hard" else True
        if meant and heldout(sorted(facts)) is held:
            return told


def question(who: str, money: str, told: str) -> str:
    return f"{who} has ${money}, {told}. How much is left?"


def solution(told: str, money: str, trades: Sequence[Step], prices: Mapping[Fact, str], habits: Habits, rng: random.Random) -> list[Piece]:
    """A worked solution, the way the policy writes it: the plan, then for each trade its price and a sum, checked and redone if wrong."""
    pieces = [Piece(f"<reasoning>{told.replace(' a ', ' ')}</reasoning><feedback>"), Piece(say(trades), "reasoning"), Piece("</feedback>")]
    for place, (trade, fact) in zip(PLACES, trades, strict=False):
        pieces += [Piece(f"{place} {trade}<knowledge>{fact}</knowledge><feedback>"), *_reply(fact, prices), Piece("</feedback>")]
        claim = f"{money}{'+' if trade == 'sell' else '-'}{prices[fact]}="
        tries, money = checked(claim, apply(trade, money, prices[fact]), check, habits, rng)
        pieces += tries
    return [*pieces, Piece(f"\\boxed{{{money}}}")]


_FOUND = {fact: find(str(fact)) for fact in FACTS}


def _reply(fact: Fact, prices: Mapping[Fact, str]) -> list[Piece]:
    """What the corpus would say with these prices, each price a piece of its own."""
    pieces = []
    for number, document in enumerate(_FOUND[fact]):
        about = document.fields.get("fact")
        before, after = tell(about) if about else (document.text, "")
        pieces.append(Piece(" " * (number > 0) + before, "knowledge"))
        if about:
            pieces += [Piece(prices[about], "knowledge", str(about)), Piece(after, "knowledge")]
    return pieces


class Options(Section):
    """``task.options`` of the shopping task."""

    easy_share: Fraction = 0.25
    """Share of training problems that the base policy can already solve."""


class Shopping:
    """Problems of two kinds. ``hard``: a novel verb, two or three facts, at least two that the base policy does not know. ``easy``: two
    known verbs, two known facts. A quarter of all pairs of facts stand in held-out problems only, in which every pair is such a one.
    """

    kinds = ("hard", "easy")

    def __init__(self, seed: int, easy_share: float):
        self._seed = seed
        self._easy_share = easy_share

    def train(self, index: int) -> Problem:
        rng = random.Random(derive_seed(self._seed, "shopping", "train", index))
        return _draw(f"train-{index}", "easy" if rng.random() < self._easy_share else "hard", False, rng)

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        """The same problems whatever the run's seed. Raises TaskError for a kind that the task does not have."""
        kind = kind or "hard"
        if kind not in self.kinds:
            raise TaskError(f"problem kind {kind!r}: the shopping task has {' and '.join(self.kinds)}")
        rngs = (random.Random(derive_seed("shopping", "heldout", kind, index)) for index in range(count))
        return [_draw(f"heldout-{kind}-{index}", kind, True, rng) for index, rng in enumerate(rngs)]

    async def reward(self, answer: str, reply: str) -> float:
        """1 if the last box holds exactly the answer's four digits; leading zeros count."""
        return float(last_box(reply) == answer)


def _draw(name: str, kind: str, held: bool, rng: random.Random) -> Problem:
    while True:
        told = story(kind, held, rng)
        trades = steps(told) or ()
        money = purse(trades, PRICES, rng)
        if money is not None:
            answer = money
            for trade, fact in trades:
                answer = apply(trade, answer, PRICES[fact])
            return Problem(name, question(rng.choice(PEOPLE), money, told), answer, kind)


def build(config: Config) -> Shopping:
    """The factory that the config names. Raises ConfigError for a data file: this task makes its own problems."""
    if config.task.data is not None:
        raise ConfigError(f"task.data = {config.task.data!r}: the shopping task makes its own problems; leave it out")
    return Shopping(config.run.seed, task_options(config.task, Options).easy_share)
