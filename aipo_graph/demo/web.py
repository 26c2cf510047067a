"""The demo's page: a small aiohttp server, for streams and two dozen lines of routes need no web framework beside the HTTP library we have.

One engine serves all tabs. A trace is told as it is made, as server-sent events in the answer to the POST that asked for it, so that a
closed tab ends its runs; what was made until then is stored all the same.
"""

import asyncio
import json
import operator
import re
import socket
import sqlite3
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Handler
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Send
from langsmith import tracing_context
from pydantic import Field, ValidationError
from rich.console import Console
from typing_extensions import TypedDict

from aipo_graph import __version__
from aipo_graph.cli import printable
from aipo_graph.config import Section
from aipo_graph.demo.options import MOST_SAMPLES, Demo, Questions
from aipo_graph.draw import layout
from aipo_graph.errors import AipoError, ConfigError, install
from aipo_graph.evaluation.samples import ballot
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.rollout.graph import Graph
from aipo_graph.tasks.grading import last_box
from aipo_graph.types import Problem, Segment, Trace, derive_seed
from aipo_graph.view.page import assemble, csp, has_display
from aipo_graph.view.record import Pieces, open_pieces, segment_json, split
from aipo_graph.view.serve import guard, secured, serving, told_to_end

NEWEST = 200
"""Questions that the history lists."""
TITLE = 200
"""Characters of a question in the history."""
Json = dict[str, Any]
"""A JSON object."""


# --- asked questions as LangGraph threads in SQLite, each a run of a small graph whose checkpoints hold the question and its traces

# The rollouts' own graphs run inside of its nodes and without a checkpointer: a graph of one's own may keep in its state what cannot be
# stored, it knows nothing of scores and errors, and plain JSON is read back without building an object of any class.


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


# --- one question being answered: its graph runs, all at once, and the events from which the page draws them

STOPPED = "stopped"
"""The status of a trace that somebody stopped: beside those of types.Status, and on the page alone."""


class Nodes(AsyncCallbackHandler):
    """LangGraph tells it of everything that starts in a run; it tells the names of the graph's nodes."""

    def __init__(self, tell: Callable[[str], None], known: Container[str]) -> None:
        self._tell = tell
        self._known = known

    async def on_chain_start(
        self, serialized: dict[str, Any], inputs: dict[str, Any], *, metadata: dict[str, Any] | None = None, **rest: Any
    ) -> None:
        name = rest.get("name")
        # Routes and what runs within a node carry the node's name in their metadata alone; subgraphs have nodes of their own.
        if isinstance(name, str) and name == (metadata or {}).get("langgraph_node") and name in self._known:
            self._tell(name)


