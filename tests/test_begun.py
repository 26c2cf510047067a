"""A begun run goes on with what does not change its learning, with the rest by --force alone, and says what has changed; trackers too."""

import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from aipo_graph.cli import leaves, parse, write_yaml
from aipo_graph.config import CHANGES_LEARNING, MAY_CHANGE, Config, may_change
from aipo_graph.errors import ConfigError
from aipo_graph.log import RunLog

KEYS = [*leaves(Config)]
FILES = {"task.data (mine.jsonl)": "aa", "rollout.prompts/solo.md": "bb", "policy.model/chat_template.jinja": "cc"}


def config(folder: Path, **settings: Any) -> Config:
    words = [f"--{key.replace('__', '.')}={value}" for key, value in ({"run__trackers": "[]"} | settings).items()]
    return parse([f"--run.dir={folder}", "--run.name=r", *words], Config, prog="train")[0]


def go_on(config: Config, *, step: int = 0, force: bool = False, files: Mapping[str, str] = FILES) -> list[str]:
    """Enters a run as `train` does, and leaves it. Returns what it said."""
    console = Console(file=io.StringIO(), width=1000)
    with RunLog(config, console, files=files, force=force) as log:
        log.resume_at(step)
    (log.folder / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def recorded(folder: Path) -> list[dict[str, Any]]:
    path = folder / "r" / "changes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_two_tables_name_every_setting_once() -> None:
    assert [key for key in KEYS if may_change(key) == may_change(key, CHANGES_LEARNING)] == []
    for table in (MAY_CHANGE, CHANGES_LEARNING):
        named = [f"{section}.{name}" for section, names in table.items() for name in names.split() if name != "*"]
        assert [name for name in named if name not in KEYS] == []
        assert {key.partition(".")[0] for key in KEYS} >= table.keys()


LIMITS = {
    "train__steps": 200, "train__micro_batch_tokens": 4096, "train__gradient_checkpointing": "true", "train__patience": 9,
    "run__checkpoint_every": 5, "run__trace_groups": 1, "run__threads": 2, "run__device": "cpu",
    "rollout__timeout": 9, "rollout__max_failed": 1, "task__max_prompt_tokens": 50, "agents__timeout": 200, "agents__attempts": 1,
    "agents__concurrency": 2, "agents__max_tokens": 99, "engine__max_batch": 8, "engine__max_context": 99, "evaluate__samples": 2,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), LIMITS.items())
def test_a_limit_may_change_and_is_noted_once(name: str, value: object, tmp_path: Path) -> None:
    key = name.replace("__", ".")
    assert go_on(config(tmp_path)) == []
    changed = config(tmp_path, **{name: value})
    (said,) = go_on(changed, step=7)
    assert said.startswith(f"note: {key} = ")
    assert go_on(changed, step=8) == []
    (record,) = recorded(tmp_path)
    assert (record["step"], list(record["changed"]), record["forced"]) == (7, [key], [])
    assert (tmp_path / "r" / "config.yaml").read_text() == write_yaml(changed)


@pytest.mark.parametrize(
    ("name", "value"), {"loss__agent": "mask", "optimizer__lr": "1e-5", "rollout__max_tokens": 80, "run__seed": 4}.items()
)
def test_what_changes_learning_needs_to_be_forced(name: str, value: object, tmp_path: Path) -> None:
    key = name.replace("__", ".")
    go_on(config(tmp_path))
    changed = config(tmp_path, **{name: value})
    with pytest.raises(
        ConfigError, match=rf"of a begun run: it has {key} = .*, not .*; keep it, choose another --run.name, or say --force"
    ):
        go_on(changed, step=3)
    assert recorded(tmp_path) == []
    (said,) = go_on(changed, step=3, force=True)
    assert said.startswith(f"note: {key} = ")
    assert [(record["step"], record["forced"]) for record in recorded(tmp_path)] == [(3, [key])]
    assert go_on(changed, step=4) == []


def test_other_steps_under_a_cosine_say_that_the_rate_is_another(tmp_path: Path) -> None:
    cosine = {"optimizer__schedule": "cosine"}
    go_on(config(tmp_path, **cosine))
    said = go_on(config(tmp_path, train__steps=200, **cosine))
    assert said[1:] == ["note: the learning rate's cosine ends at step 200 now: from here on it is another one"]


