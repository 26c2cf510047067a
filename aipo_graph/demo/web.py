"""The demo's page: a small aiohttp server, for streams and two dozen lines of routes need no web framework beside the HTTP library we have.

One engine serves all tabs. A trace is told as it is made, as server-sent events in the answer to the POST that asked for it, so that a
closed tab ends its runs; what was made until then is kept all the same.
"""

import asyncio
import json
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Handler
from langchain_core.callbacks import AsyncCallbackHandler
from pydantic import Field
from pydantic_core import from_json

from aipo_graph import __version__
from aipo_graph.cli import printable, validated
from aipo_graph.config import Section
from aipo_graph.demo import MOST_SAMPLES, Demo, Questions
from aipo_graph.draw import picture
from aipo_graph.errors import AipoError, ConfigError
from aipo_graph.evaluation.samples import ballot
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.tasks.grading import last_box
from aipo_graph.types import Problem, Segment, Trace, derive_seed
from aipo_graph.view.record import Pieces, assemble, open_pieces, segment_json, split
from aipo_graph.view.serve import application

NEWEST = 200
"""Questions that are kept, as long as the server runs."""
TITLE = 200
"""Characters of a question in the history."""
Json = dict[str, Any]
"""A JSON object."""


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
    """Makes the traces of one question. ``events`` holds what the page is to be told, None at the end."""

    def __init__(self, rollouts: Rollouts, problem: Problem, pieces: Pieces | None) -> None:
        self.events: asyncio.Queue[Json | None] = asyncio.Queue()
        self._rollouts = rollouts
        self._pieces = pieces
        self._problem = problem

    def plan(self, modes: Sequence[bool], samples: int, seed: int) -> list[Json]:
        """The traces to be made, with the seeds that the terminal takes: the same settings show the same traces there.

        A seed is text: JavaScript's integers end at 2^53.
        """
        seeds = [str(derive_seed(seed, "demo", self._problem.question, sample)) for sample in range(samples)]
        runs = [(with_agents, sample) for with_agents in modes for sample in range(samples)]
        return [
            {"number": number, "sample": sample, "with_agents": with_agents, "seed": seeds[sample]}
            for number, (with_agents, sample) in enumerate(runs)
        ]

    async def make(self, planned: Json) -> Json:
        """One trace, told as it is made: cancelled, what it is so far. A fault of ours in it is its error; a bug in a graph's own code is
        raised.
        """
        made = [Trace(self._problem.id, int(planned["seed"]), planned["with_agents"], (), ())]
        status = ""

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
        except asyncio.CancelledError:
            trace, status = made[0], STOPPED
        if not trace.trained:
            trace = replace(trace, path=made[0].path)  # with the node that failed
        shown = self._shown(planned, trace, status)
        self._tell(planned, {"event": "trace", "trace": shown})
        return shown

    def _tell(self, planned: Json, event: Json) -> None:
        self.events.put_nowait({"run": planned["number"], **event})

    def _shown(self, planned: Json, trace: Trace, status: str) -> Json:
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


