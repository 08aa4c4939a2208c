"""Redirects the process's stderr to a file of the run, for libraries of this process and processes that they start.

An engine writes pages as it loads and as it ends. In a live display nobody could read them.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_STDERR = 2
_files: list[Path] = []
"""The files that stderr is redirected to, the current one last: the whole process has one stderr."""


@contextlib.contextmanager
def stderr_to(path: Path) -> Iterator[None]:
    """Appends the process's stderr to that file; a stream from `own_stderr` still writes to the old place.

    Does nothing where `sys.stderr` is not file descriptor 2, as in a notebook. `OSError` if the file cannot be opened.
    """
    try:
        is_ours = sys.stderr is not None and sys.stderr.fileno() == _STDERR
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:  # closed, or a notebook's: descriptor 2 may be any file
        yield
        return
    _flush()
    before = os.dup(_STDERR)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, _STDERR)
        os.close(file)
        _files.append(path)
        yield
    finally:
        if path in _files:
            _files.remove(path)
        _flush()
        os.dup2(before, _STDERR)
        os.close(before)


def stderr_file() -> tuple[Path, int] | None:
    """The file that stderr goes to now and its size in bytes; None where stderr is not redirected."""
    return (_files[-1], _files[-1].stat().st_size) if _files else None


def _flush() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()


def own_stderr() -> TextIO | None:
    """A stream to where stderr goes now, unaffected by later redirection; None where there is no stderr."""
    if sys.stderr is None:
        return None
    try:
        if sys.stderr.fileno() != _STDERR:
            return sys.stderr
        return os.fdopen(os.dup(_STDERR), "w", buffering=1, encoding=sys.stderr.encoding, errors="replace")
    except (OSError, ValueError):  # a stream of a test or a notebook
        return sys.stderr
