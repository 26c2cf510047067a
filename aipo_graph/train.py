"""Train a policy: `python -m aipo_graph.train [config.yaml] [--section.field value]`; without a file, the quick start."""

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic_settings import CliToggleFlag
from rich.console import Console
from rich.table import Table

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.draw import layout
from aipo_graph.engines.chat import describe, open_chats
from aipo_graph.engines.decoder import torch_device
from aipo_graph.engines.handover import sweep
from aipo_graph.engines.launch import launched, serve_text
from aipo_graph.engines.open import open_engine
from aipo_graph.errors import AipoError, TrainError
from aipo_graph.evaluate import follow, start
from aipo_graph.evaluation.passk import Values
from aipo_graph.evaluation.provenance import contents, model_contents, problems_digest
from aipo_graph.evaluation.tables import cell, size
from aipo_graph.learn import memory
from aipo_graph.learn.batch import pack
from aipo_graph.learn.learner import Learner
from aipo_graph.load import model
from aipo_graph.log import RunLog, read_metrics
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.rollout.metrics import exclusions, rollout_metrics
from aipo_graph.rollout.stream import Stream
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Task, TraceGroup

Cursor = Mapping[str, Any]
"""What a checkpoint says of the run beside the learner's state: tokens sampled, training problems drawn, whether it is finished."""
TOLD = 64
"""Training problems by which a begun run knows its task again."""


class Command(Config):
    """Settings of a training run. Everything not given keeps its default."""

    force: CliToggleFlag[bool] = False
    """Go on with a begun run although settings or files have changed that change what it learns; changes.jsonl records them."""


async def train(config: Config, learner: Learner, stream: Stream, log: RunLog, cursor: Cursor) -> bool:
    """The loop: sample groups, learn from them, publish the weights; from `learner.version` to `train.steps` or `train.tokens`.

    Returns whether the end was reached; a signal stops it early. Raises TrainError when too many fail, or (from the learner) when there
    is nothing to learn from, or after three bad steps in a row; EngineError when the engine does not take the weights.
    """
    await stream.load_weights(learner)
    tokens, drawn = cursor.get("tokens", 0.0), cursor.get("drawn", learner.version * config.rollout.problems)
    started = time.monotonic()
    finished, unhelped, passed_over = False, 0, False
    with stop_signals() as stopping:
        async with aclosing(stream.steps(learner.version, config.train.steps, drawn)) as steps:  # an error ends what is under way, too
            async for step in steps:
                sampled = time.monotonic()
                names = config.rollout.helpers or config.agents.use
                metrics = rollout_metrics(step.groups, names, learner.version, step.discarded, step.too_long)
                metrics |= stream.metrics
                log.excluded(learner.version + 1, exclusions(step.groups), alarm=metrics["alarm"] > 0)
                if step.too_long and not passed_over:
                    log.note(f"{step.too_long[0].traces[0].error}: such problems are passed over, prompts/too_long counts them")
                passed_over = passed_over or bool(step.too_long)
                unhelped = unhelped + 1 if _all_helped_failed(step.groups) else 0
                if metrics["failed"] > config.rollout.max_failed or unhelped >= config.train.patience:
                    raise TrainError(_too_many_failed(config, step.groups, unhelped))
                batch = pack(step.groups, config.loss, learner.version - config.rollout.max_lag)
                shown = step.groups[: config.run.trace_groups]
                learned = await asyncio.to_thread(learner.learned, batch, shown)
                metrics |= await asyncio.to_thread(learner.step, batch)
                stepped = time.monotonic()
                await stream.load_weights(learner)
                ended = time.monotonic()
                metrics |= {"seconds/sample": sampled - started, "seconds/learn": stepped - sampled, "seconds/publish": ended - stepped}
                metrics["tokens_per_second"] = metrics["tokens/policy"] / (ended - started)
                started = ended
                log.step(learner.version, metrics, shown, learned)
                tokens += metrics["tokens/policy"]
                finished = _finished(config, learner.version, tokens)
                stopped = stopping.is_set() and stream.whole(learner.version)
                if finished or stopped or learner.version % config.run.checkpoint_every == 0:
                    warning = learner.save(log.folder / "checkpoints", {"finished": finished, "tokens": tokens, "drawn": step.drawn})
                    if warning:
                        log.note(warning)
                if finished or stopped:
                    break
    return finished


def _finished(config: Config, version: int, tokens: float) -> bool:
    """Whether a run is at its end, which later settings may have moved."""
    return version >= config.train.steps or 0 < config.train.tokens <= tokens


def _all_helped_failed(groups: Sequence[TraceGroup]) -> bool:
    """Whether helpers are down: no trace with agents can be trained on. The alone ones can hide it from the share of failed traces."""
    helped = [trace.trained for group in groups for trace in group.traces if trace.with_agents]
    return bool(helped) and not any(helped)


def _too_many_failed(config: Config, groups: Sequence[TraceGroup], unhelped: int) -> str:
    traces = [trace for group in groups for trace in group.traces]
    failed = [trace for trace in traces if not trace.trained]
    limit = f"rollout.max_failed is {config.rollout.max_failed:g}"
    if unhelped >= config.train.patience:
        limit = f"every one with agents for {unhelped} steps in a row (train.patience)"
    return f"{len(failed)} of {len(traces)} traces failed, {limit}; the first: {failed[0].error}"


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


