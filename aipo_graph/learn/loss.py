"""The loss: a clipped surrogate on policy tokens, a coefficient times log-probability on agent tokens.

Every loss below is a value per token, [B, T]; ``aipo_loss`` weighs, masks and sums. Notation: A the trace's advantage, pi the model,
old the learner before the update, mu the sampler of an agent's words; r = pi / old on policy tokens, rho = pi / mu on agent tokens.

Normalisers are counts over the whole batch, so that micro-batches and ranks add up to one big batch. A *row* is one thread.

========  =========================================================  =====================================================
grpo      1 / (rows * policy tokens of the row)                      arXiv 2402.03300, equation 3 (mean over each sequence)
gspo      1 / (rows * policy tokens of the row)                      arXiv 2507.18071, equations 5 to 7
dapo      1 / policy tokens                                          arXiv 2503.14476, equation 8
cispo     1 / policy tokens                                          arXiv 2506.13585, equations 4 and 5
rloo      1 / policy tokens                                          arXiv 2402.14740, sequence as one action
dr_grpo   1 / (rows * token budget)                                  arXiv 2503.20783, equation 5 (a constant, no bias by length)
========  =========================================================  =====================================================

``rloo`` differs from the paper's by the constant rows / policy tokens, which keeps ``agent_weight`` comparable between algorithms.
Agent tokens have their own denominator, 1 / agent tokens: the amount of help does not change a policy token's gradient.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from aipo_graph.config import Loss
from aipo_graph.errors import ConfigError
from aipo_graph.learn.batch import AGENT, POLICY, Batch
from aipo_graph.load import own as own_function

CLAMP = 20.0
"""Bound of every log-ratio."""
TINY = 1e-30
GAMMA = 0.1
"""LUFFY's constant."""
BELOW = (0.001, 0.01, 0.1, 0.3, 1.0)
"""Bounds of the raw ratio of agent tokens whose cumulative shares are logged: a coarse histogram."""
Sums = dict[str, Tensor]
"""Metrics of a part of a batch; ``*_max`` keys merge by maximum, all others add."""


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-CLAMP, CLAMP).exp()


# Log-ratio of policy tokens -> the log-ratio that is clipped. The sequence ratios keep the token's own gradient (GSPO-token, equation 14):
# sg[s] * pi / sg[pi] has the value s and, summed over the row, the gradient of the sequence form.


def _token_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return log_ratio


def _mean_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    mean = log_ratio.detach().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean + log_ratio - log_ratio.detach()


def _sum_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return log_ratio.detach().sum(1, keepdim=True) + log_ratio - log_ratio.detach()


def _clipped(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, loss: Loss) -> Tensor:
    """-min(r A, clip(r) A), and with ``clip_dual`` = c no more than -c A where A < 0 (dual clip, arXiv 1912.09729, equation 5)."""
    ratio = _exp(log_ratio)
    least = torch.minimum(ratio * advantages, ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high) * advantages)
    return -torch.where(advantages < 0, torch.maximum(least, loss.clip_dual * advantages), least) if loss.clip_dual else -least


def _weighted(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, loss: Loss) -> Tensor:
    return -_exp(log_ratio).clamp(1 - loss.clip_low, 1 + loss.clip_high).detach() * advantages * logprobs


def _per_row(batch: Batch, mask: Tensor, budget: int) -> Tensor:
    return 1 / (max(1, batch.policy_rows) * mask.sum(1, keepdim=True).clamp(min=1))


def _per_token(batch: Batch, mask: Tensor, budget: int) -> Tensor:
    return mask.new_tensor(1 / max(1, batch.policy_tokens), dtype=torch.float32)


Ratio = Callable[[Tensor, Tensor], Tensor]
Surrogate = Callable[[Tensor, Tensor, Tensor, Loss], Tensor]
Scale = Callable[[Batch, Tensor, int], Tensor]

SURROGATES: dict[str, tuple[Ratio, Surrogate, Scale]] = {
    "grpo": (_token_ratio, _clipped, _per_row),
    "dapo": (_token_ratio, _clipped, _per_token),
    "dr_grpo": (
        _token_ratio,
        _clipped,
        lambda batch, mask, budget: torch.tensor(1 / (max(1, batch.policy_rows) * budget), device=mask.device),
    ),
    "rloo": (_sum_ratio, _clipped, _per_token),
    "cispo": (_token_ratio, _weighted, _per_token),
    "gspo": (_mean_ratio, _clipped, _per_row),
}


