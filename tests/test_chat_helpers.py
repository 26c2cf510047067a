"""Helpers in graphs of messages: exactly their words are learned from, and alone the policy answers its own calls."""

import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tool_manners
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, Send
from pydantic import BaseModel
from rollout_world import Exact, Scribe, bpe, settings
from test_chat_graph import messages_graph, spoken
from test_messages import QWEN
from tool_manners import TEMPLATES

from aipo_graph.cli import parse
from aipo_graph.config import Config, Loss
from aipo_graph.engines.local import LocalEngine
from aipo_graph.errors import ConfigError, GraphError
from aipo_graph.learn.batch import AGENT, pack
from aipo_graph.load import load
from aipo_graph.messages import ChatFormat
from aipo_graph.rollout import Graph, PolicyChatModel
from aipo_graph.rollout.agents import Prompts
from aipo_graph.rollout.collect import Rollouts, gather
from aipo_graph.rollout.tokens import Tokenizer
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Completion, Problem, Reply, Trace, TraceGroup
from examples.operators import pretrain

PROBLEM = Problem("p", "6*7?", "42")
WORDS = 'Seven "sixes"\nare 42 – ünd\tso on.'
LLAMA = """{%- for m in messages %}<|s|>{% if m.role == 'tool' %}ipython
{{ m.content | tojson }}{% elif m.tool_calls %}assistant
{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}
{%- else %}{{ m.role }}
{{ m.content | trim }}{% endif %}<|e|>{% endfor %}{% if add_generation_prompt %}<|s|>assistant
{% endif %}"""
"""Llama 3.1's: results as JSON."""
GEMMA = """{%- for m in messages %}<|s|>{{ 'model' if m.role == 'assistant' else 'user' }}
{% if m.role == 'tool' %}<tool_response>{{ m.content | trim }}</tool_response>{% else %}{{ m.content | trim }}{% endif %}
{%- for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|e|>
{% endfor %}{% if add_generation_prompt %}<|s|>model
{% endif %}"""
FIVE = {"qwen": QWEN.replace("<|im_start|>", "<|s|>").replace("<|im_end|>", "<|e|>"), "llama": LLAMA, "gemma": GEMMA}
FIVE |= {name: TEMPLATES[name] for name in ("mistral args", "deepseek r1")}
CLOSINGS = {
    "qwen": "\n</tool_response>",
    "llama": '"',
    "gemma": "</tool_response>",
    "mistral args": "",
    "deepseek r1": "<｜tool▁output▁end｜>",
}
"""What each writes after a result."""
QWEN_LIKE = FIVE["qwen"]


@tool
async def ask_expert(question: str) -> str:
    """Asks an expert."""
    return WORDS


SCHEMA = [convert_to_openai_tool(ask_expert)]


def call(raw: Any, name: str = "ask_expert", schema: Sequence[Any] = SCHEMA, **args: Any) -> str:
    """A call as the template writes it."""
    chat, asked = ChatFormat(raw), [HumanMessage("6*7?")]
    made = AIMessage("", tool_calls=[{"name": name, "args": args or {"question": "how?"}, "id": "123456789", "type": "tool_call"}])
    return chat.render([*asked, made], schema, reply=False).removeprefix(chat.render(asked, schema)).rstrip("\n").removesuffix("<|e|>")


def build(raw: Any, graph: Graph, write: Callable[[str], str], helpers: Sequence[str] = ("ask_expert",), **agents: Any) -> Rollouts:
    config = settings(rollout={"max_tokens": 4000, "helpers": helpers}, agents={"use": {}} | agents)
    engine = Scribe(raw, write)
    return Rollouts(config, engine, Exact(), Tokenizer(raw, (), engine.eos_ids), graph, graph, {}, Prompts(), 1.0)


async def run(rollouts: Rollouts, seed: int = 1, with_agents: bool = True) -> Trace:
    return await rollouts.run_trace(PROBLEM, seed=seed, with_agents=with_agents)


