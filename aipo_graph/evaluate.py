"""Evaluate a policy: `python -m aipo_graph.evaluate MODEL [config.yaml] [--k 1 4 16 64]`; unbiased pass@k, alone and with agents."""

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg, CliToggleFlag, SettingsConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aipo_graph import cli
from aipo_graph import load as files
from aipo_graph.api import AgentsLike, DataLike, GraphLike, RewardLike, Settings, TaskLike, configured
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.evaluation.report import MODES, UNNAMED, caption, compare, comparison, remarks, summarise, table
from aipo_graph.evaluation.samples import Mode, Part, Values, begin, digest, protocol, read, settings
from aipo_graph.log import hold
from aipo_graph.tasks.open import open_task, problems_of
from aipo_graph.types import Task
from aipo_graph.workers import Report, sample, units

C = TypeVar("C", bound=Config)
K = (1, 4, 16, 64)
SIDE_SAMPLES = 4
"""Samples per problem of the kinds after the first, which are evaluated alone only."""


def measure(
    config: Config,
    model: str | Path,
    out: str | Path | None = None,
    *,
    task: Task | None = None,
    modes: Sequence[Mode] | None = None,
    kinds: Sequence[str] = ("",),
    k: Sequence[int] | None = None,
    greedy_only: bool = False,
    preset: str = "",
    aside: bool = False,
    report: Report | None = None,
) -> tuple[Values, Path]:
    """Evaluates in worker processes, which end with the call, or goes on with what ``out`` holds.

    Returns what evaluation.json holds, and its folder.

    Args:
        model: a model directory, ``operators`` or a hub name.
        out: folder of samples.jsonl and evaluation.json; default: one of its own under ``evaluations/``.
        task: the config's, where it is open already.
        modes: of the first kind; default: both, or one where both are the same graph.
        kinds: kinds of held-out problems, "" for the task's main one. The first gets ``evaluate.samples`` per problem and
            greedy decoding in each mode; the others SIDE_SAMPLES and greedy decoding, alone.
        k: default: those of K that ``evaluate.samples`` allows; with a preset that number, too.
        preset: name of the protocol that the config follows, for the record; then a model whose context would cut answers short of
            ``rollout.max_tokens`` is refused.
        aside: where ``out`` holds samples of other settings, files or weights, keep them beside the new ones instead of refusing.

    Raises AipoError in one line for settings or files that cannot be used, and what a worker raised; OSError for a full disk.
    """
    config, found = with_model(config, str(model))
    if not config.evaluate.problems:
        raise ConfigError("evaluate.problems = 0: nothing to evaluate; give at least 1")
    samples = config.evaluate.samples
    k = sorted(set(k)) if k is not None else sorted({n for n in K if n <= samples} | ({samples} if preset else set()))
    if k and k[-1] > samples and not greedy_only:
        raise ConfigError(f"--k {k[-1]}: larger than evaluate.samples = {samples}; raise --samples or lower --k")
    task = task or open_task(config)
    if modes is None:
        same = config.rollout.solo == config.rollout.graph and not config.rollout.helpers
        modes = ("with_agents",) if same else MODES
    if not modes or not set(modes) <= set(MODES):
        raise ConfigError(f"modes = {modes!r}: give some of {', '.join(MODES)}")
    parts = plan(config, task, kinds, modes, greedy_only)
    given = settings(config, found, parts)
    folder = Path(out or f"evaluations/{Path(found).name}-{digest(given)}")
    with hold(folder, "evaluation", "--out"):
        path = folder / "samples.jsonl"
        begin(path, given, aside=aside)
        todo = units(parts, read(path), 2 * config.engine.max_batch)
        sample(config, task, parts, todo, path, report, whole=bool(preset))
        values: Values = {"model": found, "k": list(k)} | summarise(parts, read(path), k, config.run.seed)
        values["protocol"] = protocol(config, found, given, preset)
        cli.write_whole(folder / "evaluation.json", json.dumps(values, indent=1) + "\n")
    return values, folder