def run(config: Config, console: Console, *, force: bool = False) -> None:
    """One run, from its last checkpoint if it has one, to its exported policy, its evaluation and summary.json.

    The base policy is evaluated in a process of its own: beside the training with the local engine, before it where both need vLLM.
    ``force`` lets a begun run go on although settings or files have changed that change what it learns.
    """
    started = time.monotonic()
    torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    path, task, evaluated = model(config.policy.model), open_task(config), config.evaluate.problems > 0
    # Data that cannot be trained on is refused before anything is loaded.
    told = contents(config) | model_contents(path) | {"the task's problems": problems_digest(map(task.train, range(TOLD)))}
    with RunLog(config, console, files=told, force=force) as log, launched(config, path, log.folder, console) as config:
        log.console.print(f"run folder {log.folder}")
        sweep(log.folder)
        learner = Learner(config, path, torch_device(config))
        cursor = learner.restore(log.folder / "checkpoints")
        before = read_metrics(log.folder / "metrics.jsonl")
        evaluation, values = log.folder / "evaluation", dict[str, Values]()
        beside = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"workers": 1})})
        with ExitStack() as stack:
            waiting = stack.enter_context(start(beside, path, evaluation / "base", kinds=task.kinds, aside=True)) if evaluated else None
            if waiting and config.engine.kind != "local":
                values["base"] = follow(waiting, console)
            if not learn(config, path, task, learner, cursor, log):
                return
            del learner  # its memory is the evaluation's, which is another process
            gc.unfreeze()
            gc.collect()
            torch.cuda.empty_cache()
            if waiting and config.engine.kind == "local":
                values["base"] = follow(waiting, console)
        if evaluated:
            with start(config, log.folder / "policy", evaluation / "trained", kinds=task.kinds, aside=True) as trained:
                values["trained"] = follow(trained, console)
        rows = read_metrics(log.folder / "metrics.jsonl")
        if len(rows) > len(before) or not (log.folder / "summary.json").exists():
            seconds = time.monotonic() - started + sum(row["seconds/sample"] + row["seconds/learn"] for row in before)
            log.summary({"wall_seconds": round(seconds, 1), **summary(log.folder, values)})
        if evaluated:
            console.print(result_table(values["base"], values["trained"]))
        console.print(f"policy, curves.png and summary.json are in {log.folder}")


def learn(config: Config, path: str, task: Task, learner: Learner, cursor: Cursor, log: RunLog) -> bool:
    """Trains from the cursor to the end and exports the policy. Returns False where a signal stopped it before."""
    finished = _finished(config, learner.version, cursor.get("tokens", 0.0))
    log.resume_at(learner.version)
    if learner.version:
        log.note(f"goes on after step {learner.version}")
    if not finished:
        finished = asyncio.run(_train(config, path, task, learner, log, cursor))
    if not finished:
        log.note(f"stopped after step {learner.version} of {config.train.steps}; the same command goes on from there")
        return False
    log.pause()
    log.curves()
    learner.export(log.folder / "policy")
    return True


async def _train(config: Config, path: str, task: Task, learner: Learner, log: RunLog, cursor: Cursor) -> bool:
    async with opened(config, path, task, log) as stream:
        return await train(config, learner, stream, log, cursor)


@asynccontextmanager
async def opened(config: Config, path: str, task: Task, log: RunLog) -> AsyncIterator[Stream]:
    """Where training steps come from: graph runs and the policy's engine, which ends with the context."""
    engine = await open_engine(config, path)
    try:
        chats = await open_chats(config, engine)
        for line in describe(chats, config):
            log.console.print(line, markup=False)
        rollouts = Rollouts.open(config, engine, task, chats)
        log.graph(layout(rollouts.graph.get_graph(), frozenset(rollouts.agents)))
        for line in rollouts.inputs[0].warnings(task.train(0)):
            log.note(line)
        gc.freeze()  # what is loaded stays: collections need not walk it at every step of thousands of graph runs
        yield Stream(rollouts, config)
    finally:
        await engine.close()


def summary(folder: Path, values: Mapping[str, Values]) -> dict[str, Any]:
    """What summary.json holds beside the wall time: the evaluations of base and trained policy, and the tokens sampled for training."""
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        "steps": len(rows),
        "train_tokens": {"policy": sum(row["tokens/policy"] for row in rows), "agent": sum(row["tokens/agent"] for row in rows)},
        **values,
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


def explain(config: Config, console: Console) -> None:
    """What a dry run says beside the settings: the memory that they need, and the command of the server that they sample from."""
    path = model(config.policy.model)
    console.print(memory.table(memory.estimate(config, path)))
    if config.engine.kind == "server":
        try:
            console.print(f"server of the policy: {serve_text(config, path)}", markup=False)
        except AipoError as error:
            console.print(f"server of the policy: its command needs the model's files ({error})", markup=False)


def main(argv: list[str]) -> None:
    command, options = cli.parse(argv, Command, prog="python -m aipo_graph.train", doc=__doc__ or "", default="configs/quickstart.yaml")
    config = Config.model_validate({name: getattr(command, name) for name in Config.model_fields})
    if options.dry_run:
        print(cli.write_yaml(config), end="")
        explain(config, Console(stderr=True, soft_wrap=True, highlight=False))
        return
    run(config, Console(soft_wrap=True, highlight=False), force=command.force)


if __name__ == "__main__":
    sys.exit(cli.main(main))