@pytest.mark.parametrize("key", FILES)
def test_a_changed_file_is_noticed(key: str, tmp_path: Path) -> None:
    go_on(config(tmp_path))
    changed = FILES | {key: "other"}
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} has changed since; restore it, choose another --run.name, or say --force"):
        go_on(config(tmp_path), files=changed)
    assert go_on(config(tmp_path), files=changed, force=True, step=2) == [f"note: {key} has changed"]
    assert recorded(tmp_path) == [{"step": 2, "changed": {key: [FILES[key], "other"]}, "forced": [key]}]
    assert go_on(config(tmp_path), files=changed) == []


def test_a_run_without_a_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    """What it was refused for before may be a typo: nothing is learned yet."""
    go_on(config(tmp_path))
    (tmp_path / "r" / "checkpoints" / "step-00000001").rmdir()
    changed = config(tmp_path, optimizer__lr="1e-5")
    assert go_on(changed) == []
    assert (tmp_path / "r" / "config.yaml").read_text() == write_yaml(changed)
    assert recorded(tmp_path) == []


def test_a_moved_run_is_the_same(tmp_path: Path) -> None:
    go_on(config(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "r").rename(tmp_path / "elsewhere" / "r2")
    assert go_on(config(tmp_path / "elsewhere", run__name="r2")) == []


def test_every_remedy_of_the_page_of_failures_can_be_applied(root: Path, tmp_path: Path) -> None:
    """By the setting alone, or by what the refusal says."""
    rows = [line.split(" | ") for line in (root / "docs/failures.md").read_text().splitlines() if line.startswith("| ")]
    named = {key for row in rows for key in KEYS if f"`{key}" in row[-1] or f"--{key}" in row[-1]}
    assert len(named) > 10
    go_on(config(tmp_path))
    path = tmp_path / "r" / "config.yaml"
    for key in named - {"run.name", "run.dir"}:
        section, _, name = key.partition(".")
        values = yaml.safe_load(path.read_text())
        values[section][name] = "another"
        path.write_text(yaml.safe_dump(values))
        if not may_change(key):
            with pytest.raises(ConfigError, match=f"{key} = 'another', not .* or say --force"):
                go_on(config(tmp_path))
        assert go_on(config(tmp_path), force=not may_change(key))[0].startswith(f"note: {key} = ")


# --- trackers


class Service:
    """A module in the place of wandb or trackio, whose server fails from a step on."""

    def __init__(self, fails_at: int = 99) -> None:
        self.fails_at, self.started, self.steps = fails_at, [], []  # type: ignore[var-annotated]

    def init(self, **settings: Any) -> Any:
        self.started.append({key: settings.get(key) for key in ("id", "name", "resume")})
        if self.fails_at == 0:
            raise LookupError("No API key configured.\nUse `wandb login` to log in.")
        return SimpleNamespace(log=self.log, finish=self.finish, name=settings["name"])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step >= self.fails_at:
            raise LookupError("the service is gone")
        self.steps.append(step)

    def finish(self) -> None:
        if self.fails_at < 99:
            raise LookupError("the service is gone")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_goes_on_with_its_run_and_ends_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, run__trackers=name)

    def steps(service: Service, first: int, last: int) -> str:
        monkeypatch.setitem(sys.modules, name, service)
        console = Console(file=io.StringIO(), width=1000)
        with RunLog(settings, console) as log:
            log.resume_at(first - 1)
            for step in range(first, last + 1):
                log.step(step, {"reward": 0.5})
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    with pytest.raises(
        ConfigError, match=f"run.trackers: {name} cannot be opened .*No API key configured. Use .*; log in, .* or leave it out"
    ):
        steps(Service(0), 1, 1)
    working = Service()
    steps(working, 1, 2)
    said = steps(broken := Service(fails_at=4), 3, 6)
    assert said.count(f"note: {name} failed (LookupError: the service is gone); the run goes on") == 1
    assert (working.steps, broken.steps) == ([1, 2], [3])
    assert "step   6/" in said
    (first,), (second,) = working.started, broken.started
    assert second["resume"] == "allow"
    assert (first["id"], first["name"]) == (second["id"], second["name"])
    assert bool(first["id"]) == (name == "wandb")
