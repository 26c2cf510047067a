"""The study: `python -m experiments.study [--only EXPERIMENT …] [--seeds 1 2] [--workers 2] [--shard 0/2] [--set NAME VALUE]`.

Trains and evaluates the runs of grid.py that have no result yet, the worthiest first, each in a process of its own. A result is a line of
docs/results/study/EXPERIMENT.jsonl, written when it is whole; killed, the same command goes on, inside a run from its last checkpoint.
`python -m experiments.report` makes docs/results.md of what is there.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from aipo_graph import cli, load
from aipo_graph.config import Config
from aipo_graph.errors import AipoError, ConfigError, TrainError
from aipo_graph.evaluate import measure
from aipo_graph.learn.learner import Learner
from aipo_graph.log import RunLog, read_metrics
from aipo_graph.tasks.open import open_task
from aipo_graph.train import learn
from aipo_graph.workers import end_with_parent
from experiments.grid import EVALUATION, EXPERIMENTS, Run, runs

RUNS, RESULTS = Path("runs/study"), Path("docs/results/study")
BASES: Mapping[str, Sequence[str]] = {
    "wordy": ("-m", "experiments.bases", "wordy"),
    "reader": ("-m", "experiments.bases", "reader"),
    "qwen3": ("-m", "experiments.bases", "qwen3"),
    "gemma3": ("-m", "experiments.bases", "gemma3"),
    "shopping": ("-m", "experiments.shopping.pretrain"),
    "legs": ("-m", "examples.legs.make_policy"),
    "expert": ("-m", "examples.operators.pretrain", "--expert"),
}
"""Base policy -> the command that makes it, with --out."""
CURVE = (
    "tokens/policy", "reward/alone", "reward/alone/hard", "reward/alone/easy", "reward/with_agents", "consults/verify",
    "consults/knowledge", "consults/reasoning", "entropy", "length/alone", "length/with_agents", "gradient_norm", "violations", "leaks",
    "agent_ratio_mean", "floor_hit", "ceiling_hit", "agent_ess", "agent_ratio_below/0.001", "agent_ratio_below/0.01",
    "agent_ratio_below/0.1", "agent_ratio_below/0.3", "agent_ratio_below/1", "lag", "policy_ess", "mismatch_mean", "mismatch_kl",
    "mismatch_capped",
)  # fmt: skip
"""Metrics of each step that a result keeps."""
Row = dict[str, Any]


def config_of(run: Run, extra: Mapping[str, str]) -> Config:
    """Its settings: the config's, the study's evaluation, the experiment's, the variant's and the command line's, the last wins."""
    config, _ = cli.parse(arguments(run, extra), Config, prog="python -m experiments.study", doc="")
    return config


def arguments(run: Run, extra: Mapping[str, str]) -> list[str]:
    """Those of `python -m aipo_graph.train` that make the run by itself."""
    base = {"policy.model": str(RUNS / "bases" / run.base)} if run.base else {}
    own = {"run.dir": str(RUNS), "run.name": run.name, "run.seed": str(run.seed), "train.patience": "1000", "engine.workers": "1"}
    settings = {**EVALUATION, **own, **base, **run.settings, **extra}
    return [run.of.config, *(word for name, value in settings.items() for word in (f"--{name}", value))]


def result(run: Run, extra: Mapping[str, str]) -> Row:
    """One result, from where the run stands. Raises AipoError, OSError."""
    started = time.monotonic()
    config = config_of(run, extra)
    torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    folder = Path(config.run.dir) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    if run.variant == "base":
        policy = Path(load.model(config.policy.model))
    elif run.of.policies_of:
        policy = folder.parent / Run(run.of.policies_of, run.variant, run.seed).name / "policy"
        if not policy.is_dir():
            raise ConfigError(f"{policy} is not there: run the experiment {run.of.policies_of} first")
    else:
        policy = train(config, folder)
    task = open_task(config)
    kinds = run.of.kinds or task.kinds
    found, _ = measure(config, policy, folder / "evaluation" / "trained", task=task, modes=run.of.modes, kinds=kinds, k=run.of.k)
    trained = {name: value for name, value in found.items() if name not in ("model", "protocol")}  # where it lay; the row says the rest
    rows = read_metrics(folder / "metrics.jsonl")
    kept = [name for name in CURVE if any(name in row for row in rows)]
    return {
        "trained": trained,
        "curve": {"step": [row["step"] for row in rows]} | {name: [_short(row.get(name)) for row in rows] for name in kept},
        "tokens": sum(row["tokens/policy"] for row in rows),
        "steps": len(rows),
        "seconds": round(time.monotonic() - started),
        "command": shlex.join(["python", "-m", "aipo_graph.train", *arguments(run, extra)]) if rows else run.command,
    }