class Server:
    """The routes of the page."""

    def __init__(self, demo: Demo, rollouts: Rollouts) -> None:
        self._demo = demo
        self._rollouts = rollouts
        self._asked: dict[str, Json] = {}
        """Thread -> the question and its traces, as far as they have ended; the newest last."""
        self._questions = Questions(rollouts, demo.run.seed)
        self._pieces: Pieces | None = None
        with suppress(ConfigError):  # a model without a tokenizer.json
            self._pieces = open_pieces(Path(demo.policy.model), {"policy.model": demo.policy.model})
        self._running: dict[str, tuple[list[asyncio.Task[None]], asyncio.Task[None]]] = {}
        """Thread -> the runs of the question, and what ends after them."""

    def app(self) -> web.Application:
        app = application(assemble("aipo_graph demo", SCRIPTS, STYLES, live=True), self._demo.host, said)
        app.on_shutdown.append(self._close)
        app.add_routes(
            [
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
        """Ends all runs, and waits until what they made is kept."""
        await asyncio.gather(*map(self._end, list(self._running)))

    async def _end(self, thread: str) -> None:
        """Stops the runs of a question, and waits until what they made is kept; nothing where none runs."""
        if thread in self._running:
            runs, work = self._running[thread]
            for run in runs:
                run.cancel()
            await asyncio.wait([work])

    async def _about(self, request: web.Request) -> web.Response:
        demo = self._demo
        agents = frozenset([*self._rollouts.agents, *demo.rollout.helpers])
        return web.json_response(
            {
                "version": __version__,
                "model": demo.model,
                "agents": sorted(agents),
                "kinds": list(self._rollouts.task.kinds),
                "example": self._questions.example,
                "notation": str(getattr(self._rollouts.task, "notation", "")),
                "most_samples": MOST_SAMPLES,
                "graphs": {
                    "alone": picture(self._rollouts.solo.get_graph(), agents),
                    "with_agents": picture(self._rollouts.graph.get_graph(), agents),
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
        listed = [
            {"thread": thread, "title": asked["question"]["question"][:TITLE], "asked": asked["asked"], "traces": len(asked["planned"])}
            for thread, asked in reversed(self._asked.items())
        ]
        return web.json_response(listed)

    async def _thread(self, request: web.Request) -> web.Response:
        if (asked := self._asked.get(request.query.get("id", ""))) is None:
            raise web.HTTPNotFound(reason="this question is no longer kept")
        return web.json_response(asked)

    async def _forget(self, request: web.Request) -> web.Response:
        thread = request.query.get("id", "")
        await self._end(thread)
        self._asked.pop(thread, None)
        return web.json_response({})

    async def _stop(self, request: web.Request) -> web.Response:
        await self._end(request.query.get("id", ""))
        return web.json_response({})

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        ask = read(await request.text())
        problem = self._read(ask.question)
        asking = Asking(replace(self._rollouts, temperature=ask.temperature), problem, self._pieces)
        thread, planned = uuid4().hex, asking.plan(MODES[ask.mode], ask.samples, ask.seed)
        question = {**ask.model_dump(), "question": problem.question, "answer": problem.answer, "kind": problem.kind}
        kept: Json = {"question": question, "planned": planned, "asked": datetime.now(UTC).isoformat(), "traces": []}
        self._asked = dict([*self._asked.items(), (thread, kept)][-NEWEST:])

        async def keep(planned: Json) -> None:
            kept["traces"].append(await asking.make(planned))

        # Tasks of their own: a closed tab cancels this handler, and what was made until then is still to be kept.
        runs = [asyncio.create_task(keep(run)) for run in planned]
        work = asyncio.create_task(self._answer(thread, runs, asking.events))
        self._running[thread] = runs, work
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
            for run in runs:
                run.cancel()
        return response

    async def _answer(self, thread: str, runs: Sequence[asyncio.Task[None]], events: asyncio.Queue[Json | None]) -> None:
        try:
            await asyncio.gather(*runs)
            events.put_nowait({"event": "end"})
        finally:
            for run in runs:
                run.cancel()
            del self._running[thread]
            events.put_nowait(None)

    def _read(self, question: str) -> Problem:
        """Raises ConfigError."""
        question = question.strip()
        if not question:
            raise ConfigError(f"the question is empty: type one such as {self._questions.example}")
        engine: Any = self._rollouts.engine
        context: int = engine.max_context
        if len(self._rollouts.tokenizer.plain(question, context)[0]) >= context:
            raise ConfigError(f"the question fills the model's context of {context} tokens: shorten it")
        return self._questions.read(question)


@web.middleware
async def said(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Takes a POST from the page itself alone, and says what is refused in one line of JSON."""
    try:
        if request.method == "POST" and request.headers.get("Origin") not in (f"http://{request.host}", f"https://{request.host}"):
            raise web.HTTPForbidden(reason="only the page itself may ask")
        if request.method == "POST" and request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(reason="the body must be application/json")
        return await handler(request)
    except AipoError as error:
        text, status = printable(str(error)), 400
    except web.HTTPException as error:
        text, status = error.reason, error.status
    field = next((name for name in Ask.model_fields if text.startswith(f"{name} = ")), "question")
    return web.json_response({"error": text, "field": field}, status=status)


def read(body: str) -> Ask:
    """The JSON of a request. Raises ConfigError, which begins with the field that is wrong."""
    try:
        return validated(Ask, from_json(body))
    except ValueError as error:
        raise ConfigError(f"the request is no JSON: {error}") from error


async def send(response: web.StreamResponse, event: Json) -> None:
    # ASCII alone: whatever characters a model wrote, none can end the event.
    await response.write(f"data: {json.dumps(event)}\n\n".encode())
