"""samples.jsonl of an evaluation: what each trace came to, one line each, in a file that survives a kill; and what that depends on."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import CodeType
from typing import Any, Literal
from uuid import uuid4

from pydantic import TypeAdapter
from pydantic_core import to_json

from aipo_graph import __version__, cli
from aipo_graph import load as files
from aipo_graph.config import FORMS, Config
from aipo_graph.errors import ConfigError
from aipo_graph.log import records
from aipo_graph.tasks.datasets import BENCHMARKS, MAPPINGS, Layout
from aipo_graph.tools.notation import LONGEST, compact, number, plain
from aipo_graph.types import TRAINED, Problem

Mode = Literal["alone", "with_agents"]
Values = dict[str, Any]
LONGEST_ANSWER = 80
MODEL_FILES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors", ".bin"})
_LETTER = re.compile(r"\(?([A-J])(?:[.:)].*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the things that an evaluation samples: a kind of problem, alone or with agents, at T or greedily."""

    kind: str
    mode: Mode
    samples: int
    """Per problem; 1 where greedy."""
    problems: tuple[Problem, ...]
    greedy: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.mode}" + "/greedy" * self.greedy


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of samples.jsonl: what a trace came to. ``consults``: agent -> (calls, tokens of its replies)."""

    part: str
    problem: str
    sample: int
    status: str
    solved: bool
    tokens: int
    """Sampled by the policy."""
    consults: Mapping[str, tuple[int, int]]
    error: str | None = None
    answer: str = ""
    """What the policy boxed last, as `ballot` writes it; "" for no box."""
    leaks: int = 0
    """Replies that gave the answer away."""
    violation: bool = False
    """Whether the policy wrote feedback tags itself in a run with agents."""

    @property
    def scored(self) -> bool:
        return self.status in TRAINED


def ballot(answer: str | None) -> str:
    r"""An untrusted answer as it votes: a number by value, a choice by its letter, the rest as plain text; a long one by its hash.

    Answers that only a grader finds equal (``x=5``, ``5``) are two, right or wrong alike: whoever votes has no gold answer.

    >>> ballot("$\\frac12$"), ballot("0.50"), ballot("(B)"), ballot("B) 3 cm"), ballot(None)
    ('1/2', '1/2', 'B', 'B', '')
    """
    text = compact(plain((answer or "")[: 2 * LONGEST]))
    if written := number(text):
        text = str(written[0])
    elif letter := _LETTER.fullmatch(text):
        text = letter[1]
    return text if len(text) <= LONGEST_ANSWER else f"{text[:40]}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"


SAMPLE = TypeAdapter(Sample)
Key = tuple[str, str, int]


def begin(path: Path, settings: Mapping[str, Any], *, aside: bool = False) -> None:
    """Makes a file ready for the samples of these settings, which are its first line, and drops a half line at its end.

    Raises ConfigError where it was made with others (the first differing key is named), unless ``aside``: then those samples are kept
    beside it, and it starts anew.
    """
    header = to_json({"settings": settings}) + b"\n"
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    first, _, rest = data[:whole].partition(b"\n")
    before, now = _settings(path, first) if first else {}, _settings(path, header)
    different = next((key for key in [*now, *before] if before.get(key) != now.get(key)), "")
    if rest and not different:
        os.truncate(path, whole)
        return
    if rest and not aside:
        raise ConfigError(
            f"{path.parent} holds an evaluation with {different} = {before.get(different)!r}, not {now.get(different)!r}; "
            "choose another --out, or delete it"
        )
    if rest:
        path.rename(path.with_name(f"samples-{hashlib.sha256(data[:whole]).hexdigest()[:8]}.jsonl"))
    path.write_bytes(header)


def read(path: Path) -> dict[Key, Sample]:
    """The samples of a file. Lines that cannot be read are left out, so that theirs are drawn again."""
    return {(found.part, found.problem, found.sample): found for *_, found in records(path, SAMPLE) if found is not None}


def task_of(path: Path) -> str:
    """The task and its held-out data in the first line of a file, by name, not by place. Raises ConfigError for another first line."""
    with path.open("rb") as lines:
        found = _settings(path, next(lines, b""))
    named = [found.get("task.name"), found.get("task.heldout") or found.get("task.data")]
    return " of ".join(Path(str(name)).name for name in named if name)


def _settings(path: Path, first: bytes) -> Values:
    """What the first line of a file holds. Raises ConfigError for another line."""
    try:
        return dict(json.loads(first)["settings"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}:1: not the first line of an evaluation; choose another folder") from error


# --- what the samples depend on, and how they came about


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
    flat = {
        **cli.flat(sections),
        **{f"task.{key}": value for key in ("reward", "weights") if (value := getattr(config.task, key))},
        **{f"rollout.{key}": value for key in ("inputs", "output", "helpers") if (value := getattr(config.rollout, key))},
    }
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
    reward = config.task.reward if isinstance(config.task.reward, dict) else {"": config.task.reward}
    code = {
        **{"rollout.graph": config.rollout.graph, "rollout.solo": config.rollout.solo, "task.name": config.task.name},
        **{f"task.reward.{name}".rstrip("."): spec for name, spec in reward.items()},
        **{f"agents.use.{name}": spec for name, spec in config.agents.use.items()},
        **{f"loss.{part}": getattr(config.loss, part) for part in FORMS},
    }
    paths = {key: path for key, spec in code.items() if (path := files.source(spec))}
    paths |= {f"rollout.prompts/{path.name}": path for path in sorted(files.find(config.rollout.prompts, "dir").glob("*.md"))}
    schemas = {key: files.find(spec.removeprefix("json:")) for key, spec in code.items() if spec.startswith("json:")}
    data = {"task.data": config.task.data, "task.heldout": config.task.heldout}
    paths |= schemas | {key: files.find(name) for key, name in data.items() if name and name.endswith((".jsonl", ".csv", ".parquet"))}
    functions = {key: getattr(files.load(spec), "__code__", None) for key, spec in code.items() if spec.startswith(files.OBJECT)}
    digests = {key: hashlib.sha256(repr(_instructions(found)).encode()).hexdigest() for key, found in functions.items() if found}
    return digests | {f"{key} ({path.name})" if "/" not in key else key: _hash(path) for key, path in paths.items()}


def _instructions(constant: Any) -> Any:
    """What a function's code does; of another constant, itself."""
    if isinstance(constant, CodeType):
        return constant.co_code, constant.co_names, tuple(map(_instructions, constant.co_consts))
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant


def model_contents(model: str) -> dict[str, str]:
    """SHA-256 of each file of a model directory that a policy's text or tokens come from; of a hub model, its commit."""
    folder = Path(model)
    if not folder.is_dir():
        return {"policy.model": revision} if (revision := _revision(model)) else {}
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return {f"policy.model/{path.relative_to(folder)}": _hash(path) for path in sorted(found) if path.suffix in MODEL_FILES}


def problems_digest(problems: Iterable[Problem]) -> str:
    """SHA-256 of what is asked and wanted, wherever it came from."""
    rows = [[p.id, p.question, p.answer, p.kind, *([dict(p.meta)] if p.meta else [])] for p in problems]
    return hashlib.sha256("".join(json.dumps(row, default=str) for row in rows).encode()).hexdigest()


def _hash(path: Path) -> str:
    stat = path.stat()
    return hashlib.sha256(path.name.encode() + _digest(path, stat.st_size, stat.st_mtime_ns)).hexdigest()


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
