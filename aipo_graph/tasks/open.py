"""Which task `task.name` stands for."""

from collections.abc import Callable, Iterable
from typing import Any

from aipo_graph.config import Config
from aipo_graph.errors import ConfigError
from aipo_graph.load import call, load, nearest
from aipo_graph.tasks.datasets import BENCHMARKS, MAPPINGS
from aipo_graph.tasks.rewards import Rewards
from aipo_graph.types import Problem, Task

TASKS = {
    "operators": "aipo_graph.tasks.operators:build",
    **dict.fromkeys([*MAPPINGS, *BENCHMARKS], "aipo_graph.tasks.datasets:build"),
    "livecodebench": "aipo_graph.tasks.livecodebench:build",
    "reasoning_gym": "aipo_graph.tasks.gym:build",
}
"""Short name -> factory; anything with a colon is a path of its own."""


def problems_of(config: Config, read: Callable[[], Iterable[Any]]) -> list[Problem]:
    """The problems that a task gives. Raises ConfigError in one line for what is none, and where code of the user's raises."""
    name = config.task.name
    problems = call(name, lambda: list(read())) if ":" in name else list(read())
    if wrong := next((problem for problem in problems if not isinstance(problem, Problem)), None):
        short = " ".join(repr(wrong).split())[:80]
        raise ConfigError(f"task.name = {name!r}: gave {short} as a problem; return aipo_graph.types.Problem(id, question, answer)")
    return problems


def open_task(config: Config) -> Task:
    """The task that ``config.task.name`` names, built by its factory from the config. Raises ConfigError, TaskError."""
    name = config.task.name
    if name not in TASKS and ":" not in name:
        raise ConfigError(f"task.name = {name!r}: no such task{nearest(name, TASKS)}; write path/to/my_task.py:build for one of your own")
    path = TASKS.get(name, name)
    factory = load(path)
    task: Task = call(path, factory, config) if callable(factory) else factory
    lacking = [needed for needed in ("train", "heldout", "kinds") if not hasattr(task, needed)]
    if lacking:
        raise ConfigError(f"task.name = {name!r}: the {type(task).__name__} it names has no {lacking[0]!r}; see aipo_graph.types.Task")
    Rewards(config, task)  # one that cannot be used is refused before anything is loaded
    return task
