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
from langchain_core.callbacks import AsyncCallbackHandler
from pydantic import Field
from pydantic_core import from_json

from aipo_graph import __version__
from aipo_graph.cli import validated
from aipo_graph.config import Section
from aipo_graph.demo import MOST_SAMPLES, Demo, Questions
from aipo_graph.draw import picture
from aipo_graph.errors import AipoError, ConfigError
from aipo_graph.evaluation.samples import ballot
from aipo_graph.log import Step
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.tasks.grading import last_box
from aipo_graph.types import Problem, Segment, Trace, derive_seed
from aipo_graph.view.read import TITLE
from aipo_graph.view.record import Pieces, assemble, open_pieces, segment_json, split
from aipo_graph.view.serve import application

NEWEST = 200
"""Questions that are kept, as long as the server runs."""
Json = dict[str, Any]


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


def plan(problem: Problem, modes: Sequence[bool], samples: int, seed: int) -> list[Json]:
    """The traces to be made of a problem, with the seeds that the terminal takes: the same settings show the same traces there.

    A seed is text: JavaScript's integers end at 2^53.
    """
    seeds = [str(derive_seed(seed, "demo", problem.question, sample)) for sample in range(samples)]
    runs = [(with_agents, sample) for with_agents in modes for sample in range(samples)]
    return [
        {"number": number, "sample": sample, "with_agents": with_agents, "seed": seeds[sample]}
        for number, (with_agents, sample) in enumerate(runs)
    ]


async def make(rollouts: Rollouts, problem: Problem, planned: Json, pieces: Pieces | None, tell: Callable[[Json], None]) -> Json:
    """One trace, told as it is made: cancelled, what it is so far. A fault of ours in it is its error; a bug in a graph's own code is
    raised.
    """
    number, seed, with_agents = planned["number"], int(planned["seed"]), planned["with_agents"]
    trace, status = Trace(problem.id, seed, with_agents, (), ()), ""

    def visit(node: str) -> None:
        nonlocal trace
        trace = replace(trace, path=(*trace.path, node))
        tell({"run": number, "event": "node", "node": node})

    def append(segments: Sequence[Segment]) -> None:
        nonlocal trace
        trace = replace(trace, segments=(*trace.segments, *segments))
        tell({"run": number, "event": "segments", "segments": _segments(trace, pieces)[-len(segments) :]})

    which = "graph" if with_agents else "solo"
    graph = getattr(rollouts, which)
    rollouts = replace(rollouts, **{which: graph.with_config(callbacks=[Nodes(visit, graph.nodes)])})
    start = rollouts.run_trace if problem.answer else rollouts.run_graph
    try:
        made = await start(problem, seed=seed, with_agents=with_agents, on_segments=append)
        trace = made if made.trained else replace(made, path=trace.path)  # with the node that failed
    except AipoError as error:
        trace = replace(trace, status="failed", error=f"{type(error).__name__}: {error}")
    except asyncio.CancelledError:
        status = STOPPED
    box = last_box(trace.reply) if trace.trained and not status and trace.scores.get("answered", 1.0) else None
    # As the viewer's components take it, and its vote.
    shown = {
        **planned,
        "status": status or trace.status,
        "error": trace.error,
        "scores": dict(trace.scores),
        "reward": trace.scores.get("reward"),
        "right": trace.solved if problem.answer and trace.trained and not status else None,
        "answer": box,
        "vote": ballot(box),
        "path": list(trace.path),
        "segments": _segments(trace, pieces),
    }
    tell({"run": number, "event": "trace", "trace": shown})
    return shown


def _segments(trace: Trace, pieces: Pieces | None) -> list[Json]:
    return [segment_json(segment, tokens) for segment, tokens in zip(trace.segments, split(trace.segments, pieces), strict=True)]


# --- the server

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("vendor/htm-preact.umd.js", "start.js", "tokens.js", "graph.js", str(STATIC / "demo.js"))
STYLES = ("style.css", str(STATIC / "demo.css"))
MODES = {"both": (False, True), "alone": (False,), "with_agents": (True,)}
"""Whether with agents, of the traces of a question."""


class Ask(Section):
    """What the page sends to have a question answered."""

    question: str
    mode: Literal["both", "alone", "with_agents"] = "both"
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 1
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    seed: Step = 0


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
        self._running: dict[str, asyncio.Task[None]] = {}
        """Thread -> what makes its traces."""

    def app(self) -> web.Application:
        app = application(assemble("aipo_graph demo", SCRIPTS, STYLES, live=True), self._demo.host)
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
            work = self._running[thread]
            work.cancel()
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

    async def _stop(self, request: web.Request) -> web.Response:
        await self._end(request.query.get("id", ""))
        return web.json_response({})

    async def _forget(self, request: web.Request) -> web.Response:
        self._asked.pop(request.query.get("id", ""), None)
        return await self._stop(request)

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        try:
            ask = validated(Ask, from_json(await request.text()))
        except ValueError as error:
            raise ConfigError(f"the request is no JSON: {error}") from error
        problem = self._read(ask.question)
        rollouts, events = replace(self._rollouts, temperature=ask.temperature), asyncio.Queue[Json | None]()
        thread, planned = uuid4().hex, plan(problem, MODES[ask.mode], ask.samples, ask.seed)
        question = {**ask.model_dump(), "question": problem.question, "answer": problem.answer, "kind": problem.kind}
        kept: Json = {"question": question, "planned": planned, "asked": datetime.now(UTC).isoformat(), "traces": []}
        self._asked = dict([*self._asked.items(), (thread, kept)][-NEWEST:])

        async def keep(planned: Json) -> None:
            kept["traces"].append(await make(rollouts, problem, planned, self._pieces, events.put_nowait))

        async def answer() -> None:
            with suppress(asyncio.CancelledError):  # each run has ended and was kept
                async with asyncio.TaskGroup() as runs:
                    for run in planned:
                        runs.create_task(keep(run))

        # A task of its own: a closed tab cancels this handler, and what was made until then is still to be kept.
        work = self._running[thread] = asyncio.create_task(answer())
        # Not at the end of answer(): stopped before its first step, a task never gets there.
        work.add_done_callback(lambda _: self._running.pop(thread))
        work.add_done_callback(lambda _: events.put_nowait(None))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            await send(response, {"event": "asked", "thread": thread, "question": question, "planned": planned})
            while (event := await events.get()) is not None:
                await send(response, event)
            await work
            await send(response, {"event": "end"})
        except ConnectionResetError:
            pass
        finally:
            work.cancel()
        return response

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


async def send(response: web.StreamResponse, event: Json) -> None:
    # ASCII alone: whatever characters a model wrote, none can end the event.
    await response.write(f"data: {json.dumps(event)}\n\n".encode())
