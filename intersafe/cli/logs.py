"""The log of a command: warnings on the terminal, everything in a file. No line holds a key."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from intersafe.errors import InputError
from intersafe.wording import printable

_LOGGER = logging.getLogger("intersafe")
_TIME = "%Y-%m-%dT%H:%M:%S%z"


@contextlib.contextmanager
def command_log(
    path: Path | None, verbose: bool, show: Callable[[str], None], keys: Iterable[str] = ()
) -> Iterator[None]:
    """Shows warnings, or with `verbose` everything, and appends everything to the file at `path`, within the block.

    `keys` are the names of environment variables whose values are never written. `InputError` for a file that cannot
    be opened.
    """
    secrets = [value for key in keys if (value := os.environ.get(key, "").strip())]
    terminal = _Terminal(show)
    terminal.setLevel(logging.INFO if verbose else logging.WARNING)
    terminal.setFormatter(_OneLine("%(levelname)s %(message)s", None, secrets))
    handlers: list[logging.Handler] = [terminal]
    if path:
        try:
            file = _File(path, encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}", at="--log-file", remedy="name a file to append to") from None
        file.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s", _TIME, secrets))
        handlers.append(file)
    level = _LOGGER.level
    for handler in handlers:
        _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO if path or verbose else logging.WARNING)
    try:
        yield
    finally:
        _LOGGER.setLevel(level)
        for handler in handlers:
            _LOGGER.removeHandler(handler)
            handler.close()


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

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is logging's
        """Drops the line."""