class Asking:
    """Makes the planned traces of one question. ``events`` holds what the page is to be told, None at the end."""

    def __init__(self, rollouts: Rollouts, problem: Problem, pieces: Pieces | None) -> None:
        self.events: asyncio.Queue[Json | None] = asyncio.Queue()
        self._rollouts = rollouts
        self._pieces = pieces
        self._problem = problem
        self._running: set[asyncio.Task[Json]] = set()
        self._stopped = False

    def plan(self, modes: Sequence[bool], samples: int, seed: int) -> list[Planned]:
        """With the seeds that the terminal takes: the same settings show the same traces there."""
        seeds = [str(derive_seed(seed, "demo", self._problem.question, sample)) for sample in range(samples)]
        runs = [(with_agents, sample) for with_agents in modes for sample in range(samples)]
        return [
            {"number": number, "sample": sample, "with_agents": with_agents, "seed": seeds[sample]}
            for number, (with_agents, sample) in enumerate(runs)
        ]

    def stop(self) -> None:
        """Ends the runs; what they made so far are their traces."""
        self._stopped = True
        for task in self._running:
            task.cancel()

    async def make(self, planned: Planned) -> Json:
        """One trace, told as it is made. A fault of ours in it is its error; a bug in a graph's own code is raised."""
        made = [Trace(self._problem.id, int(planned["seed"]), planned["with_agents"], (), ())]
        # In a context of its own, in which LangGraph does not know that it runs within a graph.
        task = asyncio.create_task(self._run(planned, made), context=Context())
        self._running.add(task)
        if self._stopped:
            task.cancel()
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            self._running.discard(task)
        shown = self._shown(planned, made[0], STOPPED) if task.cancelled() else task.result()
        self._tell(planned, {"event": "trace", "trace": shown})
        return shown

    async def _run(self, planned: Planned, made: list[Trace]) -> Json:
        def visit(node: str) -> None:
            made[0] = replace(made[0], path=(*made[0].path, node))
            self._tell(planned, {"event": "node", "node": node})

        def append(segments: Sequence[Segment]) -> None:
            made[0] = replace(made[0], segments=(*made[0].segments, *segments))
            self._tell(planned, {"event": "segments", "segments": self._segments(made[0].segments)[-len(segments) :]})

        which = "graph" if planned["with_agents"] else "solo"
        graph = getattr(self._rollouts, which)
        rollouts = replace(self._rollouts, **{which: graph.with_config(callbacks=[Nodes(visit, graph.nodes)])})
        start = rollouts.run_trace if self._problem.answer else rollouts.run_graph
        try:
            trace = await start(self._problem, seed=int(planned["seed"]), with_agents=planned["with_agents"], on_segments=append)
        except AipoError as error:
            trace = replace(made[0], status="failed", error=f"{type(error).__name__}: {error}")
        if not trace.trained:
            trace = replace(trace, path=made[0].path)  # with the node that failed
        return self._shown(planned, trace)

    def _tell(self, planned: Planned, event: Json) -> None:
        self.events.put_nowait({"run": planned["number"], **event})

    def _shown(self, planned: Planned, trace: Trace, status: str = "") -> Json:
        """The trace as the viewer's components take it, and its vote."""
        box = last_box(trace.reply) if trace.trained and not status and trace.scores.get("answered", 1.0) else None
        return {
            **planned,
            "status": status or trace.status,
            "error": trace.error,
            "scores": dict(trace.scores),
            "reward": trace.scores.get("reward"),
            "right": trace.reward >= 1 if self._problem.answer and trace.trained and not status else None,
            "answer": box,
            "vote": ballot(box),
            "path": list(trace.path),
            "segments": self._segments(trace.segments),
        }

    def _segments(self, segments: Sequence[Segment]) -> list[Json]:
        return [segment_json(segment, tokens) for segment, tokens in zip(segments, split(segments, self._pieces), strict=True)]


# --- the server

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("vendor/htm-preact.umd.js", "start.js", "tokens.js", "graph.js", str(STATIC / "demo.js"))
STYLES = ("style.css", str(STATIC / "demo.css"))
LARGEST_BODY = 1 << 20
MODES = {"both": (False, True), "alone": (False,), "with_agents": (True,)}
"""Whether with agents, of the traces of a question."""
LARGEST_SEED = 2**53 - 1
"""Of the integers that JavaScript can write."""


class Ask(Section):
    """What the page sends to have a question answered."""

    question: str
    mode: Literal["both", "alone", "with_agents"] = "both"
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 1
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0


class Refused(Exception):
    """A request that cannot be served: one line, and the page's field that it is about."""

    def __init__(self, message: str, field: str = "question", *, status: int = 400) -> None:
        super().__init__(printable(message))
        self.field = field
        self.status = status