def _aipo(log_rho: Tensor, logprobs: Tensor, advantages: Tensor, loss: Loss) -> Tensor:
    """w A log pi with w = clip(sg[rho], floor, ceiling) where A > 0, else negative * min(sg[rho], ceiling).

    Our reconstruction of the "tailored importance sampling coefficient together with a clipping strategy" of arXiv 2605.08401. The exact
    ratio vanishes on the tokens that the policy did not know: the floor keeps their gradient alive at a bounded bias. The ceiling bounds
    the variance. A failed trace says not which of its replies was wrong: by default (negative 0) it blames none. Else there is no floor
    for A < 0, where pushing down a token of probability near 0 would blow up.
    """
    rho = _exp(log_rho.detach()).clamp(max=loss.ceiling)
    weight = torch.where(advantages > 0, rho.clamp(min=loss.floor), loss.negative * rho)
    return -weight * advantages * logprobs


def _luffy(log_rho: Tensor, logprobs: Tensor, advantages: Tensor, loss: Loss) -> Tensor:
    """A pi / (pi + gamma), with its gradient: policy shaping with mu = 1 (LUFFY, arXiv 2504.14945, section 3)."""
    probability = _exp(logprobs)
    return -advantages * probability / (probability + GAMMA)


COEFFICIENTS: dict[str, Surrogate] = {
    "aipo": _aipo,
    "credit": _aipo,  # what differs is A, from `pack`
    "mask": lambda log_rho, logprobs, advantages, loss: torch.zeros_like(logprobs),  # as in tool-use training
    "ppo": _clipped,  # the exact ratio
    "luffy": _luffy,
    "gated": lambda log_rho, logprobs, advantages, loss: -advantages.clamp(min=0) * logprobs,  # weight 1 where A > 0, else 0
    "sft": lambda log_rho, logprobs, advantages, loss: -advantages * logprobs,  # weight 1 for any A
    "echo": lambda log_rho, logprobs, advantages, loss: -logprobs,  # cross-entropy; ``agent_weight`` (0.1, say) keeps it small
}


def forms(loss: Loss) -> tuple[Ratio, Surrogate, Scale, Surrogate]:
    """Ratio, surrogate and scale of policy tokens, and the surrogate of agent tokens, which may be yours.

    A function of yours takes what those above take, the log-ratio, log-probability and advantage of each token, f32 [B, T], and the
    settings, and returns the loss of each token, f32 [B, T]. Rows without an advantage do not reach it; with policy tokens it has the
    ratio of grpo and the scale of dapo. Raises ConfigError.
    """
    ratio, surrogate, scale = SURROGATES.get(loss.algorithm) or (_token_ratio, _yours("loss.algorithm", loss.algorithm), _per_token)
    return ratio, surrogate, scale, COEFFICIENTS.get(loss.agent) or _yours("loss.agent", loss.agent)


def _yours(setting: str, spec: str) -> Surrogate:
    function = own_function(setting, spec)

    def surrogate(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, loss: Loss) -> Tensor:
        found = function(log_ratio, logprobs, advantages, loss)
        if not isinstance(found, Tensor) or found.shape != logprobs.shape:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"{setting} = {spec!r}: returns {what}; a loss per token is wanted, a tensor of {list(logprobs.shape)}")
        if logprobs.requires_grad and not found.requires_grad and found.any():
            raise ConfigError(f"{setting} = {spec!r}: returns a tensor without a gradient, from which nothing is learned; detach less")
        return found

    return surrogate


