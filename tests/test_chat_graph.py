"""Graphs of chat messages: what the engine sampled is what is trained on, through tools, retries, branches and templates that rewrite."""

import asyncio
import operator
import random
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
import tool_manners
import torch
from langchain.agents import create_agent
from langchain.agents.middleware import before_model
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, RemoveMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.errors import GraphBubbleUp
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt
from pydantic import BaseModel
from rollout_world import CHAT, Exact, Scribe, save_tiny, settings
from test_messages import QWEN
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from tool_manners import TEMPLATES
from transformers import PreTrainedTokenizerFast

from aipo_graph.cli import parse
from aipo_graph.config import Config, Loss
from aipo_graph.engines.local import LocalEngine
from aipo_graph.errors import ConfigError, GraphError
from aipo_graph.learn.batch import pack
from aipo_graph.load import load
from aipo_graph.messages import ChatFormat
from aipo_graph.rollout import Graph, PolicyChatModel
from aipo_graph.rollout.agents import Prompts
from aipo_graph.rollout.collect import Rollouts, gather, open_graph
from aipo_graph.rollout.stream import rollout_metrics
from aipo_graph.rollout.tokens import Tokenizer
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Completion, Problem, Stop, Trace, TraceGroup

PRIVATE = "αβγδεζ"
"""Letters that only the policy writes."""
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "ηθ"}}\n</tool_call>'
THOUGHT = "<think>\nλ\n</think>\n\n"
WRITTEN = (*PRIVATE, CALL, "<|im_end|>")
PROBLEM = Problem("p", "6*7?", "42")
OFF = -1e4


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One token per character, and one each for a whole tool call and a whole thought, so that random weights call tools and think."""
    words = ["<pad>", "<|im_start|>", "<|im_end|>", CALL, THOUGHT, *(chr(i) for i in (10, *range(32, 127))), *PRIVATE]
    raw = RawTokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    raw.add_tokens([AddedToken(text, normalized=False) for text in (CALL, THOUGHT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>", chat_template=template, clean_up_tokenization_spaces=False
    )


class Watched:
    """The embedded engine, with what it was asked and what it said."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.asked: list[tuple[tuple[int, ...], Completion]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(
        self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        completion = await self._engine.generate(prompt_ids, seed=seed, max_tokens=max_tokens, stop=stop, temperature=temperature)
        self.asked.append((tuple(prompt_ids), completion))
        return completion


@tool
async def calculator(expression: str) -> str:
    """Works an expression out."""
    return "42"


def build(
    folder: Path, graph: Graph, template: str = QWEN, write: Sequence[str] = WRITTEN, context: int = 2000, **rollout: Any
) -> Rollouts:
    """Rollouts over one graph with the embedded engine: a random model that writes only ``write``."""
    raw = tokenizer(template)
    config = settings(rollout={"max_tokens": 40} | rollout, agents={"use": {}})
    engine = LocalEngine.load(config, save_tiny(folder, raw, context=context))
    head = engine.model.lm_head
    engine.model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        engine.model.lm_head.weight.copy_(head.weight)
        engine.model.lm_head.bias.fill_(OFF)
        engine.model.lm_head.bias[[raw.convert_tokens_to_ids(word) for word in write]] = 0
    return Rollouts(
        config, Watched(engine), Exact(), Tokenizer(raw, (), engine.eos_ids), graph, graph, {}, Prompts(), 1.0
    )  # fmt: skip


async def run(rollouts: Rollouts, seed: int = 1) -> Trace:
    return await rollouts.run_trace(PROBLEM, seed=seed, with_agents=True)


def asked(rollouts: Rollouts) -> list[tuple[tuple[int, ...], Completion]]:
    assert isinstance(rollouts.engine, Watched)
    return rollouts.engine.asked


def spoken(traces: Sequence[Trace]) -> list[tuple[tuple[int, ...], Completion]]:
    """Each policy segment of the traces with all that stands before it in its row."""
    found = []
    for trace in traces:
        for row in trace.rows():
            ids: tuple[int, ...] = ()
            for s in row:
                if s.source == "policy":
                    found.append((ids, Completion(s.token_ids, s.logprobs or (), "stop", s.version)))
                ids += s.token_ids
    return found


def essence(calls: Sequence[tuple[tuple[int, ...], Completion]]) -> list[tuple[Any, ...]]:
    return sorted((prompt, c.token_ids, c.logprobs, c.version) for prompt, c in calls)