class Server:
    """The routes of the page."""

    def __init__(self, demo: Demo, rollouts: Rollouts, threads: Threads) -> None:
        self._demo = demo
        self._rollouts = rollouts
        self._threads = threads
        self._questions = Questions(rollouts, demo.run.seed)
        self._pieces = pieces_of(demo.policy.model)
        self._running: dict[str, tuple[Asking, asyncio.Task[None]]] = {}
        self._html = assemble("aipo_graph demo", SCRIPTS, STYLES, live=True)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[guard(self._demo.host), said], client_max_size=LARGEST_BODY)
        app.on_response_prepare.append(secured(csp(self._html)))
        app.on_shutdown.append(self._close)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/about", self._about),
                web.get("/sample", self._sample),
                web.get("/history", self._history),
                web.get("/thread", self._thread),
                web.post("/ask", self._ask),
                web.post("/stop", self._stop),
                web.post("/forget", self._forget),
            ]
        )
        return app

    async def _close(self, app: web.Application) -> None:
        """Ends all runs, and waits until what they made is stored."""
        await asyncio.gather(*map(self._end, list(self._running)))

    async def _end(self, thread: str) -> None:
        """Stops the runs of a question, and waits until what they made is stored; nothing where none runs."""
        if thread in self._running:
            asking, work = self._running[thread]
            asking.stop()
            await asyncio.wait([work])

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=self._html, content_type="text/html")

    async def _about(self, request: web.Request) -> web.Response:
        demo = self._demo
        agents = frozenset([*self._rollouts.agents, *demo.rollout.helpers])
        return web.json_response(
            {
                "version": __version__,
                "model": demo.model,
                "agents": sorted(agents),
                "kinds": list(self._questions.kinds),
                "example": self._questions.example,
                "notation": self._questions.notation,
                "most_samples": MOST_SAMPLES,
                "graphs": {
                    "alone": layout(self._rollouts.solo.get_graph(), agents),
                    "with_agents": layout(self._rollouts.graph.get_graph(), agents),
                },
                "asks": {
                    "question": demo.question,
                    "mode": "alone" if demo.alone else "with_agents" if demo.with_agents else "both",
                    "samples": demo.samples,
                    "temperature": self._rollouts.temperature,
                    "seed": demo.run.seed if demo.seed is None else demo.seed,
                },
            }
        )

    async def _sample(self, request: web.Request) -> web.Response:
        problem = self._questions.sample(request.query.get("kind", ""))
        return web.json_response({"question": problem.question, "kind": problem.kind})

    async def _history(self, request: web.Request) -> web.Response:
        return web.json_response(await self._threads.history())

    async def _thread(self, request: web.Request) -> web.Response:
        stored = await self._threads.read(named(request.query.get("id")))
        if stored is None:
            raise Refused("this question is no longer stored", status=404)
        return web.json_response(stored)

    async def _forget(self, request: web.Request) -> web.Response:
        thread = await thread_of(request)
        await self._end(thread)
        await self._threads.forget(thread)
        return web.json_response({})

    async def _stop(self, request: web.Request) -> web.Response:
        thread = await thread_of(request)
        if thread in self._running:
            self._running[thread][0].stop()
        return web.json_response({})

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        ask = read_ask(await body(request))
        problem = self._read(ask.question)
        asking = Asking(replace(self._rollouts, temperature=ask.temperature), problem, self._pieces)
        thread, planned = uuid4().hex, asking.plan(MODES[ask.mode], ask.samples, ask.seed)
        question = {**ask.model_dump(), "question": problem.question, "answer": problem.answer, "kind": problem.kind}
        # A task of its own: a closed tab cancels this handler, and what was made until then is still to be stored.
        work = asyncio.create_task(self._answer(thread, question, planned, asking))
        self._running[thread] = asking, work
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            await send(response, {"event": "asked", "thread": thread, "question": question, "planned": planned})
            while (event := await asking.events.get()) is not None:
                await send(response, event)
            await work
        except ConnectionResetError:
            pass
        finally:
            asking.stop()
        return response

    async def _answer(self, thread: str, question: Json, planned: list[Planned], asking: Asking) -> None:
        try:
            await self._threads.run(thread, question, planned, Maker(asking.make))
            asking.events.put_nowait({"event": "end"})
        except sqlite3.Error as error:
            asking.events.put_nowait({"event": "end", "error": printable(f"these traces could not be stored: {error}")})
        finally:
            del self._running[thread]
            asking.events.put_nowait(None)

    def _read(self, question: str) -> Problem:
        """Raises Refused, ConfigError."""
        question = question.strip()
        if not question:
            raise Refused(f"the question is empty: type one such as {self._questions.example}")
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise Refused("the question holds half of a character (a lone surrogate)") from error
        engine: Any = self._rollouts.engine
        context: int = engine.max_context
        if len(self._rollouts.tokenizer.plain(question, context)[0]) >= context:
            raise Refused(f"the question fills the model's context of {context} tokens: shorten it")
        return self._questions.read(question)