def aipo_loss(
    logprobs: Tensor, entropy: Tensor, batch: Batch, loss: Loss, *, budget: int, reference: Tensor | None = None
) -> tuple[Tensor, Sums]:
    """L = L_policy + agent_weight * L_agent + kl_weight * KL, over the rows of ``batch``; and its metrics as sums.

    ``logprobs``, ``entropy``, ``reference``: f32 [B, T]. ``budget``: policy tokens a trace may have (dr_grpo). ``batch.old_logprobs`` is
    needed only where this is not the first update of a batch. Tokens whose behaviour, old or current logprob is infinite are dropped and
    counted; a nan of the model itself is passed on, for the learner's guard.

    Policy tokens carry the detached weight min(old / behaviour, mismatch_cap): truncated importance sampling, which corrects for a
    sampler that computes other probabilities than the learner, or older ones. KL: k3 estimator on policy tokens.
    """
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    behaviour, source, values = batch.behaviour_logprobs, batch.source, batch.advantages
    policy, agent = batch.mask & (source == POLICY), batch.mask & (source == AGENT)
    dropped = torch.isinf(logprobs) | (policy & (torch.isinf(old) | ~torch.isfinite(behaviour)))
    policy, agent = policy & ~dropped, agent & ~dropped
    own = torch.where(policy | agent, logprobs, 0.0)

    zeros = torch.zeros_like(own)
    ratio_form, surrogate, scale, agent_surrogate = forms(loss)
    log_ratio = ratio_form(torch.where(policy, own - torch.where(policy, old, zeros), zeros), policy)
    log_mismatch = torch.where(policy, old - behaviour, zeros).detach()
    weight = _exp(log_mismatch).clamp(max=loss.mismatch_cap)
    per_token = weight * surrogate(log_ratio, own, values, loss) * scale(batch, policy, budget)
    policy_loss = torch.where(policy, per_token, zeros).sum()

    # nan is absence of a record, never probability 1 by accident: the configured constant stands in for it
    log_mu = torch.where(torch.isnan(behaviour), math.log(loss.behaviour), behaviour)
    log_rho = torch.where(agent, own - torch.where(agent, log_mu, zeros), zeros)
    agent_loss = torch.where(agent, agent_surrogate(log_rho, own, values, loss), zeros).sum() / max(1, batch.agent_tokens)

    total = policy_loss + loss.agent_weight * agent_loss
    sums = {"dropped_tokens": (dropped & batch.mask).sum(), "policy_loss": policy_loss, "agent_loss": agent_loss}
    if reference is not None:
        gap = torch.where(policy, (reference - own).clamp(-CLAMP, CLAMP), zeros)
        kl = (gap.exp() - gap - 1).sum() / max(1, batch.policy_tokens)
        total = total + loss.kl_weight * kl
        sums["kl"] = kl
    with torch.no_grad():
        sums |= (
            {"loss": total}
            | _policy_sums(policy, log_ratio, log_mismatch, weight, entropy, values, loss)
            | _agent_sums(agent, log_rho, own, values, batch, loss)
        )
    return total, {name: value.detach() for name, value in sums.items()}


def _policy_sums(
    policy: Tensor, log_ratio: Tensor, log_mismatch: Tensor, weight: Tensor, entropy: Tensor, values: Tensor, loss: Loss
) -> Sums:
    """Mismatch is the learner before the update against the sampler, of the same tokens: raw ratio m = exp(old - behaviour).

    KL(behaviour || old) by two estimators over sampled tokens: k1 = -log m, unbiased, of either sign; k3 = m - 1 - log m, unbiased and
    never negative (J. Schulman, "Approximating KL divergence", 2020).
    """
    ratio, raw, log_raw = _exp(log_ratio)[policy], _exp(log_mismatch)[policy], log_mismatch[policy].clamp(-CLAMP, CLAMP)
    mismatch = (raw - 1).abs()
    value, weight = values[policy], weight[policy]
    above, below = ratio > 1 + loss.clip_high, ratio < 1 - loss.clip_low
    if loss.algorithm == "cispo":  # its clip takes effect on either side, whatever the sign
        clipped = (value != 0) & (above | below)
    else:
        clipped = ((value > 0) & above) | ((value < 0) & (below | ((ratio > loss.clip_dual) & (loss.clip_dual > 0))))
    top = torch.zeros(1, device=ratio.device)
    return {
        "policy_count": policy.sum(),
        "ratio_sum": ratio.sum(),
        "ratio_max": torch.cat([ratio, top]).max(),
        "clipped_sum": clipped.sum(),
        "entropy_sum": entropy[policy].sum(),
        "mismatch_sum": mismatch.sum(),
        "mismatch_max": torch.cat([mismatch, top]).max(),
        "mismatch_ratio_sum": raw.sum(),
        "mismatch_ratio_max": torch.cat([raw, top]).max(),
        "mismatch_kl_k1_sum": -log_raw.sum(),
        "mismatch_kl_sum": (raw - 1 - log_raw).sum(),
        "mismatch_capped_sum": (raw > loss.mismatch_cap).sum(),
        "weight_sum": weight.sum(),
        "weight_square_sum": weight.square().sum(),
    }


