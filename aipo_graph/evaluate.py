"""Evaluate a policy: `python -m aipo_graph.evaluate MODEL [config.yaml] [--k 1 4 16 64]`; unbiased pass@k, alone and with agents."""

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg, CliToggleFlag
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from aipo_graph import cli
from aipo_graph import load as files
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.log import write_whole
from aipo_graph.passk import Values, summarise
from aipo_graph.sampling import Mode, Part, Report, Sampling, Store, model_digest, units
from aipo_graph.tasks.open import open_task

K = (1, 4, 16, 64)
MODES: tuple[Mode, ...] = ("alone", "with_agents")
SIDE_SAMPLES = 4
"""Samples per problem of the kinds after the first, which are evaluated alone only."""


class Evaluation:
    """An evaluation under way in worker processes: a context manager, so that none of them outlives its use."""

    def __init__(self, config: Config, model: str, parts: Sequence[Part], k: Sequence[int], folder: Path) -> None:
        self.folder = folder
        self._config, self._model, self._parts, self._k = config, model, parts, k
        self._store = Store(folder, _settings(config, model, parts))
        self._sampling: Sampling | None = None
        try:
            todo = units(parts, self._store.read(), 2 * config.engine.max_batch)
            self._sampling = Sampling(config, parts, todo, self._store.path)
        finally:
            if self._sampling is None:
                self._store.close()

    @property
    def total(self) -> int:
        """Traces left to sample when it began."""
        return self._sampling.total if self._sampling else 0

    def result(self, report: Report | None = None) -> Values:
        """Waits for the samples and writes evaluation.json.

        Returns what it holds. Raises what a worker raised (an AipoError, or OSError for a full disk).
        """
        try:
            assert self._sampling is not None
            self._sampling.finish(report)
            samples = self._store.read()
            values: Values = {"model": self._model, "k": list(self._k)}
            values |= summarise(self._parts, samples, self._k, self._config.run.seed)
            write_whole(self.folder / "evaluation.json", json.dumps(values, indent=1) + "\n")
            return values
        finally:
            self.close()

    def close(self) -> None:
        """Ends the workers. What they have sampled stays, and the next evaluation in the folder goes on from it."""
        if self._sampling:
            self._sampling.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(
    config: Config,
    model: str | Path,
    out: Path | None = None,
    *,
    modes: Sequence[Mode] = MODES,
    kinds: Sequence[str] = ("",),
    k: Sequence[int] | None = None,
    greedy_only: bool = False,
) -> Evaluation:
    """Begins to evaluate in the background, or goes on with what ``out`` holds; ``.result()`` waits.

    Args:
        model: a model directory, ``operators`` or a hub name. Its files must stay until the workers have loaded them.
        out: folder of samples.jsonl and evaluation.json; default: one of its own under ``evaluations/``.
        modes: of the first kind.
        kinds: kinds of held-out problems, "" for the task's main one. The first gets ``evaluate.samples`` per problem and
            greedy decoding in each mode; the others SIDE_SAMPLES and greedy decoding, alone.
        k: default: those of K that ``evaluate.samples`` allows.

    Raises AipoError in one line for settings or files that cannot be used.
    """
    config, found = _with_model(config, str(model))
    samples = config.evaluate.samples
    k = sorted(set(k)) if k is not None else [n for n in K if n <= samples]
    if k and k[-1] > samples and not greedy_only:
        raise ConfigError(f"--k {k[-1]}: larger than evaluate.samples = {samples}; raise --samples or lower --k")
    parts = plan(config, kinds, modes, greedy_only)
    folder = out or Path("evaluations") / f"{Path(found).name}-{_digest(_settings(config, found, parts))}"
    return Evaluation(config, found, parts, k, folder)


def evaluate(
    config: Config,
    model: str | Path,
    out: Path | None = None,
    *,
    modes: Sequence[Mode] = MODES,
    kinds: Sequence[str] = ("",),
    k: Sequence[int] | None = None,
    greedy_only: bool = False,
    report: Report | None = None,
) -> Values:
    """``start(...)`` and its result."""
    with start(config, model, out, modes=modes, kinds=kinds, k=k, greedy_only=greedy_only) as evaluation:
        return evaluation.result(report)


def plan(config: Config, kinds: Sequence[str], modes: Sequence[Mode], greedy_only: bool) -> list[Part]:
    """The parts of an evaluation, the slowest first. Raises TaskError for a kind without held-out problems."""
    task, settings = open_task(config), config.evaluate
    parts = []
    for position, kind in enumerate(kinds):
        problems = tuple(task.heldout(settings.problems, kind))
        if not problems:
            raise TaskError(
                f"the task {config.task.name!r} has no held-out problems{f' of kind {kind!r}' if kind else ''}: nothing to evaluate"
            )
        name = kind or problems[0].kind or "heldout"
        samples = settings.samples if position == 0 else min(SIDE_SAMPLES, settings.samples)
        chosen_modes: Sequence[Mode] = [mode for mode in reversed(MODES) if mode in modes] if position == 0 else ["alone"]
        for mode in chosen_modes:
            chosen = problems[: settings.problems_with_agents] if mode == "with_agents" else problems
            parts += [] if greedy_only else [Part(name, mode, samples, chosen)]
            parts.append(Part(name, mode, 1, chosen, greedy=True))
    return parts


