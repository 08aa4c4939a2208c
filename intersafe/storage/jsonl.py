"""JSONL files: appended in groups by one writer, repaired after a kill, read with offsets.

Group commit (`GroupWriter`): at most 64 lines or 50 ms wait in memory, and fsync runs in a thread. Lines that come
during an fsync are written to the operating system and wait there for the next one, so memory does not grow.
Plain append-only files with one writer each work on NFS and Lustre, where the locks of SQLite do not.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from intersafe.errors import StorageError

GROUP_LINES = 64
GROUP_SECONDS = 0.05


class GroupWriter:
    """Appends lines to files of one directory in groups; a failed write or fsync raises `StorageError`."""

    def __init__(self, root: Path, check: Callable[[], None] | None = None) -> None:
        """`check` is called before every write; it raises `StorageError` if this process must not write any more."""
        self._root, self._check = root, check
        self._files: dict[str, int] = {}
        self._lines: list[tuple[str, bytes]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fsync")
        self._syncing: asyncio.Future[None] | None = None
        self._unsynced: set[str] = set()
        self._groups = self._durable = 0
        self._closing = False
        self._problem = ""

    def add(self, name: str, record: msgspec.Struct | dict[str, Any]) -> None:
        """Appends one record as a line of JSON to the file `name`; `StorageError` after a failed write."""
        self._fail_if_broken()
        self._lines.append((name, msgspec.json.encode(record) + b"\n"))
        if len(self._lines) >= GROUP_LINES:
            self._write()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GROUP_SECONDS, self._write_quietly)

    def flush(self) -> None:
        """Writes the waiting lines to the operating system, so that this process can read them."""
        self._write()

    async def settled(self) -> None:
        """Returns when everything added so far is written and synced; `StorageError` if that fails."""
        self._write()
        wanted = self._groups
        while self._durable < wanted and not self._problem:
            if self._syncing is None:
                self._sync()
            assert self._syncing is not None
            await asyncio.wait([self._syncing])
        self._fail_if_broken()

    def _write_quietly(self) -> None:
        with contextlib.suppress(StorageError):  # `_problem` keeps it, and the next `add` raises it inside the run
            self._write()

    def _write(self) -> None:
        """Writes the waiting lines to the operating system; a kill of the process cannot lose them any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail_if_broken()
        if self._check is not None:
            try:
                self._check()
            except StorageError as error:
                self._problem = str(error)
                raise
        groups: dict[str, list[bytes]] = {}
        # Replies first: after a kill between two files, no outcome may be there without its replies.
        for name, line in sorted(self._lines, key=lambda item: not item[0].startswith("journal/")):
            groups.setdefault(name, []).append(line)
        self._lines.clear()
        try:
            for name, lines in groups.items():
                _append(self._file(name), b"".join(lines))
                self._unsynced.add(name)
            self._groups += bool(groups)
        except OSError as error:
            self._problem = self._message(error)
            raise StorageError(self._problem) from None
        if self._syncing is None and self._unsynced:
            self._sync()

    def _sync(self) -> None:
        names = sorted(self._unsynced, key=lambda name: not name.startswith("journal/"))
        self._unsynced.clear()
        groups, loop = self._groups, asyncio.get_running_loop()
        self._syncing = loop.run_in_executor(self._thread, _fsync, {name: self._files[name] for name in names})
        self._syncing.add_done_callback(lambda future: self._synced(future, groups))

    def _synced(self, future: "asyncio.Future[None]", groups: int) -> None:
        self._syncing = None
        if future.cancelled():
            return
        if isinstance(error := future.exception(), OSError):
            self._problem = self._message(error)
            return
        self._durable = groups
        if self._unsynced and not self._closing:
            self._sync()  # what was written in the meantime must not wait for the next group

    def _file(self, name: str) -> int:
        if name not in self._files:
            path = self._root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        return self._files[name]

    def _fail_if_broken(self) -> None:
        if self._problem:
            raise StorageError(self._problem)

    def _message(self, error: OSError) -> str:
        place = self._root / error.filename if error.filename else self._root
        remedy = "free disk space or correct its permissions, then run the same command again"
        return f"{place}: cannot write ({error.strerror}); {remedy}"

    async def close(self) -> None:
        """Writes and syncs the waiting lines, then closes the files; raises `StorageError` if that fails."""
        self._closing = True
        try:
            self._write()
            while self._syncing is not None:
                await asyncio.wait([self._syncing])
            await asyncio.get_running_loop().run_in_executor(self._thread, _fsync, dict(self._files))
            self._fail_if_broken()
        except OSError as error:
            raise StorageError(self._message(error)) from None
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._thread.shutdown(wait=True)
            for file in self._files.values():
                os.close(file)
            self._files.clear()


def _append(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _fsync(files: Mapping[str, int]) -> None:
    for name, file in files.items():
        os.fsync(file)
        if not os.fstat(file).st_nlink:
            raise OSError(errno.ENOENT, "the file was deleted while it was written", name)


def heal(path: Path) -> None:
    """Removes a torn last line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        at = end
        while at > 0:
            start = max(0, at - 65_536)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < end:
            file.truncate(at)


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the offset and the bytes of every complete line; `StorageError` if the file cannot be read."""
    if not path.exists():
        return
    offset = 0
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield offset, line
                offset += len(line)
    except OSError as error:
        remedy = "correct that, then run the same command again"
        raise StorageError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
