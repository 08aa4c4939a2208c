"""A small process that stops the servers of intersafe after intersafe itself was killed.

It reads process groups from a pipe: `+123` for one that started, `-123` for one that ended. The pipe ends with
intersafe, however intersafe ends; the guard then stops the groups that are left and exits. The signal that Linux sends
to the children of a dead parent is not enough: vLLM loses a signal that arrives while it loads.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable


class Guard:
    """The guard process, seen from intersafe."""

    def __init__(self, stopping: float) -> None:
        """Starts the process; `stopping` is the seconds from SIGTERM to SIGKILL."""
        # By its file and isolated (-I): it needs the standard library alone, whatever the working directory holds.
        self._process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, "-I", __file__, str(stopping)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def add(self, group: int) -> None:
        """From now on this process group must not outlive intersafe."""
        self._tell(f"+{group}\n")

    def remove(self, group: int) -> None:
        """That group has ended; the system may give its number to another one."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """Stops the groups that were added and not removed, then the process."""
        pipe = self._process.stdin
        assert pipe
        with contextlib.suppress(OSError):
            pipe.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe
        with contextlib.suppress(OSError):  # the guard was killed: intersafe stops the servers by itself
            pipe.write(line.encode())
            pipe.flush()


def guard(lines: Iterable[str], stopping: float) -> None:
    """Reads all lines, then sends SIGTERM to the groups that are left, and SIGKILL after `stopping` seconds."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it must outlive intersafe
    groups: set[int] = set()
    for line in lines:
        (groups.add if line.startswith("+") else groups.discard)(int(line[1:]))
    deadline = time.monotonic() + stopping
    _send(groups, signal.SIGTERM)
    while (groups := _send(groups, 0)) and time.monotonic() < deadline:
        time.sleep(0.1)
    _send(groups, signal.SIGKILL)


def _send(groups: set[int], number: int) -> set[int]:
    """Sends the signal to each group; returns the groups that still exist."""
    alive = set()
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
            alive.add(group)
    return alive


if __name__ == "__main__":
    guard(sys.stdin, float(sys.argv[1]))