# --- the figures, to read


def table(values: Values) -> Table:
    """The figures of an evaluation, each over its interval."""
    shown = Table(title=f"{values['model']}: {values['kind']} problems, 95 % intervals over problems")
    modes = [("", values), *values["kinds"].items()]
    columns = [(f"{kind} {mode}".strip().replace("_", " "), found[mode]) for kind, found in modes for mode in MODES if mode in found]
    if "difference" in values:
        columns.append(("difference,\npaired", values["difference"]))
    shown.add_column("", no_wrap=True)
    for title, _ in columns:
        shown.add_column(title, justify="right")
    for name in (*(f"pass@{k}" for k in values["k"]), "greedy"):
        if any(name in found for _, found in columns):
            shown.add_row(name, *(cell(found, name) for _, found in columns))
    shown.add_section()
    shown.add_row("problems x samples", *(size(found) for _, found in columns))
    shown.add_row("tokens per trace", *(_number(found.get("tokens_per_trace")) for _, found in columns))
    for agent in dict.fromkeys(agent for _, found in columns for agent in found.get("consults_per_trace", {})):
        consults = [found.get("consults_per_trace", {}).get(agent, {}) for _, found in columns]
        shown.add_row(f"{agent} calls", *(_number(found.get("calls")) for found in consults))
        shown.add_row(f"{agent} tokens", *(_number(found.get("tokens")) for found in consults))
    return shown


def remarks(values: Values) -> list[str]:
    """What a reader must know beside the table: traces that failed, problems without all their samples."""
    lines = []
    for kind, found in {values["kind"]: values, **values["kinds"]}.items():
        for mode in (mode for mode in MODES if mode in found):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in found[mode]["failed"].items())
            if reasons:
                lines.append(
                    f"{kind}, {mode.replace('_', ' ')}: without a score: {reasons}; the same command tries those that failed again"
                )
            if found[mode]["incomplete"]:
                lines.append(
                    f"{kind}, {mode.replace('_', ' ')}: {found[mode]['incomplete']} of {found[mode]['problems']} problems have fewer than "
                    f"{found[mode]['samples']} scored samples and are left out of each pass@k that needs more than they have"
                )
    return lines


def cell(found: Values, name: str) -> str:
    if found.get(name) is None:
        return "–"
    low, high = found["intervals"][name]
    return f"{found[name]:.3f}\n{low:.3f} … {high:.3f}"


def size(found: Values) -> str:
    return str(max(found["problems"].values())) if isinstance(found["problems"], dict) else f"{found['problems']} x {found['samples']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


# --- the command


class Command(Config):
    """Evaluate a policy on held-out problems. Without a file: the config.yaml of the run that made the model, else the quick start's."""

    model: CliPositionalArg[str]
    """A model directory, `operators` (the shipped base policy), or a hub name."""
    k: Annotated[tuple[PositiveInt, ...] | None, Field(min_length=1)] = None
    """The k of pass@k, at most evaluate.samples (default: 1 4 16 64, as far as there are samples)."""
    kind: str = ""
    """Kind of held-out problems; default: the task's main one."""
    greedy: CliToggleFlag[bool] = False
    """Greedy decoding only. Without this it is evaluated beside the samples."""
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = MODES
    """alone, with_agents, or both with their difference; --alone-only and --with-agents-only are short for one."""
    out: str = ""
    """Folder of the results; what it holds already is not sampled again. Default: one of its own under evaluations/."""


SHORT = {
    "--graph": ["--rollout.graph"],
    "--solo": ["--rollout.solo"],
    "--temperature": ["--rollout.temperature"],
    "--problems": ["--evaluate.problems"],
    "--samples": ["--evaluate.samples"],
    "--workers": ["--evaluate.workers"],
    "--alone-only": ["--modes", "alone"],
    "--with-agents-only": ["--modes", "with_agents"],
}
"""What the command line's short names stand for."""
PROG = "python -m aipo_graph.evaluate"


