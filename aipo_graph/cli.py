"""Command lines: ``[config.yaml] [--section.field value] [--dry-run] [--help]``, and errors in one line."""

import argparse
import atexit
import errno
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_settings import BaseSettings, CliPositionalArg, CliSettingsSource, CliToggleFlag, SettingsError
from rich.console import Console
from rich.text import Text

from aipo_graph.config import PATHS, Config
from aipo_graph.errors import AipoError, ConfigError
from aipo_graph.load import find, nearest, text

C = TypeVar("C", bound=BaseModel)
MAX_YAML_BYTES = 1_000_000
FULL = (errno.ENOSPC, errno.EDQUOT)
SELDOM = 50_000
"""Objects made between two collections of garbage, each of which walks what all graph runs under way hold."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a command line says beside the settings."""

    file: Path | None
    """The YAML file that was read."""
    dry_run: bool


def parse(
    argv: Sequence[str], cls: type[C], *, prog: str, doc: str = "", default: str = "", overlay: Path | None = None
) -> tuple[C, Options]:
    """Settings of ``cls`` from defaults, then a YAML file, then ``overlay`` (another one), then the command line.

    The file is the positional argument, or ``--config FILE`` where ``cls`` has positional fields of its own; without either it is
    ``default``, where one is given. What is no Config takes no file and no ``--dry-run``. Raises ConfigError in one line: the key, its
    value, the place, the remedy. ``--help`` prints every field's docstring and exits.
    """
    common = ["config", "dry-run"] if issubclass(cls, Config) else []
    more: Any = cls.model_config
    known = [*leaves(cls), *more.get("cli_shortcuts", {}).values(), *common, "help"]
    words = []
    for word in argv:
        key, equals, value = word.removeprefix("--").partition("=")
        if key.replace("-", "_") in cls.model_fields:
            key = key.replace("-", "_")
        elif word.startswith("--") and key not in known:
            raise ConfigError(f"no setting --{key}{_nearest_key(key, known, '--')} (see {prog} --help)")
        # pydantic-settings gives a field of one letter a short flag only.
        words.append(f"-{'-' * (len(key) > 1)}{key}{equals}{value}" if word.startswith("--") else word)
    given = _command_line(words, cls, prog, doc, default)
    file, dry_run = given.pop("config", default), given.pop("dry-run", False) is True
    path = find(file) if file else None
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for layer in (path, overlay):
        if layer:
            above, lines = read_yaml(layer)
            above = {key: {} if value is None else value for key, value in above.items()}  # a section whose lines are all comments
            _resolve_paths(above, layer.parent)
            if isinstance(task := above.get("task"), dict) and "name" in task:  # one task's data, columns and options are no other's
                values.pop("task", None)
            values = _merge(values, above)
            places |= {key: f"{layer}:{line}" for key, line in lines.items()}
    places |= dict.fromkeys([*given, *flat(given)], "on the command line")
    return validated(cls, _merge(values, given), places), Options(path, dry_run)


