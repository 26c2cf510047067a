"""Traces apart from each other, and from the outside: nothing is kept between them, no tracer and no graph sees a gold answer."""

import http.server
import os
import re
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache as AnswerCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import CachePolicy
from rollout_world import with_graph, world
from test_chat_graph import CALL, build, run

from aipo_graph.errors import GraphError
from aipo_graph.rollout import Context, PolicyChatModel, State, append, policy_node
from aipo_graph.rollout.graph import Graph
from aipo_graph.rollout.inputs import apart
from aipo_graph.types import Problem

Node = Callable[..., Awaitable[Any]]
ALIKE = CachePolicy(key_func=lambda state: "the same")
GLOBAL = InMemoryStore()


async def say(state: MessagesState) -> Any:
    return {"messages": [await PolicyChatModel().ainvoke(state["messages"])]}


async def remember(state: MessagesState, runtime: Runtime[None]) -> Any:
    """Says what it was told before, in this trace or in another; LangGraph hands the store to sub-graphs, too."""
    store = runtime.store
    assert store is not None
    old = await store.asearch(("notes",))
    reply = await PolicyChatModel().ainvoke([*(SystemMessage(f"note: {item.value['text']}") for item in old), *state["messages"]])
    await store.aput(("notes",), f"n{len(old)}", {"text": reply.content})
    return {"messages": [reply]}


def one(node: Any, policy: CachePolicy[Any] | None = None, **kept: Any) -> Graph:
    graph = StateGraph(MessagesState)
    graph.add_node("node", node, cache_policy=policy)
    graph.add_edge(START, "node")
    return graph.compile(**kept)


def by_function(inner: Graph, thread: str | None) -> Node:
    """A node that calls a sub-graph, in a thread of the sub-graph's own or not."""
    config: RunnableConfig = {"configurable": {"thread_id": thread}} if thread else {}

    async def outer(state: MessagesState) -> Any:
        done = await inner.ainvoke({"messages": [state["messages"][0]]}, config)
        return {"messages": [done["messages"][-1]]}

    return outer


def by_tool() -> Graph:
    inner = one(say, checkpointer=InMemorySaver())

    @tool
    async def calculator(expression: str) -> str:
        """Asks a sub-agent with a memory."""
        done = await inner.ainvoke({"messages": [("user", expression)]}, {"configurable": {"thread_id": "one for all"}})
        return str(done["messages"][-1].content)

    return create_agent(PolicyChatModel(), tools=[calculator])


def knowing() -> InMemoryStore:
    store = InMemoryStore()
    store.put(("notes",), "known", {"text": "known from the start"})
    return store


KEEPERS: dict[str, Callable[[], Graph]] = {
    "store": lambda: one(remember, store=InMemoryStore()),
    "filled store": lambda: one(remember, store=knowing()),
    "cache": lambda: one(say, ALIKE, cache=InMemoryCache()),
    "checkpointer": lambda: one(say, checkpointer=InMemorySaver()),
    "store for a sub-graph": lambda: one(one(remember), store=InMemoryStore()),
    "cache of a sub-graph": lambda: one(one(say, ALIKE, cache=InMemoryCache())),
    "checkpointer of a sub-graph": lambda: one(one(say, checkpointer=InMemorySaver())),
    "history of a sub-graph": lambda: one(one(say, checkpointer=True), checkpointer=InMemorySaver()),
    "checkpointer of a called graph": lambda: one(by_function(one(say, checkpointer=InMemorySaver()), "one for all")),
    "store of a called graph": lambda: one(by_function(one(remember, store=InMemoryStore()), "one for all")),
    "cache of a called graph": lambda: one(by_function(one(say, ALIKE, cache=InMemoryCache()), None)),
    "checkpointer of a tool's graph": by_tool,
}


@pytest.mark.parametrize("keeper", KEEPERS)
async def test_a_trace_finds_nothing_of_the_one_before(keeper: str, tmp_path: Path) -> None:
    """Two traces of one seed are one and the same: the second's prompts would hold what the first said, or nothing would be sampled."""
    write = (CALL, "<|im_end|>") if "tool" in keeper else ("α", "<|im_end|>")
    rollouts = build(tmp_path, apart(KEEPERS[keeper](), "mine.py:build"), write=write)
    first, second = await run(rollouts), await run(rollouts)
    assert any(s.source == "policy" for s in first.segments)
    assert first == second
    if keeper == "filled store":
        assert "known from the start" in first.segments[0].text


async def test_within_a_trace_the_store_is_kept_and_shared(tmp_path: Path) -> None:
    store = InMemoryStore()
    graph = StateGraph(MessagesState)
    graph.add_node("first", remember)
    graph.add_node("second", by_function(one(remember, store=store), "its own thread"))
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    trace = await run(build(tmp_path, apart(graph.compile(store=store), "mine.py:build"), write=("α", "<|im_end|>")))
    assert [s.text.count("note: ") for s in trace.segments if s.source == "context"] == [0, 1]
    assert store.search(("notes",)) == []


async def test_the_answer_cache_of_langchain_is_not_asked(tmp_path: Path) -> None:
    set_llm_cache(AnswerCache())
    try:
        rollouts = build(tmp_path, one(say))
        assert (await run(rollouts)).segments == (await run(rollouts)).segments != ()
    finally:
        set_llm_cache(None)


class Elsewhere(BaseStore):
    def batch(self, ops: Any) -> Any: ...

    async def abatch(self, ops: Any) -> Any: ...


