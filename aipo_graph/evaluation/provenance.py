"""What an evaluation's samples depend on, and how its figures came about."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from aipo_graph import __version__
from aipo_graph import load as files
from aipo_graph.config import Config
from aipo_graph.evaluation.passk import Values
from aipo_graph.evaluation.samples import TASK_FILE, Part
from aipo_graph.tasks.benchmarks import BENCHMARKS
from aipo_graph.tasks.datasets import MAPPINGS, Layout


def settings(config: Config, model: str, parts: Sequence[Part]) -> Values:
    """All that the samples depend on, flat; workers, time limits and what only training reads are left out.

    They head samples.jsonl, which goes on under equal ones only: what is new here is left out where it is not used.
    """
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
    if config.task.options:
        flat["task.options"] = dict(config.task.options)
    spec = config.task.name.rpartition(":")[0]
    if spec.endswith(".py"):
        flat[TASK_FILE] = _hash([files.find(spec)])
    sizes = {part.name: f"{len(part.problems)} problems, {part.samples} samples" for part in parts}
    return {"model": model_digest(model), **flat, **sizes, "graph, agent, prompt and data files": _contents(config)}


def protocol(config: Config, model: str, given: Values, preset: str) -> Values:
    """How the samples came about, for whoever reads the figures elsewhere; ``given``, its settings, are all that they depend on."""
    task, rollout = config.task, config.rollout
    own = {**MAPPINGS, **BENCHMARKS}.get(task.name, Layout())
    data = task.heldout or own.heldout or task.data or own.data or "its own"
    return {
        "preset": preset,
        "date": datetime.now(UTC).date().isoformat(),
        "aipo_graph": __version__,
        "model": model,
        "model_revision": _revision(model),
        "model_digest": given["model"],
        "task": task.name,
        "data": data,
        "seed": config.run.seed,
        "temperature": rollout.temperature,
        "top_p": 1.0,
        "max_tokens": rollout.max_tokens,
        "max_consults": rollout.max_consults,
        "settings": given,
    }


def _revision(model: str) -> str | None:
    """The commit of a hub model that was read here; None for a directory."""
    if Path(model).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def _contents(config: Config) -> str:
    """SHA-256 over the files that the settings name: edited, they are another evaluation."""
    named = [spec.rpartition(":")[0] for spec in (config.rollout.graph, config.rollout.solo, *config.agents.use.values())]
    paths = [files.find(name) for name in named if name.endswith(".py")]
    paths += sorted(files.find(config.rollout.prompts, "dir").glob("*.md"))
    paths += [
        files.find(data) for data in (config.task.data, config.task.heldout) if data and data.endswith((".jsonl", ".csv", ".parquet"))
    ]
    return _hash(paths)


def _hash(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def digest(given: Values) -> str:
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]


def model_digest(model: str) -> str:
    """SHA-256 over a model directory's JSON and safetensors files; of a hub model, its name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    return _hash(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