def messages_graph(nodes: dict[str, Any], edges: Sequence[tuple[str, str]], retry: RetryPolicy | None = None) -> Graph:
    graph = StateGraph(MessagesState)
    for name, node in nodes.items():
        graph.add_node(name, node, retry_policy=retry)
    for edge in edges:
        graph.add_edge(*edge)
    return graph.compile()


async def say(state: MessagesState) -> dict[str, Any]:
    return {"messages": [await PolicyChatModel().ainvoke(state["messages"])]}


async def ask_again(state: MessagesState) -> dict[str, Any]:
    return {"messages": [HumanMessage("sure?")]}


def agent(**settings: Any) -> Graph:
    return create_agent(PolicyChatModel(), tools=[calculator], **settings)


async def test_an_agent_with_a_tool_is_one_row_of_exactly_the_sampled_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = build(tmp_path, agent(system_prompt="Use the calculator."), max_tokens=30)
    raw, encoded = rollouts.tokenizer.chat._tokenizer, []
    original = raw.encode
    monkeypatch.setattr(raw, "encode", lambda text, **kwargs: encoded.append(text) or original(text, **kwargs))
    traces = await gather([run(rollouts, seed) for seed in range(200)])
    assert essence(spoken(traces)) == essence(asked(rollouts))
    assert sum(len(c.token_ids) for _, c in asked(rollouts)) > 1000
    assert not any(letter in text for text in encoded for letter in (*PRIVATE, "η"))
    assert all(trace.threads == ("model",) and trace.scores["rewrites"] == 0 for trace in traces)
    turns = [sum(s.source == "policy" for s in trace.segments) for trace in traces]
    assert max(turns) > 2
    assert {trace.status for trace in traces} == {"done", "length"}
    longest = next(t for t, n in zip(traces, turns, strict=True) if n > 2 and t.segments[1].text.count(CALL) == 1)
    assert [(s.source, s.author) for s in longest.segments[:4]] == [
        ("context", "model"), ("policy", "model"), ("context", "calculator"), ("policy", "model"),
    ]  # fmt: skip
    assert longest.segments[2].text == (
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    assert longest.path[:3] == ("model", "tools", "model")
    batch = pack([TraceGroup(PROBLEM, tuple(traces))], Loss())
    assert (len(batch), batch.policy_tokens) == (200, sum(len(c.token_ids) for _, c in asked(rollouts)))


class Expression(BaseModel):
    """An expression."""

    expression: str


Expression.__name__ = "calculator"  # the call that the random policy knows


class Own(TypedDict):
    """The state of a graph that has no messages."""

    asked: str
    drafts: Annotated[list[str], operator.add]
    answer: str


async def draft(state: Own) -> dict[str, Any]:
    message = await PolicyChatModel(max_tokens=3).ainvoke([HumanMessage(state["asked"])])
    return {"drafts": [str(message.text)]}


async def vote(state: Own) -> dict[str, Any]:
    return {"answer": "\\boxed{42}" if sum(PRIVATE[0] in text for text in state["drafts"]) * 2 > len(state["drafts"]) else "none"}


def planner() -> Graph:
    async def plan(state: MessagesState) -> dict[str, Any]:
        found = await PolicyChatModel(max_tokens=4).with_structured_output(Expression).ainvoke(state["messages"])
        return {"messages": [HumanMessage(found.expression)]}

    return messages_graph({"plan": plan, "say": say}, [(START, "plan"), ("plan", "say")])


def router() -> Graph:
    async def route(state: MessagesState) -> Any:
        message = await PolicyChatModel(max_tokens=4).bind_tools([calculator], tool_choice="calculator").ainvoke(state["messages"])
        told = [ToolMessage("42", tool_call_id=call["id"]) for call in message.tool_calls]
        return Command(goto="short" if len(told) == 1 else "long", update={"messages": [message, *told]})

    async def short(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await PolicyChatModel(max_tokens=2).ainvoke(state["messages"])]}

    return messages_graph({"route": route, "short": short, "long": say}, [(START, "route")])