async def by_name(state: MessagesState) -> Any:
    GLOBAL.put((), "key", {})
    return await say(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: one(say, store=Elsewhere()), "a Elsewhere, cannot be copied for each trace (it is no InMemoryStore)"),
        (lambda: one(one(say, store=Elsewhere())), "a Elsewhere, cannot be copied"),
        (lambda: one(by_function(one(say, store=Elsewhere()), None)), "a Elsewhere, cannot be copied"),
        (lambda: one(by_name), "uses a InMemoryStore by its name"),
    ],
)
def test_what_cannot_be_kept_apart_is_refused_at_opening(make: Callable[[], Graph], message: str) -> None:
    with pytest.raises(GraphError, match="mine.py:build: ") as refused:
        apart(make(), "mine.py:build")
    assert message in str(refused.value)


async def silent(state: MessagesState) -> Any:
    return {"messages": [AIMessage("42")]}


async def test_a_trace_without_a_word_of_the_policy_failed(tmp_path: Path) -> None:
    async def nothing(state: State) -> Any:
        return append()

    graph = StateGraph(State, context_schema=Context)
    graph.add_node("node", nothing)
    graph.add_edge(START, "node")
    in_segments = with_graph(world(tmp_path, lambda text: "", ()), graph.compile())
    for rollouts in (build(tmp_path / "chat", one(silent)), in_segments):
        trace = await run(rollouts)
        assert (trace.status, trace.trained, dict(trace.scores).get("reward")) == ("failed", False, None)
        assert trace.error == "NoTokens: the graph ended without a word of the policy (no node asked it); see its routes"


# --- what a graph and a tracer see


async def test_a_graph_sees_the_question_and_no_answer(tmp_path: Path) -> None:
    seen: list[Problem] = []

    async def look(state: State) -> Any:
        seen.append(state["problem"])
        return append()

    graph = StateGraph(State, context_schema=Context)
    graph.add_node("look", look)
    graph.add_node("policy", policy_node())
    graph.add_edge(START, "look")
    graph.add_edge("look", "policy")
    secrets = {"solution": "by hand", "steps": ["6*7 = 42."], "gold": 7, "half": 42, "expected_output": "x", "nested": {"a": "is 42"}}
    problem = Problem("p", "6*7?", "42", "easy", {"level": 3, "source": "a book", **secrets})
    rollouts = with_graph(world(tmp_path, lambda text: r"\boxed{42}", ()), graph.compile())
    trace = await rollouts.run_trace(problem, seed=1, with_agents=True)
    assert trace.reward == 1
    assert seen == [Problem("p", "6*7?", "", "easy", {"level": 3, "source": "a book"})]


class Smith(http.server.BaseHTTPRequestHandler):
    """Stands in for LangSmith."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        while not self.headers.get("content-length") and (size := int(self.rfile.readline() or b"0", 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.server.got.append(body)  # type: ignore[attr-defined]
        self.do_GET()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def smith() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Smith)
    server.got = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


TRACERS = ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING_V2", "LANGCHAIN_HANDLER", "LANGCHAIN_MINE_TRACING")

ASK = """
import asyncio, sys
from aipo_graph.config import Config
from aipo_graph.engines import open_engine
from aipo_graph.load import model
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.tasks.open import open_task
from langchain_core.tracers.langchain import wait_for_all_tracers
import dotenv_like

async def main():
    config = Config.model_validate({"run": {"device": "cpu", "tracing": sys.argv[1] == "asked"}, "rollout": {"max_tokens": 8}})
    engine = await open_engine(config, model("operators"))
    rollouts = Rollouts.open(config, engine, open_task(config))
    problem = rollouts.task.train(0)
    print(problem.answer, (await rollouts.run_trace(problem, seed=1, with_agents=True)).status)
    await engine.close()
    wait_for_all_tracers()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({"LANGSMITH_TRACING": "true"}, True),
        (dict.fromkeys(TRACERS, "true"), False),
        ({"LANGCHAIN_TRACING": "true"}, False),
    ],
)
def test_tracers_see_runs_where_the_config_asks_and_never_an_answer(
    variables: dict[str, str], asked: bool, smith: http.server.ThreadingHTTPServer, warm_python: str, tmp_path: Path
) -> None:
    """LANGCHAIN_MINE_TRACING stands for what other tracers hook in with, as LANGCHAIN_WANDB_TRACING does."""
    url = f"http://127.0.0.1:{smith.server_port}"
    (tmp_path / "dotenv_like.py").write_text(
        "import urllib.request\n"
        "from contextvars import ContextVar\n"
        "from langchain_core.callbacks import BaseCallbackHandler\n"
        "from langchain_core.tracers.context import register_configure_hook\n"
        "class Mine(BaseCallbackHandler):\n"
        "    def on_chain_start(self, *_, **__):\n"
        f"        urllib.request.urlopen({url!r}, data=b'mine', timeout=5)\n"
        "register_configure_hook(ContextVar('mine', default=None), True, Mine, 'LANGCHAIN_MINE_TRACING')\n"
    )
    keys = {"LANGSMITH_API_KEY": "x", "LANGSMITH_ENDPOINT": url, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    command = [warm_python, "-c", ASK, "asked" if asked else ""]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LANG")}
    done = subprocess.run(command, env={**clean, **keys, **variables}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    answer, status = done.stdout.split()
    sent = b"".join(smith.got)  # type: ignore[attr-defined]
    assert status in ("done", "length", "budget")
    assert bool(sent) == asked
    assert re.search(rb'"answer": ?"' + answer.encode() + b'"', sent) is None
