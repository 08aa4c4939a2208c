"""What libraries in this process write to stderr, and the processes that they start, goes to a file of the run.

An engine tells of its loading and of its end in pages; in the middle of a display nobody can read them.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_STDERR = 2
_places: list[Path] = []
"""Where stderr goes, the latest last: it is one for the whole process."""


@contextlib.contextmanager
def stderr_to(path: Path) -> Iterator[None]:
    """Sends the process's stderr to the end of that file; who has a stream of `own_stderr` goes on writing to it."""
    try:
        is_ours = sys.stderr is not None and sys.stderr.fileno() == _STDERR
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:  # closed, or a notebook's: the number 2 may be any file
        yield
        return
    _flush()
    before = os.dup(_STDERR)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, _STDERR)
        os.close(file)
        _places.append(path)
        yield
    finally:
        if path in _places:
            _places.remove(path)
        _flush()
        os.dup2(before, _STDERR)
        os.close(before)


def place() -> tuple[Path, int] | None:
    """The file that stderr goes to now, and how many bytes it has; None where it goes to none."""
    return (_places[-1], _places[-1].stat().st_size) if _places else None


def _flush() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()


def own_stderr() -> TextIO | None:
    """A stream to where stderr goes now, whatever it is sent to later; None where there is no stderr."""
    if sys.stderr is None:
        return None
    try:
        if sys.stderr.fileno() != _STDERR:
            return sys.stderr
        return os.fdopen(os.dup(_STDERR), "w", buffering=1, encoding=sys.stderr.encoding, errors="replace")
    except (OSError, ValueError):  # a stream of a test or a notebook
        return sys.stderr