def evaluate(
    model: str | Path,
    config: Settings | None = None,
    *,
    graph: GraphLike | None = None,
    solo: GraphLike | None = None,
    agents: AgentsLike | None = None,
    task: TaskLike | None = None,
    data: DataLike | None = None,
    reward: RewardLike | None = None,
    out: str | Path | None = None,
    modes: Sequence[Mode] | None = None,
    kind: str = "",
    k: Sequence[int] | None = None,
    greedy_only: bool = False,
    preset: str = "",
    console: Console | None = None,
) -> Values:
    """Evaluates a policy on held-out problems: what evaluation.json holds, and the ``folder`` where it lies (docs/python.md).

    Objects reach no other process: with them this one samples, anew at each call. What is not named here may be an object or a path, and is
    above what the config says, or is as for ``measure``.

    Args:
        model: a model directory, the folder of a run, ``operators`` or a hub name.
        config: default: the settings of the run that made the model, else the quick start's.
        data: the problems, all of which are held out: a file, a data set of the hub, or rows.
        preset: a benchmark's protocol over the settings, as the command has it; a config that is an object must follow it already.
        console: what says how far it is; default: standard output.

    Raises AipoError in one line.
    """
    if preset and (config is None or isinstance(config, str | Path)):
        config = _read([str(model), *(["--config", str(config)] if config else []), "--preset", preset])[1]
    with configured(
        own_settings(model) if config is None else config, graph=graph, solo=solo, agents=agents, task=task, heldout=data, reward=reward
    ) as settings:
        console = console or Console(soft_wrap=True, highlight=False)
        with ExitStack() as stack:
            if settings.engine.launch:
                from aipo_graph.engines.launch import launched  # it waits for torch, which the other engines leave to the workers

                settings = stack.enter_context(launched(settings, files.model(str(model)), Path(settings.run.dir), console))
            report = stack.enter_context(progress(console))
            values, folder = measure(
                settings, model, out, modes=modes, kinds=(kind,), k=k, greedy_only=greedy_only, preset=preset, report=report
            )
        return values | {"folder": str(folder)}


def own_settings(model: str | Path) -> Path:
    """The config.yaml of the run that made a model, else the quick start's."""
    found = files.model(str(model))
    own = Path(found).parent / "config.yaml"
    return own if os.path.isdir(found) and own.is_file() else files.find("configs/quickstart.yaml")


def plan(config: Config, task: Task, kinds: Sequence[str], modes: Sequence[Mode], greedy_only: bool) -> list[Part]:
    """The parts of an evaluation, the slowest first. Raises TaskError for a kind without held-out problems."""
    wanted = config.evaluate
    parts = []
    for position, kind in enumerate(kinds):
        problems = tuple(problems_of(config, functools.partial(task.heldout, wanted.problems, kind)))
        if not problems:
            raise TaskError(
                f"the task {config.task.name!r} has no held-out problems{f' of kind {kind!r}' if kind else ''}: nothing to evaluate"
            )
        if twice := [id for id, count in Counter(problem.id for problem in problems).items() if count > 1]:
            raise TaskError(f"the task {config.task.name!r} has several held-out problems of the id {twice[0]!r}; give each its own")
        name = kind or problems[0].kind or UNNAMED
        samples = wanted.samples if position == 0 else min(SIDE_SAMPLES, wanted.samples)
        chosen_modes: Sequence[Mode] = [mode for mode in reversed(MODES) if mode in modes] if position == 0 else ["alone"]
        for mode in chosen_modes:
            chosen = problems[: wanted.problems_with_agents] if mode == "with_agents" else problems
            parts += [] if greedy_only else [Part(name, mode, samples, chosen)]
            parts.append(Part(name, mode, 1, chosen, greedy=True))
    return parts


def with_model(config: C, model: str) -> tuple[C, str]:
    """The config with the model's place in it. Raises ConfigError for what is neither a folder nor looks like a hub name."""
    found = files.model(model)
    if not os.path.isdir(found) and (found.count("/") != 1 or os.path.isdir(Path(found).parent)):
        raise ConfigError(f"no model {model!r}: give a model directory, operators, or a hub name (owner/name)")
    # An agent that is a copy of the starting policy stays one, whatever is evaluated.
    models = {name: f"policy:{config.policy.model}" if spec == "policy" else spec for name, spec in config.agents.models.items()}
    policy, agents = config.policy.model_copy(update={"model": found}), config.agents.model_copy(update={"models": models})
    return config.model_copy(update={"policy": policy, "agents": agents}), found


# --- the command


SHORT = {
    "rollout.graph": "graph",
    "rollout.solo": "solo",
    "rollout.temperature": "temperature",
    "evaluate.problems": "problems",
    "evaluate.samples": "samples",
    "engine.workers": "workers",
}
"""Settings that the command line knows by a short name."""


