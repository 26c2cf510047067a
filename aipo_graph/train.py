"""Train a policy: `python -m aipo_graph.train [config.yaml] [--section.field value]`; without a file, the quick start."""

import asyncio
import gc
import inspect
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic_settings import CliToggleFlag
from rich.console import Console

from aipo_graph import cli, loops
from aipo_graph import load as files
from aipo_graph.api import AgentsLike, DataLike, GraphLike, RewardLike, Run, Settings, TaskLike, configured, run_name, settings_of
from aipo_graph.config import Config
from aipo_graph.draw import picture
from aipo_graph.engines import open_engine
from aipo_graph.engines.chat import describe, open_chats
from aipo_graph.engines.decoder import device_here
from aipo_graph.engines.launch import launched, serve_text
from aipo_graph.engines.vllm_api import sweep
from aipo_graph.errors import AipoError, ConfigError, LostError, TrainError
from aipo_graph.evaluate import measure, progress
from aipo_graph.evaluation.report import compare, trained_table, verdict
from aipo_graph.evaluation.samples import Values, contents, model_contents, problems_digest
from aipo_graph.learn import memory
from aipo_graph.learn.batch import pack
from aipo_graph.learn.learner import Learner
from aipo_graph.log import RunLog, read_metrics
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.rollout.stream import Stream, exclusions, rollout_metrics
from aipo_graph.tasks.open import open_task, problems_of
from aipo_graph.types import Engine, Task, TraceGroup
from aipo_graph.workers import Workers, processes

Cursor = Mapping[str, Any]
"""What a checkpoint says of the run beside the learner's state: tokens sampled, training problems drawn."""
OnStep = Callable[[int, Mapping[str, float]], Any]
"""Called, and awaited if it is asynchronous, after each step with its number and metrics; what is true stops the run."""
TOLD = 64
"""Training problems by which a begun run knows its task again."""


class Command(Config):
    """Settings of a training run. Everything not given keeps its default."""

    force: CliToggleFlag[bool] = False
    """Go on with a begun run although settings or files have changed that change what it learns; changes.jsonl records them."""


async def loop(
    config: Config, learner: Learner, stream: Stream, log: RunLog, cursor: Cursor, stopping: threading.Event, on_step: OnStep | None
) -> bool:
    """The loop: sample groups, learn from them, publish the weights; from `learner.version` to `train.steps` or `train.tokens`.

    Returns whether the end was reached; ``stopping``, a signal and ``on_step`` stop it early. Raises TrainError when too many fail, or
    (from the learner) when there is nothing to learn from, or after three bad steps in a row; EngineError when the engine does not take
    the weights.
    """
    await stream.load_weights(learner)
    tokens, drawn = cursor.get("tokens", 0.0), cursor.get("drawn", learner.version * config.rollout.problems)
    started = time.monotonic()
    finished, unhelped, passed_over = False, 0, False
    with stop_signals(stopping, log):
        async with aclosing(stream.steps(learner.version, config.train.steps, drawn)) as steps:  # an error ends what is under way, too
            async for step in steps:
                sampled = time.monotonic()
                names = config.rollout.helpers or config.agents.use
                metrics = rollout_metrics(step.groups, names, learner.version, step.discarded, step.too_long) | stream.metrics
                log.excluded(learner.version + 1, exclusions(step.groups), alarm=metrics["alarm"] > 0)
                if step.too_long and not passed_over:
                    log.note(f"{step.too_long[0].traces[0].error}: such problems are passed over, prompts/too_long counts them")
                passed_over = passed_over or bool(step.too_long)
                helped = [trace.trained for group in step.groups for trace in group.traces if trace.with_agents]
                unhelped = unhelped + 1 if helped and not any(helped) else 0  # the alone ones can hide it from the share of failed traces
                if metrics["failed"] > config.rollout.max_failed or unhelped >= config.train.patience:
                    raise TrainError(_too_many_failed(config, step.groups, unhelped))
                batch = pack(step.groups, config.loss, learner.version - config.rollout.max_lag)
                shown = step.groups[: config.run.trace_groups]
                learned = await asyncio.to_thread(_learn, config, learner.learned, batch, shown)
                try:
                    metrics |= await asyncio.to_thread(_learn, config, learner.step, batch)
                except TrainError as error:
                    if metrics["violations"] > 0.5:  # traces with agents are worth nothing since the policy wrote the helpers' part
                        raise TrainError(
                            f"{error}; {metrics['violations']:.0%} of the last step's traces with agents got 0 since the policy wrote a "
                            "reply's tags itself (violations): say in its prompt that it must stop at a request"
                        ) from error
                    raise
                stepped = time.monotonic()
                await stream.load_weights(learner)
                ended = time.monotonic()
                metrics |= {"seconds/sample": sampled - started, "seconds/learn": stepped - sampled, "seconds/publish": ended - stepped}
                metrics["tokens_per_second"] = metrics["tokens/policy"] / (ended - started)
                started = ended
                log.step(learner.version, metrics, shown, learned)
                asked = on_step(learner.version, metrics) if on_step else False
                if await asked if inspect.isawaitable(asked) else asked:
                    stopping.set()
                tokens += metrics["tokens/policy"]
                finished = _finished(config, learner.version, tokens)
                stopped = stopping.is_set() and stream.whole(learner.version)
                if finished or stopped or learner.version % config.run.checkpoint_every == 0:
                    warning = await asyncio.to_thread(learner.save, log.folder / "checkpoints", {"tokens": tokens, "drawn": step.drawn})
                    if warning:
                        log.note(warning)
                if finished or stopped:
                    break
    return finished


