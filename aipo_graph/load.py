"""``load("graphs/aipo.py:build")`` or ``load("pkg.mod:name")``: the only dynamic import of the project; what a call gave instead; and
files that users name, with records of JSON among them."""

import codecs
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal

from aipo_graph.errors import ConfigError, TaskError

# What running a user's file can raise. An AipoError of its own passes through; anything rarer keeps its traceback.
IMPORT_FAULTS = (
    ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError,
    OSError, RuntimeError, AssertionError, ArithmeticError,
)  # fmt: skip

OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
CLIENT_FAULTS = (("openai", "OpenAIError"), ("anthropic", "AnthropicError"), ("botocore.exceptions", "BotoCoreError"),
                 ("google.auth.exceptions", "GoogleAuthError"))  # fmt: skip

_IMPORTED: dict[str, tuple[Path, bytes]] = {}
"""Name of a module made of a file -> the file, and what stood in it."""
OBJECT = "object:"
"""What a setting begins with that stands for an object of the call's: ``object:graph``."""
_OBJECTS: ContextVar[Mapping[str, Any]] = ContextVar("objects", default=MappingProxyType({}))


@contextmanager
def given(objects: Mapping[str, Any]) -> Iterator[None]:
    """Within, and in the tasks and threads that it starts, ``load("object:NAME")`` is the object of that name."""
    token = _OBJECTS.set(objects)
    try:
        yield
    finally:
        _OBJECTS.reset(token)


def objects() -> Mapping[str, Any]:
    """What was given. It reaches no other process."""
    return _OBJECTS.get()


def faults() -> tuple[type[Exception], ...]:
    """IMPORT_FAULTS, and what a model's client can raise when it is made, a missing key for one: classes that we do not import."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in CLIENT_FAULTS)
    return (*IMPORT_FAULTS, *(fault for fault in found if fault))


def shipped() -> Path:
    """The folder that holds ``graphs/``, ``prompts/`` and ``configs/``: inside an installed wheel, else the checkout."""
    package = Path(__file__).parent
    return package / "shipped" if (package / "shipped").is_dir() else package.parent


def find(path: str | Path, kind: Literal["file", "dir"] = "file") -> Path:
    """The first of ``path`` below the working directory and the shipped files.

    Raises ConfigError naming the nearest file there is.
    """
    # os.path raises for no name: Path does for a user that there is not, one that is too long, and a folder that may not be read.
    wanted, there_is = Path(os.path.expanduser(path)), os.path.isfile if kind == "file" else os.path.isdir
    near = set[str]()
    for root in (Path.cwd(), shipped()):
        if there_is(root / wanted):
            return (root / wanted).resolve()
        with suppress(OSError, ValueError):  # no such folder; a NUL byte
            near |= {str(p.relative_to(root)) for p in (root / wanted.parent).iterdir() if there_is(p) and p.is_relative_to(root)}
    what = "file" if kind == "file" else "folder"
    looked = "" if wanted.is_absolute() else " here or among the files that ship with aipo_graph"
    raise ConfigError(f"no {what} {str(path)!r}{looked}{nearest(str(wanted), near)}")


def data(name: str) -> Path:
    """A file or folder that ships inside the package (``aipo_graph/data``)."""
    return Path(__file__).parent / "data" / name


def model(name: str) -> str:
    """Where a model is: a shipped one (``operators``), an existing directory, of a run folder its policy, or a hub name, unchanged.

    Raises ConfigError for a path (./x, /x, ~/x) that is no directory, and for a run folder without a policy.
    """
    ours = data(name)
    if name.isidentifier() and os.path.isdir(ours):
        return str(ours)
    if not name.startswith((".", "/", "~")) and not os.path.isdir(name):
        return name
    folder = find(name, "dir")
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        if not (folder / "policy").is_dir():
            raise ConfigError(f"run folder {folder} has no policy yet: let the run end, or name a model directory")
        folder /= "policy"
    return str(folder)


def load(spec: str) -> Any:
    """The object that ``file.py:name`` (looked up by :func:`find`), ``package.module:name`` or ``object:name`` names.

    A file is imported once, so that its classes keep their identity, and anew once it or another that was loaded so has changed.
    Raises ConfigError in one line: no such file, no such name, or what the import raised and where.
    """
    if spec.startswith(OBJECT):
        name = spec.removeprefix(OBJECT)
        if name not in objects():
            again = f"give it again ({name.partition('.')[0]}=...), or name a file"
            raise ConfigError(f"{spec!r} stands for an object that a call from Python gave: {again}")
        return objects()[name]
    target, colon, name = spec.rpartition(":")
    if not colon or not target or not name.isidentifier():
        raise ConfigError(f"{spec!r} names nothing to load: write path/to/file.py:name or package.module:name")
    path = find(target) if target.endswith(".py") else None
    # Text outside UTF-8 or a NUL byte in the file arrives as SyntaxError or ValueError: IMPORT_FAULTS has both.
    with _told(f"{spec!r} does not load", str(path or spec)):
        module = _import_file(path) if path else importlib.import_module(target)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ConfigError(f"{target} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)


def source(spec: str) -> Path | None:
    """The file behind ``file.py:name`` or ``package.module:name``; None where it is no Python file or ``spec`` names nothing to load."""
    target = spec.rpartition(":")[0]
    if target.endswith(".py"):
        return find(target)
    try:
        found = importlib.util.find_spec(target)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(found.origin) if found and found.origin and found.origin.endswith(".py") else None


def text(path: Path) -> str:
    """The text of a file that a user wrote, in UTF-8, with or without the byte order mark of some editors.

    Raises ConfigError in one line for another encoding or a file that cannot be read.
    """
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def decoded(data: bytes, where: str) -> str:
    """Bytes as :func:`text` reads them; ``where`` is what an error names."""
    if data.startswith(OTHER_MARKS):
        raise ConfigError(f"{where}: not UTF-8, but UTF-16 or UTF-32 by its first bytes; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error


def call(spec: str, factory: Callable[..., Any], *args: Any) -> Any:
    """What the factory that ``spec`` named returns. Raises ConfigError in one line: what it raised and where."""
    with _told(f"{spec!r} does not load", spec):
        return factory(*args)


@functools.cache
def own(setting: str, spec: str) -> Callable[..., Any]:
    """The function that a setting names. It is loaded once: what a run learns by does not change under an edit.

    Raises ConfigError in one line, as each of its calls does: what it raised and where.
    """
    function = load(spec)
    if not callable(function):
        raise ConfigError(f"{setting} = {spec!r}: a {type(function).__name__} is no function; name one")

    def called(*args: Any) -> Any:
        with _told(f"{setting} = {spec!r}", spec):
            return function(*args)

    return called


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or what there is when little is and nothing is near, or nothing.

    >>> nearest("stepz", ["steps", "epochs"])
    "; did you mean 'steps'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    listed = f"; there is {', '.join(known)}" if 0 < len(known) <= 12 else ""
    return f"; did you mean {close[0]!r}?" if close else listed


def _import_file(path: Path) -> ModuleType:
    if any(file.is_file() and file.read_bytes() != code for file, code in _IMPORTED.values()):
        for name in _IMPORTED:
            sys.modules.pop(name, None)
        _IMPORTED.clear()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    # The module's name is a function of the path, so that a second load finds it, and two files of one name do not meet.
    name = f"aipo_file_{digest}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    # Registered before it runs: dataclasses and LangGraph look up a class's module to resolve annotations.
    sys.modules[name] = module
    _IMPORTED[name] = path, path.read_bytes()
    try:
        # Without the loader's cache of bytecode, which takes an edit within a second for the file that it knows.
        exec(compile(_IMPORTED[name][1], str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name], _IMPORTED[name]
        raise
    return module


@contextmanager
def _told(what: str, place: str) -> Iterator[None]:
    """What a user's code raises within becomes a ConfigError in one line: ``what``, what was raised and where, else ``place``."""
    try:
        yield
    except faults() as fault:
        text = " ".join(str(fault).split()) or "no message"
        remedy = "; install it, or give the file as path/to/file.py:name" if isinstance(fault, ModuleNotFoundError) else ""
        raise ConfigError(f"{what}: {type(fault).__name__} in {own_place(fault) or place}: {text}{remedy}") from fault


