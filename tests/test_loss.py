import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_learner import group, segment, trace
from torch import Tensor

from aipo_graph.config import FORMS, Config, Loss
from aipo_graph.errors import ConfigError
from aipo_graph.evaluation.samples import contents
from aipo_graph.learn.advantage import ESTIMATORS
from aipo_graph.learn.batch import AGENT, POLICY, Batch, pack
from aipo_graph.learn.loss import BELOW, COEFFICIENTS, SURROGATES, aipo_loss, merge, summarise

# Two rows. Row 0: context, two policy tokens, an agent token with a recorded logprob, one without. Row 1: context, one policy token.
CURRENT = torch.tensor([[0.0, -0.5, -1.5, -3.0, -1.0], [0.0, -0.7, 0.0, 0.0, 0.0]])
OLD = torch.tensor([[0.0, -1.0, -1.2, 0.0, 0.0], [0.0, -0.3, 0.0, 0.0, 0.0]])
A0, A1 = 0.8, -0.6
BUDGET = 10


def batch_of(a0: float = A0, a1: float = A1, old: Tensor | None = OLD) -> Batch:
    first = trace(
        segment("context", 1), segment("policy", 2, 3, logprobs=(-1.1, -1.2)), segment("agent", 4, logprobs=(-2.0,)), segment("agent", 5)
    )
    second = trace(segment("context", 1), segment("policy", 2, logprobs=(-0.3,)))
    batch = pack([group(first, second)], Loss())
    return replace(batch, advantages=batch.mask * torch.tensor([[a0], [a1]]), old_logprobs=old)


