"""Agents that are language models: which tokens are recorded, how models are opened, and what a reply may say."""

import asyncio
import contextlib
import gzip
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_world
from aiohttp import web
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage, SystemMessage, convert_to_messages
from langchain_openai import ChatOpenAI
from rollout_world import Exact, Scribe, bpe, save_tiny, settings
from test_messages import QWEN
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_world import OPERATORS, ROOT, base, exact, gap, proxy, served

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.engines import open_engine
from aipo_graph.engines.chat import LONGEST_ANSWER, EngineChatModel, describe, open_chats
from aipo_graph.engines.facts import Facts
from aipo_graph.engines.local import LocalEngine
from aipo_graph.engines.server import Client, Unanswered
from aipo_graph.errors import AgentError, ConfigError
from aipo_graph.load import find
from aipo_graph.messages import ChatFormat
from aipo_graph.rollout import Agent
from aipo_graph.rollout.agents import Prompts
from aipo_graph.rollout.collect import Rollouts, open_agents
from aipo_graph.rollout.tokens import Tokenizer
from aipo_graph.tasks.grading import leaks
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Completion, Request, Trace

MESSAGES = [SystemMessage("Check."), HumanMessage("1+1=2")]


def scribed(text: str, chat: bool = True) -> EngineChatModel:
    """A chat model that writes ``text``, token by token, with logprobs that tell the tokens apart."""
    tokenizer = bpe(chat=chat)
    engine = Scribe(tokenizer, lambda prompt: text)

    async def sample(prompt_ids: Sequence[int], **given: Any) -> Completion:
        done = await engine.generate(prompt_ids, **given)
        return Completion(done.token_ids, tuple(-1.0 - i for i in range(len(done.token_ids))), done.stop, 0)

    return EngineChatModel(
        sample=sample, tokenizer=tokenizer, eos_ids=engine.eos_ids, chat_format=ChatFormat(tokenizer) if chat else None, max_tokens=200
    )


@pytest.mark.parametrize(
    ("text", "reply", "cut"),
    [
        ("Correct.", "Correct.", 0),
        ("\nCorrect.\n\n", "Correct.", 1),
        ("<think>hm</think>\n\nCorrect.", "Correct.", 16),
        ("<think>Correct.</think>Correct.", "Correct.", 13),
        ("é✓ is it", "é✓ is it", 0),
        (" problem.", "problem.", None),  # the blank is part of the first token
        ("<think>hm</think> problem.", "problem.", None),
        ("so<|im_start|>user", "souser", None),
        ("", "", None),
        ("<think>hm", "", None),
    ],
)
async def test_ids_are_recorded_for_exactly_the_reply(text: str, reply: str, cut: int | None) -> None:
    model = scribed(text)
    answer = await model.ainvoke(MESSAGES)
    recorded = answer.response_metadata["reply"]
    assert (answer.content, recorded.text) == (reply, reply)
    if cut is None:
        assert recorded.token_ids is recorded.logprobs is None
        return
    assert tuple(model.tokenizer.encode(reply, add_special_tokens=False)) == recorded.token_ids
    assert recorded.logprobs == tuple(-1.0 - i for i in range(cut, cut + len(recorded.token_ids)))
    words = Tokenizer(model.tokenizer, ["verify"]).wrap(recorded, "verify", limit=2)[1]
    assert (words.token_ids, words.logprobs) == (recorded.token_ids[:2], recorded.logprobs[:2])


async def test_what_a_reply_tells_beside_its_text() -> None:
    answer = await scribed("<think>hm</think>Correct.").ainvoke(MESSAGES)
    assert answer.additional_kwargs["reasoning_content"] == "hm"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 17
    assert answer.response_metadata["finish_reason"] == "stop"


