"""A banded index (LSH) of MinHash signatures: a record of fixed size for each, and tables of 4-byte record numbers.

With a folder all but one small table is in scratch files, so that memory does not grow with the run; without one the
index takes less than 1 KB of memory for each signature. A full table is never rebuilt: a larger one is added, so that
no insertion has to wait for millions of others.
"""

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from struct import Struct

from intersafe.gates.index.scratch import Scratch

_FIRST_CAPACITY = 4096
_IN_MEMORY, _IN_FILES = (4, 1), (16, 2)
"""How many times larger each table is than the one before, and how many slots a full one has for each signature.

Larger values take more bytes; smaller ones give more chance candidates, or more tables to read.
"""
_NUMBER = Struct("=I")
_BATCH = 16_384
"""Signatures that are added without a search in between, as on resuming a run, are inserted together, band by band."""
_DENSE = 512
"""Slots for each signature of a batch up to which it is faster to read and write the whole band than single slots."""
_WRITTEN = 1024
"""Records that are written by one call."""
_LOWEST, _SECOND = (bytes(48 + (byte >> bit & 1) for byte in range(256)) for bit in (0, 1))
"""Translates a byte to the digit of its lowest and of its second lowest bit."""


class BandedSignatures:
    """Signatures, numbered from 1 in the order in which they were added, searchable for the nearest.

    A signature is the bytes of its values, 4 for each. Two are compared if all values of at least one band agree.
    """

    def __init__(self, permutations: int, bands: int, least: int, folder: Path | None = None) -> None:
        """`least`: how many values must agree for a signature to be found; `folder`: for scratch files, else memory."""
        self._permutations, self._bands, self._least, self._folder = permutations, bands, least, folder
        self._size, self._width = 4 * permutations, 4 * permutations // bands
        self._growth, self._spare = _IN_FILES if folder else _IN_MEMORY
        self._count = self._free = 0
        self._pending: list[bytes] = []
        # A record: for each band the previous signature of its slot (0 if none), then the sketch, then the signature.
        self._links = Struct(f"={bands}I")
        self._sketch_at, self._sketch_size = 4 * bands, -(-2 * permutations // 8)
        self._head_size = self._sketch_at + self._sketch_size
        self._record = self._head_size + self._size
        self._records: Scratch | None = None
        self._tables: list[tuple[Scratch, int]] = []
        """For each band and slot the number of its latest signature; and how many slots a band has."""
        self._lookup: tuple[bytes, list[int], list[int]] = b"", [], []
        """The signature last searched for, the offsets of its slots in the last table, and what these held."""
        self._low = (1 << permutations) - 1
        # The highest bit of each value, and all bits but that one.
        self._tops = int.from_bytes(b"\0\0\0\x80" * permutations, "little")
        self._rests = int.from_bytes(b"\xff\xff\xff\x7f" * permutations, "little")

    def __len__(self) -> int:
        return self._count + len(self._pending)

    def add(self, signature: bytes) -> None:
        """Stores a signature."""
        self._pending.append(signature)
        if len(self._pending) >= _BATCH:
            self._insert_pending()

    def _insert_pending(self) -> None:
        """Inserts the signatures that were added since the last search."""
        pending, self._pending = self._pending, []
        while pending:
            if not self._free:
                self._add_table()
            now, pending = pending[: self._free], pending[self._free :]
            if len(now) * _DENSE < self._tables[-1][1]:
                for signature in now:
                    self._insert_one(signature)
            else:
                self._insert_many(now)
            self._free -= len(now)

    def _insert_one(self, signature: bytes) -> None:
        # A signature is mostly added right after it was searched for: one lookup serves both.
        if self._lookup[0] != signature:
            self._look_up(signature)
        _, offsets, before = self._lookup
        self._lookup = b"", [], []
        self._append([signature], [tuple(before)])
        write, cell = self._tables[-1][0].write, _NUMBER.pack(self._count)
        for offset in offsets:
            write(offset, cell)

    def _insert_many(self, signatures: list[bytes]) -> None:
        cells, slots = self._tables[-1]
        width, links = self._width, []
        self._lookup = b"", [], []
        for band in range(self._bands):
            at, column, before = band * width, array("I"), array("I")
            column.frombytes(cells.read(4 * slots * band, 4 * slots))
            for number, signature in enumerate(signatures, self._count + 1):
                slot = hash(signature[at : at + width]) % slots
                before.append(column[slot])
                column[slot] = number
            cells.write(4 * slots * band, memoryview(column).cast("B"))
            links.append(before)
        rows = zip(*links, strict=True)
        for start in range(0, len(signatures), _WRITTEN):
            some = signatures[start : start + _WRITTEN]
            self._append(some, islice(rows, len(some)))

    def _append(self, signatures: list[bytes], links: Iterable[tuple[int, ...]]) -> None:
        assert self._records
        pack, size = self._links.pack, self._sketch_size
        records = b"".join(
            pack(*before) + _sketch(signature).to_bytes(size, "little") + signature
            for signature, before in zip(signatures, links, strict=True)
        )
        self._records.write(self._count * self._record, records)
        self._count += len(signatures)

    def nearest(self, signature: bytes) -> tuple[int, int] | None:
        """Number of the nearest and how many of its values agree, the earliest of equals; None below `least`."""
        best, most = 0, self._least - 1
        for number in sorted(self._plausible(signature)):
            other = self._stored(number)
            agreeing = self._agreeing(other, signature)
            if agreeing > most and self._share_a_band(other, signature):
                best, most = number, agreeing
        return (best, most) if best else None

    def candidates(self, signature: bytes) -> set[int]:
        """Numbers of all that share a slot in a band: those with an equal band, and a few by chance."""
        return set(self._heads(signature))

    def _heads(self, signature: bytes) -> dict[int, bytes | bytearray]:
        """The candidates, each with the part of its record before the signature."""
        found: dict[int, bytes | bytearray] = {}
        if self._pending:
            self._insert_pending()
        if self._records is None:
            return found
        read, size, record, unpack = self._records.read, self._head_size, self._record, _NUMBER.unpack_from
        for band, number in self._chains(signature):
            at = 4 * band
            while number:
                if (head := found.get(number)) is None:
                    head = found[number] = read((number - 1) * record, size)
                (number,) = unpack(head, at)
        return found

    def _chains(self, signature: bytes) -> Iterator[tuple[int, int]]:
        """Band and number of the latest signature in each of its slots, table by table."""
        for table in range(len(self._tables)):
            _, _, numbers = self._look_up(signature, table)
            yield from enumerate(numbers)

    def _look_up(self, signature: bytes, table: int = -1) -> tuple[bytes, list[int], list[int]]:
        cells, slots = self._tables[table]
        offsets = [4 * (band * slots + value % slots) for band, value in enumerate(self._hashes(signature))]
        read = cells.read
        numbers = [int.from_bytes(read(offset, 4), "little") for offset in offsets]
        self._lookup = signature, offsets, numbers
        return self._lookup

    def _add_table(self) -> None:
        folder = self._folder
        if self._records is None:
            self._records = Scratch(folder)
        self._free = _FIRST_CAPACITY * self._growth ** len(self._tables)
        # The first one is small and read most often: a file would only make it slower.
        slots = self._free * self._spare
        self._tables.append((Scratch(folder if self._tables else None, 4 * slots * self._bands), slots))
        self._lookup = b"", [], []

    def _hashes(self, signature: bytes) -> list[int]:
        # These hashes differ between processes; `nearest` drops the candidates that they bring by chance.
        width = self._width
        return [hash(signature[at : at + width]) for at in range(0, self._size, width)]

    def _plausible(self, signature: bytes) -> list[int]:
        """The candidates that may agree in enough values: all that do, and few others.

        Values that agree do so in their lowest two bits. More than `allowed` differences there settle it, at a tenth of
        the cost of comparing the values, so that a slot with thousands of signatures stays cheap.
        """
        mine, low, shift, at = _sketch(signature), self._low, self._permutations, self._sketch_at
        allowed = self._permutations - self._least
        plausible = []
        for number, head in self._heads(signature).items():
            differing = int.from_bytes(head[at:], "little") ^ mine
            if ((differing | differing >> shift) & low).bit_count() <= allowed:
                plausible.append(number)
        return plausible

    def _stored(self, number: int) -> bytes | bytearray:
        assert self._records
        return self._records.read((number - 1) * self._record + self._head_size, self._size)

    def _agreeing(self, stored: bytes | bytearray, signature: bytes) -> int:
        other = int.from_bytes(stored, "little") ^ int.from_bytes(signature, "little")
        # All values at once: the highest bit of each becomes 1 where any of its bits differs, without a carry.
        differing = (((other & self._rests) + self._rests) | other) & self._tops
        return self._permutations - differing.bit_count()

    def _share_a_band(self, other: bytes | bytearray, signature: bytes) -> bool:
        width = self._width
        return any(other[at : at + width] == signature[at : at + width] for at in range(0, self._size, width))


def _sketch(signature: bytes) -> int:
    """The lowest bit of each value, followed by the second lowest of each in the higher half."""
    bytes_ = signature[::4]
    return int(bytes_.translate(_SECOND) + bytes_.translate(_LOWEST), 2)
