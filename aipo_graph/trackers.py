"""Where metrics go besides metrics.jsonl. A tracker is another's code and often another's server: it may fail in any way, never a run."""

import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, install

IDS = "trackers.json"
"""In the run folder: which run of each tracker is this one."""


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # three seconds that `--help` and readers of logs are spared

            # Points from this step on, left by a run that was killed, are hidden.
            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Trackers:
    """The trackers that `run.trackers` names, each with the run that it had before where this one goes on.

    Raises ConfigError for one that is not installed or cannot be opened; later faults are noted, once each.
    """

    def __init__(self, config: Config, folder: Path, note: Callable[[str], None]) -> None:
        self._note = note
        self._broken: set[str] = set()
        self._opened: dict[str, Any] = {}
        for name in config.run.trackers:
            try:
                self._opened[name] = _open(name, config, folder)
            except ImportError as error:
                self.finish()
                raise ConfigError(f"run.trackers names {name}, which is not installed; {install('trackers')}") from error
            except Exception as error:
                self.finish()
                raise ConfigError(
                    f"run.trackers: {name} cannot be opened ({type(error).__name__}: {_line(error)}); log in, let it work offline, "
                    "or leave it out"
                ) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands one step's finite metrics to each."""
        for name, tracker in self._opened.items():
            self._attempt(name, lambda tracker=tracker: tracker.log(metrics, step=step))  # type: ignore[misc]

    def finish(self) -> None:
        for name, tracker in self._opened.items():
            self._attempt(name, tracker.finish)

    def _attempt(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  the tracker boundary
            if name not in self._broken:
                self._broken.add(name)
                self._note(f"{name} failed ({type(error).__name__}: {_line(error)}); the run goes on, metrics.jsonl has all of it")


def _open(name: str, config: Config, folder: Path) -> Any:
    if name == "tensorboard":
        return _TensorBoard(folder)
    ids = _ids(folder)
    known, settings = name in ids, config.model_dump(mode="json")
    if name == "wandb":
        import wandb

        run = ids.setdefault(name, secrets.token_hex(4))
        opened = wandb.init(
            project="aipo_graph", name=config.run.name, id=run, resume="allow", dir=str(folder), config=settings, allow_val_change=True
        )
    else:
        import trackio

        # Another run of this name may be there: only our own is gone on with.
        run = ids.get(name, config.run.name)
        opened = trackio.init(project="aipo_graph", name=run, resume="allow" if known else "never", config=settings)
        ids[name] = str(getattr(opened, "name", None) or run)
    if not known:
        (folder / IDS).write_text(json.dumps(ids) + "\n", encoding="utf-8")
    return opened


def _ids(folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        ids = json.loads((folder / IDS).read_text(encoding="utf-8"))
        return ids if isinstance(ids, dict) else {}
    return {}


def _line(error: BaseException) -> str:
    return " ".join(str(error)[:2000].split())[:300]
