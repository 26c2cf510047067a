import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_learner import group, random_groups, segment, trace

from aipo_graph.config import Loss
from aipo_graph.errors import TrainError
from aipo_graph.learn.batch import AGENT, POLICY, pack
from aipo_graph.types import Trace

DR = Loss(advantage="dr_grpo", baseline="group")
CREDIT = Loss(advantage="dr_grpo", baseline="group", agent="credit")


def test_columns_describe_their_token() -> None:
    helped = trace(
        segment("context", 1, 2, author="prompt"),
        segment("policy", 3, 4, logprobs=(-0.25, -0.5), version=7),
        segment("agent", 5, 6, author="verify", logprobs=(-2.0, -3.0)),
        segment("agent", 7, author="knowledge"),
        segment("policy", 8, logprobs=(-0.75,), version=6),
    )
    batch = pack([group(helped, trace(segment("context", 1), segment("policy", 9), reward=0.0))], DR)
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 9, 0, 0, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [8, 2]
    assert batch.mask.int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.source[0].tolist() == [0, 0, POLICY, POLICY, AGENT, AGENT, AGENT, POLICY]
    assert [batch.authors[i] for i in batch.author[0]] == ["prompt"] * 2 + ["policy"] * 2 + ["verify"] * 2 + ["knowledge", "policy"]
    assert batch.behaviour_logprobs[0, 2:6].tolist() == [-0.25, -0.5, -2.0, -3.0]
    assert batch.behaviour_logprobs.isnan().int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 1, 1]]
    assert batch.advantages.tolist() == [[0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], [0, -0.5, 0, 0, 0, 0, 0, 0]]
    assert batch.versions.tolist() == [6, 0]
    assert (batch.policy_tokens, batch.agent_tokens, batch.policy_rows) == (4, 3, 2)


def test_a_row_has_the_oldest_version_also_where_weights_changed_within_a_segment() -> None:
    crossed = trace(segment("context", 1), segment("policy", 2, 3, 4, version=4, updates=((1, 5), (2, 6))), segment("policy", 5, version=6))
    batch = pack([group(crossed, trace(segment("context", 1), segment("policy", 2, version=5), reward=0.0))], DR)
    assert batch.versions.tolist() == [4, 5]


def test_one_row_per_thread() -> None:
    planner = (segment("context", 1, thread="planner"), segment("policy", 2, thread="planner"))
    critic = (segment("context", 3, thread="critic"), segment("policy", 4, 5, thread="critic"))
    both = trace(planner[0], critic[0], planner[1], critic[1])
    batch = pack([group(both, trace(segment("context", 1), segment("policy", 2), reward=0.0))], DR)
    assert batch.token_ids.tolist() == [[1, 2, 0], [3, 4, 5], [1, 2, 0]]
    assert (batch.policy_rows, batch.policy_tokens) == (3, 4)


def test_masked_segments_are_context_and_a_first_token_is_never_trained() -> None:
    leaked = trace(segment("policy", 1, 2), segment("agent", 3, 4, masked=True), segment("policy", 5))
    batch = pack([group(leaked)], DR)
    assert batch.mask.int().tolist() == [[0, 1, 0, 0, 1]]
    assert (batch.policy_tokens, batch.agent_tokens) == (2, 0)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (trace(segment("context", 1), segment("policy", 2), reward=math.nan), "bad_reward"),
        (trace(segment("context", 1), segment("policy", 2), reward=math.inf), "bad_reward"),
        (trace(segment("context", 1), segment("policy", 2, logprobs=(math.nan,))), "bad_logprob"),
        (trace(segment("context", 1), segment("policy", 2, logprobs=(-math.inf,))), "bad_logprob"),
        (trace(segment("context", 1), segment("policy", 2, logprobs=(0.5,))), "bad_logprob"),
        (trace(segment("context", 1), segment("policy", 2), status="failed"), "untrained"),
        (trace(segment("context", 1), segment("policy", 2), status="timeout"), "untrained"),
    ],
)
def test_bad_traces_are_left_out_counted_and_change_nothing(bad, reason: str) -> None:
    good = [trace(segment("context", 1), segment("policy", 2, 3), reward=r) for r in (1.0, 0.0)]
    with_bad, without = pack([group(*good, bad)], DR), pack([group(*good)], DR)
    assert with_bad.counts == without.counts | {reason: 1, "traces": 3}
    assert torch.equal(with_bad.token_ids, without.token_ids)
    assert torch.equal(with_bad.advantages, without.advantages)
    assert with_bad.policy_tokens == without.policy_tokens


