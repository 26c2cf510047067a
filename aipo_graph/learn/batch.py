"""Traces to tensors: one row per thread, padded right, with a source and an author on every token."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import dropwhile, pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from aipo_graph.config import Loss
from aipo_graph.errors import GraphError, TrainError
from aipo_graph.learn.advantage import advantages, estimate
from aipo_graph.types import Segment, Trace, TraceGroup, differ

SOURCES = {"context": 0, "policy": 1, "agent": 2}
CONTEXT, POLICY, AGENT = SOURCES.values()
ROUNDING = 1e-4
"""A sampler's float error: a logprob above 0 by no more than this is not a fault."""
ASKED = re.compile(r"<(\w+)>[^<]*</\1>")
TAGS = ("<feedback>", "</feedback>")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows for the learner. _B rows (one per thread of a trace), _T tokens; column t of every array describes token t.

    ``policy_tokens``, ``agent_tokens`` and ``policy_rows`` (rows with a trained policy token) are the loss normalisers. They are counted
    once, over the whole batch, and kept by ``select``: that makes one batch equal its micro-batches, on however many ranks.
    """

    token_ids: Tensor
    """i64 [B, T], zeros right of a row's length."""
    lengths: Tensor
    """i64 [B]"""
    mask: Tensor
    """bool [B, T]: trained tokens, policy's or agent's; never column 0, which nothing predicts."""
    source: Tensor
    """i8 [B, T]: a value of SOURCES."""
    author: Tensor
    """i8 [B, T]: index into ``authors``."""
    behaviour_logprobs: Tensor
    """f32 [B, T]: the sampler's, nan where it gave none."""
    advantages: Tensor
    """f32 [B, T]: on trained tokens the trace's advantage, or with `credit` the reply's; 0 elsewhere."""
    versions: Tensor
    """i32 [B]: the oldest weights that a policy token of the row was sampled under; -1 without one."""
    authors: tuple[str, ...]
    policy_tokens: int
    agent_tokens: int
    policy_rows: int
    counts: Mapping[str, int] = field(default_factory=dict)
    """Traces and tokens left out, by reason; agent tokens with an advantage of their own."""
    old_logprobs: Tensor | None = None
    """f32 [B, T]: the learner's before the update, where several updates are made of one batch."""

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> "Batch":
        """These rows (index or mask), cut to the longest of them; the counts stay those of the whole batch."""
        width = int(self.lengths[rows].max()) if len(self.lengths[rows]) else 0
        return self._map(lambda tensor: tensor[rows] if tensor.dim() == 1 else tensor[rows, :width])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed = {f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **changed)  # type: ignore[arg-type]

    def plan(self, max_tokens: int, *, packed: bool = False) -> list[Tensor]:
        """Row indices of micro-batches, whose gradients add up to the batch's: longest first, each of at most ``max_tokens`` tokens (or of
        one row), padded ones included unless it is ``packed``.
        """
        order = torch.argsort(self.lengths, descending=True, stable=True)
        result, start = [], 0
        while start < len(order):
            left = self.lengths[order[start:]]
            sizes = left.cumsum(0) if packed else left[0] * torch.arange(1, len(left) + 1)
            count = max(1, int((sizes <= max_tokens).sum()))
            result.append(order[start : start + count])
            start += count
        return result

    def minibatches(self, count: int, seed: int) -> Iterator["Batch"]:
        """Random parts for several optimizer steps, each with its own normalisers: an update is the mean over what it sees."""
        if count == 1:
            yield self
            return
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        for rows in order.tensor_split(count):
            part = self.select(rows)
            yield replace(part, **count_tokens(part.mask, part.source))

    def trainable(self, loss: Loss) -> Tensor:
        """bool [B, T]: tokens that can have a gradient. Rows without one need no forward pass; the normalisers still count them."""
        agent = self.source == AGENT
        echo = agent & (loss.agent == "echo")  # cross-entropy without an advantage
        moves = (self.advantages != 0) | echo | (~agent & (loss.kl_weight > 0))
        return self.mask & moves & ~(agent & (loss.agent == "mask" or loss.agent_weight == 0))


