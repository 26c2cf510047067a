"""The table of replies against hand arithmetic, against the package's own loss, and against what is written down of it."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from tiny_learner import group, segment, trace

from aipo_graph.config import Loss
from aipo_graph.learn.batch import pack
from aipo_graph.learn.loss import aipo_loss
from aipo_graph.types import Trace
from experiments import tabular
from experiments.tabular import CONDITIONS, WEIGHTS, World, expected_advantages, rest, run, unrest, update


def test_two_replies_by_hand() -> None:
    world = World(faulty=0.25, same=True, consults=1, helped=1, alone=1, solved=1.0, replies=2, own=0.0)
    # A group of two that differ: 1 and 0 around 1/2, sample deviation sqrt(1/2): A = +-sqrt(1/2). One alone has nobody to compare with.
    assert expected_advantages(world, 0.75, 0.5) == pytest.approx((0.5**0.5 / 2, -(0.5**0.5) / 2, 0, 0))
    push = 0.75 * 0.5**0.5 / 2  # the right reply's, of weight 1; the wrong one's has the weight 0
    assert update(world, np.zeros(3), "gated")[:2] == pytest.approx((push / 2, -push / 2))
    blame = 0.25 * 0.5**0.5 / 2
    assert update(world, np.zeros(3), "sft")[:2] == pytest.approx(((push + blame) / 2, -(push + blame) / 2))


def outcomes(world: World, chances: np.ndarray, solved: float, with_agents: bool, own: list[float]) -> list[tuple[float, Trace]]:
    """What a trace with these chances of replies can come to: a reply, and a reward where it is right."""
    found = []
    for reply, chance in enumerate(chances):
        for reward, part in ((1.0, solved), (0.0, 1 - solved)) if reply == 0 else ((0.0, 1.0),):
            words = segment("agent", reply) if with_agents else segment("policy", reply, logprobs=(own[reply],))
            found.append((float(chance * part), trace(segment("context", 9), words, reward=reward, with_agents=with_agents)))
    return [(chance, one) for chance, one in found if chance]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("odds", [(0.85, 0.1, 0.05), (0.2, 0.5, 0.3)])
def test_the_update_is_that_of_the_packages_loss_over_every_possible_group(name: str, same: bool, odds: tuple[float, ...]) -> None:
    world = World(faulty=0.3, same=same, consults=2, helped=2, alone=2, solved=0.9, replies=3, own=0.5)
    logits = torch.tensor(odds).log().requires_grad_()
    logp = torch.log_softmax(logits, 0)
    own = logp.tolist()
    said = np.array([0.7, 0, 0]) + 0.3 * world.wrong
    helped = outcomes(world, said, 0.9 * 0.7, True, own)
    alone = outcomes(world, np.array(odds), 0.9 * odds[0], False, own)
    chances, groups = [], []
    for traces in product(helped, helped, alone, alone):
        chances.append(float(np.prod([chance for chance, _ in traces])))
        groups.append(group(*(one for _, one in traces)))
    coefficient = {"aipo": {"negative": 0.0}, "signed": {"agent": "aipo", "negative": 1.0}}.get(name, {"agent": name})
    loss = Loss.model_validate({"agent_weight": 1 / world.own, **coefficient})
    batch = pack(groups, loss)
    weight = torch.tensor(chances).repeat_interleave(4) * len(groups)  # every group has the same counts of tokens
    object.__setattr__(batch, "advantages", batch.advantages * weight[:, None])
    current = torch.where(batch.mask, logp[batch.token_ids.clamp(max=2)], 0.0)
    aipo_loss(current, torch.zeros_like(current), batch, loss, budget=1)[0].backward()
    assert logits.grad is not None
    assert update(world, np.log(odds), name) == pytest.approx(-world.own * logits.grad.numpy(), abs=2e-5)


def test_a_coefficient_that_blames_rests_below_one_that_does_not() -> None:
    for name in ("25", "same30", "same40", "same60"):
        alone = World(CONDITIONS[name].faulty, CONDITIONS[name].same, own=0.0)
        assert rest(alone, "signed") == pytest.approx(alone.others_right * (1 + alone.faulty), abs=0.04)
        assert rest(alone, "aipo") == rest(alone, "gated") == alone.solved
    assert rest(World(), "signed") == World().solved
    assert unrest(CONDITIONS["same30"], "sft") > 0.5 > 0.01 > unrest(CONDITIONS["same30"], "aipo")


def test_what_is_written_down_is_what_the_table_says(root) -> None:
    found = json.loads((root / tabular.PREDICTIONS).read_text())
    page = (root / tabular.PAGE).read_text()
    condition, name, target = tabular.FITTED
    assert run(CONDITIONS[condition], name, found["force"])[-1] == pytest.approx(target, abs=0.002)
    for name, condition in (("aipo", "same30"), ("gated", "25"), ("sft", "50"), ("credit", "same60")):
        cell = found["coefficients"][name][condition]
        assert run(CONDITIONS[condition], name, found["force"])[-1] == pytest.approx(cell["final"], abs=0.001)
        assert rest(CONDITIONS[condition], name) == pytest.approx(cell["rest"], abs=0.001)
    for name, cells in found["coefficients"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert [part.partition(";")[0].strip() for part in row.split("|")[2:-1]] == [
            f"{cell['final']:.2f} ({cell['rest']:.2f})" for cell in cells.values()
        ]
