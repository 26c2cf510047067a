"""What an update makes of each token: for people who look at traces."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from ..config import Loss
from ..types import Learned, Trace, TraceGroup
from .batch import AGENT, Batch, fault
from .loss import aipo_loss

Columns = tuple[list[float | None], ...]
"""Of one row, by token: logprobs, ratios, advantages, coefficients."""


def rows_of(groups: Sequence[TraceGroup]) -> int:
    """How many rows `pack` makes of these groups; they are a batch's first ones where the groups are."""
    return sum(len(trace.threads) for group in groups for trace in group.traces if fault(trace) is None)


def columns(logprobs: Tensor, batch: Batch, loss: Loss, budget: int) -> Iterator[Columns]:
    """One of each row of ``batch``, from the learner's ``logprobs``, f32 [B, T]. Coefficients are read off the loss's own gradient."""
    leaf = logprobs.detach().requires_grad_()
    with torch.enable_grad():
        aipo_loss(leaf, torch.zeros_like(leaf), batch, loss, budget=budget)[0].backward()
    assert leaf.grad is not None
    agent = batch.source == AGENT
    behaviour = torch.where(agent & batch.behaviour_logprobs.isnan(), math.log(loss.behaviour), batch.behaviour_logprobs)
    scale = torch.where(agent, batch.agent_tokens / loss.agent_weight if loss.agent_weight else 0.0, float(batch.policy_tokens))
    unit = torch.where(agent, 1.0, batch.advantages) if loss.agent == "echo" else batch.advantages
    values = (logprobs, (logprobs - behaviour).exp(), batch.advantages, 0.0 - leaf.grad * scale / unit)  # 0.0, and never -0.0
    shown = [torch.where(batch.mask & value.isfinite(), value, math.nan).tolist() for value in values]
    for row, length in enumerate(batch.lengths.tolist()):
        yield tuple([None if math.isnan(x) else float(f"{x:.4g}") for x in value[row][:length]] for value in shown)


def by_trace(groups: Sequence[TraceGroup], rows: Sequence[Columns]) -> list[tuple[Learned | None, ...]]:
    """The rows that `pack` made of the groups, put back into each trace's order of tokens; None for a trace that it left out."""
    rest = iter(rows)
    return [tuple(_learned(trace, rest) if fault(trace) is None else None for trace in group.traces) for group in groups]


def _learned(trace: Trace, rows: Iterator[Columns]) -> Learned:
    threads = {name: [iter(column) for column in columns] for name, columns in zip(trace.threads, rows, strict=False)}
    parts: tuple[list[float | None], ...] = ([], [], [], [])
    for segment in trace.segments:
        for part, column in zip(parts, threads[segment.thread], strict=True):
            part += islice(column, len(segment.token_ids))
    logprobs, ratios, advantages, coefficients = map(tuple, parts)
    return Learned(logprobs, ratios, advantages, coefficients)
