"""Records of a JSONL file, every fault named by file and line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.literals import DECODER
from aipo_graph.load import decoded

LONGEST_LINE = 1_000_000


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
        found = DECODER.decode(decoded(line, where))
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
