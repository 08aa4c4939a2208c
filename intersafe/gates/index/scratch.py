"""Bytes by offset off the heap, for an index that grows with the run: a file without a name, private to the process.

Read and written by calls, not mapped: a mapped page counts as memory of the process, and a full disk would kill it.
"""

import os
import weakref
from pathlib import Path
from tempfile import TemporaryFile

from intersafe.errors import StorageError

_AT_ONCE = 2**20


class Scratch:
    """Bytes by offset, zero where none were written; in memory where there is no folder or no file can be written."""

    def __init__(self, folder: Path | None, size: int = 0) -> None:
        """`size`: bytes that can be read at once; `folder` is made with the first file and holds nothing to be seen."""
        self._size, self._memory = size, bytearray()
        self._file = None if folder is None else _opened(folder, size)
        if self._file is None:
            self._memory = bytearray(size)
        else:
            self._close = weakref.finalize(self, os.close, self._file)

    def read(self, at: int, size: int) -> bytes | bytearray:
        """Those bytes; `StorageError` where the disk does not give them back."""
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
        """Stores those bytes, in memory from the first write on that the disk refuses."""
        end = at + len(data)
        if self._file is not None:
            try:
                if os.pwrite(self._file, data, at) == len(data):
                    self._size = max(self._size, end)
                    return
            except OSError:
                pass
            self._give_up_file()
        if len(self._memory) < end:
            self._memory.extend(bytes(end - len(self._memory)))
        self._memory[at:end] = data

    def _give_up_file(self) -> None:
        memory = bytearray()
        while len(memory) < self._size:
            memory += self.read(len(memory), min(_AT_ONCE, self._size - len(memory)))
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
        f"a scratch file of the duplicate index cannot be read ({why}); mend the disk, then run the same command again"
    )
