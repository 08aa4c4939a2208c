"""The signatures of a run's accepted dialogues on disk: a cache that spares a resumed run from computing them again.

Record k belongs to the k-th row of `dialogues.jsonl`: its signature, and a checksum over that row's id and texts, the
settings and the signature itself. A record with a wrong checksum is computed again from the row. So a file that is
lost, torn, damaged, foreign or ahead of the rows cannot change a decision. Nothing is synced.
"""

import hashlib
import os
from pathlib import Path

_MAGIC = b"intersafe duplicates 1\n"
_CHECKSUM = 8
"""Bytes."""
_BATCH = 64
"""Records that are written together: a process that ends loses at most these."""
_READ_AHEAD = 512
"""Records that are read together."""


class SignatureFile:
    """Signatures by position, from 0. What cannot be read counts as missing; after a failed write none is tried."""

    def __init__(self, path: Path, made_by: bytes, size: int) -> None:
        """`made_by` stands for all that a signature depends on; `size`: the bytes of one."""
        self._path, self._size, self._record = path, size, size + _CHECKSUM
        self._key = hashlib.blake2b(made_by, digest_size=20).digest()
        self._head = _MAGIC + self._key.hex().encode() + b"\n"
        self._pending: list[tuple[int, bytes]] = []
        self._block, self._block_at = b"", 0
        self._usable = True
        self._stored = self._count()

    def get(self, position: int, row: bytes) -> bytes | None:
        """The signature at that position if it belongs to that row, or None."""
        if position >= self._stored:
            self._block = b""
            return None
        at = (position - self._block_at) * self._record
        if not 0 <= at < len(self._block):
            self._block, self._block_at, at = self._read(position), position, 0
        record = self._block[at : at + self._record]
        signature = record[: self._size]
        return signature if record[self._size :] == self._checksum(row, signature) else None

    def put(self, position: int, row: bytes, signature: bytes) -> None:
        """Stores the signature of that row, on disk with the next batch."""
        if self._usable:
            self._pending.append((position, signature + self._checksum(row, signature)))
            if len(self._pending) >= _BATCH:
                self._write()

    def _checksum(self, row: bytes, signature: bytes) -> bytes:
        return hashlib.blake2b(signature + row, digest_size=_CHECKSUM, key=self._key).digest()

    def _count(self) -> int:
        """Whole records in the file, 0 if it has another head."""
        try:
            with self._path.open("rb") as file:
                known = file.read(len(self._head)) == self._head
                return (file.seek(0, os.SEEK_END) - len(self._head)) // self._record if known else 0
        except OSError:
            return 0

    def _read(self, position: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset(position))
                return file.read(_READ_AHEAD * self._record)
        except OSError:
            return b""

    def _offset(self, position: int) -> int:
        return len(self._head) + position * self._record

    def _write(self) -> None:
        pending, self._pending = self._pending, []
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            # Unbuffered: a full disk refuses the write here, and not again on closing.
            with self._path.open("rb+", buffering=0) as file:
                if file.read(len(self._head)) != self._head:
                    file.truncate(0)
                    file.seek(0)
                    file.write(self._head)
                for position, record in pending:
                    file.seek(self._offset(position))
                    if file.write(record) != len(record):
                        self._usable = False
                        return
        except OSError:
            self._usable = False