def own_place(fault: BaseException) -> str:
    """The deepest line of a user's own file that a fault came through; "" where all are ours or a library's."""
    if isinstance(fault, SyntaxError) and fault.filename:
        return f"{fault.filename}:{fault.lineno}"
    theirs = (str(Path(__file__).parent), sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    own = [frame for frame in traceback.extract_tb(fault.__traceback__) if not frame.filename.startswith((*theirs, "<frozen"))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


# --- JSON that others wrote, and files of records, every fault of which is named by file and line

LONGEST_LINE = 1_000_000


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def number(text: str) -> float:
    """Raises ValueError for what is no JSON number: inf, nan, and what is too large for any."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=number, parse_float=number)
"""Reads JSON in which no key stands twice and every number is finite. Raises ValueError, or RecursionError."""


def records(path: str | Path, *fields: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, record) for each line that is not blank; ``fields`` must be there, as text that is not blank.

    Raises TaskError on a missing or empty file, and on a line that is not such a record.
    """
    found = False
    try:
        with open(path, "rb") as file:
            for count, line in enumerate(file, 1):
                if line.strip():
                    found = True
                    yield f"{path}:{count}", record(line, f"{path}:{count}", fields)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror}); name a JSONL file with the fields {', '.join(fields)}") from error
    if not found:
        raise TaskError(f"{path}: no records; each line is to be a JSON object with the fields {', '.join(fields)}")


def record(line: bytes, where: str, fields: tuple[str, ...] = (), longest: int = LONGEST_LINE) -> dict[str, Any]:
    """The JSON object of one line of at most ``longest`` bytes. Raises TaskError, which names ``where``, for anything else."""
    if len(line) > longest:
        raise TaskError(f"{where}: a line of more than {longest} bytes; no more are read")
    try:
        found = STRICT.decode(decoded(line, where))
    except ConfigError as error:
        raise TaskError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not a JSON record ({str(error) or type(error).__name__})") from error
    if not isinstance(found, dict):
        raise TaskError(f"{where}: a JSON object is expected, not {type(found).__name__}")
    for name in fields:
        value = found.get(name)
        if not isinstance(value, str) or not value.strip():
            problem = "is missing" if name not in found else f"is {value!r:.40}, not text"
            raise TaskError(f"{where}: field {name!r} {problem}; the fields there: {', '.join(found)[:200] or 'none'}")
    return found