def validated(cls: type[C], values: Mapping[str, Any], places: Mapping[str, str] = {}) -> C:
    """Settings from a mapping of sections, given in ``places``, by dotted name. Raises ConfigError in one line."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, cls, places)) from error


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A mapping from a YAML file, and the line of each dotted key.

    Aliases (a few lines of them can fill the memory), repeated keys and anything but a mapping are refused with ConfigError.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES:,} bytes; this is not a configuration")
        loader = _Loader(text(path))
        node = loader.get_single_node()
        lines = dict(_lines(node, "")) if node else {}
        values = loader.construct_document(node) if node else {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path}:1: a mapping of sections is wanted (train: {{steps: 10}}), not a {type(values).__name__}")
        return values, lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {getattr(error, 'problem', None) or error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {'nested too deeply' if isinstance(error, RecursionError) else error}") from error


def write_yaml(config: BaseModel) -> str:
    """Every setting as YAML; reading it back gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def main(command: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command and turn an expected failure into one line on stderr; returns the exit code (0, 2, 130)."""
    gc.enable()
    gc.set_threshold(SELDOM)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit.register(gc.freeze)  # nothing is looked through for garbage at the end: with torch loaded that takes seconds
    try:
        command(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return 0
    except AipoError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output went away (head, less). Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        return fail(f"no space left on the disk{where}; free some and repeat the command")


def printable(text: str) -> str:
    """Text on one line: nothing in it may move the cursor or end the line, wherever it came from."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def fail(message: str) -> int:
    """Say an error on one line. The exit code."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble(("error: ", "bold red"), printable(message)))
    return 2


POSITIONAL = get_args(CliPositionalArg[str])[1]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _command_line(argv: Sequence[str], cls: type[BaseModel], prog: str, doc: str, default: str) -> dict[str, Any]:
    """What argv gives, nested as the config is: most values still text, ``config`` and ``dry-run`` among them."""
    positional = [
        name.upper() if field.is_required() else f"[{name.upper()}]"
        for name, field in cls.model_fields.items()
        if POSITIONAL in field.metadata
    ]
    file_type: Any = str if positional else CliPositionalArg[str]
    common: dict[str, Any] = {
        "config_file": (file_type, Field(default, validation_alias="config", description="YAML file of settings.")),
        "dry_run": (CliToggleFlag[bool], Field(False, validation_alias="dry-run", description="Print the resolved settings and stop.")),
    }
    usage = [prog, *positional, "[--config config.yaml]" if positional else "[config.yaml]", "[--section.field value ...] [--dry-run]"]
    if not issubclass(cls, Config):
        common, usage = {}, [prog, *positional, "[--field value ...]"]
    # Of what is made here there is no source, and a long search for it.
    command: Any = create_model("Command", __base__=(BaseSettings, cls), __cls_kwargs__={"use_attribute_docstrings": False}, **common)
    parser = _Parser(
        prog=prog,
        usage=" ".join(usage),
        description=doc or cls.__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
        allow_abbrev=False,
    )
    try:
        source: Any = CliSettingsSource(
            command,
            cli_parse_args=list(argv),
            root_parser=parser,
            parse_args_method=argparse.ArgumentParser.parse_intermixed_args,  # MODEL may come after an option
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_parse_none_str="null",
        )
        return dict(source())
    except SettingsError as error:
        raise ConfigError(f"{error} (see {prog} --help)") from error


def leaves(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting below ``cls``."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``, section by section; a field that is itself a mapping is replaced as a whole."""
    over = {
        key: {**low[key], **value} if isinstance(value, dict) and isinstance(low.get(key), dict) else value for key, value in high.items()
    }
    return {**low, **over}


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of settings by dotted name.

    >>> flat({"run": {"seed": 1}})
    {'run.seed': 1}
    """
    return {f"{section}.{name}": value for section, held in values.items() if isinstance(held, dict) for name, value in held.items()}


# --- YAML


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not supported; write the value out", mark)
        return super().compose_node(parent, index)


def _lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every key below a mapping. Raises YAMLError on a repeated key and on one that is no word."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{prefix}{key.value} is given twice", key.start_mark)
        seen.add(key.value)
        yield f"{prefix}{key.value}", key.start_mark.line + 1
        yield from _lines(value, f"{prefix}{key.value}.")


def _resolve_paths(values: dict[str, Any], base: Path) -> None:
    """Paths that exist beside the YAML file, and not below the working directory, become absolute, so that a run's resolved
    config means the same wherever it is read."""

    def beside(value: Any, bare: bool) -> Any:
        if not isinstance(value, str) or (bare and "/" not in value and "." not in value):
            return value
        path, colon, name = value.rpartition(":") if ".py:" in value else (value, "", "")
        if not path or Path(path).is_absolute() or os.path.exists(path) or not os.path.exists(base / path):
            return value
        return f"{(base / path).resolve()}{colon}{name}"

    for dotted in PATHS:
        section, _, key = dotted.partition(".")
        holder = values.get(section)
        if isinstance(holder, dict) and key in holder:
            # A bare word as model or task is a built-in's name first.
            bare, value = key in ("model", "name"), holder[key]
            holder[key] = {k: beside(v, bare) for k, v in value.items()} if isinstance(value, dict) else beside(value, bare)


# --- what is wrong with a value


def _explain(error: ValidationError, cls: type[BaseModel], places: Mapping[str, str]) -> str:
    """One line for the first of the errors: key, value, what is allowed, where it was given, how many more there are."""
    errors = error.errors(include_url=False)
    first, value = errors[0], errors[0]["input"]
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "value_error":  # our own checks of fields together: the message starts with the key
        text = str(first["ctx"]["error"])
        key = text.partition(" = ")[0]
    elif first["type"] == "extra_forbidden":
        text = f"no setting {key!r}{_nearest_key(key, [*cls.model_fields, *leaves(cls)])}"
    elif first["type"] == "missing":
        text = f"{key} is missing"
    else:
        wanted = "must be a mapping of settings" if first["type"] == "model_type" else re.sub("^[A-Z][a-z]+ should ", "must ", first["msg"])
        text = f"{key} = {value!r:.80}: {wanted}"
        # YAML reads an unquoted no, yes, on or off as a truth value.
        text += "; put quotes around it" if isinstance(value, bool) and first["type"] == "string_type" else ""
    stem = next((known for known in leaves(cls) if key == known or key.startswith(f"{known}.")), key)
    found = next((f" ({places[k]})" for k in (key, stem, key.rpartition(".")[0]) if k in places), "")
    return text + found + (f"; and {len(errors) - 1} more" if len(errors) > 1 else "")


def _nearest_key(key: str, known: Sequence[str], dashes: str = "") -> str:
    """The same word in another section, else a near key."""
    moved = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return nearest(dashes + key.replace("-", "_"), [dashes + k for k in moved or known])