def _learn(config: Config, method: Callable[..., Any], *arguments: Any) -> Any:
    """In a thread whose parallel operations have the cores of all that sample, where these wait meanwhile."""
    torch.set_num_threads(config.run.threads * (1 if config.rollout.max_lag else processes(config)))
    try:
        return method(*arguments)
    finally:
        torch.set_num_threads(config.run.threads)  # a part of it is the whole process's


def _finished(config: Config, version: int, tokens: float) -> bool:
    """Whether a run is at its end, which later settings may have moved."""
    return version >= config.train.steps or 0 < config.train.tokens <= tokens


def _too_many_failed(config: Config, groups: Sequence[TraceGroup], unhelped: int) -> str:
    traces = [trace for group in groups for trace in group.traces]
    failed = [trace for trace in traces if not trace.trained]
    limit = f"rollout.max_failed is {config.rollout.max_failed:g}"
    if unhelped >= config.train.patience:
        limit = f"every one with agents for {unhelped} steps in a row (train.patience)"
    return f"{len(failed)} of {len(traces)} traces failed, {limit}; the first: {failed[0].error}"


@contextmanager
def stop_signals(stopping: threading.Event, log: RunLog) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets the event, so that the step under way is finished and saved; a second ends the process.

    Another thread than the main one gets no signals.
    """

    def stop(number: int) -> None:
        if stopping.is_set():
            if hasattr(sys, "ps1"):  # of somebody's session
                raise KeyboardInterrupt
            os._exit(128 + number)
        stopping.set()
        log.note("stops once the step under way is done and saved; once more ends it at once")

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    running = asyncio.get_running_loop()
    for number in numbers:
        running.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in numbers:
            running.remove_signal_handler(number)


def train(
    model: str | Path | None = None,
    config: Settings | None = None,
    *,
    graph: GraphLike | None = None,
    solo: GraphLike | None = None,
    agents: AgentsLike | None = None,
    task: TaskLike | None = None,
    data: DataLike | None = None,
    heldout: DataLike | None = None,
    reward: RewardLike | None = None,
    steps: int | None = None,
    name: str | None = None,
    on_step: OnStep | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Run:
    """Trains a policy, or goes on with a begun run, to its exported policy, its evaluation and summary.json (docs/python.md).

    Works in a notebook and in any thread. A run that was stopped goes on by the same call. What is not named here may be an object or a
    path, and is above what the config says.

    Args:
        model: a model directory, the folder of a run, ``operators`` or a hub name; default: the config's.
        config: what is not given otherwise; default: the settings' defaults, and without a model the quick start.
        steps: `train.steps`.
        name: `run.name`; where nothing names the run, the model does.
        on_step: called after each step with its number and metrics; what is true stops the run.
        force: let a begun run go on although settings or files have changed that change what it learns.
        console: where it says what it does; default: standard output.

    Raises AipoError in one line.
    """
    base = settings_of(config or ({} if model else "configs/quickstart.yaml"))
    if model and name is None and "name" not in base.run.model_fields_set:
        name = run_name(str(model))
    given = {"policy.model": model and str(model), "train.steps": steps, "run.name": name}
    with configured(base, graph=graph, solo=solo, agents=agents, task=task, data=data, heldout=heldout, reward=reward, **given) as settings:
        run(settings, console or Console(soft_wrap=True, highlight=False), force=force, on_step=on_step)
        return Run(Path(settings.run.dir) / settings.run.name)


def run(config: Config, console: Console, *, force: bool = False, on_step: OnStep | None = None) -> None:
    """One run, from its last checkpoint if it has one, to its exported policy, its evaluation and summary.json.

    Policies are evaluated in processes of their own, before and after the training, or in this one where objects were given, which reach no
    other.
    """
    started = time.monotonic()
    torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    path, task, evaluated = files.model(config.policy.model), open_task(config), config.evaluate.problems > 0
    check(config)
    if config.cluster.address and files.objects():
        raise ConfigError(f"cluster.address = {config.cluster.address}: objects of this process reach no other; give paths, file.py:name")
    # Data that cannot be trained on is refused before anything is loaded.
    asked = problems_of(config, lambda: map(task.train, range(TOLD)))
    told = contents(config) | model_contents(path) | {"the task's problems": problems_digest(asked)}
    with RunLog(config, console, files=told, force=force) as log, launched(config, path, log.folder, console) as config:
        log.console.print(f"run folder {log.folder}")
        sweep(log.folder)
        before, made = read_metrics(log.folder / "metrics.jsonl"), Run(log.folder)
        known = made.summary if made.finished else {}
        evaluation, values = log.folder / "evaluation", dict[str, Values]()

        def evaluate(model: str | Path, name: str) -> Values:
            with progress(console, name) as report:
                return measure(config, model, evaluation / name, task=task, kinds=task.kinds, aside=True, report=report)[0]

        if evaluated:
            values["base"] = evaluate(path, "base")
        with _cluster(config, log) if config.cluster.address else nullcontext() as cluster:
            learner: Any = cluster.learners(path) if cluster else Learner(config, path, device_here(config))
            cursor = learner.restore(log.folder / "checkpoints")
            needed, free = learner.checkpoint_bytes / 1e9, shutil.disk_usage(log.folder).free / 1e9
            if needed > free:
                log.note(f"a checkpoint takes about {needed:.1f} GB, and {log.folder} has {free:.1f} GB left: this run cannot be saved")
            if not learn(config, path, task, learner, cursor, log, on_step, cluster):
                return
            if cluster:
                learner.close()
            del learner  # its memory is the evaluation's, which is another process, or the caller's
            gc.collect()
            torch.cuda.empty_cache()
        sweep(log.folder)
        if evaluated:
            values["trained"] = evaluate(log.folder / "policy", "trained")
        rows = read_metrics(log.folder / "metrics.jsonl")
        if not known or len(rows) > len(before):
            seconds = time.monotonic() - started + sum(row[f"seconds/{part}"] for row in before for part in ("sample", "learn", "publish"))
            known = {"wall_seconds": round(seconds, 1)}
        tokens = {source: sum(row[f"tokens/{source}"] for row in rows) for source in ("policy", "agent")}
        log.write(
            "summary.json", known | {"steps": len(rows), "train_tokens": tokens} | values
        )  # a finished run may have been evaluated otherwise
        if evaluated:
            console.print(trained_table(values["base"], values["trained"]))
            for line in verdict(compare(evaluation / "base", evaluation / "trained"), values["base"]["kind"]):
                console.print(line, markup=False)
        console.print(f"policy and summary.json are in {log.folder}", markup=False)
        console.print(f"look at it: python -m aipo_graph.view {log.folder}", markup=False)
        if not files.objects():  # which the other commands would lack
            console.print(f"ask it: python -m aipo_graph.demo {log.folder}", markup=False)


def _cluster(config: Config, log: RunLog) -> AbstractContextManager[Any]:
    """The run's processes, which end with the context. Raises ConfigError where Ray is not installed or does not answer."""
    from aipo_graph import cluster

    return cluster.joined(config, log.folder, log.note)