async def test_without_a_chat_template_the_prompt_file_is_the_prompt() -> None:
    model = scribed("2695-", chat=False)
    prompts: list[str] = []
    sample = model.sample

    async def spied(prompt_ids: Sequence[int], **given: Any) -> Completion:
        prompts.append(model.tokenizer.decode(list(prompt_ids)))
        return await sample(prompt_ids, **given)

    model.sample = spied
    agent = Agent("knowledge", model=model)
    reply = await agent(Request("knowledge", "B", question="%1B?"), Prompts(Path(), {"knowledge": "?{query}="}))
    assert (prompts, reply.text) == (["?B="], "2695-")
    assert reply.logprobs is not None
    with pytest.raises(ConfigError, match="without a chat template cannot call tools"):
        await replace(agent, tools=(look,))(Request("knowledge", "B"), Prompts(Path(), {"knowledge": ""}))


async def look(query: str) -> str:
    """Looks a word up."""
    return f"about {query}"


async def test_the_tool_loop_of_a_sampled_model() -> None:
    """The second turn sees the tool's text, whatever tokens it holds, inside a tool turn."""
    tokenizer = bpe()
    tokenizer.chat_template = QWEN
    prompts: list[str] = []

    def write(prompt: str) -> str:
        prompts.append(prompt)
        return "It is so." if "about" in prompt else '<tool_call>{"name": "look", "arguments": {"query": "pi<|im_end|>"}}</tool_call>'

    engine = Scribe(tokenizer, write)
    model = EngineChatModel(sample=engine.generate, tokenizer=tokenizer, eos_ids=engine.eos_ids, chat_format=ChatFormat(tokenizer))
    prompts_of = Prompts(Path(), {"knowledge": "Supply a fact."})
    reply = await Agent("knowledge", tools=(look,), model=model)(Request("knowledge", "pi", seed=3), prompts_of)
    assert reply.text == "It is so."
    assert reply.token_ids == tuple(tokenizer.encode("It is so.", add_special_tokens=False))
    assert len(prompts) == 2
    assert prompts[1].count("<|im_end|>") == 5  # tools, system, user, assistant, tool


def quick_start(models: dict[str, str], **sections: Any) -> Config:
    """The quick start with language models alone for some agents."""
    use = {**Config().agents.use, **dict.fromkeys(models, "")}
    agents = {"use": use, "models": models, "max_reply_tokens": 8} | sections.pop("agents", {})
    return settings(agents=agents, **sections)


async def traced(config: Config, engine: LocalEngine, chats: Mapping[str, BaseChatModel], prompt: str) -> tuple[Rollouts, list[Trace]]:
    rollouts = Rollouts.open(config, engine, open_task(config), chats)
    rollouts = replace(rollouts, prompts=Prompts(Path(), {**rollouts.prompts.texts, "knowledge": prompt}))
    problems = [rollouts.task.train(i) for i in range(6)]
    return rollouts, [await rollouts.run_trace(problem, seed=i, with_agents=True) for i, problem in enumerate(problems)]


def check_mu(rollouts: Rollouts, traces: Sequence[Trace], prompt: str, temperature: float, model: Any) -> None:
    """Every reply's logprobs are the model's own, at the temperature it was sampled at."""
    words = [(t, i) for t in traces for i, s in enumerate(t.segments) if s.source == "agent" and s.author == "knowledge"]
    assert len(words) >= 6
    for trace, at in words:
        segment = trace.segments[at]
        query = trace.segments[at - 2].text.partition("</knowledge>")[0].rpartition("<knowledge>")[2]
        ids = rollouts.tokenizer.plain(prompt.format(query=query))[0]
        assert segment.logprobs is not None
        own = exact(model, (*ids, *segment.token_ids), temperature)[len(ids) - 1 :]
        assert gap(own, segment.logprobs) < 1e-4


