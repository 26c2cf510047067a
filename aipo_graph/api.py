"""What a call from Python gives `train` and `evaluate`, objects as well as paths, as settings; and the run that comes of it."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aipo_graph import cli, load
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError
from aipo_graph.log import read_metrics
from aipo_graph.types import Task

Settings = Config | Mapping[str, Any] | str | Path
"""A Config, a mapping of its sections, or a YAML file."""
GraphLike = Any
"""A path, a LangGraph graph, compiled or not, or a function without arguments that returns one."""
AgentsLike = Mapping[str, Any] | Sequence[Any]
"""Agents by name, each itself, by its path or by its factory; or a list of them."""
TaskLike = str | Task | Callable[[Config], Task]
DataLike = str | Path | Iterable[Mapping[str, Any]]
"""A file, a data set of the hub, or the rows themselves."""
RewardLike = str | Callable[..., Any] | Mapping[str, Any]

TRACERS = re.compile(r"LANG(SMITH|CHAIN)_((\w+_)?TRACING(_V2)?|HANDLER)")
"""The variables that turn tracers on."""


@dataclass(frozen=True)
class Run:
    """A run's folder, and what it holds."""

    dir: Path

    @property
    def finished(self) -> bool:
        """Whether it reached its end; a stopped one goes on by the same call."""
        return (self.dir / "summary.json").is_file()

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json says: steps, tokens, seconds, and the evaluations. Raises ConfigError before the run has ended."""
        if not self.finished:
            raise ConfigError(f"run folder {self.dir} has no summary.json yet: the run has not ended; the same call goes on")
        return dict(json.loads((self.dir / "summary.json").read_text(encoding="utf-8")))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Those of each step."""
        return read_metrics(self.dir / "metrics.jsonl")

    @property
    def policy(self) -> Path:
        """The trained policy, a Hugging Face model directory. Raises ConfigError before the run has ended."""
        return Path(load.model(str(self.dir.resolve())))

    def view(self, **options: Any) -> Path:
        """`aipo_graph.view` of this run."""
        from aipo_graph.view import view

        return view(self, **options)


@contextmanager
def configured(
    config: Settings,
    *,
    graph: GraphLike | None = None,
    solo: GraphLike | None = None,
    agents: AgentsLike | None = None,
    task: TaskLike | None = None,
    data: DataLike | None = None,
    heldout: DataLike | None = None,
    reward: RewardLike | None = None,
    **settings: Any,
) -> Iterator[Config]:
    """The settings with what is given over them; within, the paths ``object:NAME`` that stand for objects lead to them.

    A graph of chat messages of its own without a solo one runs as it is in every trace, and has no agents but its tools, unless the
    settings say otherwise. Raises ConfigError in one line.

    Args:
        settings: by dotted name; None is not given.
    """
    base = settings_of(config)
    objects: dict[str, Any] = {}

    def named(name: str, value: Any) -> Any:
        if value is None or isinstance(value, str | Path):
            return value if value is None else str(value)
        objects[name] = value
        return f"{load.OBJECT}{name}"

    use = agents if agents is None or isinstance(agents, Mapping) else {getattr(agent, "name", str(agent)): agent for agent in agents}
    changes = settings | {
        "rollout.graph": named("graph", graph),
        "rollout.solo": named("solo", solo),
        "agents.use": use if use is None else {name: named(f"agents.{name}", agent) for name, agent in use.items()},
        "task.name": named("task", task),
        "task.data": named("data", data),
        "task.heldout": named("heldout", heldout),
        "task.reward": {k: named(f"reward.{k}", v) for k, v in reward.items()} if isinstance(reward, Mapping) else named("reward", reward),
    }
    if task is None and (data is not None or heldout is not None) and base.task.name == Config().task.name:
        changes["task.name"] = "dataset"
    with load.given(objects), tracers_restored():
        own = "solo" in base.rollout.model_fields_set and base.rollout.solo != base.rollout.graph
        if graph is not None and solo is None and not own:
            changes |= _alone(base, changes["rollout.graph"], agents is None)
        values = base.model_dump()
        for key, value in changes.items():
            section, _, name = key.partition(".")
            if value is not None:
                values[section][name] = value
        yield cli.validated(Config, values)


@contextmanager
def tracers_restored() -> Iterator[None]:
    """What a run does to the variables of tracers (`run.tracing`) ends with it."""
    before = {name: value for name, value in os.environ.items() if TRACERS.fullmatch(name)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if TRACERS.fullmatch(name)]:
            del os.environ[name]
        os.environ.update(before)
        from langsmith.utils import get_env_var  # half a second, which `--help` is spared

        get_env_var.cache_clear()  # type: ignore[attr-defined]


def settings_of(config: Settings) -> Config:
    """Raises ConfigError in one line."""
    if isinstance(config, Config):
        return config
    return cli.validated(Config, dict(config)) if isinstance(config, Mapping) else cli.parse([str(config)], Config, prog="train")[0]


def _alone(base: Config, graph: str, bare: bool) -> dict[str, Any]:
    """What a graph of messages needs beside itself."""
    from aipo_graph.rollout.collect import open_graph
    from aipo_graph.rollout.inputs import in_messages  # LangGraph takes a second, which `--help` is spared

    if not in_messages(open_graph(graph)):
        return {}
    changes: dict[str, Any] = {"rollout.solo": graph}
    if "with_agents" not in base.rollout.model_fields_set and not base.rollout.helpers:
        changes["rollout.with_agents"] = 1.0
    if bare and "use" not in base.agents.model_fields_set:
        changes["agents.use"] = {}
    return changes


def run_name(model: str) -> str:
    """A run's name after its model, where nothing says another.

    >>> run_name("Qwen/Qwen3-0.6B")
    'Qwen3-0.6B'
    """
    return re.sub(r"[^\w.=+,-]|^[^\w]+", "", Path(model).name)[:100] or "run"