def count_tokens(mask: Tensor, source: Tensor) -> dict[str, Any]:
    policy = mask & (source == POLICY)
    return {
        "policy_tokens": int(policy.sum()),
        "agent_tokens": int((mask & (source == AGENT)).sum()),
        "policy_rows": int(policy.any(1).sum()),
    }


def _bad(logprob: float) -> bool:
    return not -1e30 < logprob <= ROUNDING  # nan fails both comparisons


def fault(trace: Trace) -> str | None:
    """Why a trace cannot be trained on, if so."""
    if not trace.trained:
        return "untrained"
    if not math.isfinite(trace.reward):
        return "bad_reward"
    bad = any(_bad(p) for s in trace.segments if s.source == "policy" for p in s.logprobs or ())
    return "bad_logprob" if bad else None


def _behaviour(segment: Segment) -> Sequence[float]:
    """Its logprobs: nan where absent, inf where an agent's is no logprob."""
    return [math.nan] * len(segment.token_ids) if segment.logprobs is None else [math.inf if _bad(p) else p for p in segment.logprobs]


def pack(groups: Sequence[TraceGroup], loss: Loss, oldest: int = -1) -> Batch:
    """One row per thread of each trace that can be trained on, with its advantage.

    Traces that failed, or that have a reward or a policy logprob that is not finite or a logprob above 0, are left out and counted in
    ``Batch.counts``; so are single agent tokens whose recorded logprob is bad. Masked segments stay as context.

    Raises GraphError for a policy token that was sampled under weights before version ``oldest``: `rollout.max_lag` is a promise.
    """
    counts = Counter(traces=0, untrained=0, bad_reward=0, bad_logprob=0, bad_agent_tokens=0, credited_tokens=0)
    rows: list[tuple[tuple[Segment, ...], float, float]] = []
    """Each with its trace's advantage and reward."""
    for group in groups:
        faults = [fault(trace) for trace in group.traces]
        values = advantages(
            [trace.reward for trace in group.traces],
            [trace.with_agents for trace in group.traces],
            [reason is None for reason in faults],
            estimator=loss.advantage,
            baseline=loss.baseline,
        )
        counts.update(reason for reason in faults if reason)
        counts["traces"] += len(faults)
        found = zip(group.traces, faults, values, strict=True)
        rows += [(row, value, trace.reward) for trace, reason, value in found if reason is None for row in trace.rows()]
    credits = _credits(rows, loss.advantage) if loss.agent == "credit" else {}
    batch = _tensors([(_tagged(row, credits), value, reward) for row, value, reward in rows] if loss.tags else rows, counts, credits)
    if stale := [version for version in batch.versions.tolist() if 0 <= version < oldest]:
        raise GraphError(f"a policy token of weights {min(stale)} in a batch that takes none before {oldest} (rollout.max_lag); report it")
    return batch


def _tagged(row: tuple[Segment, ...], credits: dict[int, float]) -> tuple[Segment, ...]:
    """A row in which the tags around a reply are words of it, masked where it is, and with its credit."""
    replies = {at + side: segment for at, segment in enumerate(row) if segment.source == "agent" for side in (-1, 1)}
    found = tuple(
        replace(s, source="agent", masked=replies[at].masked) if at in replies and s.source == "context" and s.text in TAGS else s
        for at, s in enumerate(row)
    )
    of = [(id(tag), id(replies[at])) for at, tag in enumerate(found) if tag is not row[at]]
    credits |= {tag: credits[reply] for tag, reply in of if reply in credits}
    return found