def supervisor() -> Graph:
    """Two workers, one after the other, in a sub-graph, as often as the supervisor names them."""

    def worker(name: str) -> Callable[[MessagesState], Awaitable[dict[str, Any]]]:
        async def work(state: MessagesState) -> dict[str, Any]:
            prompt = [SystemMessage(name), *state["messages"]]
            return {"messages": [await PolicyChatModel(max_tokens=4).ainvoke(prompt)]}

        return work

    team = messages_graph({"one": worker("one"), "two": worker("two")}, [(START, "one"), ("one", "two")])
    graph = StateGraph(MessagesState).add_node("supervisor", say).add_node("team", team).add_edge(START, "supervisor")
    graph.add_conditional_edges("supervisor", lambda state: "team" if PRIVATE[1] in state["messages"][-1].text else END, ["team", END])
    return graph.add_edge("team", "supervisor").compile()


def fan_out() -> Graph:
    graph = StateGraph(Own).add_node("spread", lambda state: {}).add_node("draft", draft).add_node("vote", vote).add_edge(START, "spread")
    graph.add_conditional_edges("spread", lambda state: [Send("draft", {"asked": f"{state['asked']} {i}"}) for i in range(3)], ["draft"])
    return graph.add_edge("draft", "vote").compile()


def own_state() -> Graph:
    graph = StateGraph(Own).add_node("first", draft).add_node("second", draft).add_node("vote", vote)
    return graph.add_edge(START, "first").add_edge("first", "second").add_edge("second", "vote").compile()


OWN = {"inputs": {"asked": "question"}, "output": "answer"}


@pytest.mark.parametrize(
    ("shape", "rollout", "rows"),
    [(planner, {}, {1, 2}), (router, {}, {1, 2}), (supervisor, {}, {1, 2, 3}), (fan_out, OWN, {3}), (own_state, OWN, {2})],
)
async def test_in_200_runs_of_common_shapes_the_traces_hold_what_the_engine_sampled(
    shape: Callable[[], Graph], rollout: dict[str, Any], rows: set[int], tmp_path: Path
) -> None:
    rollouts = build(tmp_path, shape(), **rollout)
    traces = await gather([run(rollouts, seed) for seed in range(200)])
    assert essence(spoken(traces)) == essence(asked(rollouts))
    assert {trace.status for trace in traces} <= {"done", "length"}
    assert all(trace.trained for trace in traces)
    batch = pack([TraceGroup(PROBLEM, tuple(traces))], Loss())
    assert batch.policy_tokens == sum(len(c.token_ids) for _, c in asked(rollouts))
    assert {len(trace.rows()) for trace in traces} == rows
    if rollout:
        votes = [[PRIVATE[0] in s.text for s in trace.segments if s.source == "policy"] for trace in traces]
        assert [trace.reward for trace in traces] == [float(2 * sum(found) > len(found)) for found in votes]
        assert {trace.reward for trace in traces} == {0.0, 1.0}
    else:
        assert len({trace.path for trace in traces}) > 1


async def test_a_run_repeats_bit_for_bit(tmp_path: Path) -> None:
    rollouts = build(tmp_path, agent())
    assert await gather([run(rollouts, s) for s in range(8)]) == await gather([run(rollouts, s) for s in range(8)])


