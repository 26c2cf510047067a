"""`make bench`: tokens/s of the engine alone, of the same requests through the whole graph, and of the learner; ms per superstep.

The engine alone answers exactly the requests that the graph runs made (same prompts, seeds and stops, each trace's one after the
other) with no graph, agent or grader around it. Repeats are interleaved; medians and ranges are shown.
"""

import asyncio
import gc
import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.engines.local import LocalEngine
from aipo_graph.learn.batch import pack
from aipo_graph.learn.learner import Learner
from aipo_graph.load import find, model
from aipo_graph.rollout.collect import Rollouts, gather
from aipo_graph.rollout.protocol import tags
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Trace, TraceGroup, derive_seed

REPEATS = 5


async def replay(rollouts: Rollouts, trace: Trace) -> None:
    """One trace's requests to the engine, without its graph."""
    prompt: list[int] = []
    calls, left = 0, rollouts.config.rollout.max_tokens
    stop = tuple(tags(name)[1] for name in rollouts.agents) if trace.with_agents else ()
    with rollouts.engine.run(f"{trace.problem_id}/{trace.seed}"):
        for segment in trace.segments:
            if segment.source == "policy":
                done = await rollouts.engine.generate(prompt, seed=derive_seed(trace.seed, "main", calls), max_tokens=left, stop=stop)
                if done.token_ids != segment.token_ids:
                    raise SystemExit("the replay sampled other tokens than the graph run: the comparison would not be fair")
                calls, left = calls + 1, left - len(done.token_ids)
            prompt += segment.token_ids


async def measure(config: Config) -> dict[str, list[float]]:
    """Seconds and counts per repeat."""
    engine = LocalEngine.load(config, model(config.policy.model))
    rollouts = Rollouts.open(config, engine, open_task(config))
    learner = Learner(config, model(config.policy.model))
    gc.freeze()  # as in training
    rows: dict[str, list[float]] = {name: [] for name in ("graph", "engine", "ratio", "learner", "superstep")}
    groups: tuple[TraceGroup, ...] = await rollouts.run_step(0)
    for step in range(REPEATS):
        started = time.perf_counter()
        groups = await rollouts.run_step(step)
        graph_seconds = time.perf_counter() - started
        traces = [trace for group in groups for trace in group.traces]
        engine.load_weights(engine.model.state_dict().items(), engine.version)  # forgets cached prefixes
        started = time.perf_counter()
        await gather([replay(rollouts, trace) for trace in traces])
        engine_seconds = time.perf_counter() - started
        started = time.perf_counter()
        learner.step(pack(groups, config.loss))
        learner_seconds = time.perf_counter() - started
        sampled = sum(len(s.token_ids) for t in traces for s in t.segments if s.source == "policy")
        rows["graph"].append(sampled / graph_seconds)
        rows["engine"].append(sampled / engine_seconds)
        rows["ratio"].append(engine_seconds / graph_seconds)
        rows["learner"].append(sum(len(s.token_ids) for t in traces for s in t.segments) / learner_seconds)
        rows["superstep"].append(1000 * (graph_seconds - engine_seconds) / sum(len(t.path) for t in traces))
    return rows


NAMES = {
    "engine": "engine alone, sampled tokens/s",
    "graph": "through the graph, sampled tokens/s",
    "ratio": "graph / engine",
    "learner": "learner, tokens/s",
    "superstep": "graph's own time, ms per superstep",
}


def main(argv: list[str]) -> None:
    config, _ = cli.parse(argv or [str(find("configs/quickstart.yaml"))], Config, prog="python benchmarks/bench.py", doc=__doc__)
    torch.set_num_threads(config.run.threads)
    rows = asyncio.run(measure(config))
    table = Table("", "median", "min", "max", title=f"{REPEATS} repeats of {config.rollout.problems} x {config.rollout.traces} traces")
    for name, label in NAMES.items():
        values = [statistics.median(rows[name]), min(rows[name]), max(rows[name])]
        table.add_row(label, *(f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in values))
    Console().print(table)
    hardware = f"{os.cpu_count()} cores, {torch.get_num_threads()} in use, {platform.machine()}, torch {torch.__version__}"
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    report = {"date": date.today().isoformat(), "hardware": hardware, "policy": config.policy.model, "rows": rows}
    (folder / "bench.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cli.main(main))
