"""The signatures of a run's accepted dialogues on the disk: a cache that saves a resumed run from making them again.

Record k belongs to the k-th row of `dialogues.jsonl`: its signature, and a digest of that row's id and texts, of the
settings and of the signature itself. A record that does not prove itself by it is made anew from the row, so neither
a lost, torn, damaged or foreign file nor one that is ahead of the rows can change a decision. Nothing is synced.
"""

import hashlib
import os
from pathlib import Path

_MAGIC = b"intersafe duplicates 1\n"
_PROOF = 8
_AT_ONCE = 64
"""Records that wait to be written: so many a process that ends loses at most."""
_READ_AHEAD = 512


class SignatureFile:
    """Signatures by place, from 0; whatever cannot be read is not there, and a disk that fails is left alone."""

    def __init__(self, path: Path, made_by: bytes, size: int) -> None:
        """`made_by` stands for all that decides what a signature is; `size`: its bytes."""
        self._path, self._size, self._record = path, size, size + _PROOF
        self._key = hashlib.blake2b(made_by, digest_size=20).digest()
        self._head = _MAGIC + self._key.hex().encode() + b"\n"
        self._waiting: list[tuple[int, bytes]] = []
        self._block, self._block_at = b"", 0
        self._usable = True
        self._stored = self._count()

    def get(self, place: int, row: bytes) -> bytes | None:
        """The signature at that place if it was made from that row, or None."""
        if place >= self._stored:
            self._block = b""
            return None
        at = (place - self._block_at) * self._record
        if not 0 <= at < len(self._block):
            self._block, self._block_at, at = self._read(place), place, 0
        record = self._block[at : at + self._record]
        signature = record[: self._size]
        return signature if record[self._size :] == self._proof(row, signature) else None

    def put(self, place: int, row: bytes, signature: bytes) -> None:
        """Stores the signature of that row; it is on the disk after a few dozen others, or never."""
        if self._usable:
            self._waiting.append((place, signature + self._proof(row, signature)))
            if len(self._waiting) >= _AT_ONCE:
                self._write()

    def _proof(self, row: bytes, signature: bytes) -> bytes:
        return hashlib.blake2b(signature + row, digest_size=_PROOF, key=self._key).digest()

    def _count(self) -> int:
        """Whole records of a file with this head."""
        try:
            with self._path.open("rb") as file:
                known = file.read(len(self._head)) == self._head
                return (file.seek(0, os.SEEK_END) - len(self._head)) // self._record if known else 0
        except OSError:
            return 0

    def _read(self, place: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset(place))
                return file.read(_READ_AHEAD * self._record)
        except OSError:
            return b""

    def _offset(self, place: int) -> int:
        return len(self._head) + place * self._record

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            # Without a buffer: what a full disk refuses is refused here, and not once more on closing.
            with self._path.open("rb+", buffering=0) as file:
                if file.read(len(self._head)) != self._head:
                    file.truncate(0)
                    file.seek(0)
                    file.write(self._head)
                for place, record in waiting:
                    file.seek(self._offset(place))
                    if file.write(record) != len(record):
                        self._usable = False
                        return
        except OSError:
            self._usable = False