def flaky(node: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """Fails two times of three, after it has sampled."""
    calls = []

    async def retried(state: MessagesState) -> Any:
        update = await node(state)
        calls.append(1)
        if len(calls) % 3:
            raise ConnectionError("after sampling")
        return update

    return retried


RETRY = RetryPolicy(max_attempts=3, initial_interval=0.001, jitter=False, retry_on=(ConnectionError,))


async def test_what_a_failed_attempt_sampled_is_no_part_of_the_trace(tmp_path: Path) -> None:
    inner = agent()

    async def sub_agent(state: MessagesState) -> Any:
        return {"messages": (await inner.ainvoke({"messages": state["messages"][:1]}))["messages"][-1:]}

    graph = messages_graph({"plain": flaky(say), "nested": flaky(sub_agent)}, [(START, "plain"), ("plain", "nested")], RETRY)
    rollouts = build(tmp_path, graph, max_tokens=400)
    for seed in range(10):
        asked(rollouts).clear()
        trace = await run(rollouts, seed)
        assert len(essence(spoken([trace]))) < len(asked(rollouts))
        assert set(essence(spoken([trace]))) <= set(essence(asked(rollouts)))
        assert [s.author for s in trace.segments if s.source == "policy"].count("plain") == 1
        assert trace.threads == ("plain", "nested/model")
        assert len(spoken([trace])) * 3 == len(asked(rollouts))  # each attempt sampled the same again


def parallel(delays: random.Random | None = None) -> Graph:
    """Three experts at once, one of them an agent, and three equal drafts; then a judge."""

    async def slowly(node: Callable[[Any], Awaitable[Any]], state: Any) -> Any:
        await asyncio.sleep(delays.random() / 50 if delays else 0)
        return await node(state)

    async def critic(state: MessagesState) -> Any:
        return await slowly(say, {"messages": [SystemMessage("Criticise."), *state["messages"]]})

    async def draft(state: MessagesState) -> Any:
        return await slowly(say, state)

    graph = StateGraph(MessagesState)
    graph.add_node("critic", critic)
    graph.add_node("draft", draft)
    graph.add_node("agent", agent())
    graph.add_node("judge", say)
    graph.add_edge(START, "critic")
    graph.add_edge(START, "agent")
    graph.add_conditional_edges(START, lambda state: [Send("draft", state)] * 3, ["draft"])
    graph.add_edge(["critic", "agent", "draft"], "judge")
    return graph.compile()


def shape(trace: Trace) -> list[tuple[Any, ...]]:
    """Everything but the logprobs, of which the last bit depends on who was in the batch."""
    return [(s.source, s.author, s.thread, s.token_ids, s.text) for s in trace.segments]


async def test_branches_are_rows_of_their_own_and_repeat_whoever_is_faster(tmp_path: Path) -> None:
    rollouts = build(tmp_path, parallel(random.Random(1)), max_tokens=200)
    first = await gather([run(rollouts, seed) for seed in range(20)])
    assert essence(spoken(first)) == essence(asked(rollouts))
    second = await gather([run(replace(rollouts, graph=parallel(random.Random(2))), seed) for seed in range(20)])
    assert [shape(trace) for trace in first] == [shape(trace) for trace in second]
    for trace in first:
        assert trace.threads == ("agent/model", "critic", "draft", "draft/2", "draft/3", "judge")
        assert trace.scores["rewrites"] == 1  # the judge reads what the agent said, without the agent's tools
    assert any(len({row[1].token_ids for row in trace.rows() if row[0].author == "draft"}) == 3 for trace in first)
    assert len(pack([TraceGroup(PROBLEM, tuple(first))], Loss())) == sum(len(trace.threads) for trace in first)


async def test_two_branches_of_one_conversation_go_on_from_the_same_tokens(tmp_path: Path) -> None:
    async def twice(state: MessagesState) -> Any:
        asks = ([*state["messages"], HumanMessage(text)] for text in ("left?", "right?"))
        return {"messages": await asyncio.gather(*(PolicyChatModel().ainvoke(messages) for messages in asks))}

    rollouts = build(tmp_path, messages_graph({"say": say, "twice": twice}, [(START, "say"), ("say", "twice")]))
    trace = await run(rollouts)
    assert (trace.threads, trace.scores["rewrites"]) == (("say", "twice"), 0)
    start = tuple(token for s in trace.rows()[0][:2] for token in s.token_ids)
    assert all(tuple(token for s in row for token in s.token_ids)[: len(start)] == start for row in trace.rows())
    assert essence(spoken([trace])) == essence(asked(rollouts))
    assert [s.source for s in trace.rows()[1]] == ["context", "policy"]  # the first reply is trained on once


async def test_a_template_that_rewrites_opens_a_counted_row(tmp_path: Path) -> None:
    graph = messages_graph({"a": say, "ask": ask_again, "b": say}, [(START, "a"), ("a", "ask"), ("ask", "b")])
    rollouts = build(tmp_path, graph, write=(*PRIVATE, THOUGHT, "<|im_end|>"), max_tokens=400)
    traces = await gather([run(rollouts, seed) for seed in range(40)])
    assert essence(spoken(traces)) == essence(asked(rollouts))
    thought = [trace for trace in traces if "λ" in trace.segments[1].text]
    assert 0 < len(thought) < len(traces)
    for trace in traces:
        rewritten = trace in thought
        assert (len(trace.rows()), trace.scores["rewrites"]) == ((2, 1) if rewritten else (1, 0))
        if rewritten:
            assert "λ" not in trace.rows()[1][0].text  # as the template has it
    metrics = rollout_metrics([TraceGroup(PROBLEM, tuple(traces))], (), 0)
    assert metrics["rewrites"] == len(thought) / len(traces)


async def test_a_template_that_never_shows_reasoning_is_seen_to_rewrite(tmp_path: Path) -> None:
    graph = messages_graph({"a": say, "ask": ask_again, "b": say}, [(START, "a"), ("a", "ask"), ("ask", "b")])
    silent = QWEN.replace("m.reasoning_content and", "false and")
    rollouts = build(tmp_path, graph, silent, write=(*PRIVATE, THOUGHT, "<|im_end|>"), max_tokens=400)
    traces = await gather([run(rollouts, seed) for seed in range(20)])
    assert [t.scores["rewrites"] for t in traces] == [float("λ" in t.segments[1].text) for t in traces]


def edited(messages: list[BaseMessage]) -> list[BaseMessage]:
    return [m.model_copy(update={"content": "β"}) if isinstance(m, AIMessage) else m for m in messages]


def trimmed(messages: list[BaseMessage]) -> list[BaseMessage]:
    return trim_messages(messages, max_tokens=3, token_counter=len, include_system=True, strategy="last")


@pytest.mark.parametrize("change", [edited, trimmed])
async def test_a_graph_that_edits_its_history_opens_a_counted_row(tmp_path: Path, change: Any) -> None:
    async def changing(state: MessagesState) -> Any:
        return {"messages": [await PolicyChatModel().ainvoke(change([SystemMessage("s"), *state["messages"]]))]}

    nodes = {"a": changing, "ask": ask_again, "b": changing}
    rollouts = build(tmp_path, messages_graph(nodes, [(START, "a"), ("a", "ask"), ("ask", "b")]))
    trace = await run(rollouts, 3)
    assert (len(trace.rows()), trace.scores["rewrites"]) == (2, 1)
    assert essence(spoken([trace])) == essence(asked(rollouts))


async def test_middleware_of_an_agent_may_summarise(tmp_path: Path) -> None:
    @before_model
    async def forget(state: Any, runtime: Any) -> dict[str, Any] | None:
        messages = state["messages"]
        return {"messages": [RemoveMessage(messages[1].id), RemoveMessage(messages[2].id)]} if len(messages) > 4 else None

    graph = agent(middleware=[forget], system_prompt="s")
    rollouts = build(tmp_path, graph, write=(CALL, "α", "<|im_end|>"), max_tokens=60)
    traces = await gather([run(rollouts, seed) for seed in range(10)])
    assert essence(spoken(traces)) == essence(asked(rollouts))
    assert max(trace.scores["rewrites"] for trace in traces) > 1


async def test_budget_and_context_end_a_loop_as_length(tmp_path: Path) -> None:
    loop = StateGraph(MessagesState)
    loop.add_node("say", say, retry_policy=RetryPolicy(retry_on=Exception))
    loop.add_edge(START, "say")
    loop.add_edge("say", "say")
    trace = await run(build(tmp_path / "a", loop.compile(), max_tokens=25))
    assert (trace.status, trace.trained) == ("length", True)
    assert sum(len(s.token_ids) for s in trace.segments if s.source == "policy") == 25

    async def stubborn(state: MessagesState) -> Any:
        try:
            return await say(state)
        except GraphBubbleUp:
            return {"messages": [AIMessage("anything")]}

    nodes = {str(index): stubborn for index in range(30)}
    refused = await run(
        build(tmp_path / "e", messages_graph(nodes, [(START, "0"), *zip(nodes, [*nodes][1:], strict=False)]), max_tokens=25)
    )
    assert refused.status == "length"

    once = messages_graph({"say": say}, [(START, "say")])
    cut = await run(build(tmp_path / "b", once, write="αβ", max_tokens=9))
    assert (cut.status, len(cut.segments[1].token_ids)) == ("length", 9)

    looping = messages_graph({"say": say, "ask": ask_again}, [(START, "say"), ("say", "ask"), ("ask", "say")])
    overflown = await run(build(tmp_path / "c", looping, context=200, max_tokens=1000))
    assert overflown.status == "length"
    assert (overflown.error or "").startswith("ContextError")
    steps = await run(build(tmp_path / "d", looping, max_tokens=1000, max_supersteps=4))
    assert steps.status == "budget"
    assert len(spoken([steps])) == 2


async def test_a_reply_cut_by_the_models_own_limit_is_closed_by_the_template(tmp_path: Path) -> None:
    async def short(state: MessagesState) -> Any:
        return {"messages": [await PolicyChatModel(max_tokens=3).ainvoke(state["messages"])]}

    graph = messages_graph({"a": short, "ask": ask_again, "b": short}, [(START, "a"), ("a", "ask"), ("ask", "b")])
    trace = await run(build(tmp_path, graph, write="αβ"))
    assert len(trace.rows()) == 1
    assert trace.segments[2].text == "<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    assert [len(s.token_ids) for s in trace.segments if s.source == "policy"] == [3, 3]


async def test_the_answer_is_what_the_last_message_says(tmp_path: Path) -> None:
    hidden, shown = "<think>\n\\boxed{42}\n</think>\n\nα", "<think>\nλ\n</think>\n\n\\boxed{42}"
    graph = messages_graph({"say": say}, [(START, "say")])
    for text, reward in ((hidden, 0.0), (shown, 1.0)):
        rollouts = build(tmp_path / text[8:9].encode().hex(), graph)
        raw = rollouts.tokenizer.chat._tokenizer
        ids = [*raw.encode(text, add_special_tokens=False), raw.eos_token_id]

        async def generate(prompt_ids: Sequence[int], ids: list[int] = ids, **_: Any) -> Completion:
            return Completion(tuple(ids), (-0.5,) * len(ids), "stop", 0)

        rollouts.engine.generate = generate
        assert (await run(rollouts)).reward == reward


def plain(state: MessagesState) -> dict[str, Any]:
    return {"messages": [PolicyChatModel().invoke(state["messages"])]}


async def streaming(state: MessagesState) -> dict[str, Any]:
    pieces = [piece async for piece in PolicyChatModel().astream(state["messages"])]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    return {"messages": [whole]}


TALK = {"plain": plain, "ask": ask_again, "streaming": streaming, "again": ask_again, "last": say}


async def test_plain_nodes_and_streamed_replies_go_on_as_any_other(tmp_path: Path) -> None:
    graph = messages_graph(TALK, [(START, "plain"), *zip(TALK, [*TALK][1:], strict=False)])
    rollouts = build(tmp_path, graph, max_tokens=300)
    traces = await gather([run(rollouts, seed) for seed in range(30)])
    assert essence(spoken(traces)) == essence(asked(rollouts))
    assert all((len(t.rows()), t.scores["rewrites"], len(spoken([t]))) == (1, 0, 3) for t in traces)
    assert any(CALL in t.segments[3].text for t in traces)  # a tool call, streamed


async def test_a_plain_node_that_outlives_its_run_samples_no_more(tmp_path: Path) -> None:
    ended, told, errors = threading.Event(), threading.Event(), []

    def late(state: MessagesState) -> Any:
        plain(state)
        ended.wait(30)
        try:
            plain(state)
        except GraphError as error:
            errors.append(str(error))
        told.set()

    rollouts = build(tmp_path, messages_graph({"late": late}, [(START, "late")]), timeout=0.3)
    assert (await run(rollouts)).status == "timeout"
    ended.set()
    assert await asyncio.to_thread(told.wait, 30)
    assert "after its run had ended" in errors[0]
    assert len(asked(rollouts)) == 1


async def test_messages_and_events_of_a_graph_can_be_streamed(tmp_path: Path) -> None:
    inner = messages_graph(TALK, [(START, "plain"), *zip(TALK, [*TALK][1:], strict=False)])
    heard: list[tuple[str, str]] = []
    events: set[str] = set()

    async def show(state: MessagesState) -> Any:
        async for message, metadata in inner.astream(state, stream_mode="messages"):
            heard.append((metadata["langgraph_node"], str(message.text)))
        async for event in agent().astream_events(state, version="v2"):
            events.add(event["event"])
        return {"messages": [AIMessage("shown")]}

    rollouts = build(tmp_path, messages_graph({"show": show}, [(START, "show")]), write=(*PRIVATE, "<|im_end|>"), max_tokens=300)
    traces = [await run(rollouts, seed) for seed in range(3)]
    assert essence(spoken(traces)) == essence(asked(rollouts))
    assert {node for node, text in heard if text} >= {"plain", "streaming", "last"}
    assert {"on_chat_model_start", "on_chat_model_stream", "on_chat_model_end"} <= events


REFUSED: dict[str, tuple[Callable[[MessagesState], Any], str]] = {
    "temperature": (lambda s: PolicyChatModel().bind(temperature=0).ainvoke("x"), "has no 'temperature': sampling is the run's"),
    "blocking": (lambda s: PolicyChatModel().invoke("x"), "would block the event loop: await ainvoke"),
}


@pytest.mark.parametrize("fault", REFUSED)
async def test_what_cannot_be_honoured_is_named(tmp_path: Path, fault: str) -> None:
    act, message = REFUSED[fault]

    async def node(state: MessagesState) -> Any:
        await act(state)

    with pytest.raises(GraphError, match=message):
        await run(build(tmp_path, messages_graph({"node": node}, [(START, "node")])))


MADE_UP = '<tool_call>\n{"name": "knowledge", "arguments": {"expression": "1"}}\n</tool_call>'


async def test_a_tool_that_the_policy_makes_up_is_no_author(tmp_path: Path) -> None:
    rollouts = build(tmp_path, agent(), max_tokens=400)
    raw = rollouts.tokenizer.chat._tokenizer
    replies = [[*raw.encode(text, add_special_tokens=False), raw.eos_token_id] for text in (MADE_UP, CALL, "\\boxed{42}")]

    async def generate(prompt_ids: Sequence[int], **_: Any) -> Completion:
        ids = replies.pop(0)
        return Completion(tuple(ids), (-0.5,) * len(ids), "stop", 0)

    rollouts.engine.generate = generate
    trace = await run(rollouts)
    assert [s.author for s in trace.segments if s.source == "context"] == ["model", "model", "calculator"]
    assert "knowledge is not a valid tool" in trace.segments[2].text


@pytest.mark.parametrize("manner", TEMPLATES)
async def test_tools_run_in_every_manner_of_calling(manner: str, tmp_path: Path) -> None:
    """Twice the same call, in two turns: each with an id of its own and its own result, on one row of what was sampled."""
    ran: list[tuple[int, str]] = []

    @tool
    async def save(count: int, text: str = "") -> str:
        """Saves."""
        ran.append((count, text))
        return f"saved {len(ran)}"

    raw = tool_manners.tokenizer(TEMPLATES[manner])
    chat = ChatFormat(raw)
    schema = [convert_to_openai_tool(save)]
    wanted = AIMessage("", tool_calls=[{"name": "save", "args": {"count": 6, "text": "a b"}, "id": "123456789", "type": "tool_call"}])
    asked: list[BaseMessage] = [HumanMessage("6*7?")]
    call = chat.render([*asked, wanted], schema, reply=False).removeprefix(chat.render(asked, schema)).rstrip("\n").removesuffix("<|e|>")
    engine = Scribe(raw, lambda prompt: "\\boxed{42}" if "saved 2" in prompt else call)
    if manner == "gpt-oss":  # its end of a call ends a reply
        engine.eos_ids |= {raw.convert_tokens_to_ids("<|call|>")}
    seen: list[BaseMessage] = []

    async def look(state: MessagesState) -> Any:
        seen.extend(state["messages"])

    graph = messages_graph({"agent": create_agent(PolicyChatModel(), tools=[save]), "look": look}, [(START, "agent"), ("agent", "look")])
    config = settings(rollout={"max_tokens": 4000}, agents={"use": {}})
    rollouts = Rollouts(config, engine, Exact(), Tokenizer(raw, (), engine.eos_ids), graph, graph, {}, Prompts(), 1.0)
    trace = await run(rollouts)
    assert (trace.status, trace.reward, trace.scores["invalid_calls"]) == ("done", 1.0, 0)
    assert ran == [(6, "a b")] * 2
    ids = [call["id"] for message in seen if isinstance(message, AIMessage) for call in message.tool_calls]
    assert [message.tool_call_id for message in seen if isinstance(message, ToolMessage)] == ids
    assert len(set(ids)) == 2
    assert len(spoken([trace])) == 3
    assert trace.scores["rewrites"] == 0
    assert len(trace.rows()) == 1


async def test_calls_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    rollouts = build(tmp_path, agent(), max_tokens=400)
    raw = rollouts.tokenizer.chat._tokenizer
    replies = [
        [*raw.encode(text, add_special_tokens=False), raw.eos_token_id] for text in (CALL, CALL.replace("}", "", 1) + CALL, "<tool_call>no")
    ]

    async def generate(prompt_ids: Sequence[int], **_: Any) -> Completion:
        ids = replies.pop(0)
        return Completion(tuple(ids), (-0.5,) * len(ids), "stop", 0)

    rollouts.engine.generate = generate
    trace = await run(rollouts)
    assert (trace.status, trace.scores["invalid_calls"]) == ("done", 2)
    assert rollout_metrics([TraceGroup(PROBLEM, (trace,))], (), 0)["calls/invalid"] == 2


async def test_a_template_without_calls_ends_the_run_when_tools_are_bound(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="writes no tool calls that can be read back"):
        await run(build(tmp_path, agent(), CHAT))


OWN = """
from dataclasses import dataclass

from langchain_core.messages import SystemMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.runtime import Runtime

from aipo_graph.rollout import PolicyChatModel


@dataclass
class Manner:
    words: str = "Be brief."


async def node(state: MessagesState, runtime: Runtime[Manner]):
    return {"messages": [await PolicyChatModel().ainvoke([SystemMessage(runtime.context.words), *state["messages"]])]}


graph = StateGraph(MessagesState, context_schema=Manner)
graph.add_node("node", node)
graph.add_edge(START, "node")
graph = graph.compile(checkpointer=InMemorySaver())
"""


async def test_a_graph_may_have_a_context_and_a_checkpointer_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    trace = await run(build(tmp_path, open_graph(f"{tmp_path}/own.py:graph")))
    assert (trace.status, trace.path) == ("done", ("node",))
    assert "Be brief." in trace.segments[0].text


async def test_a_tool_that_raises_fails_its_trace_alone(tmp_path: Path) -> None:
    """What the policy writes into a tool call must not end a run; what was sampled before stays to be read."""

    async def tool(state: MessagesState) -> Any:
        raise KeyError("no such city")

    async def both(state: MessagesState) -> Any:
        await say(state)
        await tool(state)

    for graph in (
        messages_graph({"say": say, "tool": tool}, [(START, "say"), ("say", "tool")]),
        messages_graph({"both": both}, [(START, "both")]),
    ):
        trace = await run(build(tmp_path, graph))
        assert (trace.status, trace.trained, trace.error) == ("failed", False, "KeyError: 'no such city'")
        assert [s.source for s in trace.segments] == ["context", "policy"]


async def test_a_graph_that_waits_for_a_person_ends_the_run(tmp_path: Path) -> None:
    async def approve(state: MessagesState) -> Any:
        return {"messages": [HumanMessage(interrupt("yes?"))]}

    graph = messages_graph({"say": say, "approve": approve}, [(START, "say"), ("say", "approve")])
    with pytest.raises(GraphError, match=r"interrupted, and nobody is there to resume it: leave out interrupt\(\)"):
        await run(build(tmp_path, graph))


async def test_outside_a_run_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="called outside a run: .* name its graph as rollout.graph"):
        await PolicyChatModel().ainvoke("x")
    with pytest.raises(GraphError, match="called outside a run"):
        await agent().ainvoke({"messages": [HumanMessage("x")]})
    rollouts = build(tmp_path, messages_graph({"say": say}, [(START, "say")]))
    rollouts.tokenizer.chat._tokenizer.chat_template = None
    del rollouts.tokenizer.__dict__["chat"]
    with pytest.raises(ConfigError, match="has no chat template"):
        await run(rollouts)


