"""The log of a worker: collected in its process, sent with its reports, and logged again by the driver."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator

import msgspec

from intersafe.run.incidents import SHOWN
from intersafe.wording import counted, printable

LOGGER = logging.getLogger("intersafe")
MOST = 1_000
"""Lines of one report; the others are counted."""


class LogLine(msgspec.Struct, frozen=True):
    """One record of a log."""

    level: int
    logger: str
    text: str
    """One printable line, without the keys that the worker has."""
    shown: bool = False
    """True if the user is told of the event in other words."""


class LogCollector(logging.Handler):
    """Keeps the lines of a worker until its next report."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """`keys` are the names of environment variables whose values never leave the worker."""
        super().__init__()
        self._secrets = [value for key in keys if (value := os.environ.get(key, "").strip())]
        self._lines: list[LogLine] = []
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one line."""
        if len(self._lines) >= MOST:
            self._dropped += 1
            return
        text = record.getMessage()
        for secret in self._secrets:
            text = text.replace(secret, "***")
        self._lines.append(LogLine(record.levelno, record.name, printable(text), getattr(record, "shown", False)))

    def taken(self) -> list[LogLine]:
        """The lines since the last call, at most `MOST`, and one that counts the others."""
        lines, dropped, self._lines, self._dropped = self._lines, self._dropped, [], 0
        if dropped:
            text = f"{counted(dropped, 'more log line')} of a worker left out"
            lines.append(LogLine(logging.INFO, LOGGER.name, text))
        return lines


@contextlib.contextmanager
def collecting(collector: LogCollector, level: int) -> Iterator[None]:
    """Collects what is logged at that level and above, within the block."""
    before = LOGGER.level
    LOGGER.addHandler(collector)
    LOGGER.setLevel(level)
    try:
        yield
    finally:
        LOGGER.setLevel(before)
        LOGGER.removeHandler(collector)
        collector.close()


def log_again(reports: Iterable[Iterable[LogLine]]) -> None:
    """Logs the lines of the workers' reports; an event that several workers met at once is one line."""
    met: set[LogLine] = set()
    for lines in reports:
        for line in lines:
            is_event = line.shown or line.level >= logging.WARNING
            if is_event and line in met:
                continue
            met.add(line)
            logging.getLogger(line.logger).log(line.level, "%s", line.text, extra=SHOWN if line.shown else None)
