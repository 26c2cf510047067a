"""`make bench`: tokens/s of the engine alone, of the same requests through the whole graph, and of the learner; ms per superstep.

The engine alone answers exactly the requests that the graph runs made (same prompts, seeds, stops and lengths, each trace's one after
the other) with no graph, agent or grader around it. Repeats are interleaved; medians and ranges are shown. `bench_vllm.py` does the
same with vLLM.
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
from aipo_graph.engines import open_engine
from aipo_graph.engines.chat import open_chats
from aipo_graph.learn.batch import pack
from aipo_graph.learn.learner import Learner
from aipo_graph.load import find, model
from aipo_graph.rollout.collect import Rollouts, gather
from aipo_graph.rollout.tokens import tags
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Trace, derive_seed

REPEATS = 5


async def replay(rollouts: Rollouts, trace: Trace) -> int:
    """One trace's requests to the engine, without its graph. Returns the tokens sampled."""
    prompt: list[int] = []
    calls = sampled = 0
    stop = tuple(tags(name)[1] for name in rollouts.agents) if trace.with_agents else ()
    with rollouts.engine.run(f"{trace.problem_id}/{trace.seed}"):
        for segment in trace.segments:
            if segment.source == "policy":
                seed, length = derive_seed(trace.seed, "main", calls), len(segment.token_ids)
                done = await rollouts.engine.generate(prompt, seed=seed, max_tokens=length, stop=stop)
                calls, sampled = calls + 1, sampled + len(done.token_ids)
            prompt += segment.token_ids
    return sampled


async def measure(config: Config) -> dict[str, list[float]]:
    """Seconds and counts per repeat."""
    engine = await open_engine(config, model(config.policy.model))
    rollouts = Rollouts.open(config, engine, open_task(config), await open_chats(config))
    learner = Learner(config, model(config.policy.model))
    gc.freeze()  # as in training
    rows: dict[str, list[float]] = {name: [] for name in ("graph", "engine", "ratio", "learner", "superstep")}
    draws = [rollouts.draw(index) for index in range(config.rollout.problems * REPEATS)]
    await rollouts.run_groups(draws[: config.rollout.problems])
    for step in range(REPEATS):
        await engine.load_weights(learner.weights(), step)  # forgets cached prefixes
        started = time.perf_counter()
        groups = await rollouts.run_groups(draws[step * config.rollout.problems :][: config.rollout.problems])
        graph_seconds = time.perf_counter() - started
        traces = [trace for group in groups for trace in group.traces]
        await engine.load_weights(learner.weights(), step)
        started = time.perf_counter()
        replayed = sum(await gather([replay(rollouts, trace) for trace in traces]))
        engine_seconds = time.perf_counter() - started
        if config.engine.kind == "local":
            started = time.perf_counter()
            learner.step(pack(groups, config.loss))
            rows["learner"].append(sum(len(s.token_ids) for t in traces for s in t.segments) / (time.perf_counter() - started))
        sampled = sum(len(s.token_ids) for t in traces for s in t.segments if s.source == "policy")
        rows["graph"].append(sampled / graph_seconds)
        rows["engine"].append(replayed / engine_seconds)
        rows["ratio"].append(sampled / graph_seconds * engine_seconds / replayed)
        rows["superstep"].append(1000 * (graph_seconds - engine_seconds) / sum(len(t.path) for t in traces))
    await engine.close()
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
    report(config, asyncio.run(measure(config)), "bench.json")


def report(config: Config, rows: dict[str, list[float]], file: str) -> None:
    """Shows medians and ranges, and writes all repeats to ``runs/bench/``, past the results that the docs quote."""
    table = Table("", "median", "min", "max", title=f"{REPEATS} repeats of {config.rollout.problems} x {config.rollout.traces} traces")
    for name, label in NAMES.items():
        if not rows[name]:
            continue
        values = [statistics.median(rows[name]), min(rows[name]), max(rows[name])]
        table.add_row(label, *(f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in values))
    Console().print(table)
    hardware = f"{os.cpu_count()} cores, {torch.get_num_threads()} in use, {platform.machine()}, torch {torch.__version__}"
    folder = Path("runs/bench")
    folder.mkdir(parents=True, exist_ok=True)
    written = {"date": date.today().isoformat(), "hardware": hardware, "policy": config.policy.model, "rows": rows}
    (folder / file).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cli.main(main))
