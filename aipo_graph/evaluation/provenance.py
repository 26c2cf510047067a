"""What an evaluation's samples depend on, and how its figures came about."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import CodeType
from typing import Any
from uuid import uuid4

from aipo_graph import __version__
from aipo_graph import load as files
from aipo_graph.config import Config
from aipo_graph.evaluation.samples import Part
from aipo_graph.evaluation.summary import Values
from aipo_graph.tasks.datasets import BENCHMARKS, MAPPINGS, Layout
from aipo_graph.types import Problem

MODEL_FILES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors", ".bin"})


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
    flat |= {f"task.{key}": value for key in ("reward", "weights") if (value := getattr(config.task, key))}
    flat |= {f"rollout.{key}": value for key in ("inputs", "output", "helpers") if (value := getattr(config.rollout, key))}
    if files.objects():
        flat["objects"] = uuid4().hex  # nobody can say whether they are those of an earlier call
    if config.task.options:
        flat["task.options"] = dict(config.task.options)
    sizes = {part.name: f"{len(part.problems)} problems, {part.samples} samples" for part in parts}
    held = hashlib.sha256(json.dumps(contents(config)).encode()).hexdigest()
    asked = problems_digest(problem for part in parts for problem in part.problems)
    return {"model": model_digest(model), **flat, **sizes, "graph, agent, prompt and data files": held, "problems": asked}


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
    """The commit of a hub model, whose config.json is read here if it was not; None for a directory, and where there is none to be had."""
    if Path(model).is_dir():
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json")).parent.name
    except (OSError, ValueError):  # whoever loads the model says it better
        return None


def contents(config: Config) -> dict[str, str]:
    """SHA-256 of each file that the settings name, by setting: code, prompts, local data; of a function that a call gave, of its code."""
    code = {"rollout.graph": config.rollout.graph, "rollout.solo": config.rollout.solo, "task.name": config.task.name}
    reward = config.task.reward if isinstance(config.task.reward, dict) else {"": config.task.reward}
    code |= {f"task.reward.{name}".rstrip("."): spec for name, spec in reward.items()}
    code |= {f"agents.use.{name}": spec for name, spec in config.agents.use.items()}
    paths = {key: path for key, spec in code.items() if (path := files.source(spec))}
    paths |= {f"rollout.prompts/{path.name}": path for path in sorted(files.find(config.rollout.prompts, "dir").glob("*.md"))}
    schemas = {key: files.find(spec.removeprefix("json:")) for key, spec in code.items() if spec.startswith("json:")}
    data = {"task.data": config.task.data, "task.heldout": config.task.heldout}
    paths |= schemas | {key: files.find(name) for key, name in data.items() if name and name.endswith((".jsonl", ".csv", ".parquet"))}
    functions = {key: getattr(files.load(spec), "__code__", None) for key, spec in code.items() if spec.startswith(files.OBJECT)}
    digests = {key: hashlib.sha256(repr(_instructions(found)).encode()).hexdigest() for key, found in functions.items() if found}
    return digests | {f"{key} ({path.name})" if "/" not in key else key: _hash([path]) for key, path in paths.items()}


def _instructions(code: CodeType) -> tuple[Any, ...]:
    def plain(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return _instructions(constant)
        return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant

    return code.co_code, code.co_names, tuple(map(plain, code.co_consts))


def model_contents(model: str) -> dict[str, str]:
    """SHA-256 of each file of a model directory that a policy's text or tokens come from; of a hub model, its commit."""
    folder = Path(model)
    if not folder.is_dir():
        return {"policy.model": revision} if (revision := _revision(model)) else {}
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return {f"policy.model/{path.relative_to(folder)}": _hash([path]) for path in sorted(found) if path.suffix in MODEL_FILES}


def problems_digest(problems: Iterable[Problem]) -> str:
    """SHA-256 of what is asked and wanted, wherever it came from."""
    total = hashlib.sha256()
    for problem in problems:
        row = [dict(problem.meta)] if problem.meta else []
        total.update(json.dumps([problem.id, problem.question, problem.answer, problem.kind, *row], default=str).encode())
    return total.hexdigest()


def _hash(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        total.update(path.name.encode() + _digest(path, stat.st_size, stat.st_mtime_ns))
    return total.hexdigest()


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, size: int, changed: int) -> bytes:
    """Of a model of many gigabytes once per process."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def digest(given: Values) -> str:
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]


def model_digest(model: str) -> str:
    """SHA-256 over the files of a model directory: weights, configurations, tokenizer, chat templates; of a hub model, name and commit."""
    if not Path(model).is_dir():
        return "@".join(filter(None, (model, _revision(model))))
    return hashlib.sha256(json.dumps(model_contents(model)).encode()).hexdigest()