def said(trace: Trace) -> list[tuple[str, str]]:
    return [(s.author, s.text) for s in trace.segments if s.source == "agent"]


def agent(**own: Any) -> Graph:
    return create_agent(PolicyChatModel(), tools=[ask_expert], **own)


@pytest.mark.parametrize("manner", FIVE)
@pytest.mark.parametrize("tokens", ["bytes", "pairs"])
async def test_exactly_the_words_of_a_tool_are_learned_from(manner: str, tokens: str) -> None:
    raw = tool_manners.tokenizer(FIVE[manner])
    if tokens == "pairs":
        raw = bpe()
        raw.add_special_tokens({"additional_special_tokens": list(tool_manners.CONTROLS)})
        raw.eos_token, raw.chat_template = "<|e|>", FIVE[manner]
    request = call(raw)
    rollouts = build(raw, agent(), lambda text: "\\boxed{42}" if "Seven" in text else request, leak="allow")
    trace = await run(rollouts)
    assert (trace.status, trace.reward, trace.threads) == ("done", 1.0, ("model",))
    [(author, text)] = said(trace)
    assert author == "ask_expert"
    whole = json.dumps(WORDS, ensure_ascii=False)[1:-1] if manner == "llama" else WORDS
    assert text in whole  # a token that reaches into the template is none of theirs
    assert len(text) >= len(whole) - 4
    assert (text == whole) or tokens == "pairs"
    # the row is what the template writes, token for token, and what stands before each reply is what it was sampled from
    row = [token for s in trace.segments for token in s.token_ids]
    assert raw.decode(row) == "".join(s.text for s in trace.segments)
    assert [completion.token_ids for _, completion in spoken([trace])] == rollouts.engine.sampled
    batch = pack([TraceGroup(PROBLEM, (trace, replace(trace, scores={"reward": 0.0})))], Loss())
    assert int((batch.source == AGENT).sum()) == 2 * sum(len(s.token_ids) for s in trace.segments if s.source == "agent")


@tool
async def calculator(question: str) -> str:
    """Works out what an expert would say, too."""
    return WORDS


async def test_another_tool_that_says_the_same_is_no_helper() -> None:
    raw, tools = tool_manners.tokenizer(QWEN_LIKE), [ask_expert, calculator]
    schema = [convert_to_openai_tool(each) for each in tools]
    requests = [call(raw, name, schema) for name in ("ask_expert", "calculator")]
    graph = create_agent(PolicyChatModel(), tools=tools)
    trace = await run(build(raw, graph, lambda text: [*requests, "\\boxed{42}"][text.count(WORDS)]))
    assert (trace.status, trace.reward, said(trace)) == ("done", 1.0, [("ask_expert", WORDS)])


def test_a_token_that_reaches_into_the_template_is_context() -> None:
    raw = bpe(chat=True)
    assert len(raw.encode(">.")) == 1
    pieces = ChatFormat(raw).pieces("<b>. So. <b>", [("expert", 3, 8)])
    assert [(text, whose) for _, text, whose in pieces] == [("<b>.", None), (" So.", "expert"), (" <b>", None)]
    assert [token for ids, _, _ in pieces for token in ids] == raw.encode("<b>. So. <b>")


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("manner", FIVE)
async def test_alone_the_policy_answers_its_own_call(manner: str, ended: bool) -> None:
    """Whether it ends the result as the template does, or by the end of its turn."""
    raw = tool_manners.tokenizer(FIVE[manner])
    request, ran = call(raw), []

    @tool
    async def ask_expert(question: str) -> str:
        """Asks an expert."""
        ran.append(question)
        return "by heart"

    def write(text: str) -> str:
        if text.count("by heart") == 2:
            return "\\boxed{42}"
        return request if text.count("how?") == text.count("by heart") else "by heart" + CLOSINGS[manner] * ended

    seen: list[BaseMessage] = []

    async def look(state: MessagesState) -> Any:
        seen.extend(state["messages"])

    inner = create_agent(PolicyChatModel(), tools=[ask_expert])
    again = create_agent(PolicyChatModel(), tools=[ask_expert])
    edges = [(START, "agent"), ("agent", "ask"), ("ask", "again"), ("again", "look")]

    async def ask(state: MessagesState) -> Any:
        return {"messages": [HumanMessage("sure?")]}

    rollouts = build(raw, messages_graph({"agent": inner, "ask": ask, "again": again, "look": look}, edges), write)
    trace = await run(rollouts, with_agents=False)
    assert (trace.status, trace.reward, trace.scores["rewrites"], ran) == ("done", 1.0, 0, [])
    assert [s.source for s in trace.segments] == ["context", "policy"] * 6
    assert [s.text.startswith("by heart") for s in trace.segments if s.source == "policy"] == [False, True, False, True, False, False]
    assert [message.type for message in seen] == ["human", "ai", "human", "ai"]  # the graph sees neither calls nor results
    helped = await run(rollouts)
    assert (ran, said(helped)) == (["how?", "how?"], [("ask_expert", "by heart")] * 2)
    if ended:  # then both rows are the same text
        assert "".join(s.text for s in trace.segments) == "".join(s.text for s in helped.segments)