@web.middleware
async def said(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Takes a POST from the page itself alone, and says what is refused in one line of JSON."""
    try:
        if request.method == "POST":
            if request.headers.get("Origin") not in (f"http://{request.host}", f"https://{request.host}"):
                raise Refused("only the page itself may ask", status=403)
            if request.content_type != "application/json":
                raise Refused("the body must be application/json", status=415)
        return await handler(request)
    except Refused as error:
        return web.json_response({"error": str(error), "field": error.field}, status=error.status)
    except AipoError as error:
        return web.json_response({"error": printable(str(error)), "field": "question"}, status=400)
    except sqlite3.Error as error:
        return web.json_response({"error": printable(f"the file of threads: {error}"), "field": "question"}, status=500)
    except web.HTTPException as error:
        return web.json_response({"error": error.reason, "field": "question"}, status=error.status)


def pieces_of(path: str) -> Pieces | None:
    """What splits text at its tokens; None for a model without a tokenizer.json."""
    try:
        return open_pieces(Path(path), {"policy.model": path})
    except ConfigError:
        return None


async def body(request: web.Request) -> object:
    """The JSON of a request. Raises Refused."""
    try:
        return json.loads(await request.text())
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from error


async def thread_of(request: web.Request) -> str:
    given = await body(request)
    return named(given.get("thread") if isinstance(given, dict) else None)


def named(thread: object) -> str:
    """The id of a thread. Raises Refused for what is none."""
    if not (isinstance(thread, str) and re.fullmatch("[0-9a-f]{32}", thread)):
        raise Refused("this names no question", status=404)
    return thread


def read_ask(given: object) -> Ask:
    """Raises Refused, naming the field."""
    try:
        return Ask.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "question"
        what = first["msg"].replace("Input should be ", "must be ")
        raise Refused(f"{field} = {str(first['input'])[:60]}: {what}", field) from error


async def send(response: web.StreamResponse, event: Json) -> None:
    # ASCII alone: whatever characters a model wrote, none can end the event.
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


@asynccontextmanager
async def opened(demo: Demo, rollouts: Rollouts) -> AsyncIterator[web.Application]:
    """The page's application, while its file of threads is open. Raises ConfigError for a file that cannot be used."""
    async with open_threads(Path(demo.threads or Path(demo.run.dir) / "demo.sqlite")) as threads:
        yield Server(demo, rollouts, threads).app()


async def serve(demo: Demo, listening: socket.socket, rollouts: Rollouts, console: Console) -> None:
    """Serves the page until SIGINT or SIGTERM."""
    async with opened(demo, rollouts) as app, serving(app, listening, cancels=True) as url:
        with told_to_end() as told:
            address = listening.getsockname()[0]
            if not ip_address(address).is_loopback:
                note = f"note: whoever can reach {address} can use the model, and read and delete what was asked"
                console.print(note, markup=False, soft_wrap=True)
            console.print(f"{printable(demo.model)}: {url} (Ctrl-C ends it)", markup=False, soft_wrap=True)
            if not demo.no_open and has_display():
                await asyncio.to_thread(webbrowser.open, url)
            await told.wait()