def _agent_sums(agent: Tensor, log_rho: Tensor, own: Tensor, values: Tensor, batch: Batch, loss: Loss) -> Sums:
    """Vectors over ``batch.authors``, of the raw ratio, whatever the coefficient in use."""
    rho, author = _exp(log_rho)[agent], batch.author[agent].long()

    def by_author(value: Tensor) -> Tensor:
        return torch.zeros(len(batch.authors), device=rho.device).index_add_(0, author, value.float())

    return {
        "agent_count": by_author(torch.ones_like(rho)),
        "agent_ratio_sum": by_author(rho),
        "agent_ratio_square_sum": by_author(rho.square()),
        "agent_ratio_max": torch.zeros(len(batch.authors), device=rho.device).scatter_reduce_(0, author, rho, "amax"),
        "agent_logprob_sum": by_author(own[agent]),
        **{f"agent_below_{bound:g}_sum": by_author(rho < bound) for bound in BELOW},
        "floor_sum": by_author((values[agent] > 0) & (rho < loss.floor)),
        "ceiling_sum": by_author(rho > loss.ceiling),
    }


def merge(total: Sums, part: Sums) -> Sums:
    return total | {
        name: value if name not in total else torch.maximum(total[name], value) if name.endswith("_max") else total[name] + value
        for name, value in part.items()
    }


def summarise(sums: Sums, authors: tuple[str, ...], updates: int) -> dict[str, float]:
    """Sums over all parts of a batch -> means, shares and maxima; losses per update; by author for agent tokens."""
    if not sums:
        return {}
    scalar = {name: float(value) for name, value in sums.items() if value.dim() == 0}
    vector = {name: value.tolist() for name, value in sums.items() if value.dim() == 1}
    result: dict[str, float] = {"dropped_tokens": scalar["dropped_tokens"]} | {
        name: scalar[name] / max(1, updates) for name in ("loss", "policy_loss", "agent_loss", "kl") if name in scalar
    }
    if n := scalar["policy_count"]:
        result |= {
            **{name: scalar[name] for name in ("ratio_max", "mismatch_max", "mismatch_ratio_max")},
            **{f"{name}_mean": scalar[f"{name}_sum"] / n for name in ("ratio", "mismatch", "mismatch_ratio")},
            **{name: scalar[f"{name}_sum"] / n for name in ("mismatch_kl", "mismatch_kl_k1", "mismatch_capped", "entropy")},
            "clip_fraction": scalar["clipped_sum"] / n,
            "policy_ess": scalar["weight_sum"] ** 2 / max(scalar["weight_square_sum"], TINY) / n,
        }
    for i, author in enumerate(authors):
        if vector["agent_count"][i]:
            result |= {f"{name}/{author}": value for name, value in _agent_metrics({k: v[i] for k, v in vector.items()}).items()}
    if sum(vector["agent_count"]):
        result |= _agent_metrics({name: max(value) if name.endswith("_max") else sum(value) for name, value in vector.items()})
    return result


def _agent_metrics(of: dict[str, float]) -> dict[str, float]:
    """``agent_ess``: effective sample size of the raw ratios as a share of the tokens; 1 where all are equal."""
    n = of["agent_count"]
    return {
        "agent_ratio_mean": of["agent_ratio_sum"] / n,
        "agent_ratio_max": of["agent_ratio_max"],
        "agent_ess": of["agent_ratio_sum"] ** 2 / max(of["agent_ratio_square_sum"], TINY) / n,
        "floor_hit": of["floor_sum"] / n,
        "ceiling_hit": of["ceiling_sum"] / n,
        "agent_logprob": of["agent_logprob_sum"] / n,
        **{f"agent_ratio_below/{bound:g}": of[f"agent_below_{bound:g}_sum"] / n for bound in BELOW},
    }