async def test_alone_a_helpers_call_beside_another_is_invalid() -> None:
    ran: list[str] = []

    @tool
    async def save(text: str) -> str:
        """Saves."""
        ran.append(text)
        return "saved"

    raw = tool_manners.tokenizer(QWEN_LIKE)
    schema = [*SCHEMA, convert_to_openai_tool(save)]
    both = call(raw, schema=schema) + "\n" + call(raw, "save", schema, text="a")
    graph = create_agent(PolicyChatModel(), tools=[ask_expert, save])
    trace = await run(build(raw, graph, lambda text: "\\boxed{42}" if "saved" in text else both), with_agents=False)
    assert (trace.status, trace.scores["invalid_calls"], ran) == ("done", 1.0, ["a"])
    assert WORDS not in "".join(s.text for s in trace.segments)


async def test_words_are_learned_from_once_in_branches_and_rewritten_histories() -> None:
    """Two branches read the same expert, and a third conversation is told of it anew."""
    raw = tool_manners.tokenizer(QWEN_LIKE)

    async def expert(state: MessagesState) -> Any:
        return {"messages": [AIMessage("Six and six.", name="expert")]}

    async def branch(state: MessagesState) -> Any:
        return {"messages": [await PolicyChatModel().ainvoke(state["messages"][:2])]}

    async def anew(state: MessagesState) -> Any:
        return {"messages": [await PolicyChatModel().ainvoke([HumanMessage("Told:"), state["messages"][1]])]}

    graph = StateGraph(MessagesState)
    for name, node in {"expert": expert, "left": branch, "right": branch, "anew": anew}.items():
        graph.add_node(name, node)
    for edge in ((START, "expert"), ("expert", "left"), ("expert", "right"), (["left", "right"], "anew"), ("anew", END)):
        graph.add_edge(*edge)
    trace = await run(build(raw, graph.compile(), lambda text: "\\boxed{42}", ["expert"]))
    assert (trace.status, len(trace.rows())) == ("done", 3)
    assert said(trace) == [("expert", "Six and six.")]
    assert all("Six and six." in "".join(s.text for s in row) for row in trace.rows())


async def test_a_retried_tool_and_many_runs_at_once_keep_every_token() -> None:
    """200 runs with fan-outs: what the engine sampled is in the traces, and agent tokens are the contents'."""
    raw = tool_manners.tokenizer(QWEN_LIKE)
    request = call(raw)
    inner = create_agent(PolicyChatModel(), tools=[ask_expert])

    async def spread(state: MessagesState) -> Any:
        return {}

    graph = StateGraph(MessagesState)
    graph.add_node("spread", spread)
    graph.add_node("worker", inner)
    graph.add_edge(START, "spread")
    graph.add_conditional_edges(
        "spread", lambda state: [Send("worker", {"messages": [HumanMessage(f"part {n}")]}) for n in range(3)], ["worker"]
    )
    rollouts = build(raw, graph.compile(), lambda text: "\\boxed{42}" if "Seven" in text else request)
    traces = await gather([run(rollouts, seed) for seed in range(200)])
    assert {(trace.status, len(trace.rows()), *said(trace)) for trace in traces} == {("done", 3, *[("ask_expert", WORDS)] * 3)}
    assert sorted(c.token_ids for _, c in spoken(traces)) == sorted(rollouts.engine.sampled)