def _consults(row: Sequence[Segment]) -> list[tuple[str, str]]:
    """What was asked, ``<knowledge>B</knowledge>`` or without tags the words before, and the reply, a helper's or in the policy's words."""
    said = "".join(s.text for s in dropwhile(lambda s: s.source == "context", row)).split(TAGS[0])
    pairs = [(before.rpartition(TAGS[1])[2], after.partition(TAGS[1])[0]) for before, after in pairwise(said)]
    return [(([found[0] for found in ASKED.finditer(words)] or [words])[-1], reply) for words, reply in pairs]


def _credits(rows: Sequence[tuple[tuple[Segment, ...], float, float]], estimator: str) -> dict[int, float]:
    """The advantage of single replies, by the id of their segment: those in traces that earn less than the mean of all that asked the same,
    where the traces that got the reply earn more than it. Compared word for word, with the policy's own replies among them.

    The mean over n traces is one of few: it counts n / (n + 1).
    """
    consults = [_consults(row) for row, _, _ in rows]
    earned = defaultdict[str | tuple[str, str], list[float]](list)
    for asked, (_, _, reward) in zip(consults, rows, strict=True):
        compared: set[str | tuple[str, str]] = {*asked, *(request for request, _ in asked)}
        for each in compared:
            earned[each].append(reward)
    found = {}
    for asked, (row, _, reward) in zip(consults, rows, strict=True):
        for segment, consult in zip((s for s in row if s.source == "agent"), asked, strict=False):
            n, mean, peers = len(earned[consult]), fmean(earned[consult]), earned[consult[0]]
            if reward < fmean(peers) < mean and differ(peers):
                found[id(segment)] = n / (n + 1) * estimate(estimator, mean, peers)
    return found


def _tensors(rows: Sequence[tuple[tuple[Segment, ...], float, float]], counts: Counter[str], credits: Mapping[int, float]) -> Batch:
    authors = tuple(dict.fromkeys(segment.author for row, _, _ in rows for segment in row))
    if len(authors) > 127:
        raise TrainError(f"a batch has segments of {len(authors)} authors; the most is 127 graph nodes")
    index = {name: i for i, name in enumerate(authors)}

    def table(values: Callable[[Segment], Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        lines = [torch.tensor([value for segment in row for value in values(segment)], dtype=dtype) for row, _, _ in rows]
        return pad_sequence(lines, batch_first=True, padding_value=fill) if lines else torch.zeros(0, 0, dtype=dtype)

    source = table(lambda s: [SOURCES[s.source]] * len(s.token_ids), CONTEXT, torch.int8)
    mask = table(lambda s: [s.source != "context" and not s.masked] * len(s.token_ids), False, torch.bool)
    behaviour = table(_behaviour, math.nan, torch.float32)
    mask[:, :1] = False
    bad = torch.isinf(behaviour)
    counts["bad_agent_tokens"] = int((bad & mask).sum())
    mask &= ~bad
    behaviour[bad] = math.nan
    value = torch.tensor([advantage for _, advantage, _ in rows], dtype=torch.float32)[:, None]
    credit = table(lambda s: [credits.get(id(s), 0.0)] * len(s.token_ids), 0.0, torch.float32) if credits else torch.zeros(())
    credited = mask & (value <= 0) & (credit > 0)
    counts["credited_tokens"] = int(credited.sum())
    versions = [min((s.version for s in row if s.source == "policy"), default=-1) for row, _, _ in rows]
    return Batch(
        token_ids=table(lambda s: s.token_ids, 0, torch.int64),
        lengths=torch.tensor([sum(len(s.token_ids) for s in row) for row, _, _ in rows], dtype=torch.int64),
        mask=mask,
        source=source,
        author=table(lambda s: [index[s.author]] * len(s.token_ids), 0, torch.int8),
        behaviour_logprobs=behaviour,
        advantages=torch.where(credited, credit, torch.where(mask, value, 0.0)),
        versions=torch.tensor(versions, dtype=torch.int32),
        authors=authors,
        counts=dict(counts),
        **count_tokens(mask, source),
    )