async def test_the_worked_example_runs_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_policy = load("examples/calculator/make_policy.py:main")
    module = sys.modules[make_policy.__module__]
    monkeypatch.setattr(module, "STEPS", 40)
    monkeypatch.setattr(module, "DIALOGS", 100)
    monkeypatch.setattr(sys, "argv", ["make_policy.py", "--out", str(tmp_path)])
    make_policy()
    config, _ = parse(["examples/calculator/config.yaml", "--policy.model", str(tmp_path)], Config, prog="test")
    engine = LocalEngine.load(config, config.policy.model)
    rollouts = Rollouts.open(config, engine, open_task(config))
    assert rollouts.tokenizer.decode(rollouts.tokenizer.chat.encode(TURNS)) == TURNS
    group = await rollouts.run_group(rollouts.task.train(0), 0)
    assert {trace.status for trace in group.traces} <= {"done", "length"}
    assert pack([group], config.loss).policy_tokens > 0
    alone = await rollouts.run_trace(rollouts.task.train(0), seed=0, with_agents=False)
    assert alone.path == ("model",)


TURNS = (
    '<|im_start|>assistant\n<tool_call>{"name": "calculator", "arguments": {"expression": "12*34"}}</tool_call><|im_end|>\n'
    "<|im_start|>tool\n408<|im_end|>\n<|im_start|>assistant\n\\boxed{408}<|im_end|>\n"
)