async def test_bound_leaks_errors_and_mu() -> None:
    raw = tool_manners.tokenizer(QWEN_LIKE)
    request = call(raw)
    short = await run(build(raw, agent(), lambda text: "\\boxed{42}" if "Seven" in text else request, max_reply_tokens=7))
    assert said(short) == [("ask_expert", 'Seven "')]  # the policy reads no more, either
    assert "sixes" not in "".join(s.text for s in short.segments)

    ids = raw.encode("Six and six.")
    for given, recorded in ((tuple(ids), True), (tuple(ids[:-1]), False)):
        told = Reply("Six and six.", given, tuple(-0.25 for _ in given))

        async def expert(state: MessagesState, told: Reply = told) -> Any:
            return {"messages": [AIMessage("Six and six.", response_metadata={"reply": told})]}

        async def say(state: MessagesState) -> Any:
            return {"messages": [await PolicyChatModel().ainvoke(state["messages"])]}

        graph = messages_graph({"expert": expert, "say": say}, [(START, "expert"), ("expert", "say")])
        trace = await run(build(raw, graph, lambda text: "\\boxed{42}", ["expert"]))
        [words] = [s for s in trace.segments if s.source == "agent"]
        assert (words.author, words.logprobs is not None) == ("expert", recorded)

    @tool
    async def ask_expert(question: str) -> str:
        """Asks an expert."""
        return "It is 42."

    leaky = await run(
        build(raw, create_agent(PolicyChatModel(), tools=[ask_expert]), lambda text: "\\boxed{1}" if "It is" in text else request)
    )
    assert (leaky.scores["leaks"], [s.masked for s in leaky.segments if s.source == "agent"]) == (1.0, [True])
    wrong = call(raw, query="how?")
    failed = await run(build(raw, agent(), lambda text: "\\boxed{42}" if "rror" in text else wrong))
    assert (failed.status, said(failed)) == ("done", [])  # what LangGraph answers to a bad call is not the expert's


async def test_a_template_that_changes_what_is_said_is_one_line() -> None:
    raw = tool_manners.tokenizer(QWEN_LIKE.replace("<tool_response>\n{{ m.content }}", "<tool_response>\n{{ m.content | upper }}"))
    assert "upper" in raw.chat_template
    request = call(raw)
    with pytest.raises(GraphError, match=r"does not write the words of ask_expert as they are.* leave these names out of rollout.helpers"):
        await run(build(raw, agent(), lambda text: "\\boxed{42}" if "SEVEN" in text else request))


class Verdict(BaseModel):
    """A verdict."""

    right: bool
    why: str


@pytest.mark.parametrize(
    ("args", "reward", "misfits"),
    [({"right": True, "why": "\\boxed{42}"}, 1.0, 0.0), ({"right": "perhaps", "why": "\\boxed{42}"}, 0.0, 1.0), (None, 0.0, 1.0)],
)
@pytest.mark.parametrize("form", ["response_format", "with_structured_output"])
async def test_structured_output_is_sampled_freely_and_read(form: str, args: Any, reward: float, misfits: float) -> None:
    raw = tool_manners.tokenizer(QWEN_LIKE)
    schema = [convert_to_openai_tool(Verdict)]
    text = call(raw, "Verdict", schema, **args) if args else "\\boxed{42}"
    read: list[Any] = []

    async def judge(state: MessagesState) -> Any:
        read.append(await PolicyChatModel().with_structured_output(Verdict).ainvoke(state["messages"]))

    graph = (
        create_agent(PolicyChatModel(), tools=[], response_format=Verdict)
        if form == "response_format"
        else messages_graph({"judge": judge}, [(START, "judge")])
    )
    trace = await run(build(raw, graph, lambda prompt: text, []))
    assert (trace.status, trace.reward, trace.scores["misfits"]) == ("done", reward, misfits)
    assert trace.trained
    assert [s.source for s in trace.segments] == ["context", "policy"]
    if reward:
        assert json.loads(trace.reply) == args
        assert form == "response_format" or read == [Verdict(**args)]


