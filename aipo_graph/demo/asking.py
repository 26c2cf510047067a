"""One question being answered on the page: its graph runs, all at once, and the events from which the page draws them."""

import asyncio
from collections.abc import Callable, Container, Sequence
from contextvars import Context
from dataclasses import replace
from typing import Any

from langchain_core.callbacks import AsyncCallbackHandler

from aipo_graph.demo.threads import Json, Planned
from aipo_graph.errors import AipoError
from aipo_graph.evaluation.samples import ballot
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.tasks.grading import last_box
from aipo_graph.types import Problem, Segment, Trace, derive_seed
from aipo_graph.view.pieces import Pieces
from aipo_graph.view.record import segment_json, split

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
