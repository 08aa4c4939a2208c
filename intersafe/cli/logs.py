"""The log of a command: warnings on the terminal, everything in a file. No line holds a key."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from intersafe.errors import InputError, IntersafeError
from intersafe.run.incidents import SHOWN
from intersafe.wording import printable

_LOGGER = logging.getLogger("intersafe")
_TIME = "%Y-%m-%dT%H:%M:%S%z"
_BEGINS = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


@contextlib.contextmanager
def command_log(
    path: Path | None, verbose: bool, show: Callable[[str], None], keys: Iterable[str] = ()
) -> Iterator[None]:
    """Shows warnings, or with `verbose` everything, and appends everything to the file at `path`, within the block.

    An error that ends the block is logged too. `keys` are the names of environment variables whose values are never
    written. `InputError` for a file that cannot be opened or holds something else than a log.
    """
    secrets = [value for key in keys if (value := os.environ.get(key, "").strip())]
    terminal = _Terminal(show)
    terminal.setLevel(logging.INFO if verbose else logging.WARNING)
    terminal.setFormatter(_OneLine("%(levelname)s %(message)s", None, secrets))
    handlers: list[logging.Handler] = [terminal]
    if path:
        file = _open(path, show)
        file.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s", _TIME, secrets))
        handlers.append(file)
    level = _LOGGER.level
    for handler in handlers:
        _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO if path or verbose else logging.WARNING)
    try:
        yield
    except IntersafeError as error:
        _LOGGER.error("%s", error, extra=SHOWN)  # the command prints it
        raise
    except KeyboardInterrupt:
        _LOGGER.warning("stopped; the same command resumes", extra=SHOWN)
        raise
    finally:
        _LOGGER.setLevel(level)
        for handler in handlers:
            _LOGGER.removeHandler(handler)
            handler.close()


def _open(path: Path, show: Callable[[str], None]) -> "_File":
    """The file to append to. Data that a run or a recipe needs must not get log lines."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file", at="--log-file", remedy="name a file to append to")
        with path.open("ab+") as file:
            file.seek(0)
            if (begins := file.read(40)) and not _BEGINS.match(begins):
                raise InputError(f"{path} is not a log of intersafe", at="--log-file", remedy="name another file")
        return _File(path, show)
    except OSError as error:
        remedy = "make its folder first, or name another file"
        raise InputError(f"{path}: {error.strerror}", at="--log-file", remedy=remedy) from None


class _OneLine(logging.Formatter):
    """One printable line per record, without the secrets."""

    def __init__(self, form: str, time_form: str | None, secrets: list[str]) -> None:
        super().__init__(form, time_form)
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        text = super().format(record)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return printable(text)


class _Terminal(logging.Handler):
    """Hands lines to the display, except those that the display has shown already."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one line."""
        if not getattr(record, "shown", False):
            self._show(self.format(record))


class _File(logging.FileHandler):
    """Appends to a file; a full disk costs lines of the log, not the run."""

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        super().__init__(path, encoding="utf-8", errors="replace")
        self._show: Callable[[str], None] | None = show

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is logging's
        """Drops the line; says so the first time."""
        show, self._show = self._show, None
        if show:
            show(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]}): log lines are lost, the run is not")
