"""Asked questions as LangGraph threads in SQLite: each one a run of a small graph, whose checkpoints hold the question and its traces.

The rollouts' own graphs run inside of its nodes and without a checkpointer: a graph of one's own may keep in its state what cannot be
stored, it knows nothing of scores and errors, and plain JSON is read back without building an object of any class.
"""

import asyncio
import operator
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Send
from langsmith import tracing_context
from typing_extensions import TypedDict

from aipo_graph.errors import ConfigError, install
from aipo_graph.rollout.graph import Graph

NEWEST = 200
"""Questions that the history lists."""
TITLE = 200
"""Characters of a question in the history."""
Json = dict[str, Any]
"""A JSON object."""


class Planned(TypedDict):
    """One trace to be made."""

    number: int
    """Its place among the question's traces."""
    sample: int
    with_agents: bool
    seed: str
    """As text: JavaScript's integers end at 2^53."""


class Asked(TypedDict):
    """What a thread's checkpoints hold."""

    question: Json
    planned: list[Planned]
    traces: Annotated[list[Json], operator.add]


@dataclass(frozen=True, slots=True)
class Maker:
    """The run context: how a planned trace is made. It must not raise, but say in the trace what went wrong."""

    make: Callable[[Planned], Awaitable[Json]]


async def trace(state: Planned, runtime: Runtime[Maker]) -> dict[str, list[Json]]:
    return {"traces": [await runtime.context.make(state)]}


def build() -> StateGraph[Any, Any, Any, Any]:
    """All traces of a question at once; each is stored as it ends."""
    graph = StateGraph(Asked, context_schema=Maker)
    graph.add_node("trace", trace)
    graph.add_conditional_edges(START, lambda asked: [Send("trace", planned) for planned in asked["planned"]], ["trace"])
    graph.add_edge("trace", END)
    return graph


@dataclass(frozen=True, slots=True)
class Threads:
    """The stored questions."""

    graph: Graph
    saver: "BaseCheckpointSaver[str]"

    async def run(self, thread: str, question: Json, planned: list[Planned], maker: Maker) -> None:
        """Makes and stores all traces of one question."""
        listed = {"title": question["question"][:TITLE], "traces": len(planned)}
        config: RunnableConfig = {"configurable": {"thread_id": thread}, "metadata": listed}
        with tracing_context(enabled=False):  # it holds the gold answer, which is no tracer's
            await self.graph.ainvoke({"question": question, "planned": planned, "traces": []}, config, context=maker)

    async def history(self) -> list[Json]:
        """The newest questions first: thread, what was asked, when (ISO 8601, UTC), and of how many traces."""
        found = []
        async for kept in self.saver.alist(None, filter={"source": "input"}, limit=NEWEST):
            listed: Json = dict(kept.metadata)
            thread = kept.config["configurable"]["thread_id"]
            asked = {"title": listed.get("title", ""), "traces": listed.get("traces", 0), "asked": kept.checkpoint["ts"]}
            found.append({"thread": thread, **asked})
        return found

    async def read(self, thread: str) -> Json | None:
        """The question and its traces, as far as they have ended or had when the server died; None for a thread that there is not.

        Raises ConfigError for one that is damaged.
        """
        try:
            state = await self.graph.aget_state({"configurable": {"thread_id": thread}})
        except ValueError as error:  # what is stored is no MessagePack
            raise ConfigError(f"this question is damaged in the file of threads ({error}): delete it") from error
        if not Asked.__required_keys__ <= state.values.keys():
            return None
        return {key: state.values[key] for key in Asked.__required_keys__}

    async def forget(self, thread: str) -> None:
        await self.saver.adelete_thread(thread)


@asynccontextmanager
async def open_threads(path: Path) -> AsyncIterator[Threads]:
    """The threads of a SQLite file, made where there is none. Raises ConfigError."""
    try:
        import aiosqlite
        from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
    except ImportError as error:
        raise ConfigError(f"--web keeps earlier questions in SQLite: {error}; {install('web')}") from error
    async with AsyncExitStack() as stack:
        try:
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            connection = await stack.enter_async_context(aiosqlite.connect(path))
            # Not the default, which builds any class that a blob names (LANGGRAPH_STRICT_MSGPACK is read at the import).
            saver = AsyncSqliteSaver(connection, serde=JsonPlusSerializer(allowed_msgpack_modules=None))
            await saver.setup()
            threads = Threads(build().compile(checkpointer=saver), saver)
            await threads.history()
        except (OSError, sqlite3.Error, ValueError) as error:
            raise ConfigError(f"--threads {path}: {error}; name another file, or one that is new") from error
        yield threads
