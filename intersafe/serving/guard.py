"""Ends the servers of an intersafe that was killed: a small process of its own, which outlives it by half a minute.

It is told process groups over a pipe, `+123` for one that began and `-123` for one that ended. The pipe is at its end
when intersafe is, however that came about. A signal that the system sends a child of a dead parent is not enough: one
that reaches a vLLM while it loads is lost.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable


class Guard:
    """The process, as intersafe sees it."""

    def __init__(self, stopping: float) -> None:
        """Starts it, with the seconds from SIGTERM to SIGKILL.

        By its file and apart from the folder that it is started in, as it needs nothing else.
        """
        self._process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, "-I", __file__, str(stopping)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def began(self, group: int) -> None:
        """From now on this group must not outlive intersafe."""
        self._tell(f"+{group}\n")

    def ended(self, group: int) -> None:
        """That group is gone, and its number may become another's."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """Ends it, and with it what it was told of and not yet told that it ended."""
        pipe = self._process.stdin
        assert pipe
        with contextlib.suppress(OSError):
            pipe.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe
        with contextlib.suppress(OSError):  # somebody killed it: the servers are stopped all the same
            pipe.write(line.encode())
            pipe.flush()


def guard(lines: Iterable[str], stopping: float) -> None:
    """Reads to the end, then stops the groups that are left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with intersafe, not before
    groups: set[int] = set()
    for line in lines:
        (groups.add if line.startswith("+") else groups.discard)(int(line[1:]))
    deadline = time.monotonic() + stopping
    _send(groups, signal.SIGTERM)
    while (groups := _send(groups, 0)) and time.monotonic() < deadline:
        time.sleep(0.1)
    _send(groups, signal.SIGKILL)


def _send(groups: set[int], number: int) -> set[int]:
    """A signal for each group; those that are still there."""
    there = set()
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
            there.add(group)
    return there


if __name__ == "__main__":
    guard(sys.stdin, float(sys.argv[1]))
