"""What a run's traces say was learned from each token."""

import math
from pathlib import Path

import pytest
from tiny_learner import group, random_groups, same, segment, snapshot, tiny_learner, trace

from aipo_graph.config import Config, Loss
from aipo_graph.learn.batch import pack
from aipo_graph.types import Learned, Segment, TraceGroup

HELP = segment("agent", 7, 8, 9, author="knowledge", logprobs=(-3.0, -0.01, -9.0))


def written(*more: Segment) -> tuple[Segment, ...]:
    return (segment("context", 1, 2), segment("policy", 3, 4), *more, segment("policy", 5, 6))


def two_traces() -> TraceGroup:
    return group(trace(*written(HELP), reward=1.0, with_agents=True), trace(*written(HELP), reward=0.0, with_agents=True))


def learned(folder: Path, groups: list[TraceGroup], **loss: object) -> list[tuple[Learned | None, ...]]:
    learner = tiny_learner(folder, loss=loss)
    return learner.learned(pack(groups, Loss.model_validate(loss)), groups)


def test_the_coefficient_of_agent_tokens_is_the_clipped_ratio(tmp_path: Path) -> None:
    [[good, bad]] = learned(tmp_path, [two_traces()], algorithm="dapo", agent="aipo", floor=0.3, ceiling=1.0, negative=1)
    assert good is not None
    assert bad is not None
    agent, policy, context = slice(4, 7), (2, 3, 7, 8), (0, 1)
    expected = [math.exp(p - mu) for p, mu in zip(good.logprobs[agent], HELP.logprobs, strict=True)]
    assert good.ratios[agent] == pytest.approx(expected, rel=1e-2)
    assert good.coefficients[agent] == pytest.approx([min(max(r, 0.3), 1.0) for r in expected], rel=1e-2)
    assert bad.coefficients[agent] == pytest.approx([min(r, 1.0) for r in expected], rel=1e-2)  # no floor where A < 0
    assert min(expected) < 0.3 < 1.0 < max(expected)
    assert good.advantages[2] > 0 > bad.advantages[2]
    assert all(column[i] is None for column in (good.logprobs, good.ratios, good.advantages, good.coefficients) for i in context)
    assert [good.coefficients[i] for i in policy] == pytest.approx([min(good.ratios[i], 2.0) for i in policy], rel=1e-2)


@pytest.mark.parametrize(("agent", "weights"), [("mask", (0.0, 0.0)), ("gated", (1.0, 0.0)), ("sft", (1.0, 1.0))])
def test_every_coefficient_is_read_off_its_own_loss(tmp_path: Path, agent: str, weights: tuple[float, float]) -> None:
    [pair] = learned(tmp_path, [two_traces()], agent=agent, agent_weight=0.5)
    for found, weight in zip(pair, weights, strict=True):
        assert found is not None
        assert found.coefficients[4:7] == pytest.approx([weight] * 3)
        assert "-0.0" not in map(str, found.coefficients)


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "dr_grpo", "rloo", "cispo"])
def test_policy_tokens_weigh_as_their_surrogate_says_and_the_kl_term_is_left_out(tmp_path: Path, algorithm: str) -> None:
    short, longer = written(), written(segment("policy", 9, 10, 11, 12))
    pair = group(trace(*short, reward=1.0), trace(*longer, reward=0.0))
    [found] = learned(tmp_path, [pair], algorithm=algorithm, kl_weight=0.1)
    budget = Config().rollout.max_tokens
    share = {"grpo": lambda n: 12 / (2 * n), "gspo": lambda n: 12 / (2 * n), "dr_grpo": lambda n: 12 / (2 * budget)}
    for one, tokens in zip(found, (4, 8), strict=True):
        assert one is not None
        expected = [min(ratio, 2.0) * share.get(algorithm, lambda n: 1.0)(tokens) for ratio in one.ratios[2:]]
        assert one.coefficients[2:] == pytest.approx(expected, rel=1e-2)


def test_echo_has_no_advantage_and_no_groups_cost_nothing(tmp_path: Path) -> None:
    equal = group(trace(*written(HELP), with_agents=True), trace(*written(HELP), with_agents=True))
    [[one, _]] = learned(tmp_path, [equal], agent="echo", agent_weight=0.1)
    assert one is not None
    assert one.coefficients[4:7] == pytest.approx([1.0] * 3)
    assert one.coefficients[2] is None
    assert tiny_learner(tmp_path).learned(pack([equal], Loss()), []) == []


def test_a_trace_left_out_has_none_and_an_equal_group_no_coefficient(tmp_path: Path) -> None:
    failed = trace(*written(), status="failed")
    equal = group(trace(*written()), failed, trace(*written()))
    [[one, none, two], [other, _]] = learned(tmp_path, [equal, two_traces()])
    assert none is None
    assert one == two
    assert one is not None
    assert other is not None
    assert (one.advantages[2], one.coefficients[2]) == (0.0, None)
    assert other.advantages[2] != 0


def test_a_trace_in_which_nothing_was_written_has_no_tokens(tmp_path: Path) -> None:
    silent = trace(reward=0.0)
    [[one, nothing, other]] = learned(tmp_path, [group(trace(*written()), silent, trace(*written(), reward=0.0))])
    assert nothing == Learned((), (), (), ())
    assert one is not None
    assert other is not None
    assert one.logprobs == other.logprobs


def test_threads_are_put_back_between_each_other(tmp_path: Path) -> None:
    main, side = written(HELP), tuple(segment(s.source, *s.token_ids, logprobs=s.logprobs, thread="side") for s in written())
    mixed = trace(main[0], side[0], main[1], side[1], main[2], side[2], main[3], with_agents=True)
    [[found, _, *_]] = learned(tmp_path, [group(mixed, trace(*written(HELP), reward=0.0, with_agents=True))])
    [[plain, _]] = learned(tmp_path, [two_traces()])
    assert found is not None
    assert plain is not None
    of_main = [*range(2), *range(4, 6), *range(8, 11), *range(13, 15)]
    assert [found.logprobs[i] for i in of_main] == pytest.approx(list(plain.logprobs), nan_ok=True)


def test_it_leaves_the_learner_as_it_was(tmp_path: Path) -> None:
    learner, groups = tiny_learner(tmp_path, train={"micro_batch_tokens": 48}, rollout={"max_tokens": 16}), random_groups(3)
    before = snapshot(learner)
    found = learner.learned(pack(groups, Loss()), groups[:2])
    assert same(before, snapshot(learner))
    assert [len(traces) for traces in found] == [4, 4]
    lengths = [sum(len(s.token_ids) for s in t.segments) for g in groups[:2] for t in g.traces]
    assert [len(one.ratios) for traces in found for one in traces if one] == lengths
