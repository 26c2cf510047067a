"""The quick start's helpers as the study changes them: wrong at times, wordy, or as good as removed. Named by path in `agents.use`.

Each change is drawn from the consult's own seed, so that a run repeats.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aipo_graph import load
from aipo_graph.config import Config
from aipo_graph.learn.model import load_model
from aipo_graph.rollout import Agent
from aipo_graph.rollout.agents import Prompts
from aipo_graph.tasks.operators import RULES, UNKNOWN
from aipo_graph.types import Reply, Request, derive_seed
from examples.operators.pretrain import IDS, WORDS, encode
from examples.operators.solutions import Piece

Change = Callable[[random.Random, str, Reply], Reply]
"""The draw of this consult, its query and the honest reply -> the reply that is given."""

EXPERT = Path("runs/study/bases/expert")
HEAT = 1.5
"""The expert's temperature: one reply in nine is wrong."""
RULE = 5
"""Tokens of a rule."""
SIGNS = "@%&;?="
WORDY = 4
"""Signs on either side of a wordy reply."""


@dataclass(frozen=True)
class Changed(Agent):
    """An agent whose honest reply goes through ``change``."""

    change: Change = lambda rng, query, reply: reply

    async def __call__(self, request: Request, prompts: Prompts) -> Reply:
        reply = await Agent.__call__(self, request, prompts)
        return self.change(random.Random(request.seed), request.query, reply)


def _changed(name: str, config: Config, change: Change) -> Agent:
    agent: Agent = load.load(f"graphs/operators_agents.py:{name}")(config)
    return Changed(agent.name, tools=agent.tools, change=change)


def _random_rule(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=4)) + rng.choice("+-")


def _wrong(share: float) -> Change:
    """With this chance another rule, drawn anew each time."""
    return lambda rng, query, reply: replace(reply, text=_random_rule(rng)) if rng.random() < share and query in RULES else reply


def wrong_10(config: Config) -> Agent:
    return _changed("knowledge", config, _wrong(0.1))


def wrong_25(config: Config) -> Agent:
    return _changed("knowledge", config, _wrong(0.25))


def wrong_50(config: Config) -> Agent:
    return _changed("knowledge", config, _wrong(0.5))


def _same_wrong(share: float) -> Change:
    """With this chance one and the same wrong rule of the operator."""

    def change(rng: random.Random, query: str, reply: Reply) -> Reply:
        lie = _random_rule(random.Random(derive_seed("same wrong", query)))
        return replace(reply, text=lie) if rng.random() < share and query in RULES else reply

    return change


def same_30(config: Config) -> Agent:
    return _changed("knowledge", config, _same_wrong(0.3))


def same_40(config: Config) -> Agent:
    return _changed("knowledge", config, _same_wrong(0.4))


def same_60(config: Config) -> Agent:
    return _changed("knowledge", config, _same_wrong(0.6))


def signs(rng: random.Random) -> str:
    return "".join(rng.choices(SIGNS, k=WORDY))


def wordy_verify(config: Config) -> Agent:
    return _wordy("verify", config)


def wordy_knowledge(config: Config) -> Agent:
    return _wordy("knowledge", config)


def wordy_reasoning(config: Config) -> Agent:
    return _wordy("reasoning", config)


def _wordy(name: str, config: Config) -> Agent:
    """The reply between signs drawn anew each time: words around the fact that nobody needs to learn."""
    return _changed(name, config, lambda rng, query, reply: Reply(signs(rng) + reply.text + signs(rng)))


def expert(config: Config) -> Agent:
    """A language model of the policy's tokenizer that knows the rules, with the true chance of each of its tokens recorded."""
    return _changed("knowledge", config, lambda rng, query, reply: _said(rng, query) if query in RULES else reply)


def expert_no_mu(config: Config) -> Agent:
    return _changed("knowledge", config, lambda rng, query, reply: Reply(_said(rng, query).text) if query in RULES else reply)


def _said(rng: random.Random, query: str) -> Reply:
    asked, ids, chances = encode([Piece(f"{query}?")])[0], list[int](), list[float]()
    while len(ids) < RULE:
        each = _next(tuple(asked + ids))
        token = rng.choices(range(len(each)), each)[0]
        if token == IDS["<eos>"]:
            break
        ids.append(token)
        chances.append(math.log(each[token]))
    return Reply("".join(WORDS[token] for token in ids), tuple(ids), tuple(chances))


@cache
def _next(ids: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        return list(_expert()(torch.tensor([ids])).logits[0, -1].double().div(HEAT).softmax(-1).tolist())


@cache
def _expert() -> Any:
    return load_model(EXPERT)


def no_verify(config: Config) -> Agent:
    """Says yes to everything: as good as no check."""
    return _changed("verify", config, lambda rng, query, reply: replace(reply, text="yes"))


def no_knowledge(config: Config) -> Agent:
    return _changed("knowledge", config, lambda rng, query, reply: replace(reply, text=UNKNOWN))


def no_reasoning(config: Config) -> Agent:
    return _changed("reasoning", config, lambda rng, query, reply: replace(reply, text=UNKNOWN))
