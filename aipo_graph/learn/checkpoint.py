"""Checkpoints that survive kill -9, a full disk and a flipped bit: safetensors and JSON, a manifest of hashes, atomic renames.

``ROOT/step-00000010/`` holds one; ``ROOT/LATEST`` names the newest. Nothing is ever unpickled. Several ranks write their parts to files of
their own; any number of them reads any checkpoint.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import hf_storage, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from aipo_graph.errors import ConfigError
from aipo_graph.learn import shards

MANIFEST, STATE, LATEST, FORMAT = "MANIFEST.json", "state.json", "LATEST", 1
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""A full disk, a quota, a file size limit: what a long run must outlive."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    shapes: Mapping[str, torch.Size]
    """Of the whole tensors, by name."""
    state: Mapping[str, Any]

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Fills these tensors, or this rank's parts of them, with those of the same names, which have to be there in the same shapes."""
        with warnings.catch_warnings(action="ignore", category=UserWarning), _first_failure():  # one process needs no group
            state_dict_loader.load(dict(into), storage_reader=hf_storage.HuggingFaceStorageReader(str(self.path)))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _first_failure() -> Iterator[None]:
    """What torch collects from all ranks, as what it was."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary directory to fill, which becomes ``target`` when the block ends, durably, or goes when it raises."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = (target.parent / f".{target.name}.{word}" for word in ("partial", "replaced"))
    try:
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        if target.exists():
            os.rename(target, replaced)
        try:
            os.rename(temporary, target)
        except OSError:
            if replaced.exists():
                os.rename(replaced, target)
            raise
        _sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int) -> str | None:
    """Write ``step-N``, keep it and the ``keep - 1`` steps before it. A full disk costs only this checkpoint: it returns one line to show.

    ``state`` must be JSON. Raises ConfigError where the folder cannot be written for another reason.
    """
    name = f"step-{step:08d}"
    try:
        with ExitStack() as stack:
            temporary = shards.from_first(lambda: stack.enter_context(atomic_directory(root / name)))
            files = _write_tensors(temporary, tensors)

            def finish() -> None:
                _write(temporary / STATE, _canonical(state))
                files[STATE] = _digest(temporary / STATE)
                if hidden := files.keys() - {path.name for path in temporary.iterdir()}:
                    raise ConfigError(f"checkpoint {root / name}: rank 0 does not see {min(hidden)}; give a run.dir that all nodes share")
                _write(temporary / MANIFEST, _canonical({"format": FORMAT, "files": files}))
                stack.close()
                _write(root / f".{LATEST}.partial", name.encode())
                os.rename(root / f".{LATEST}.partial", root / LATEST)
                _sync(root)
                before = [path for path in _steps(root) if path.name < name]
                kept = {root / name, *before[: keep - 1]}  # later steps are damaged: a run passed them over
                for path in {*_steps(root), *root.glob(".step-*")} - kept:
                    shutil.rmtree(path, ignore_errors=True)

            shards.from_first(finish)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in FULL:
            raise ConfigError(f"checkpoint {root / name}: {error.strerror or error}; make the folder writable") from error
        warning = f"checkpoint {root / name} not written ({error}); training goes on with the one before, free some disk space"
        logger.warning(warning)
        return warning
    return None


def _write_tensors(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """One file per stem, or per stem and rank. Returns all files' hashes by name; what one rank raises, all do."""
    rank, size = shards.world()
    if size == 1:
        for stem, named in tensors.items():
            save_file({key: tensor.contiguous() for key, tensor in named.items()}, folder / f"{stem}.safetensors")
        return {path.name: _digest(path) for path in folder.iterdir()}
    stems = {key: number for number, named in enumerate(tensors.values(), 1) for key in named}
    writer = hf_storage.HuggingFaceStorageWriter(str(folder), stems, save_distributed=True)
    with _first_failure():
        state_dict_saver.save({key: tensor for named in tensors.values() for key, tensor in named.items()}, storage_writer=writer)
    own = {path.name: _digest(path) for path in folder.glob(f"shard-{rank + 1:05d}-*")}
    return {name: digest for files in shards.gathered(own) for name, digest in files.items()}


def _steps(root: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True)


def fault(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, if anything. Reads bytes only, each rank those of some files; no tensor is loaded."""
    rank, size = shards.world()
    return next(filter(None, shards.gathered(_fault(path, rank, size))), None)


def _fault(path: Path, rank: int, size: int) -> str | None:
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or _canonical(manifest) != raw:
            return f"{MANIFEST} is damaged"
        files = manifest["files"]
        if set(files) | {MANIFEST} != {file.name for file in path.iterdir()}:
            return f"its files are not those of {MANIFEST}"
        return next((f"{name} is damaged" for name in sorted(files)[rank::size] if _digest(path / name) != files[name]), None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"


def load(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None where none was ever written. Damaged ones are passed over with a warning each.

    Raises ConfigError where there are checkpoints and none is whole.
    """
    candidates = shards.from_first(lambda: _steps(root))
    pointer = root / LATEST
    if pointer.exists() and pointer.read_bytes() not in {path.name.encode() for path in candidates}:
        logger.warning("checkpoints %s: %s names none of them; using the newest whole one", root, LATEST)
    for path in candidates:
        if reason := fault(path):
            logger.warning("checkpoint %s skipped: %s; using the one before", path, reason)
            continue
        state = json.loads((path / STATE).read_bytes())
        found: dict[str, Any] = hf_storage.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        return Checkpoint(path, {name: tensor.size for name, tensor in found.items()}, state)
    if candidates:
        raise ConfigError(f"checkpoints {root}: none of the {len(candidates)} is whole; remove the folder to start again")
    return None