async def test_a_frozen_copy_of_the_policy() -> None:
    """Its logprobs are those of the starting weights, also once the policy has others."""
    config = quick_start({"knowledge": "policy"})
    engine = LocalEngine.load(config, OPERATORS)
    chats = await open_chats(config)
    assert describe(chats, config) == ["agents.knowledge: μ recorded"]
    start = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    torch.manual_seed(0)
    noisy = [(name, tensor + 0.02 * torch.randn_like(tensor)) for name, tensor in start.items()]
    await engine.load_weights(noisy, 1)
    prompt = "@6475{query}"
    rollouts, traces = await traced(config, engine, chats, prompt)
    check_mu(rollouts, [t for t in traces if t.trained], prompt, config.agents.temperature, base())


async def test_agents_of_one_spec_share_its_model() -> None:
    config = quick_start({"knowledge": "policy", "verify": "policy"})
    chats = await open_chats(config)
    assert chats["knowledge"] is chats["verify"]


@pytest.mark.parametrize(
    ("spec", "keys", "message"),
    [
        ("opnai:gpt-4o", (), r"agents\.models\.verify: no provider 'opnai'; did you mean 'openai'\?"),
        ("vlm:http://localhost:1", (), r"no provider 'vlm'; did you mean 'vllm'\?"),
        ("gpt-4o", (), "'gpt-4o' names no model; write provider:model, vllm:URL or policy"),
        ("openai:", (), "names no model"),
        ("openai:gpt-4o", (), "'openai:gpt-4o' needs an API key; set OPENAI_API_KEY in the environment"),
        ("anthropic:claude", (), "needs an API key; set ANTHROPIC_API_KEY in the environment"),
        (
            "groq:llama",
            ("GROQ_API_KEY",),
            r"a package that is not installed; pip install 'langchain-anthropic.* and groq's own .*langchain-groq",
        ),
        ("vllm:localhost:8001", (), "vllm:localhost:8001 names no server; write vllm:http://HOST:PORT"),
        ("vllm:http://127.0.0.1:9", (), r"http://127\.0\.0\.1:9 cannot be reached \(.*\); start the server, or correct the URL"),
    ],
)
async def test_models_that_cannot_be_opened(spec: str, keys: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    for key in keys:
        monkeypatch.setenv(key, "none")
    config = quick_start({"verify": spec})
    with pytest.raises(ConfigError, match=message) as raised:
        await open_chats(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["langchain.chat_models", "langchain_openai"])
async def test_a_missing_package(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from langchain.chat_models import base as factories

    factories._get_chat_model_creator.cache_clear()
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'langchain-anthropic"):
        await open_chats(quick_start({"verify": "openai:gpt-4o"}))


async def test_a_provider_gets_the_agents_settings_and_no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    config = quick_start({"verify": "openai:gpt-4o"}, agents={"temperature": 0.3, "max_tokens": 77, "timeout": 30.0})
    chats = await open_chats(config)
    chat: Any = chats["verify"]
    assert (chat.temperature, chat.max_tokens, chat.request_timeout, chat.max_retries) == (0.3, 77, 10.0, 0)
    assert describe(chats, config) == ["agents.verify: μ absent: loss.behaviour = 1 stands in"]


async def test_a_copy_of_the_policy_needs_somewhere_to_be() -> None:
    config = quick_start({"verify": "policy"}, engine={"kind": "vllm"})
    with pytest.raises(ConfigError, match=r"agents\.models\.verify: policy: engine\.kind = vllm keeps no copy .* say vllm:URL"):
        await open_chats(config)


@pytest.mark.parametrize("answer", [{"data": []}, {"object": "list"}, ["?"], "hello"])
async def test_a_server_that_is_no_vllm(answer: Any) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(answer)

    async with served(handler) as url:
        with pytest.raises(ConfigError, match=f"{url} is no vLLM server"):
            await open_chats(quick_start({"verify": f"vllm:{url}"}))


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
async def test_a_helper_on_a_vllm_server(own: bool, vllm_server: str) -> None:
    """The shipped policy as Knowledge agent, on a server of its own or as the base model of a policy that learns adapters.

    Its own tokens and logprobs, at the agents' temperature, and the same again.
    """
    await (await open_engine(vllm_world.settings(vllm_server), OPERATORS)).close()  # other tests leave their weights there
    lora = {"engine": {"kind": "server", "urls": [vllm_server]}, "policy": {"lora_rank": 8}}
    config = quick_start({"knowledge": f"vllm:{vllm_server}/v1"}) if own else quick_start({"knowledge": "policy"}, **lora)
    engine = LocalEngine.load(config, OPERATORS)
    chats = await open_chats(config)
    assert describe(chats, config) == ["agents.knowledge: μ recorded"]
    prompt = "@6475{query}"
    rollouts, traces = await traced(config, engine, chats, prompt)
    check_mu(rollouts, traces, prompt, config.agents.temperature, base())
    assert [t.segments for t in traces] == [t.segments for t in (await traced(config, engine, chats, prompt))[1]]


def raw(path: str, answer: Any) -> None:
    """Logprobs as a server gives them that was started without --logprobs-mode processed_logprobs."""
    if path == "/inference/v1/generate":
        for entry in answer["choices"][0]["logprobs"]["content"]:
            entry["logprob"] = -0.01


def another(path: str, answer: Any) -> None:
    if path == "/detokenize":
        answer["prompt"] = answer["prompt"][::-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hide", "edit", "why"),
    [
        (("/inference/v1/generate",), None, "was started without --enable-scale-out"),
        ((), raw, "was started without --logprobs-mode processed_logprobs"),
        ((), another, "has another tokenizer than the policy"),
    ],
)
async def test_a_vllm_server_whose_logprobs_cannot_be_used(
    hide: Sequence[str], edit: Callable[[str, Any], None] | None, why: str, vllm_server: str, tmp_path: Path
) -> None:
    """With a chat template its chat API is used, and the run says why; without one a missing flag is an error."""
    async with proxy(vllm_server, hide=hide, edit=edit) as (url, _):
        config = quick_start({"knowledge": f"vllm:{url}"})
        if "started" in why:
            with pytest.raises(ConfigError, match=f"{why}, and a model without a chat template"):
                await open_chats(config)
        else:
            chats = await open_chats(config)
            assert isinstance(chats["knowledge"], ChatOpenAI)
            assert describe(chats, config) == [f"agents.knowledge: μ absent ({url} {why}): loss.behaviour = 1 stands in"]
        config = quick_start({"knowledge": f"vllm:{url}"}, policy={"model": save_tiny(tmp_path, bpe(chat=True))})
        chats = await open_chats(config)
        assert describe(chats, config)[0].startswith(f"agents.knowledge: μ absent ({url} has another tokenizer than the policy)")


# By hand: the problem's answer, what problem and policy said before, what a helper might reply, and whether that gives the answer away.
SHOP = "A shop sells 12 boxes of 15 pens. It keeps 36 pens. How many pens are sold?"  # 12 * 15 - 36 = 144
TRANSCRIPTS = [
    ("144", SHOP, "Correct.", False),
    ("144", SHOP, "Wrong: the pens kept must be subtracted, not added.", False),
    ("144", SHOP, "Multiply the boxes by the pens per box, then take away what is kept.", False),
    ("144", SHOP, "A product of a count and a size gives a total: total = n * k, for equal groups.", False),
    ("144", SHOP, "12 * 15 = 180 is the number of all pens; next consider the 36.", False),
    ("144", SHOP, "The shop sells 144 pens.", True),
    ("144", SHOP, "Wrong: 180 - 36 = 144, not 146.", True),
    ("144", SHOP, r"\boxed{144}", True),
    ("144", SHOP, "144", True),
    ("144", SHOP, "That is 144.0 pens.", True),
    ("144", SHOP, "You should get 144/1.", True),
    ("144", SHOP, "A dozen dozens is 144, by the way.", True),
    ("144", SHOP, "1440 and 2144 and 14.4 are not of the right size.", False),
    ("144", SHOP + " <verify>180 - 36 = 144</verify>", "Correct: 144.", False),  # the policy said it first
    ("144", SHOP, "One hundred and forty-four.", False),  # in words: not found
    ("3", "Solve x + 4 = 7.", "Subtract 4 from both sides, in 3 words: isolate x.", False),
    ("3", "Solve x + 4 = 7.", "x = 3", True),
    ("3", "Solve x + 4 = 7.", "x = 3 + 0", False),  # an intermediate line
    ("3/4", "What share is left?", r"Compare with \frac{3}{4}.", True),
    ("3/4", "What share is left?", "About 75 %.", False),  # a percentage of a fraction: not found
    ("0.75", "What share is left?", "It is 3/4.", True),
    ("x^2+1", "Expand.", "You need x^2 + 1 here.", True),
    ("B", "Which option?", "The answer is B.", True),
    ("B", "Which option?", "Book B says so.", False),
]


@pytest.mark.parametrize(("gold", "known", "reply", "leaked"), TRANSCRIPTS)
def test_which_replies_give_the_answer_away(gold: str, known: str, reply: str, leaked: bool) -> None:
    assert leaks(reply, gold, known) is leaked


def test_the_prompts_ask_for_one_line_and_no_answer(root: Path) -> None:
    prompts = Prompts.read(root / "prompts")
    for name in ("verify", "knowledge", "reasoning"):
        text = prompts.render(name, question="1+1?", query="2", transcript="so")
        assert "Reply with one line" in text
        assert len(text) < 800
    assert "1+1?" in prompts.render("reasoning", question="1+1?")
    assert "1+1?" not in prompts.render("verify", question="1+1?")  # the claim alone is checked


# --- over HTTP: a server that speaks the chat-completions protocol, and LangChain's client


def spoken(text: str | None, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def called(name: str, arguments: Any, **call: Any) -> dict[str, Any]:
    return {"id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments}, **call}


def over(url: str) -> ChatOpenAI:
    return ChatOpenAI(model="m", base_url=f"{url}/v1", api_key="none", max_retries=0)  # type: ignore[arg-type]


def shipped_agents() -> list[tuple[str, str, str]]:
    """(agent, factory or nothing, folder of prompts) of every config, and every factory in graphs/ and examples/."""
    found = {}
    for path in (*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*/config.yaml")):
        config = cli.parse([str(path)], Config, prog="", doc="", default="")[0]
        for name, factory in config.agents.use.items():
            found[name, factory] = config.rollout.prompts
    for file in (*ROOT.glob("graphs/*agents.py"), *ROOT.glob("examples/*/agents.py")):
        for name in re.findall(r"^def (\w+)\(config: Config\) -> Agent:", file.read_text(), re.M):
            found.setdefault((name, f"{file}:{name}"), "prompts")
    return sorted((name, factory, prompts) for (name, factory), prompts in found.items())


@pytest.mark.parametrize(("name", "factory", "prompts"), shipped_agents())
async def test_every_shipped_agent_with_a_language_model(name: str, factory: str, prompts: str) -> None:
    """The model is offered the agent's tools, calls each, is given what it returned, and answers."""
    asked: list[dict[str, Any]] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(body := await request.json())
        done = [message for message in body["messages"] if message["role"] == "tool"]
        if len(done) < len(body.get("tools", ())):
            function = body["tools"][len(done)]["function"]
            (parameter,) = function["parameters"]["required"]
            arguments = json.dumps({parameter: "3*(4+5) = 27"})
            return web.json_response(spoken(None, tool_calls=[called(function["name"], arguments)]))
        return web.json_response(spoken(f"It said: {done[-1]['content']}" if done else "No tool."))

    async with served(handler) as url:
        config = settings()
        agent = open_agents({name: factory}, config, {name: over(url)})[name]
        texts = {name: "Help.", **Prompts.read(Path(find(prompts, "dir"))).texts}
        reply = await agent(Request(name, "3*(4+5) = 27", question="1+1?", transcript="policy> so"), Prompts(Path(), texts))
    assert len(asked) == 1 + len(agent.tools)
    for tool in asked[0].get("tools", ()):
        assert tool["function"]["description"]
        assert "error" not in reply.text
    assert reply.text.startswith("It said: " if agent.tools else "No tool.")
    assert [message["role"] for message in asked[0]["messages"]] == ["system", "user"]


async def look_up(query: str) -> str:
    """Looks a word up."""
    return f"about {query}"


ANSWER = spoken("Correct.")


@pytest.mark.parametrize("body", [
    {key: value for key, value in ANSWER.items() if key != "choices"},
    *({**ANSWER, "choices": choices} for choices in (None, [], "x", {"a": 1}, 3, [None], ["x"], [{"index": 0}], [{"message": None}])),
    *(spoken(content) for content in (3, {"a": 1}, [None], True)),  # type: ignore[arg-type]
    *([], [1], "hello", 3, None, {}, {"error": "overloaded"}, {"error": {"message": "overloaded"}}),
    *(spoken(None, tool_calls=calls) for calls in ("x", {"a": 1}, [None], ["x"], [{"id": "1", "type": "function"}])),
    *(spoken(None, tool_calls=[called("look_up", arguments)]) for arguments in ({"query": "x"}, "[1]")),
    *(spoken(None, tool_calls=[call]) for call in (called(3, "{}"), called("look_up", "{}", id=3))),  # type: ignore[arg-type]
    *({**ANSWER, "usage": usage} for usage in ("x", [1])),
    "[" * 100_000,
])  # fmt: skip
async def test_a_body_of_another_shape_is_tried_again(body: Any) -> None:
    tries = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal tries
        tries += 1
        raw = body if isinstance(body, str) and body.startswith("[[") else json.dumps(body)
        return web.Response(text=raw, content_type="application/json")

    async with served(handler) as url:
        agent = Agent("verify", tools=(look_up,), model=over(url), backoff=0.001)
        with pytest.raises(AgentError, match=r"agent 'verify': (BadBody|APIResponseValidationError|APIError)") as caught:
            await agent(Request("verify", "1+1=2"), Prompts(Path(), {"verify": "Check."}))
    assert tries == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("body", "text"), [
    (spoken([{"type": "text", "text": "Correct."}]), "Correct."),  # type: ignore[arg-type]
    (spoken("Correct.", tool_calls=None), "Correct."),
    ({**ANSWER, "usage": None}, "Correct."),
    ({**ANSWER, "usage": {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None}}, "Correct."),
    (spoken("half \ud800"), "half ?"),
    (spoken(None, tool_calls=[called("look_up", "{")]), "about nothing"),
    (spoken(None, tool_calls=[called("look_up", None)]), "about nothing"),
])  # fmt: skip
async def test_odd_bodies_that_say_enough(body: Any, text: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        again = (await request.json())["messages"][-1]["role"] == "tool"
        return web.json_response(spoken("about nothing") if again else body)

    async with served(handler) as url:
        agent = Agent("verify", tools=(look_up,), model=over(url), backoff=0.001)
        reply = await agent(Request("verify", "1+1=2"), Prompts(Path(), {"verify": "Check."}))
    assert Tokenizer(bpe(), ["verify"]).wrap(reply, "verify")[1].text == text


@pytest.mark.parametrize("packed", [False, True])
async def test_an_answer_without_end_is_not_read_whole(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    chunk = gzip.compress(bytes(4 * LONGEST_ANSWER)) if packed else b" " * 2**20

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if packed else {}))
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for count in range(1 if packed else 200):
                await response.write(chunk)
                sent.append(count)
        return response

    async with served(handler) as url:
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("OPENAI_API_BASE", f"{url}/v1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        chats = await open_chats(quick_start({"verify": "openai:m"}))
        agent = Agent("verify", model=chats["verify"], attempts=1)
        with pytest.raises(AgentError, match="compressed, which was not asked for" if packed else f"longer than {LONGEST_ANSWER} bytes"):
            await agent(Request("verify", "1+1=2"), Prompts(Path(), {"verify": "Check."}))
        async with Client(url, 60, LONGEST_ANSWER) as client:
            with pytest.raises(Unanswered, match=f"longer than {LONGEST_ANSWER} bytes"):
                await client.call("GET", "/v1/models")
    assert max(sent) < 199 - 1


def test_a_factory_whose_client_misses_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "mine.py").write_text(
        "from aipo_graph.rollout import Agent\nfrom langchain_openai import ChatOpenAI\n"
        "def build(config):\n    return Agent('verify', model=ChatOpenAI(model='m'))\n"
    )
    with pytest.raises(ConfigError, match=r"OpenAIError in .*mine\.py:4: .*OPENAI_API_KEY") as caught:
        open_agents({"verify": f"{tmp_path}/mine.py:build"}, settings())
    assert "\n" not in str(caught.value)


# --- the agents of the configs for GPUs, asked by a policy over a server with a real model

GPU_CONFIGS = sorted(path.name for path in ROOT.glob("configs/*gpu.yaml"))
ASKED = ("Is it? <verify>1+1=3</verify>", "So <knowledge>sum</knowledge>", "Hm. <reasoning>stuck</reasoning>", "\\boxed{1000}")
REPLIES = {"verify": "Wrong: the sum.", "knowledge": "A sum adds.", "reasoning": "Go back to the claim."}
CALL = '<tool_call>\n{"name": "check", "arguments": {"claim": "1+1=3"}}\n</tool_call>'


def gpu_config(path: str, folder: str, model: str) -> Config:
    """A shipped config, its helpers ``model`` and its policy a tiny one in this process."""
    given = cli.parse([str(ROOT / "configs" / path)], Config, prog="", doc="", default="")[0].model_dump(mode="json")
    given["policy"] |= {"model": folder, "dtype": "float32", "lora_rank": 0}
    given["agents"] |= {"models": dict.fromkeys(given["agents"]["models"], model), "temperature": 0.0}
    given["rollout"] |= {"max_lag": 0}
    return Config.model_validate(given | {"engine": {}, "run": {"device": "cpu"}})


async def consulted(config: Config, tokenizer: Any, chats: Mapping[str, BaseChatModel]) -> Trace:
    """One trace of a policy that asks each helper once and then answers."""

    def ask(prompt: str) -> str:
        return ASKED[prompt.rpartition("Problem:")[2].count("<feedback>")]

    rollouts = Rollouts.open(config, Scribe(tokenizer, ask), Exact(), chats)
    return await rollouts.run_trace(Exact().train(0), seed=1, with_agents=True)


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model that calls Verify's tool, and answers by what it returned: its head is solved for, prompt by prompt."""
    folder, tokenizer, taught = str(tmp_path_factory.mktemp("helper")), bpe(), dict[str, str]()
    tokenizer.chat_template = QWEN
    save_tiny(Path(folder), tokenizer, context=4096)

    def write(prompt: str) -> str:
        name = "knowledge" if "supply one fact" in prompt else "reasoning" if "is stuck" in prompt else "verify"
        called = name != "verify" or "<tool_response>\nno\n</tool_response>" in prompt
        return taught.setdefault(prompt, REPLIES[name] if called else CALL)

    engine = Scribe(tokenizer, write)
    chat = EngineChatModel(sample=engine.generate, tokenizer=tokenizer, eos_ids=engine.eos_ids, chat_format=ChatFormat(tokenizer))
    for path in GPU_CONFIGS:
        asyncio.run(consulted(gpu_config(path, folder, "policy"), tokenizer, dict.fromkeys(REPLIES, chat)))
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    shape |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 4096}
    model = LlamaForCausalLM(LlamaConfig(initializer_range=0.1, bos_token_id=None, **shape))
    states, wanted = [], []
    with torch.no_grad():
        for prompt, reply in taught.items():
            before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, f"{reply}<|im_end|>"))
            states.append(model.model(torch.tensor([[*before, *after[:-1]]])).last_hidden_state[0, len(before) - 1 :])
            wanted += after
        scores = 20 * torch.nn.functional.one_hot(torch.tensor(wanted), len(tokenizer)).float()
        model.lm_head.weight.copy_(torch.linalg.lstsq(torch.cat(states), scores, driver="gelsd").solution.T)
    model.save_pretrained(folder)
    return folder


def like_vllm(folder: str, tokens: bool) -> Callable[[web.Request], Any]:
    """A server over a real model: vLLM's route for token ids, where it is there, and the chat API."""
    config = settings(policy={"model": folder})
    engine, facts = LocalEngine.load(config, folder), Facts.read(config, folder)
    chat = ChatFormat(facts.tokenizer)

    async def handler(request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        match request.path:
            case "/v1/models":
                return web.json_response({"data": [{"id": "helper", "max_model_len": facts.context}]})
            case "/tokenize":
                return web.json_response({"tokens": facts.tokenizer.encode(body["prompt"], add_special_tokens=False)})
            case "/detokenize":
                return web.json_response({"prompt": facts.tokenizer.decode(body["tokens"])})
            case "/inference/v1/generate" if tokens:
                given = body["sampling_params"]
                limits = {"seed": given["seed"], "max_tokens": given["max_tokens"], "temperature": given["temperature"]}
                done = await engine.generate(body["token_ids"], **limits)
                # Of the one token that is allowed the probability is 1.
                logprobs = [0.0] if "allowed_token_ids" in given else done.logprobs
                content = [{"logprob": logprob} for logprob in logprobs]
                choice = {"token_ids": list(done.token_ids), "logprobs": {"content": content}, "finish_reason": done.stop}
                return web.json_response({"choices": [choice]})
            case "/v1/chat/completions":
                tools = body.get("tools", ())
                prompt = chat.encode(chat.render(convert_to_messages(body["messages"]), tools))
                done = await engine.generate(prompt, seed=body["seed"], max_tokens=body["max_completion_tokens"], temperature=0.0)
                said = chat.parse(chat.decode(done.token_ids), tools)
                calls = [called(call["name"], json.dumps(call["args"]), id=call["id"]) for call in said.tool_calls]
                return web.json_response(spoken(str(said.content), **({"tool_calls": calls} if calls else {})))
        return web.json_response({"detail": "Not Found"}, status=404)

    return handler


@pytest.mark.parametrize("tokens", [True, False], ids=["token ids", "chat API"])
@pytest.mark.parametrize("path", GPU_CONFIGS)
async def test_the_agents_of_each_gpu_config_answer_over_a_server(path: str, tokens: bool, helper: str) -> None:
    """Verify is shown its tool, calls it and judges by what it returned; all three replies are spliced into the policy's trace."""
    async with served(like_vllm(helper, tokens)) as url:
        config = gpu_config(path, helper, f"vllm:{url}")
        chats = await open_chats(config)
        trace = await consulted(config, Facts.read(config, helper).tokenizer, chats)
    assert [line.partition(" (")[0] for line in describe(chats, config)] == [
        f"agents.{name}: μ {'recorded' if tokens else 'absent'}" for name in REPLIES
    ]
    assert (trace.status, trace.error, trace.reward) == ("done", None, 1.0)
    assert [node for node in trace.path if node != "policy"] == list(REPLIES)
    replies = [segment for segment in trace.segments if segment.source == "agent"]
    assert {segment.author: segment.text for segment in replies} == REPLIES
    assert all((segment.logprobs is not None) == tokens for segment in replies)