def learn(
    config: Config,
    path: str,
    task: Task,
    learner: Any,
    cursor: Cursor,
    log: RunLog,
    on_step: OnStep | None = None,
    cluster: Any = None,
) -> bool:
    """Trains from the cursor to the end and exports the policy. Returns False where it was stopped before.

    Where a process of the learner was lost, it goes on from the last checkpoint.
    """
    finished = _finished(config, learner.version, cursor.get("tokens", 0.0))
    log.resume_at(learner.version)
    if learner.version:
        log.note(f"goes on after step {learner.version}")
    if not finished:
        stopping = threading.Event()

        async def main(cursor: Cursor) -> bool:
            async with opened(config, path, task, log, cluster) as stream:
                while True:
                    try:
                        return await loop(config, learner, stream, log, cursor, stopping, on_step)
                    except LostError:
                        cursor = await asyncio.to_thread(learner.restore, log.folder / "checkpoints")
                        log.resume_at(learner.version)

        finished = loops.run(main(cursor), interrupted=stopping.set)
    if not finished:
        log.note(f"stopped after step {learner.version} of {config.train.steps}; the same command goes on from there")
        return False
    log.pause()
    learner.export(log.folder / "policy")
    return True


@asynccontextmanager
async def opened(config: Config, path: str, task: Task, log: RunLog, cluster: Any = None) -> AsyncIterator[Stream]:
    """Where training steps come from: graph runs and the policy's engine, here or in a cluster. What they started ends with the context."""
    async with AsyncExitStack() as stack:
        if cluster:
            engine: Engine = await stack.enter_async_context(cluster.opened(path))
        else:
            engine = await open_engine(config, path)
            stack.push_async_callback(engine.close)
        chats = await open_chats(config)
        for line in describe(chats, config):
            log.console.print(line, markup=False)
        rollouts = Rollouts.open(config, engine, task, chats)
        log.write("graph.json", picture(rollouts.graph.get_graph(), frozenset([*rollouts.agents, *config.rollout.helpers])))
        for line in rollouts.inputs[0].warnings(task.train(0)):
            log.note(line)
        gc.freeze()  # what is loaded stays: collections need not walk it at every step of thousands of graph runs
        stack.callback(gc.unfreeze)
        workers = cluster.sampling(rollouts) if cluster else stack.enter_context(Workers(rollouts, path))
        yield Stream(rollouts, workers.run_groups)


