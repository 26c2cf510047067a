"""Files of lines that another process may still be writing."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SEEN = 64
"""Bytes of the last line that must still be there for what follows them to be a continuation."""


def opened(path: Path) -> BinaryIO:
    """For its bytes. Raises OSError for what is no file: one would wait for a pipe without end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file")
    return path.open("rb")


class Growing:
    """Gives every whole line of a growing file once. No file is an empty one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.forget()

    def forget(self) -> None:
        """Start again with the first line."""
        self.lines = self._offset = 0
        self.rest = False
        """Whether something without an end follows the last line."""
        self.fault = ""
        """Why the file cannot be read."""
        self._seen = b""

    def rewritten(self) -> bool:
        """Whether what was read is no longer there: a run that goes on cuts off what came after its checkpoint."""
        if not self._offset:
            return False
        try:
            with opened(self.path) as file:
                file.seek(self._offset - len(self._seen))
                return file.read(len(self._seen)) != self._seen
        except OSError:
            return True

    def read(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of each line that is new; ``lines`` is the number of the last one, from 1."""
        self.rest, self.fault = False, ""
        try:
            with opened(self.path) as file:
                file.seek(self._offset)
                for line in file:
                    self.rest = not line.endswith(b"\n")
                    if self.rest:
                        return
                    start, self._offset, self._seen = self._offset, self._offset + len(line), line[-SEEN:]
                    self.lines += 1
                    yield start, line
        except FileNotFoundError:
            return
        except OSError as error:
            self.fault = error.strerror or str(error)