async def test_a_forced_call_routes_or_ends_the_trace() -> None:
    @tool
    async def go(to: str) -> str:
        """Goes on."""
        return to

    async def router(state: MessagesState) -> Any:
        message = await PolicyChatModel().bind_tools([go], tool_choice="go").ainvoke(state["messages"])
        return {"messages": [message, ToolMessage(message.tool_calls[0]["args"]["to"], tool_call_id=message.tool_calls[0]["id"])]}

    async def say(state: MessagesState) -> Any:
        return {"messages": [await PolicyChatModel().ainvoke(state["messages"])]}

    raw = tool_manners.tokenizer(QWEN_LIKE)
    route = call(raw, "go", [convert_to_openai_tool(go)], to="left")
    graph = messages_graph({"router": router, "say": say}, [(START, "router"), ("router", "say")])
    trace = await run(build(raw, graph, lambda text: "\\boxed{42}" if "left" in text else route, []))
    assert (trace.status, trace.reward, trace.path) == ("done", 1.0, ("router", "say"))
    missed = await run(build(raw, graph, lambda text: "\\boxed{42}", []))
    assert (missed.status, missed.reward, missed.scores["misfits"]) == ("done", 0.0, 1.0)


async def test_a_chat_model_left_in_by_mistake_is_named() -> None:
    async def say(state: MessagesState) -> Any:
        return {"messages": [await FakeListChatModel(responses=["42"]).ainvoke(state["messages"])]}

    trace = await run(build(tool_manners.tokenizer(QWEN_LIKE), messages_graph({"say": say}, [(START, "say")]), str))
    assert (trace.status, trace.error) == (
        "failed",
        "NoTokens: the graph ended without a word of the policy (its nodes asked FakeListChatModel); see its routes",
    )


@pytest.mark.parametrize("setting", ["temperature", "model"])
def test_a_setting_that_the_policy_does_not_have_is_refused(setting: str) -> None:
    with pytest.raises(GraphError, match=f"PolicyChatModel has no '{setting}'"):
        PolicyChatModel(**{setting: 0.5})


def test_helpers_of_a_consult_graph_are_named_elsewhere(root: Path) -> None:
    config = settings(rollout={"helpers": ["ask_expert"], "prompts": str(root / "prompts/operators")})
    engine = Scribe(pretrain.tokenizer(), str)
    with pytest.raises(
        ConfigError, match=r"rollout.helpers = ask_expert: graphs/aipo.py:build is no graph of messages; name them in agents.use"
    ):
        Rollouts.open(config, engine, Exact())