def parts(loss: Loss, batch: Batch, current: Tensor = CURRENT, **extra: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Total loss, its sums, and the gradient by the current logprobs."""
    own = current.clone().requires_grad_()
    total, sums = aipo_loss(own, torch.ones_like(own), batch, loss, budget=BUDGET, **extra)
    total.backward()
    assert own.grad is not None
    return total.detach(), sums, own.grad


def clipped(ratio: float, a: float) -> float:
    return -min(ratio * a, min(max(ratio, 0.8), 1.28) * a)


def hand_policy_loss(name: str) -> float:
    """The published formulas, token by token, in plain arithmetic; truncated importance weights on token 1 only."""
    r = [math.exp(0.5), math.exp(-0.3), math.exp(-0.4)]
    w = [math.exp(-1.0 - -1.1), 1.0, 1.0]
    a = [A0, A0, A1]
    token = [w[i] * clipped(r[i], a[i]) for i in range(3)]
    if name == "grpo":
        return (token[0] + token[1]) / 2 / 2 + token[2] / 2
    if name == "dapo":
        return sum(token) / 3
    if name == "dr_grpo":
        return sum(token) / (2 * BUDGET)
    if name == "cispo":
        logp = [-0.5, -1.5, -0.7]
        return sum(-w[i] * min(max(r[i], 0.8), 1.28) * a[i] * logp[i] for i in range(3)) / 3
    if name == "gspo":  # s = exp(mean log r) of the row
        s = [math.exp(0.2 / 2), math.exp(-0.4)]
        return (w[0] + w[1]) / 2 * clipped(s[0], A0) / 2 + clipped(s[1], A1) / 2
    s = [math.exp(0.2), math.exp(-0.4)]  # rloo: the whole row is one action
    return ((w[0] + w[1]) * clipped(s[0], A0) + clipped(s[1], A1)) / 3


@pytest.mark.parametrize("name", SURROGATES)
def test_policy_surrogates_by_hand(name: str) -> None:
    total, sums, gradient = parts(Loss(algorithm=name, agent="mask"), batch_of())
    assert float(sums["policy_loss"]) == pytest.approx(hand_policy_loss(name), rel=1e-5)
    assert float(total) == pytest.approx(hand_policy_loss(name), rel=1e-5)
    assert not gradient[batch_of().source == AGENT].any()


# Ratios of row 0 (A > 0 or < 0): exp(2), exp(-3); the mismatch weight of its first token is exp(.1).
WIDE = torch.tensor([[0.0, 1.0, -4.2, -3.0, -1.0], [0.0, -0.3, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("settings", "a", "first", "second", "share"),
    [
        ({"algorithm": "dapo"}, 0.5, 1.28, math.exp(-3), 1 / 3),
        ({"algorithm": "dapo"}, -0.5, math.exp(2), 0.8, 1 / 3),
        ({"algorithm": "dapo", "clip_dual": 3}, 0.5, 1.28, math.exp(-3), 1 / 3),
        ({"algorithm": "dapo", "clip_dual": 3}, -0.5, 3, 0.8, 2 / 3),
        ({"algorithm": "dapo", "clip_dual": 9}, -0.5, math.exp(2), 0.8, 1 / 3),
        ({"algorithm": "cispo"}, 0.5, 1.28 * 1.0, 0.8 * -4.2, 2 / 3),
        ({"algorithm": "cispo", "clip_low": 1, "clip_high": 4}, 0.5, 5 * 1.0, math.exp(-3) * -4.2, 1 / 3),
        ({"algorithm": "cispo", "clip_low": 50, "clip_high": 9}, -0.5, math.exp(2) * 1.0, math.exp(-3) * -4.2, 0),
    ],
)
def test_clips_by_hand(settings: dict[str, Any], a: float, first: float, second: float, share: float) -> None:
    batch = batch_of(a0=a, a1=0.0)
    _, sums, gradient = parts(Loss.model_validate(settings | {"agent": "mask"}), batch, WIDE)
    assert float(sums["policy_loss"]) == pytest.approx(-a * (math.exp(0.1) * first + second) / 3, rel=1e-5)
    assert summarise(sums, batch.authors, 1)["clip_fraction"] == pytest.approx(share)
    if settings["algorithm"] == "dapo":  # a clip that takes effect ends the gradient
        assert int((gradient[0, 1:3] == 0).sum()) == round(3 * share)


@pytest.mark.parametrize(("name", "form"), [("gspo", "mean"), ("rloo", "sum")])
def test_sequence_ratios_have_the_gradient_of_the_sequence_form(name: str, form: str) -> None:
    batch = batch_of(a0=0.8, a1=0.6)
    batch = replace(batch, behaviour_logprobs=torch.where(batch.source == POLICY, OLD, batch.behaviour_logprobs))
    _, _, gradient = parts(Loss(algorithm=name, agent="mask", clip_low=0.99, clip_high=9), batch)
    own = CURRENT.clone().requires_grad_()
    gap = torch.where(batch.source == POLICY, own - OLD, 0.0).sum(1)
    if form == "mean":
        (-(gap / torch.tensor([2.0, 1.0])).exp() * torch.tensor([0.8, 0.6]) / 2).sum().backward()
    else:
        (-gap.exp() * torch.tensor([0.8, 0.6]) / 3).sum().backward()
    assert torch.allclose(gradient, own.grad, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "a", "expected"),
    [
        # rho of the two agent tokens: exp(-3 + 2) = .368 with the recorded mu, exp(-1 - log .5) = .736 with the constant
        ("aipo", 0.8, -(0.5 * 0.8 * -3 + math.exp(-1) / 0.5 * 0.8 * -1) / 2),
        ("aipo", -0.6, 0.0),
        ("mask", 0.8, 0.0),
        ("ppo", 0.8, -(math.exp(-1) * 0.8 + math.exp(-1) / 0.5 * 0.8) / 2),
        ("ppo", -0.6, -(0.8 * -0.6 + 0.8 * -0.6) / 2),
        ("luffy", 0.8, -0.8 * (math.exp(-3) / (math.exp(-3) + 0.1) + math.exp(-1) / (math.exp(-1) + 0.1)) / 2),
        ("gated", 0.8, 0.8 * (3 + 1) / 2),
        ("gated", -0.6, 0.0),
        ("sft", 0.8, 0.8 * (3 + 1) / 2),
        ("sft", -0.6, -0.6 * (3 + 1) / 2),
        ("echo", 0.8, (3 + 1) / 2),
        ("echo", -0.6, (3 + 1) / 2),
        ("echo", 0.0, (3 + 1) / 2),
    ],
)
def test_agent_coefficients_by_hand(name: str, a: float, expected: float) -> None:
    loss = Loss(agent=name, floor=0.5, ceiling=2, behaviour=0.5, agent_weight=3)
    total, sums, _ = parts(loss, batch_of(a0=a, a1=0.0))
    assert float(sums["agent_loss"]) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert float(total) == pytest.approx(float(sums["policy_loss"]) + 3 * expected, rel=1e-5)


def test_shares_of_ratios_below_the_bounds() -> None:
    _, sums, _ = parts(Loss(behaviour=0.5), batch_of(a0=0.8))  # ratios .368 and .736
    found = summarise(sums, batch_of().authors, 1)
    assert [found[f"agent_ratio_below/{bound:g}"] for bound in BELOW] == [0, 0, 0, 0, 1]


def test_every_name_of_the_config_has_a_formula() -> None:
    assert {"advantage": (*ESTIMATORS,), "algorithm": (*SURROGATES,), "agent": (*COEFFICIENTS,)} == FORMS


MINE = """
import torch

def gated(log_rho, logprobs, advantages, settings):
    return -advantages.clamp(min=0) * logprobs

def summed(log_rho, logprobs, advantages, settings):
    return (advantages * logprobs).sum()

def odd(log_rho, logprobs, advantages, settings):
    return logprobs @ logprobs

def nothing_yet(log_rho, logprobs, advantages, settings):
    return -advantages * logprobs if (advantages > 0).any() else torch.zeros_like(logprobs)

def cut(log_rho, logprobs, advantages, settings):
    return -advantages * logprobs.detach()

def squared(reward, rewards):
    return reward ** 2

class Settings: ...
name = "x"
"""


def test_functions_of_ones_own_are_parts_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    for a in (1.0, -1.0):
        ours, mine = (parts(Loss(agent=name), batch_of(a0=a))[2] for name in ("gated", "mine.py:gated"))
        assert torch.equal(ours, mine)
    total, _, gradient = parts(Loss(algorithm="mine.py:gated"), batch_of())
    assert total.isfinite()
    assert gradient.abs().sum() > 0
    assert parts(Loss(agent="mine.py:nothing_yet"), batch_of(a0=-1.0))[0].isfinite()
    traces = [trace(segment("context", 1), segment("policy", 2), reward=reward) for reward in (3.0, 1.0)]
    batch = pack([group(*traces)], Loss(advantage="mine.py:squared", baseline="group"))
    assert batch.advantages[:, -1].tolist() == [9.0, 1.0]
    assert "loss.agent (mine.py)" in contents(Config(loss=Loss(agent="mine.py:gated"))), "a begun run notices an edit"
    for spec, said in (
        ("mine.py:summed", r"loss.agent = 'mine.py:summed': returns \[\]; a loss per token is wanted, a tensor of \[2, "),
        ("mine.py:odd", r"loss.agent = 'mine.py:odd': RuntimeError in .*mine.py:11: "),
        ("mine.py:cut", "loss.agent = 'mine.py:cut': returns a tensor without a gradient, from which nothing is learned; detach less"),
        ("mine.py:name", "loss.agent = 'mine.py:name': a str is no function; name one"),
        ("mine.py:gatd", "mine.py has no 'gatd'; did you mean 'gated'?"),
        ("none.py:gated", "no file 'none.py'"),
    ):
        with pytest.raises(ConfigError, match=said):
            parts(Loss(agent=spec), batch_of())


def weights_of_agent_tokens(rho: list[float], a: float, loss: Loss) -> list[float]:
    """w_t read off the gradient of the loss, -(1/N) w A, through a softmax model: N tokens with mu = 1."""
    n = len(rho)
    batch = pack([group(trace(segment("context", 0), segment("agent", *[1] * n)))], loss)
    batch = replace(batch, advantages=batch.mask * a)
    # a Bernoulli policy per token: log pi = log sigmoid(x), d log pi / dx = 1 - pi
    probability = torch.tensor([rho])
    x = (probability / (1 - probability)).log().requires_grad_()
    own = torch.cat([torch.zeros(1, 1), torch.nn.functional.logsigmoid(x)], 1)
    total, _ = aipo_loss(own, torch.zeros_like(own), batch, loss, budget=1)
    total.backward()
    assert x.grad is not None
    return (x.grad / (-a / n * (1 - probability)))[0].tolist()


@pytest.mark.parametrize("a", [1.5, -0.5])
def test_agent_gradient_is_weight_times_advantage_times_score(a: float) -> None:
    rho = [1e-4, 0.05, 0.1, 0.3, 0.9]
    floor = 0.1 if a > 0 else 0.0
    assert weights_of_agent_tokens(rho, a, Loss(floor=0.1, negative=1)) == pytest.approx([max(p, floor) for p in rho], rel=1e-3)
    assert weights_of_agent_tokens(rho, a, Loss(floor=0.1, ceiling=0.25, negative=1)) == pytest.approx(
        [min(max(p, floor), 0.25) for p in rho], rel=1e-3
    )
    assert weights_of_agent_tokens(rho, a, Loss(agent="sft")) == pytest.approx([1.0] * 5, rel=1e-3)
    assert weights_of_agent_tokens(rho, a, Loss(agent="gated")) == pytest.approx([float(a > 0)] * 5, rel=1e-3)
    shaped = [0.1 * p / (p + 0.1) ** 2 for p in rho]
    assert weights_of_agent_tokens(rho, a, Loss(agent="luffy")) == pytest.approx(shaped, rel=1e-3)


def test_negative_scales_what_a_failed_trace_says_of_its_replies() -> None:
    rho = [1e-4, 0.05, 0.9]
    assert weights_of_agent_tokens(rho, -0.5, Loss(negative=0.3, ceiling=0.5)) == pytest.approx([0.3 * min(p, 0.5) for p in rho], rel=1e-3)
    assert weights_of_agent_tokens(rho, -0.5, Loss()) == [0, 0, 0]
    assert weights_of_agent_tokens(rho, 0.5, Loss(negative=1)) == weights_of_agent_tokens(rho, 0.5, Loss())


def test_the_exact_ratio_vanishes_where_the_floor_does_not() -> None:
    assert weights_of_agent_tokens([1e-6], 1.0, Loss(agent="ppo"))[0] < 1e-5
    assert weights_of_agent_tokens([1e-6], 1.0, Loss(floor=0.1))[0] == pytest.approx(0.1)
    assert weights_of_agent_tokens([1e-6], -1.0, Loss(negative=1))[0] < 1e-5


@pytest.mark.parametrize("algorithm", SURROGATES)
def test_more_help_does_not_change_a_policy_tokens_gradient(algorithm: str) -> None:
    def gradient(words: int) -> Tensor:
        helped = trace(segment("context", 1), segment("policy", 2, 3), segment("agent", *[4] * words))
        batch = pack([group(helped, trace(segment("context", 1), segment("policy", 2), reward=0.0))], Loss())
        current = torch.full(batch.token_ids.shape, -1.3)
        return parts(Loss(algorithm=algorithm), batch, current)[2][:, :3]

    assert gradient(3).any()
    assert torch.equal(gradient(3), gradient(6))


def test_mu_is_the_record_then_the_constant_never_one_by_accident() -> None:
    _, sums, _ = parts(Loss(behaviour=0.25), batch_of())
    by_author = sums["agent_ratio_sum"][batch_of().authors.index("agent")]
    assert float(by_author) == pytest.approx(math.exp(-3 + 2) + math.exp(-1) / 0.25, rel=1e-5)


def test_mismatch_weight_is_capped_detached_and_reported() -> None:
    batch = batch_of(a0=1.0, a1=0.0, old=None)
    behaviour = batch.behaviour_logprobs.clone()
    behaviour[0, 1] = -5.0  # the learner gives exp(4.5) times the sampler's probability
    _, sums, gradient = parts(Loss(algorithm="dapo", agent="mask", mismatch_cap=1.5), replace(batch, behaviour_logprobs=behaviour))
    assert gradient[0, 1] == pytest.approx(-1.5 / 3)
    assert gradient[0, 2] == pytest.approx(-math.exp(-1.5 + 1.2) / 3)
    assert float(sums["mismatch_max"]) == pytest.approx(math.exp(4.5) - 1, rel=1e-5)


def test_mismatch_metrics_by_hand() -> None:
    """Behaviour -1.1, -1.2, -0.3 against old -1.0, -1.7, 0.7: raw ratios exp(0.1), exp(-0.5), exp(1)."""
    old = torch.tensor([[0.0, -1.0, -1.7, 0.0, 0.0], [0.0, 0.7, 0.0, 0.0, 0.0]])
    batch = batch_of(old=old)
    found = summarise(parts(Loss(mismatch_cap=2.0), batch)[1], batch.authors, 1)
    logs = [0.1, -0.5, 1.0]
    ratios = [math.exp(x) for x in logs]
    assert found["mismatch_ratio_mean"] == pytest.approx(sum(ratios) / 3)
    assert found["mismatch_ratio_max"] == pytest.approx(math.e)
    assert found["mismatch_kl_k1"] == pytest.approx(-sum(logs) / 3)
    assert found["mismatch_kl"] == pytest.approx(sum(m - 1 - x for m, x in zip(ratios, logs, strict=True)) / 3)
    assert found["mismatch_kl"] > 0 > found["mismatch_kl_k1"]
    assert found["mismatch_capped"] == pytest.approx(1 / 3)
    exact = summarise(
        parts(Loss(), replace(batch, behaviour_logprobs=torch.where(batch.source == POLICY, old, torch.nan)))[1], batch.authors, 1
    )
    names = ("mismatch_ratio_mean", "mismatch_ratio_max", "mismatch_kl", "mismatch_kl_k1", "mismatch_capped")
    assert [exact[name] for name in names] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_impossible_tokens_are_dropped_and_counted_and_nan_of_the_model_is_not_hidden() -> None:
    current = CURRENT.clone()
    current[0, 1] = current[0, 3] = -math.inf
    total, sums, gradient = parts(Loss(), batch_of(), current)
    assert total.isfinite()
    assert gradient.isfinite().all()
    assert int(sums["dropped_tokens"]) == 2
    current[0, 1] = math.nan
    assert parts(Loss(), batch_of(old=None), current)[0].isnan()


def test_far_off_ratios_are_clamped_to_finite_values() -> None:
    current = CURRENT.clone()
    current[0, 3] = -1e4
    near, behaviour = batch_of(), batch_of().behaviour_logprobs
    for name in COEFFICIENTS:
        for a in (1.0, -1.0):
            batch = batch_of(a0=a, old=torch.where(OLD == -1.0, -1e4, OLD))
            for mu in (behaviour, torch.where(near.source == AGENT, -1e4, behaviour)):
                total, sums, gradient = parts(Loss(agent=name), replace(batch, behaviour_logprobs=mu), current)
                assert total.isfinite()
                assert gradient.isfinite().all()
                assert all(value.isfinite().all() for value in sums.values())


def test_kl_to_the_reference_by_hand() -> None:
    reference = torch.full_like(CURRENT, -1.0)
    plain, _, _ = parts(Loss(), batch_of())
    total, sums, _ = parts(Loss(kl_weight=0.5), batch_of(), reference=reference)
    gaps = [-1 + 0.5, -1 + 1.5, -1 + 0.7]
    kl = sum(math.exp(g) - g - 1 for g in gaps) / 3
    assert float(sums["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(total - plain) == pytest.approx(0.5 * kl, rel=1e-5)


def test_metrics_of_parts_add_up_and_say_what_happened() -> None:
    batch, loss = batch_of(), Loss(behaviour=0.5, floor=0.5, ceiling=0.7)
    whole = summarise(parts(loss, batch)[1], batch.authors, 1)
    sums: dict[str, Tensor] = {}
    for rows in (torch.tensor([0]), torch.tensor([1])):
        part = batch.select(rows)
        sums = merge(sums, parts(loss, part, CURRENT[rows, : part.token_ids.shape[1]])[1])
    assert summarise(sums, batch.authors, 1) == pytest.approx(whole)
    assert whole["ratio_max"] == pytest.approx(math.exp(0.5))
    assert whole["clip_fraction"] == pytest.approx(2 / 3)  # exp(.5) > 1.28 where A > 0, exp(-.4) < .8 where A < 0
    assert whole["mismatch_max"] == pytest.approx(math.exp(0.1) - 1, rel=1e-5)
    rho = [math.exp(-1), math.exp(-1) / 0.5]
    assert whole["agent_ratio_mean/agent"] == pytest.approx(sum(rho) / 2)
    assert whole["agent_ess/agent"] == pytest.approx(sum(rho) ** 2 / sum(p * p for p in rho) / 2)
    assert (whole["floor_hit"], whole["ceiling_hit"]) == (0.5, 0.5)
    assert whole["agent_logprob"] == pytest.approx(-2.0)
    assert whole["entropy"] == pytest.approx(1.0)