def train(config: Config, folder: Path) -> Path:
    """The folder of the trained policy, from the last checkpoint on."""
    path, task = load.model(config.policy.model), open_task(config)
    with (folder / "log.txt").open("a") as text, RunLog(config, Console(file=text)) as log:
        learner = Learner(config, path, torch.device("cpu"))
        if not learn(config, path, task, learner, learner.restore(folder / "checkpoints"), log):
            raise ConfigError(f"{folder.name} was stopped; the same command goes on from there")
    return folder / "policy"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def finished(folder: Path) -> Iterator[tuple[str, str, int]]:
    """What has a result. Raises ConfigError for a line that is none."""
    for path in folder.glob("*.jsonl"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                yield row["experiment"], row["variant"], row["seed"]
            except (ValueError, LookupError, TypeError) as error:
                raise ConfigError(f"{path}:{number}: not a result of the study; delete the line") from error


def write(folder: Path, run: Run, row: Row) -> None:
    """Adds a result as one line, at once."""
    about = {"experiment": run.experiment, "variant": run.variant, "seed": run.seed, "config": run.of.config, "settings": run.settings}
    hardware = f"{os.cpu_count()} shared cores, {platform.machine()}, torch {torch.__version__}"
    where = {"hardware": hardware, "date": date.today().isoformat(), "version": version("aipo_graph")}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{run.experiment}.jsonl").open("a") as file:
        file.write(json.dumps({**about, **row, **where}) + "\n")


def make_base(name: str, console: Console) -> None:
    """The base policy of that name, if the study makes it and it is not there yet. Raises ConfigError if it cannot be made."""
    folder = RUNS / "bases" / name
    if name in BASES and not folder.is_dir():
        console.print(f"making the base policy {name}, some minutes")
        begun = folder.with_name(f"{name}.part")
        shutil.rmtree(begun, ignore_errors=True)
        made = subprocess.run([sys.executable, *BASES[name], "--out", str(begun)], check=False)
        if made.returncode:
            raise ConfigError(f"the base policy {name} could not be made; what its command said stands above")
        begun.rename(folder)  # a folder is a whole policy


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__, formatter_class=form)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, help="experiments (default: all)")
    parser.add_argument("--variants", nargs="+", help="variants (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds (default: all of the grid's)")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one core each (default: %(default)s)")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th run from the I-th, for several machines (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a setting of all runs, for trials")
    parser.add_argument("--list", action="store_true", help="print the runs that are left, and end")
    given = parser.parse_args(argv)
    shard = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", given.shard)
    index, count = (int(shard[1]), int(shard[2])) if shard else (0, 0)
    if index >= count:
        raise ConfigError(f"--shard {given.shard}: give I/N with I from 0 to N-1, such as 0/2 and 1/2")
    if given.workers < 1:
        raise ConfigError(f"--workers {given.workers}: at least 1")
    if unknown := set(given.variants or ()) - {run.variant for run in runs()}:
        raise ConfigError(f"--variants {min(unknown)}: no such variant in experiments/grid.py; --list names what is left to run")
    done = set(finished(given.results))
    chosen = [
        run
        for run in runs()
        if (not given.only or run.experiment in given.only)
        and (not given.variants or run.variant in given.variants)
        and (not given.seeds or run.seed in given.seeds)
    ][index::count]
    left = [run for run in chosen if (run.experiment, run.variant, run.seed) not in done]
    console = Console(soft_wrap=True, highlight=False)
    if given.list:
        for run in left:
            console.print(run.name)
        return
    work(left, dict(given.set), given, console)


def _begin() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()


def work(left: Sequence[Run], extra: Mapping[str, str], given: argparse.Namespace, console: Console) -> None:
    """Runs them, as many at once as ``given.workers``; one that fails is named, and the others go on."""
    RUNS.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * given.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn"), _begin, max_tasks_per_child=1)
    waiting, running = list(left), dict[Future[Row], Run]()
    with pool, Progress(*columns, console=console) as progress, contextlib.suppress(KeyboardInterrupt):
        bar = progress.add_task("runs", total=len(left))
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < given.workers and time.monotonic() < deadline:
                run = waiting.pop(0)
                try:
                    for base in (run.base, run.of.helper):
                        make_base(base, console)
                except ConfigError as error:
                    progress.advance(bar)
                    console.print(f"{run.name} failed: {error}")
                    continue
                running[pool.submit(result, run, extra)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                progress.advance(bar)
                try:
                    row = future.result()
                except (AipoError, OSError) as error:
                    console.print(f"{run.name} failed: {error}")
                    continue
                except BrokenProcessPool as error:
                    raise TrainError(f"{run.name}: a process was killed (out of memory?); the same command goes on from there") from error
                write(given.results, run, row)
                alone = row["trained"]["alone"]
                console.print(f"{run.name}: alone pass@1 {alone['pass@1']:.3f}, greedy {alone['greedy']:.3f}, {row['seconds']} s")


if __name__ == "__main__":
    sys.exit(cli.main(main))