async def test_the_worked_example_learns_from_its_expert(root: Path, tmp_path: Path) -> None:
    """What carries loss in its pretraining is what a policy writes, results included; in a run they are the expert's, or its own."""
    made = sys.modules[load(f"{root}/examples/expert/make_policy.py:main").__module__]
    ids, labels = made.sample(random.Random(0))
    words = made.tokenizer()
    learned = words.decode([label for label in labels if label != pretrain.IGNORE])
    shown = words.decode([token for token, label in zip(ids, labels, strict=True) if label == pretrain.IGNORE])
    assert re.fullmatch(
        r"(<tool_call>.*?</tool_call><\|im_end\|>\n\d{3}\n</tool_response><\|im_end\|>\n){2}\\boxed\{\d{6}\}<\|im_end\|>\n",
        learned,
        re.DOTALL,
    )
    assert re.fullmatch(r"<\|im_start\|>user\n[A-L]{2}<\|im_end\|>\n(<\|im_start\|>(assistant\n|user\n<tool_response>\n)){5}", shown)
    made.fresh_policy(0).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    config, _ = parse([str(root / "examples/expert/config.yaml"), "--policy.model", str(tmp_path)], Config, prog="test")
    rollouts = Rollouts.open(config, LocalEngine.load(config, tmp_path), open_task(config))
    problem = rollouts.task.train(0)

    def write(text: str) -> str:
        asked = re.findall(r'letter": "(.)"', text)
        codes = re.findall(r"<tool_response>\n(\d{3})", text)
        if len(asked) > len(codes):
            return "123\n</tool_response>"
        left = problem.question[len(asked) :]
        return call(words, "ask_expert", made.TOOLS, letter=left[0]).replace("<|im_end|>", "") if left else f"\\boxed{{{''.join(codes)}}}"

    rollouts = replace(rollouts, engine=Scribe(words, write))
    helped, alone = [await rollouts.run_trace(problem, seed=0, with_agents=with_agents) for with_agents in (True, False)]
    assert (helped.reward, alone.reward) == (1.0, 0.0)
    assert "".join(text for _, text in said(helped)) == problem.answer
    assert (said(alone), alone.reply) == ([], "\\boxed{123123}")


async def test_a_result_that_is_cut_short_is_no_answer() -> None:
    raw = tool_manners.tokenizer(QWEN_LIKE)
    request = call(raw)
    rambling = build(raw, agent(), lambda text: request if "how?" not in text else "\\boxed{42} " * 50, max_reply_tokens=64)
    rambling.engine.generate = cut_at(rambling.engine)
    trace = await run(rambling, with_agents=False)
    assert (trace.status, trace.reply, trace.reward, "\\boxed{42}" in trace.segments[-1].text) == ("length", "", 0.0, True)
    assert len(trace.segments[-1].token_ids) == 64  # as long as a helper's may be


def cut_at(engine: Scribe) -> Any:
    """The scribe's generate, which says when a limit cut it short."""
    generate = engine.generate

    async def cut(prompt_ids: Sequence[int], **settings: Any) -> Completion:
        completion = await generate(prompt_ids, **settings)
        return replace(completion, stop="length" if len(completion.token_ids) == settings["max_tokens"] else "stop")

    return cut


async def test_alone_own_results_in_a_history_told_anew_are_nobodys_words() -> None:
    """The second conversation starts with another message, so that the first one's row cannot go on."""
    raw = tool_manners.tokenizer(QWEN_LIKE)
    request = call(raw)
    inner = create_agent(PolicyChatModel(), tools=[ask_expert])

    async def anew(state: MessagesState) -> Any:
        return {"messages": [await PolicyChatModel().ainvoke([HumanMessage("Again:"), *state["messages"]])]}

    graph = messages_graph({"agent": inner, "anew": anew}, [(START, "agent"), ("agent", "anew")])

    def write(text: str) -> str:
        if "how?" not in text:
            return request
        return "\\boxed{42}" if "by heart" in text else "by heart\n</tool_response>"

    trace = await run(build(raw, graph, write), with_agents=False)
    assert (trace.status, len(trace.rows()), said(trace)) == ("done", 2, [])
    assert "by heart" in trace.rows()[1][0].text


@pytest.mark.parametrize("thought", ["<think>hm</think>\n\n", "hm </think> "])
async def test_alone_reasoning_before_a_call_stays_as_it_was_sampled(thought: str) -> None:
    raw = tool_manners.tokenizer(QWEN_LIKE.replace("m.reasoning_content and loop", "false and loop"))
    request = thought + call(raw)

    def write(text: str) -> str:
        if "how?" not in text:
            return request
        return "\\boxed{42}" if "by heart" in text else "by heart\n</tool_response>"

    trace = await run(build(raw, agent(), write), with_agents=False)
    assert (trace.status, trace.reward, trace.threads) == ("done", 1.0, ("model",))
    assert thought in trace.segments[1].text


