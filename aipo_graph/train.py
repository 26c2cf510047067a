"""Train a policy: `python -m aipo_graph.train [config.yaml] [--section.field value]`; without a file, the quick start."""

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.engines.local import LocalEngine
from aipo_graph.errors import TrainError
from aipo_graph.evaluate import cell, follow, size, start
from aipo_graph.learn.batch import pack
from aipo_graph.learn.learner import Learner
from aipo_graph.load import model
from aipo_graph.log import RunLog, read_metrics
from aipo_graph.passk import Values
from aipo_graph.rollout.collect import LocalRollouts, Rollouts
from aipo_graph.rollout.metrics import rollout_metrics
from aipo_graph.tasks.open import open_task
from aipo_graph.types import TraceGroup


async def train(config: Config, learner: Learner, rollouts: Rollouts, log: RunLog, tokens: float = 0.0) -> bool:
    """The loop: sample groups, learn from them, publish the weights; from `learner.version` to `train.steps` or `train.tokens`.

    ``tokens`` were sampled before. Returns whether the end was reached; a signal stops it early. Raises TrainError when too many fail,
    or (from the learner) when there is nothing to learn from, or after three bad steps in a row.
    """
    local = LocalRollouts(rollouts)
    local.load_weights(learner.weights(), learner.version)
    ended = time.monotonic()
    finished = False
    with stop_signals() as stopping:
        async for groups in local.stream(learner.version, config.train.steps):
            sampled, started = time.monotonic(), ended
            metrics = rollout_metrics(groups, rollouts.agents, learner.version)
            if metrics["failed"] > config.rollout.max_failed:
                raise TrainError(_too_many_failed(config, groups))
            metrics |= await asyncio.to_thread(learner.step, pack(groups, config.loss))
            local.load_weights(learner.weights(), learner.version)
            ended = time.monotonic()
            metrics |= {"seconds/sample": sampled - started, "seconds/learn": ended - sampled}
            metrics["tokens_per_second"] = metrics["tokens/policy"] / (ended - started)
            log.step(learner.version, metrics, groups)
            tokens += metrics["tokens/policy"]
            finished = learner.version == config.train.steps or 0 < config.train.tokens <= tokens
            regular = learner.version % config.run.checkpoint_every == 0
            # One step ahead, only a regular checkpoint resumes with just the weights that the undisturbed run samples with.
            stopped = stopping.is_set() and (regular or not config.rollout.max_lag)
            if finished or stopped or regular:
                warning = learner.save(log.folder / "checkpoints", {"finished": finished, "tokens": tokens})
                if warning:
                    log.note(warning)
            if finished or stopped:
                break
    return finished


def _too_many_failed(config: Config, groups: Sequence[TraceGroup]) -> str:
    traces = [trace for group in groups for trace in group.traces]
    failed = [trace for trace in traces if not trace.trained]
    return (
        f"{len(failed)} of {len(traces)} traces failed, rollout.max_failed is {config.rollout.max_failed:g}; the first: {failed[0].error}"
    )


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """The first SIGINT or SIGTERM sets the event, so that the step under way is finished and saved; a second ends the process."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield stopping
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def run(config: Config, console: Console) -> None:
    """One run, from its last checkpoint if it has one, to its exported policy, its evaluation and summary.json.

    The base policy is evaluated in a process of its own while the training goes on.
    """
    started = time.monotonic()
    torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    path, task = model(config.policy.model), open_task(config)
    with RunLog(config, console) as log:
        log.console.print(f"run folder {log.folder}")
        engine = LocalEngine.load(config, path)
        learner = Learner(config, path, engine.device)
        cursor = learner.restore(log.folder / "checkpoints")
        finished = cursor.get("finished", False)
        log.resume_at(learner.version)
        before = read_metrics(log.folder / "metrics.jsonl")
        if learner.version:
            log.note(f"goes on after step {learner.version}")
        beside = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"workers": 1})})
        with start(beside, path, log.folder / "evaluation" / "base", kinds=task.kinds) as base_evaluation:
            if not finished:
                rollouts = Rollouts.open(config, engine, task)
                gc.freeze()  # what is loaded stays: collections need not walk it at every step of thousands of graph runs
                finished = asyncio.run(train(config, learner, rollouts, log, cursor.get("tokens", 0.0)))
            if not finished:
                log.note(f"stopped after step {learner.version} of {config.train.steps}; the same command goes on from there")
                return
            log.pause()
            log.curves()
            learner.export(log.folder / "policy")
            base = follow(base_evaluation, console)
        with start(config, log.folder / "policy", log.folder / "evaluation" / "trained", kinds=task.kinds) as evaluation:
            trained = follow(evaluation, console)
        if not (log.folder / "summary.json").exists():
            seconds = time.monotonic() - started + sum(row["seconds/sample"] + row["seconds/learn"] for row in before)
            log.summary({"wall_seconds": round(seconds, 1), **summary(log.folder, base, trained)})
        console.print(result_table(base, trained))
        console.print(f"policy, curves.png and summary.json are in {log.folder}")


def summary(folder: Path, base: Values, trained: Values) -> dict[str, Any]:
    """What summary.json holds beside the wall time: both evaluations and the tokens that were sampled for training."""
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        "steps": len(rows),
        "train_tokens": {"policy": sum(row["tokens/policy"] for row in rows), "agent": sum(row["tokens/agent"] for row in rows)},
        "base": base,
        "trained": trained,
    }


def result_table(base: Values, trained: Values) -> Table:
    """Base and trained policy, alone and with agents, and the other kinds alone."""
    shown = Table(title=f"held-out {base['kind']} problems, 95 % intervals over problems")
    columns = [("alone", base["alone"], trained["alone"]), ("with agents", base["with_agents"], trained["with_agents"])]
    columns += [(f"{kind} alone", base["kinds"][kind]["alone"], trained["kinds"][kind]["alone"]) for kind in base["kinds"]]
    shown.add_column("")
    for title, _, _ in columns:
        shown.add_column(f"base\n{title}", justify="right")
        shown.add_column(f"trained\n{title}", justify="right", style="bold")
    for name in (*(f"pass@{k}" for k in base["k"]), "greedy"):
        shown.add_row(name, *(cell(found, name) for _, *pair in columns for found in pair))
    shown.add_section()
    shown.add_row("problems x samples", *(size(found) for _, *pair in columns for found in pair))
    return shown


def main(argv: list[str]) -> None:
    config, options = cli.parse(argv, Config, prog="python -m aipo_graph.train", doc=__doc__ or "", default="configs/quickstart.yaml")
    if options.dry_run:
        print(cli.write_yaml(config), end="")
        return
    run(config, Console(soft_wrap=True, highlight=False))


if __name__ == "__main__":
    sys.exit(cli.main(main))