def test_bad_agent_logprobs_drop_single_tokens() -> None:
    helped = trace(
        segment("context", 1),
        segment("policy", 2),
        segment("agent", 3, 4, 5, 6, logprobs=(-1.0, math.nan, 0.5, -math.inf)),
        with_agents=True,
    )
    batch = pack([group(helped, trace(segment("context", 1), segment("policy", 2), reward=0.0))], DR)
    assert batch.mask[0].int().tolist() == [0, 1, 1, 0, 0, 0]
    assert (batch.agent_tokens, batch.counts["bad_agent_tokens"]) == (1, 3)


def asked(reply: str, reward: float, helped: bool = True) -> Trace:
    """One consult, answered by a helper or in the policy's own words."""
    words = f"<knowledge>B</knowledge><feedback>{reply}</feedback>"
    prompt, own = segment("context", 1), replace(segment("policy", 2, 3), text=words)
    if not helped:
        return trace(prompt, own, reward=reward)
    request, opening = replace(own, text="so <knowledge>B</knowledge>"), replace(segment("context", 4), text="<feedback>")
    closing = replace(segment("context", 7), text="</feedback>")
    answer = replace(segment("policy", 8), text="12")
    return trace(prompt, request, opening, replace(segment("agent", 5, 6), text=reply), closing, answer, reward=reward, with_agents=True)


def test_credit_is_by_reply_in_failed_traces_and_all_else_stays() -> None:
    mixed = group(asked("12+", 1), asked("12+", 0), asked("99-", 0), asked("34+", 0, helped=False))
    failed = group(asked("12+", 0), asked("12+", 0, helped=False))
    plain, batch = pack([mixed, failed], DR), pack([mixed, failed], CREDIT)
    # Asked by six traces, which earn 1/6 in the mean; the four that got 12+ earn 1/4: 4/5 of the difference.
    expected = plain.advantages.clone()
    expected[[1, 4], 4:6] = 4 / 5 * (1 / 4 - 1 / 6)
    assert plain.advantages[:, 4].tolist() == [0.75, -0.25, -0.25, 0, 0, 0]
    assert torch.allclose(batch.advantages, expected, atol=1e-7)
    assert torch.equal(batch.advantages == plain.advantages, expected == plain.advantages)
    assert (plain.counts["credited_tokens"], batch.counts["credited_tokens"]) == (0, 4)


def test_credit_compares_by_the_last_request_and_counts_a_trace_once() -> None:
    """Tags of another kind before the request are none; one that asked the same twice, and heard two things, earns once."""
    thought = [replace(s, text=s.text.replace("so ", "<b>so</b> ")) for s in asked("12+", 0).segments]
    groups = [group(asked("12+", 1), trace(*thought, reward=0, with_agents=True), asked("99-", 0))]
    assert pack(groups, CREDIT).advantages[1, 4].item() == pytest.approx(2 / 3 * (1 / 2 - 1 / 3))
    twice = (*asked("12+", 1).segments, *asked("99-", 1).segments[1:])
    groups = [group(trace(*twice, reward=1, with_agents=True), asked("12+", 0), asked("34+", 0))]
    assert pack(groups, CREDIT).advantages[1, 4].item() == pytest.approx(2 / 3 * (1 / 2 - 1 / 3))


def test_credit_where_nothing_can_be_compared_is_aipo() -> None:
    """Replies that all agree, a lucky one beside a worse one, other requests, consults that nobody asked for in tags."""
    other, unasked = (
        [replace(s, text=s.text.replace("<knowledge>B</knowledge>", text)) for s in asked("12+", 0).segments]
        for text in ("<knowledge>C</knowledge>", "well")
    )
    for groups in (
        [group(asked("12+", 1), asked("12+", 0))],
        [group(asked("12+", 1), asked("34+", 0))],
        [group(asked("12+", 1), trace(*other, reward=0, with_agents=True), trace(*unasked, reward=0, with_agents=True), asked("34+", 0))],
        random_groups(0),
    ):
        assert torch.equal(pack(groups, CREDIT).advantages, pack(groups, DR).advantages)