class Command(Config):
    """Evaluate a policy on held-out problems. Without a file: the config.yaml of the run that made the model, else the quick start's.
    `--compare A B`, alone: the paired difference of two evaluations (their folders) of the same problems."""

    model_config = SettingsConfigDict(cli_shortcuts=SHORT)

    model: CliPositionalArg[str]
    """A model directory, the folder of a run, `operators` (the shipped base policy), or a hub name."""
    file: CliPositionalArg[str] = ""
    """YAML file of settings, also given as --config FILE."""
    preset: str = ""
    """A benchmark's protocol over the file's settings: task, samples per problem, temperature, budget. The command line is above it."""
    k: Annotated[tuple[PositiveInt, ...] | None, Field(min_length=1)] = None
    """The k of pass@k and maj@k, at most evaluate.samples (default: 1 4 16 64, as far as there are samples)."""
    kind: str = ""
    """Kind of held-out problems; default: the task's main one."""
    greedy: CliToggleFlag[bool] = False
    """Greedy decoding only. Without this it is evaluated beside the samples."""
    modes: Annotated[tuple[Mode, ...] | None, Field(min_length=1)] = None
    """alone, with_agents, or both with their difference."""
    alone_only: CliToggleFlag[bool] = False
    """Short for --modes alone; also written --alone-only."""
    with_agents_only: CliToggleFlag[bool] = False
    """Short for --modes with_agents; also written --with-agents-only."""
    out: str = ""
    """Folder of the results; what it holds already is not sampled again. Default: one of its own under evaluations/."""


PROG = "python -m aipo_graph.evaluate"
PRESETS = "configs/benchmarks"


def presets() -> dict[str, Path]:
    """Name -> file of the presets: those below the working directory, then those that ship."""
    folders = [root / PRESETS for root in (files.shipped(), Path.cwd())]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def _preset(name: str) -> Path | None:
    """Its file. Raises ConfigError in one line that names the nearest and all there are."""
    if name and name not in presets():
        near = files.nearest(name, presets())
        there = "" if near.startswith("; there is") else f"; there is {', '.join(sorted(presets())) or 'none'}"
        raise ConfigError(f"--preset {name!r}: no such preset{near}{there}")
    return presets()[name].resolve() if name else None


def main(argv: list[str]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    if argv[:1] == ["--compare"]:
        if len(argv) != 3:
            raise ConfigError(f"--compare: give two folders of evaluations, nothing else (see {PROG} --help)")
        console.print(comparison((argv[1], argv[2]), compare(Path(argv[1]), Path(argv[2]))))
        return
    command, config, dry_run = _read(argv)
    if dry_run:
        print(cli.write_yaml(config), end="")
        return
    only = {"alone": command.alone_only, "with_agents": command.with_agents_only}
    values = evaluate(
        command.model,
        config,
        out=command.out or None,
        modes=tuple(mode for mode in MODES if only[mode]) or command.modes,
        kind=command.kind,
        k=command.k,
        greedy_only=command.greedy,
        preset=command.preset,
        console=console,
    )
    console.print(table(values))
    for line in [caption(values), *remarks(values)]:
        console.print(line, markup=False)
    console.print(f"written to {Path(values['folder']) / 'evaluation.json'}")


def _read(argv: Sequence[str]) -> tuple[Command, Config, bool]:
    """The command line, the settings it comes to, and whether it only asks for them."""
    short = ", ".join(f"--{word} = --{full}" for full, word in SHORT.items())
    doc = f"{' '.join((Command.__doc__ or '').split())} Presets: {', '.join(sorted(presets()))}. Short names: {short}."
    words: list[str] = []
    for word in argv:
        if words[-2:-1] == ["--k"] and word.isdigit():
            words[-1] += f",{word}"  # --k 1 4 16
        else:
            words.append(word)
    command, options = cli.parse(words, Command, prog=PROG, doc=doc)
    overlay = _preset(command.preset)
    if options.file is None:
        words += ["--config", command.file or str(own_settings(command.model))]
    command, options = cli.parse(words, Command, prog=PROG, doc=doc, overlay=overlay)
    return command, Config.model_validate({name: getattr(command, name) for name in Config.model_fields}), options.dry_run


@contextmanager
def progress(console: Console, policy: str = "") -> Iterator[Report]:
    """Says how far an evaluation is: by a bar on a terminal, a line per tenth elsewhere, which name the ``policy`` if given."""
    whose, shown = f"{policy} policy: " if policy else "", 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task(f"{whose}traces", total=None)

        def report(done: int, total: int, failed: int) -> None:
            nonlocal shown
            traces = f"traces ({failed} failed)" if failed else "traces"
            bar.update(row, total=total, completed=done, description=whose + traces)
            if not console.is_terminal and 10 * done // total > shown:
                shown = 10 * done // total
                console.print(f"{whose}evaluated {done} of {total} {traces}")

        yield report


if __name__ == "__main__":
    sys.exit(cli.main(main))