def check(config: Config) -> None:
    """Raises ConfigError for settings that only training cannot use."""
    if config.train.micro_batch_tokens < config.rollout.max_tokens:
        raise ConfigError(
            f"train.micro_batch_tokens = {config.train.micro_batch_tokens}: below rollout.max_tokens = {config.rollout.max_tokens}, "
            "so one trace would not fit"
        )
    if config.engine.kind == "server" and config.evaluate.problems and "policy" in config.agents.models.values():
        raise ConfigError(
            "agents.models: policy: the evaluation gives the servers the trained weights; serve the starting ones apart and say vllm:URL, "
            "or evaluate.problems: 0"
        )


def explain(config: Config, console: Console) -> None:
    """What a dry run says beside the settings: the memory that they need, and the command of the server that they sample from."""
    path = files.model(config.policy.model)
    console.print(memory.table(found := memory.estimate(config, path)))
    for line in memory.placement(config, found) if config.cluster.address else ():
        console.print(line, markup=False)
    if config.engine.kind == "server":
        try:
            console.print(f"server of the policy: {serve_text(config, path)}", markup=False)
        except AipoError as error:
            console.print(f"server of the policy: its command needs the model's files ({error})", markup=False)


def main(argv: list[str]) -> None:
    command, options = cli.parse(argv, Command, prog="python -m aipo_graph.train", doc=__doc__ or "", default="configs/quickstart.yaml")
    config = Config.model_validate({name: getattr(command, name) for name in Config.model_fields})
    if options.dry_run:
        check(config)
        print(cli.write_yaml(config), end="")
        explain(config, Console(stderr=True, soft_wrap=True, highlight=False))
        return
    train(config=config, force=command.force)


if __name__ == "__main__":
    sys.exit(cli.main(main))