async def test_a_sub_graph_as_helper_says_what_is_new_and_no_more_than_it_may() -> None:
    raw = tool_manners.tokenizer(QWEN_LIKE)

    async def blank(state: MessagesState) -> Any:
        return {"messages": [AIMessage("")]}

    async def expert(state: MessagesState) -> Any:
        return {"messages": [AIMessage("Six and six, " * 20)]}

    async def say(state: MessagesState) -> Any:
        return {"messages": [await PolicyChatModel().ainvoke(state["messages"])]}

    inner = messages_graph({"blank": blank, "expert": expert}, [(START, "blank"), ("blank", "expert")])
    graph = messages_graph({"experts": inner, "say": say}, [(START, "experts"), ("experts", "say")])
    trace = await run(build(raw, graph, lambda text: "\\boxed{42}", ["experts"], max_reply_tokens=12))
    assert (trace.status, said(trace)) == ("done", [("experts", "Six and six,")])
    assert PROBLEM.question in trace.segments[0].text


async def test_a_helper_that_hands_over_to_its_parents_graph_is_learned_from() -> None:
    async def expert(state: MessagesState) -> Any:
        return Command(graph=Command.PARENT, goto="say", update={"messages": [AIMessage("Six sevens.")]})

    async def say(state: MessagesState) -> Any:
        return {"messages": [await PolicyChatModel().ainvoke(state["messages"])]}

    inner = messages_graph({"expert": expert}, [(START, "expert")])
    graph = messages_graph({"experts": inner, "say": say}, [(START, "experts")])
    trace = await run(build(tool_manners.tokenizer(QWEN_LIKE), graph, lambda text: "\\boxed{42}", ["experts"]))
    assert (trace.status, said(trace)) == ("done", [("experts", "Six sevens.")])


async def test_a_helper_that_rewrites_anothers_result_is_learned_from() -> None:
    async def consult(state: MessagesState) -> Any:
        call = {"name": "look_up", "args": {"question": "how?"}, "id": "123456789", "type": "tool_call"}
        return {"messages": [AIMessage("", tool_calls=[call]), ToolMessage("Six sevens are 42, I think.", tool_call_id=call["id"], id="r")]}

    async def condense(state: MessagesState) -> Any:
        return {"messages": [ToolMessage("six sevens: 42", tool_call_id="123456789", id="r")]}

    async def say(state: MessagesState) -> Any:
        return {"messages": [await PolicyChatModel().ainvoke(state["messages"])]}

    order = [(START, "consult"), ("consult", "condense"), ("condense", "say")]
    graph = messages_graph({"consult": consult, "condense": condense, "say": say}, order)
    trace = await run(build(tool_manners.tokenizer(QWEN_LIKE), graph, lambda text: "\\boxed{42}", ["condense"]))
    assert (trace.status, said(trace)) == ("done", [("condense", "six sevens: 42")])


async def test_a_forced_call_of_a_helper_fits_alone_too() -> None:
    raw = tool_manners.tokenizer(QWEN_LIKE)
    request = call(raw)

    async def ask(state: MessagesState) -> Any:
        message = await PolicyChatModel().bind_tools([ask_expert], tool_choice="ask_expert").ainvoke(state["messages"])
        results = [ToolMessage(WORDS, name="ask_expert", tool_call_id=made["id"]) for made in message.tool_calls]
        return {"messages": [message, *results]}

    async def say(state: MessagesState) -> Any:
        last = state["messages"][-1]
        return {"messages": [last if last.type == "ai" else await PolicyChatModel().ainvoke(state["messages"])]}

    def write(text: str) -> str:
        if "how?" not in text:
            return request
        return "\\boxed{42}" if "by heart" in text or "Seven" in text else "by heart\n</tool_response>"

    graph = messages_graph({"ask": ask, "say": say}, [(START, "ask"), ("ask", "say")])
    for with_agents in (True, False):
        trace = await run(build(raw, graph, write), with_agents=with_agents)
        assert (trace.status, trace.reward, trace.scores["misfits"], len(said(trace))) == ("done", 1.0, 0.0, int(with_agents))