def main(argv: list[str]) -> None:
    short = ", ".join(f"{word} = {' '.join(full)}" for word, full in SHORT.items())
    doc = f"{Command.__doc__} Short names: {short}."
    words = _expand(argv)
    command, options = cli.parse(words, Command, prog=PROG, doc=doc)
    if options.file is None:
        own = Path(command.model).parent / "config.yaml"
        ours = Path(command.model).is_dir() and own.is_file()  # `operators` and hub names have no folder of a run
        default = own if ours else files.find("configs/quickstart.yaml")
        command, options = cli.parse([*words, "--config", str(default)], Command, prog=PROG, doc=doc)
    config = Config.model_validate({name: getattr(command, name) for name in Config.model_fields})
    if options.dry_run:
        print(cli.write_yaml(config), end="")
        return
    console = Console(soft_wrap=True, highlight=False)
    modes = tuple(dict.fromkeys(command.modes))
    out = Path(command.out) if command.out else None
    with (
        _served(config, files.model(command.model), console) as served,
        start(served, command.model, out, modes=modes, kinds=(command.kind,), k=command.k, greedy_only=command.greedy) as evaluation,
    ):
        values = follow(evaluation, console)
    console.print(table(values))
    for line in remarks(values):
        console.print(line)
    console.print(f"written to {evaluation.folder / 'evaluation.json'}")


def _served(config: Config, model: str, console: Console) -> AbstractContextManager[Config]:
    if not config.engine.launch:
        return nullcontext(config)
    from aipo_graph.engines.launch import launched  # it waits for torch, which the other engines leave to the workers

    return launched(config, model, Path(config.run.dir), console)


def _expand(argv: Sequence[str]) -> list[str]:
    """Short names to settings, `--k 1 4 16` to one value, and a YAML file after the model to `--config FILE`."""
    words: list[str] = []
    position = 0
    while position < len(argv):
        word, equals, value = argv[position].partition("=")
        position += 1
        if word == "--k" and not equals:
            start_at = position
            while position < len(argv) and argv[position].isdigit():
                position += 1
            words += ["--k", ",".join(argv[start_at:position])] if position > start_at else ["--k"]
        elif word in SHORT:
            full = SHORT[word]
            words += [*full[:-1], full[-1] + equals + value]
        elif word.endswith((".yaml", ".yml")) and words and (words[-1] in ("--greedy", "--dry-run") or not words[-1].startswith("-")):
            words += ["--config", argv[position - 1]]
        else:
            words.append(argv[position - 1])
    return words


def follow(evaluation: Evaluation, console: Console) -> Values:
    """The result, with a progress bar on a terminal and a line per tenth elsewhere."""
    if console.is_terminal:
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
        )
        with bar:
            row = bar.add_task("traces", total=evaluation.total)
            return evaluation.result(lambda done, total, failed: bar.update(row, completed=done, description=_failures(failed)))
    shown = 0

    def report(done: int, total: int, failed: int) -> None:
        nonlocal shown
        if 10 * done // total > shown:
            shown = 10 * done // total
            console.print(f"evaluated {done} of {total} {_failures(failed)}")

    return evaluation.result(report)


def _failures(count: int) -> str:
    return f"traces ({count} failed)" if count else "traces"


# --- settings


def _with_model(config: Config, model: str) -> tuple[Config, str]:
    """The config with the model's place in it. Raises ConfigError for what is neither a folder nor looks like a hub name."""
    found = files.model(model)
    if not Path(found).is_dir() and (found.count("/") != 1 or Path(found).parent.is_dir()):
        raise ConfigError(f"no model {model!r}: give a model directory, operators, or a hub name (owner/name)")
    # An agent that is a copy of the starting policy stays one, whatever is evaluated.
    models = {name: f"policy:{config.policy.model}" if spec == "policy" else spec for name, spec in config.agents.models.items()}
    policy, agents = config.policy.model_copy(update={"model": found}), config.agents.model_copy(update={"models": models})
    return config.model_copy(update={"policy": policy, "agents": agents}), found


def _settings(config: Config, model: str, parts: Sequence[Part]) -> Values:
    """All that the samples depend on, flat; workers, time limits and what only training reads are left out."""
    sections = config.model_dump(
        mode="json",
        include={
            "run": {"seed", "device"},
            "policy": {"dtype", "thinking"},
            "task": {"name", "data", "heldout", "columns"},
            "rollout": {"graph", "solo", "prompts", "max_tokens", "max_consults", "max_supersteps", "temperature"},
            "agents": {"use", "models", "temperature", "max_tokens", "max_reply_tokens", "leak"},
            "engine": {"kind", "max_context", "max_batch", "deterministic"},
        },
    )
    flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    sizes = {part.name: f"{len(part.problems)} problems, {part.samples} samples" for part in parts}
    return {"model": model_digest(model), **flat, **sizes, "graph, agent, prompt and data files": _contents(config)}


def _contents(config: Config) -> str:
    """SHA-256 over the files that the settings name: edited, they are another evaluation."""
    named = [spec.rpartition(":")[0] for spec in (config.rollout.graph, config.rollout.solo, *config.agents.use.values())]
    paths = [files.find(name) for name in named if name.endswith(".py")]
    paths += sorted(files.find(config.rollout.prompts, "dir").glob("*.md"))
    paths += [files.find(data) for data in (config.task.data, config.task.heldout) if data and data.endswith((".jsonl", ".parquet"))]
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _digest(settings: Values) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    sys.exit(cli.main(main))
