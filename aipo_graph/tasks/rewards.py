"""What a trace is worth: plain functions that are given what they name, and the scores that they return."""

import asyncio
import functools
import inspect
import json
import math as maths
import reprlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from jsonschema import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry

from aipo_graph import load as files
from aipo_graph import loops
from aipo_graph.config import Config
from aipo_graph.errors import AipoError, ConfigError, TaskError
from aipo_graph.tasks import grading

Function = Callable[..., Any]
GIVEN = ("question", "answer", "row", "reply", "messages", "state", "trace", "problem")
"""What a function may name."""
COUNTED = ("leaks", "violation", "rewrites", "invalid_calls", "misfits")
"""Scores that the rollout counts itself; a function's own have other names."""
PLACES = 64
"""Calls of a run's functions at once; the others wait, and the time that they wait is not theirs."""


async def text(answer: str, reply: str) -> float:
    """1 if the reply is the answer, whatever blanks stand around it."""
    return float(reply.strip() == answer.strip())


async def math(answer: str, reply: str, *, rounded_digits: int = 0) -> dict[str, float]:
    """``reward``: 1 if the last box holds the answer, as `grading.equal` compares them. ``answered``: 1 if there is a closed last box."""
    box = grading.last_box(reply)
    right = box is not None and await grading.equal(box, answer, rounded_digits=rounded_digits)
    return {"reward": float(right), "answered": float(box is not None)}


async def fits(reply: str, *, schema: str) -> float:
    """1 if the reply is JSON, fenced or bare, that a JSON schema allows. Raises TaskError if the worker that reads it failed."""
    return await grading.judged("JSON could not be checked", _fits, reply, schema)


def _fits(reply: str, schema: str) -> bool:
    """In a worker: a schema's patterns can take any time on what a model wrote."""
    wanted, bare = json.loads(schema), reply.strip()
    if bare.startswith("```") and bare.endswith("```"):
        bare = bare[3:-3].removeprefix("json")
    try:
        found = json.loads(bare)
    except ValueError:
        return False
    # With a registry of its own it fetches nothing that a schema refers to.
    return bool(validator_for(wanted)(wanted, registry=Registry()).is_valid(found))


READY = ("text", "math", "json:SCHEMA_FILE")
"""The rewards that are here; anything else with a colon is a path."""


def function(spec: Any, config: Config) -> Function:
    """The function that a setting names: one of ours, ``file.py:name`` or ``module:name``, or itself. Raises ConfigError."""
    found: Any = spec
    if spec == "text":
        return text
    if spec == "math":
        digits = config.task.options.get("rounded_digits", 0)
        return functools.partial(math, rounded_digits=digits if isinstance(digits, int) else 0)
    if isinstance(spec, str) and spec.startswith("json:"):
        return functools.partial(fits, schema=_schema(files.find(spec.removeprefix("json:"))))
    if isinstance(spec, str):
        if ":" not in spec:
            near = files.nearest(spec, READY)
            raise ConfigError(f"task.reward = {spec!r}: no such reward{near}; write path/to/rewards.py:name for one of your own")
        found = files.load(spec)
    if not callable(found):
        raise ConfigError(f"task.reward = {spec!r}: a {type(found).__name__} is no function; name one")
    return found


def _schema(path: Path) -> str:
    try:
        schema = json.loads(files.text(path))
        validator_for(schema).check_schema(schema)
    except (ValueError, SchemaError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"task.reward = 'json:{path}': not a JSON schema ({reason})") from error
    return json.dumps(schema)


