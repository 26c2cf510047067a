"""The demo's page: a small aiohttp server, for streams and two dozen lines of routes need no web framework beside the HTTP library we have.

One engine serves all tabs. A trace is told as it is made, as server-sent events in the answer to the POST that asked for it, so that a
closed tab ends its runs; what was made until then is stored all the same.
"""

import asyncio
import json
import re
import socket
import sqlite3
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import Field, ValidationError
from rich.console import Console

from aipo_graph import __version__
from aipo_graph.cli import printable
from aipo_graph.config import Section
from aipo_graph.demo.asking import Asking
from aipo_graph.demo.options import MOST_SAMPLES, Demo
from aipo_graph.demo.questions import Questions
from aipo_graph.demo.threads import Json, Maker, Planned, Threads, open_threads
from aipo_graph.draw import layout
from aipo_graph.errors import AipoError, ConfigError
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.types import Problem
from aipo_graph.view.page import assemble, csp, has_display
from aipo_graph.view.pieces import Pieces, open_pieces
from aipo_graph.view.serve import guard, secured, serving, told_to_end

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