def test_the_tags_of_a_reply_are_learned_as_its_words_where_the_setting_says_so() -> None:
    """And kept out where the reply is; nothing else of the context is learned."""
    told, leaked = asked("12+", 1), asked("12+", 1)
    leaked = replace(leaked, segments=tuple(replace(s, masked=s.source == "agent") for s in leaked.segments))
    groups = [group(told, asked("12+", 0), leaked, asked("12+", 0, helped=False))]
    plain, batch = pack(groups, DR), pack(groups, DR.model_copy(update={"tags": True}))
    assert plain.mask.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 1]] * 2 + [[0, 1, 1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]] * 2 + plain.mask.int().tolist()[2:]
    assert batch.source[0].tolist() == [0, POLICY, POLICY, AGENT, AGENT, AGENT, AGENT, POLICY]
    assert batch.advantages[:2, 1:].tolist() == [[0.5] * 7, [-0.5] * 7]
    assert (plain.agent_tokens, batch.agent_tokens, batch.policy_tokens) == (4, 8, plain.policy_tokens)
    mixed = [group(asked("12+", 1), asked("12+", 0), asked("99-", 0))]
    credit = pack(mixed, CREDIT.model_copy(update={"tags": True})).advantages
    assert credit[1, 3:7].tolist() == [pack(mixed, CREDIT).advantages[1, 4].item()] * 4 > [0] * 4  # the tags have their reply's
    assert torch.equal(credit[2, 3:7], credit[2, :1].new_full((4,), -1 / 3))
    own = replace(told.segments[1], text="<feedback>")  # what the policy wrote stays its own
    bare = trace(told.segments[0], told.segments[1], told.segments[3], own, reward=1, with_agents=True)
    batch = pack([group(bare, asked("12+", 0, helped=False))], DR.model_copy(update={"tags": True}))
    assert batch.source[0].tolist() == [0, POLICY, POLICY, AGENT, AGENT, POLICY, POLICY]


def test_plan_covers_all_rows_once_within_the_budget_and_is_deterministic() -> None:
    batch = pack(random_groups(0, problems=5), Loss())
    parts = [batch.select(rows) for rows in batch.plan(60)]
    assert all(part.token_ids.numel() <= 60 and part.token_ids.shape[1] == int(part.lengths.max()) for part in parts)
    assert len(parts) > 3
    assert sum(int(part.mask.sum()) for part in parts) == int(batch.mask.sum())
    assert torch.equal(torch.cat(batch.plan(60)).sort().values, torch.arange(len(batch)))
    assert all(torch.equal(a, b) for a, b in zip(batch.plan(60), batch.plan(60), strict=True))
    assert all(part.policy_tokens == batch.policy_tokens and part.agent_tokens == batch.agent_tokens for part in parts)
    packed = batch.plan(60, packed=True)
    assert torch.equal(torch.cat(packed), torch.cat(batch.plan(60)))
    assert all(sum(batch.lengths[rows]) <= 60 < sum(batch.lengths[rows]) + batch.lengths[after[0]] for rows, after in pairwise(packed))
    assert [len(part) for part in batch.plan(1)] == [1] * len(batch)  # a row longer than the budget still trains


def test_minibatches_recount() -> None:
    batch = pack(random_groups(0), Loss())
    parts = list(batch.minibatches(3, seed=1))
    assert sum(part.policy_tokens for part in parts) == batch.policy_tokens
    assert all(part.policy_rows == len(part) for part in parts)


def test_nothing_to_pack() -> None:
    batch = pack([group(trace(segment("context", 1), status="failed"))], Loss())
    assert (len(batch), batch.policy_tokens, batch.token_ids.shape) == (0, 0, (0, 0))
    assert batch.plan(100) == []


def test_rows_without_a_gradient_are_known_for_each_loss() -> None:
    flat = trace(segment("context", 1), segment("policy", 2), segment("agent", 3), with_agents=True)
    batch = pack([group(flat, flat)], Loss())
    assert batch.trainable(Loss()).sum() == 0
    assert batch.trainable(Loss(kl_weight=0.1)).sum() == 2
    assert batch.trainable(Loss(agent="echo")).sum() == 2
    assert batch.trainable(Loss(agent="echo", agent_weight=0)).sum() == 0


def test_too_many_authors_is_one_clear_line() -> None:
    many = trace(*(segment("agent", 1, author=f"a{i}") for i in range(128)))
    with pytest.raises(TrainError, match="128 authors"):
        pack([group(many)], Loss())