class Rewards:
    """The functions of one run: `task.reward`, else the task's own ``reward``, a function or several by name.

    ``names``: what they name. Serves one event loop. Raises ConfigError for what is no function, and for a parameter that
    nothing is given for.
    """

    def __init__(self, config: Config, task: Any) -> None:
        given = config.task.reward or getattr(task, "reward", None)
        if not given:
            raise ConfigError(f"task.name = {config.task.name!r}: it has no `reward`; say task.reward: {', '.join(READY)} or file.py:name")
        several = given if isinstance(given, Mapping) else {"": given}
        if unknown := next((name for name in config.task.weights if name not in several), None):
            raise ConfigError(
                f"task.weights.{unknown}: task.reward has no {unknown!r}{files.nearest(unknown, filter(None, several))}; "
                "weights are those of rewards by name, task.reward: {NAME: file.py:name}"
            )
        if taken := next((name for name in several if name in ("reward", *COUNTED)), None):
            raise ConfigError(f"task.reward.{taken}: the whole reward, or what the rollout counts itself, has that name; give it another")
        self._functions = {name: function(spec, config) for name, spec in several.items()}
        self._weights, self._seconds = config.task.weights, config.task.timeout
        self._labels = {name: _label(spec, config) for name, spec in several.items()}
        self._wanted = {name: _parameters(self._labels[name], found) for name, found in self._functions.items()}
        self.names = frozenset().union(*(names for names, _ in self._wanted.values()))
        self._room = asyncio.Semaphore(PLACES)
        self._late: list[Future[Any]] = []
        """Calls that still ran after their time."""

    async def __call__(self, given: Mapping[str, Any]) -> dict[str, float]:
        """The scores of a trace, ``reward`` among them, any kind of number as a float: with several functions the weighted sum of theirs.

        Raises TaskError where there is no reward (a function raised, did not end in time, or gave one that is not finite), ConfigError
        for what is no score.
        """
        scores: dict[str, float] = {}
        parts: list[float] = []
        for name, found in self._functions.items():
            label = f"{self._labels[name]}, problem {given['problem'].id!r}"
            own = _read(label, await self._ask(name, found, {key: given[key] for key in self._wanted[name][1]}))
            if not maths.isfinite(own["reward"]):
                raise TaskError(f"{label}: the reward is {own['reward']}")
            if name:
                parts.append(self._weights.get(name, 1.0) * own["reward"])
                own = {name if key == "reward" else key: value for key, value in own.items()}
            if twice := next((key for key in own if key in scores), None):
                raise ConfigError(f"{label}: gave a score named {twice!r}, as another reward does; rename one")
            scores |= own
        return scores if "" in self._functions else {"reward": maths.fsum(parts), **scores}

    async def _ask(self, name: str, found: Function, given: Mapping[str, Any]) -> Any:
        label, late = self._labels[name], f"had not ended after {self._seconds:g} s (task.timeout)"
        async with self._room:
            try:
                async with asyncio.timeout(self._seconds) as limit:
                    return await loops.call(found, named=given, late=self._late)
            except AipoError:
                raise
            except Exception as error:  # the boundary of a user's reward
                if not (isinstance(error, TimeoutError) and limit.expired()):
                    said, place = " ".join(str(error).split())[:300] or "no message", files.own_place(error)
                    raise TaskError(f"{label}: raised {type(error).__name__}{place and f' in {place}'}: {said}") from error
                if (still := len(self._late)) >= PLACES:
                    raise ConfigError(f"{label}: {late}, and {still} such calls still run: look for a loop without an end") from None
                raise TaskError(f"{label}: {late}") from None


def _label(spec: Any, config: Config) -> str:
    own = f"{getattr(loops.inner(spec), '__name__', type(spec).__name__)}() of task {config.task.name}"
    return f"task.reward = {spec!r}" if isinstance(spec, str) else own


def _parameters(label: str, found: Function) -> tuple[frozenset[str], frozenset[str]]:
    """Those of GIVEN that a function names, and all that it takes. Raises ConfigError for a parameter of another name."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{label}: its parameters cannot be read ({error}); wrap it in a function that names them") from error
    filled = found.keywords if isinstance(found, functools.partial) else {}
    wanted: set[str] = set()
    others: set[str] = set()
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            others = {*GIVEN} - {*filled}
        elif name in GIVEN and name not in filled and parameter.kind is not parameter.POSITIONAL_ONLY:
            wanted.add(name)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            near = files.nearest(name, GIVEN)
            raise ConfigError(f"{label}: nothing is given for its parameter {name!r}{near}; or give it a default")
    return frozenset(wanted), frozenset(wanted | others)


def _read(label: str, found: Any) -> dict[str, float]:
    """What a function returned, as scores. Raises ConfigError for what is none."""
    if not isinstance(found, Mapping):
        remedy = "return a number, or a mapping of names to numbers, 'reward' among them"
        return {"reward": _number(found, f"{label}: returned {_short(found)}", remedy)}
    if "reward" not in found:
        raise ConfigError(f"{label}: gave no 'reward', only {_short(list(found))}; return one")
    for name in found:
        if not isinstance(name, str) or name in COUNTED:
            raise ConfigError(f"{label}: gave a score named {_short(name)}; name it by a text other than {', '.join(COUNTED)}")
    remedy = "return one for each score, or leave it out"
    return {name: _number(value, f"{label}: gave {name} = {_short(value)}", remedy) for name, value in found.items()}


def _number(value: Any, gave: str, remedy: str) -> float:
    """A number of any library (bool, Fraction, a tensor of one element) as a float; nan and inf are numbers, too. Raises ConfigError."""
    try:
        item = value.item() if hasattr(value, "item") else value
        if not isinstance(item, str | bytes | bytearray):
            return float(item)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ConfigError(f"{gave}, which is no number; {remedy}")


def _short(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())
