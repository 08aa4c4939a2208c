"""Bytes by offset outside of memory, for an index that grows with the run: an unnamed file, private to the process.

It is read and written by calls and not mapped: mapped pages count as the process's memory, and a full disk would kill
the process.
"""

import os
import weakref
from pathlib import Path
from tempfile import TemporaryFile

from intersafe.errors import StorageError

_CHUNK = 2**20


class Scratch:
    """Bytes by offset, zero where nothing was written; in memory if there is no folder or the disk refuses a file."""

    def __init__(self, folder: Path | None, size: int = 0) -> None:
        """`size`: bytes that can be read from the start; `folder` is created with the first file, which has no name."""
        self._size, self._memory = size, bytearray()
        self._file = None if folder is None else _opened(folder, size)
        if self._file is None:
            self._memory = bytearray(size)
        else:
            self._close = weakref.finalize(self, os.close, self._file)

    def read(self, at: int, size: int) -> bytes | bytearray:
        """Those bytes; `StorageError` if the disk cannot return them."""
        if self._file is None:
            return self._memory[at : at + size]
        try:
            data = os.pread(self._file, size, at)
        except OSError as error:
            raise _unreadable(error.strerror) from None
        if len(data) != size:
            raise _unreadable("it ends too early")
        return data

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Stores those bytes; in memory once the disk has refused a write."""
        end = at + len(data)
        if self._file is not None:
            try:
                if os.pwrite(self._file, data, at) == len(data):
                    self._size = max(self._size, end)
                    return
            except OSError:
                pass
            self._move_to_memory()
        if len(self._memory) < end:
            self._memory.extend(bytes(end - len(self._memory)))
        self._memory[at:end] = data

    def _move_to_memory(self) -> None:
        """Copies the file's bytes to memory and closes it."""
        memory = bytearray()
        while len(memory) < self._size:
            memory += self.read(len(memory), min(_CHUNK, self._size - len(memory)))
        self._memory, self._file = memory, None
        self._close()


def _opened(folder: Path, size: int) -> int | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder, buffering=0) as file:
            file.truncate(size)
            return os.dup(file.fileno())
    except OSError:
        return None


def _unreadable(why: str | None) -> StorageError:
    return StorageError(
        f"a scratch file of the duplicate index cannot be read ({why}); repair it, then run the same command again"
    )
