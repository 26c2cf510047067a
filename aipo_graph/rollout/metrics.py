"""What one step's traces say, as flat numbers for the log."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from aipo_graph.tasks.rewards import COUNTED
from aipo_graph.types import Trace, TraceGroup

ALARM = 0.1
"""Share of a step's traces that carry no gradient from which on a run warns."""


def rollout_metrics(
    groups: Sequence[TraceGroup],
    agents: Iterable[str],
    version: int,
    discarded: Sequence[TraceGroup] = (),
    too_long: Sequence[TraceGroup] = (),
) -> dict[str, float]:
    """Reward, solve rate, calls and tokens per agent, failures by reason, and lag, over one step's groups.

    Means are over trained traces; `failed` is the share of the others. `consults/<agent>` is per trace with agents. `lag` is the mean
    number of updates by which policy segments were sampled behind ``version``, `lag_max` the largest. Groups ``discarded`` for lack of
    signal count in `discarded` (their share of all that were sampled) and in the token counts alone, those of prompts ``too_long`` for
    the context in `prompts/too_long` (their number) and in the token counts. `rewrites`, per trace of a graph of messages: replies that
    could not go on from an earlier one's exact tokens; `calls/invalid`, of those too: tool calls that could not be read; `misfits`:
    replies that were not the call that the graph asked for.
    `score/<name>`: each other score of the reward functions.
    """
    everything = [trace for group in (*groups, *discarded, *too_long) for trace in group.traces]
    traces = [trace for group in groups for trace in group.traces]
    kept = [trace for trace in traces if trace.trained]
    alone = [trace for trace in kept if not trace.with_agents]
    helped = [trace for trace in kept if trace.with_agents]
    lags = [version - s.version for t in kept for s in t.segments if s.source == "policy"]
    metrics = {
        "reward": _mean(t.reward for t in kept),
        "reward/alone": _mean(t.reward for t in alone),
        "reward/with_agents": _mean(t.reward for t in helped),
        "solved": _mean(float(any(t.trained and t.reward > 0 for t in group.traces)) for group in groups),
        "violations": _mean(t.scores.get("violation", 0.0) for t in helped),
        "leaks": _mean(t.scores.get("leaks", 0.0) for t in helped),
        "failed": 1 - len(kept) / len(traces),
        "alarm": float(len(traces) - len(kept) >= ALARM * len(traces)),
        "length/alone": _mean(_tokens(t, "policy") for t in alone),
        "length/with_agents": _mean(_tokens(t, "policy") for t in helped),
        "tokens/policy": float(sum(_tokens(t, "policy") for t in everything)),
        "tokens/agent": float(sum(_tokens(t, "agent") for t in everything)),
        "lag": _mean(lags),
        "lag_max": float(max(lags, default=0)),
    }
    for name, score in (("rewrites", "rewrites"), ("calls/invalid", "invalid_calls"), ("misfits", "misfits")):
        if counts := [t.scores[score] for t in kept if score in t.scores]:
            metrics[name] = _mean(counts)
    for name in sorted({name for trace in kept for name in trace.scores} - {"reward", *COUNTED}):
        metrics[f"score/{name}"] = _mean(t.scores[name] for t in kept if name in t.scores)
    if discarded:
        metrics["discarded"] = len(discarded) / len((*groups, *discarded))
    if too_long:
        metrics["prompts/too_long"] = float(len(too_long))
    for agent in agents:
        metrics[f"consults/{agent}"] = _mean(sum(s.source == "agent" and s.author == agent for s in t.segments) for t in helped)
    for kind in sorted({group.problem.kind for group in groups if group.problem.kind}):
        metrics[f"reward/alone/{kind}"] = _mean(
            t.reward for g in groups if g.problem.kind == kind for t in g.traces if t.trained and not t.with_agents
        )
    for reason, count in Counter(_reason(t) for t in traces if t.status != "done").items():
        metrics[f"ended/{reason}"] = count / len(traces)
    return metrics


def exclusions(groups: Sequence[TraceGroup]) -> list[dict[str, Any]]:
    """Of each problem that lost traces: how many of how many, how many for which reason, and what the first of each said."""
    found = []
    for group in groups:
        if lost := [trace for trace in group.traces if not trace.trained]:
            reasons = dict(Counter(map(_reason, lost)))
            errors = {_reason(trace): (trace.error or "")[:300] for trace in reversed(lost)}
            found.append({"problem": group.problem.id, "lost": len(lost), "of": len(group.traces), "reasons": reasons, "errors": errors})
    return found


def _reason(trace: Trace) -> str:
    """How a trace ended, a failed one with the class of its error: `failed/AgentError`."""
    return f"failed/{(trace.error or '').partition(':')[0]}" if trace.status == "failed" else trace.status


def _tokens(trace: Trace, source: str) -> int:
    return sum(len(s.token_ids) for s in trace.segments if s.source == source)


def _mean(values: Iterable[float]) -> float:
    found = [value for value in values if math.isfinite(value)]
    return sum(found) / len(found) if found else float("nan")
