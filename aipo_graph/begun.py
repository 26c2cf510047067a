"""A begun run that goes on: which of its settings and files have changed since, which of them may, and what was changed when."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aipo_graph.cli import leaves, read_yaml, write_whole, write_yaml
from aipo_graph.config import GONE, Config, may_change
from aipo_graph.errors import ConfigError

CONFIG, FILES, CHANGES = "config.yaml", "files.json", "changes.jsonl"
PLACES = ("run.name", "run.dir")
"""Where a run lies is nothing of it."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The settings and the digests of the files that a run now goes on with, and what differs from those before."""

    folder: Path
    config: Config
    files: Mapping[str, str]
    changed: Mapping[str, tuple[Any, Any]]
    """Setting or file -> its value or digest before and now."""
    forced: tuple[str, ...]
    """Those of them that --force alone lets through."""
    gone: tuple[str, ...]
    """Settings of an earlier version that there are no more."""

    def record(self, step: int) -> list[str]:
        """Writes what has changed after ``step`` to changes.jsonl and makes it the run's own. Returns a note for each change."""
        if self.changed:
            changed = {key: list(pair) for key, pair in self.changed.items()}
            line = json.dumps({"step": step, "changed": changed, "forced": list(self.forced)})
            with (self.folder / CHANGES).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if self.files:
            write_whole(self.folder / FILES, json.dumps(self.files, indent=1) + "\n")
        if self.changed or self.gone:
            write_whole(self.folder / CONFIG, write_yaml(self.config))
        notes = [f"{key}, a setting of another version, is passed over" for key in self.gone]
        for key, (before, now) in self.changed.items():
            notes.append(f"{key} has changed" if key in self.files else f"{key} = {now!r} from here on, {before!r} before")
        if "train.steps" in self.changed and self.config.optimizer.schedule == "cosine":
            notes.append(f"the learning rate's cosine ends at step {self.config.train.steps} now: from here on it is another one")
        return notes


def begin(folder: Path, config: Config, files: Mapping[str, str], *, force: bool) -> Begun:
    """Writes config.yaml and files.json of a new run, one without a checkpoint, or compares them with a begun one's.

    A setting that config.yaml lacks, since its version did not know it, had its default. Raises ConfigError in one line where something
    has changed that changes learning, unless ``force``.
    """
    path = folder / CONFIG
    if not path.exists() or not any(folder.glob("checkpoints/step-*")):  # where nothing is learned yet nothing is lost
        write_whole(folder / FILES, json.dumps(files, indent=1) + "\n")
        write_whole(path, write_yaml(config))
        return Begun(folder, config, files, {}, (), ())
    before = {section: values for section, values in read_yaml(path)[0].items() if isinstance(values, dict)}
    now = config.model_dump(mode="json")
    defaults, known = Config().model_dump(mode="json"), [key for key, _ in leaves(Config)]
    defaults["loss"]["negative"] = 1.0  # as it was done where no setting said so
    changed: dict[str, tuple[Any, Any]] = {}
    for key in known:
        section, _, name = key.partition(".")
        old, new = before.get(section, {}).get(name, defaults[section][name]), now[section][name]
        if old != new and key not in PLACES:
            changed[key] = (old, new)
    old_files = _read(folder / FILES)
    changed |= {key: (old_files[key], files[key]) for key in files if old_files.get(key, files[key]) != files[key]}
    gone = [f"{section}.{name}" for section, values in before.items() for name in values if f"{section}.{name}" not in known]
    for key in gone:
        section, _, name = key.partition(".")
        if key in GONE and before[section][name] != GONE[key]:
            changed[key] = (before[section][name], GONE[key])
    refused = [key for key in changed if key in files or key in gone or not may_change(key)]
    if refused and not force:
        raise ConfigError(_refusal(folder, changed, refused, files))
    return Begun(folder, config, files, changed, tuple(refused), tuple(gone))


def _refusal(folder: Path, changed: Mapping[str, tuple[Any, Any]], refused: list[str], files: Mapping[str, str]) -> str:
    key, (before, now) = refused[0], changed[refused[0]]
    more = f" (and {len(refused) - 1} more: {', '.join(refused[1:4])})" if len(refused) > 1 else ""
    what = f"{key} has changed since{more}; restore it" if key in files else f"it has {key} = {before!r}, not {now!r}{more}; keep it"
    return f"run folder {folder} is of a begun run: {what}, choose another --run.name, or say --force to go on with the change from here"


def _read(path: Path) -> dict[str, str]:
    """The digests of a run folder; none where its version wrote none. Raises ConfigError for a damaged file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); delete it: the files are then taken as they are") from error
