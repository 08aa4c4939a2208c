"""MinHash signatures in a banded index (LSH): a record of fixed size for each and tables of 4-byte numbers.

With a folder all but one small table lies in scratch files, so that memory does not grow with the run; otherwise it
takes less than 1 KB for each signature. Tables are never moved: where one is full a larger one is begun beside it, so
that no insertion has to wait for millions of others.
"""

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from struct import Struct

from intersafe.gates.index.scratch import Scratch

_FIRST_ROOM = 4096
_IN_MEMORY, _IN_FILES = (4, 1), (16, 2)
"""How many times larger each table is than the one before, and slots for each signature of a full one.

More are more bytes; fewer bring more together by chance, or more tables to be read.
"""
_NUMBER = Struct("=I")
_WAITING = 16_384
"""Signatures added without a question between: as on resuming a run. They are entered together, band by band."""
_DENSE = 512
"""Slots for each of them up to which it is quicker to read and write the whole band: the cost of a call for 2 KB."""
_WRITTEN = 1024
_LOWEST, _SECOND = (bytes(48 + (byte >> bit & 1) for byte in range(256)) for bit in (0, 1))
"""A byte to the digit 0 or 1 of one of its bits."""


class BandedSignatures:
    """Signatures by number, from 1 in the order in which they were added, searchable for the nearest.

    A signature is the bytes of its values, 4 for each. Two are compared if all values of at least one band agree.
    """

    def __init__(self, permutations: int, bands: int, least: int, folder: Path | None = None) -> None:
        """`least`: how many values must agree for a signature to be found at all; `folder`: where files may be."""
        self._permutations, self._bands, self._least, self._folder = permutations, bands, least, folder
        self._size, self._width = 4 * permutations, 4 * permutations // bands
        self._growth, self._spare = _IN_FILES if folder else _IN_MEMORY
        self._count = self._room = 0
        self._waiting: list[bytes] = []
        # For each band the signature that stood in its slot before this one, 0 where there was none; then its sketch.
        self._links = Struct(f"={bands}I")
        self._sketch_at, self._sketch_size = 4 * bands, -(-2 * permutations // 8)
        self._head_size = self._sketch_at + self._sketch_size
        self._record = self._head_size + self._size
        self._records: Scratch | None = None
        self._tables: list[tuple[Scratch, int]] = []
        """For each band and slot the signature that came last, and how many slots a band has."""
        self._asked: tuple[bytes, list[int], list[int]] = b"", [], []
        """The signature last searched for, where it stands in the last table, and what stands there."""
        self._low = (1 << permutations) - 1
        # The highest bit of each value, and all bits but that one.
        self._tops = int.from_bytes(b"\0\0\0\x80" * permutations, "little")
        self._rests = int.from_bytes(b"\xff\xff\xff\x7f" * permutations, "little")

    def __len__(self) -> int:
        return self._count + len(self._waiting)

    def add(self, signature: bytes) -> None:
        """Remembers a signature."""
        self._waiting.append(signature)
        if len(self._waiting) >= _WAITING:
            self._enter()

    def _enter(self) -> None:
        """Enters what waits."""
        waiting, self._waiting = self._waiting, []
        while waiting:
            if not self._room:
                self._begin_table()
            now, waiting = waiting[: self._room], waiting[self._room :]
            if len(now) * _DENSE < self._tables[-1][1]:
                for signature in now:
                    self._enter_one(signature)
            else:
                self._enter_many(now)
            self._room -= len(now)

    def _enter_one(self, signature: bytes) -> None:
        # Who is added was asked about just before: one look serves both.
        if self._asked[0] != signature:
            self._look_up(signature)
        _, places, before = self._asked
        self._asked = b"", [], []
        self._append([signature], [tuple(before)])
        write, cell = self._tables[-1][0].write, _NUMBER.pack(self._count)
        for place in places:
            write(place, cell)

    def _enter_many(self, signatures: list[bytes]) -> None:
        cells, slots = self._tables[-1]
        width, links = self._width, []
        self._asked = b"", [], []
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
        """Number of the nearest and how many of its values agree, the earliest of equals; None if none is near."""
        best, most = 0, self._least - 1
        for number in sorted(self._alike(signature)):
            other = self._stored(number)
            agreeing = self._agreeing(other, signature)
            if agreeing > most and self._share_a_band(other, signature):
                best, most = number, agreeing
        return (best, most) if best else None

    def candidates(self, signature: bytes) -> set[int]:
        """Numbers of all that share a slot in a band: those to be compared, and a few that got there by chance."""
        return set(self._heads(signature))

    def _heads(self, signature: bytes) -> dict[int, bytes | bytearray]:
        """The candidates, each with its record up to the signature itself."""
        found: dict[int, bytes | bytearray] = {}
        if self._waiting:
            self._enter()
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
        """Band and number of the last signature of each slot."""
        for table in range(len(self._tables)):
            _, _, numbers = self._look_up(signature, table)
            yield from enumerate(numbers)

    def _look_up(self, signature: bytes, table: int = -1) -> tuple[bytes, list[int], list[int]]:
        cells, slots = self._tables[table]
        places = [4 * (band * slots + value % slots) for band, value in enumerate(self._hashes(signature))]
        read = cells.read
        numbers = [int.from_bytes(read(place, 4), "little") for place in places]
        self._asked = signature, places, numbers
        return self._asked

    def _begin_table(self) -> None:
        folder = self._folder
        if self._records is None:
            self._records = Scratch(folder)
        self._room = _FIRST_ROOM * self._growth ** len(self._tables)
        # The first one is small and asked most often; a file of its own for it would only cost time.
        slots = self._room * self._spare
        self._tables.append((Scratch(folder if self._tables else None, 4 * slots * self._bands), slots))
        self._asked = b"", [], []

    def _hashes(self, signature: bytes) -> list[int]:
        # They differ by process; what they bring together by chance is told apart in `nearest`.
        width = self._width
        return [hash(signature[at : at + width]) for at in range(0, self._size, width)]

    def _alike(self, signature: bytes) -> list[int]:
        """The candidates that may have enough in common: all that have, and few others.

        Values that agree do so in their lowest two bits: more than `allowed` differences there settle it, at a tenth of
        what it costs to compare the values. A slot that thousands share stays cheap.
        """
        mine, low, shift, at = _sketch(signature), self._low, self._permutations, self._sketch_at
        allowed = self._permutations - self._least
        alike = []
        for number, head in self._heads(signature).items():
            differing = int.from_bytes(head[at:], "little") ^ mine
            if ((differing | differing >> shift) & low).bit_count() <= allowed:
                alike.append(number)
        return alike

    def _stored(self, number: int) -> bytes | bytearray:
        assert self._records
        return self._records.read((number - 1) * self._record + self._head_size, self._size)

    def _agreeing(self, stored: bytes | bytearray, signature: bytes) -> int:
        other = int.from_bytes(stored, "little") ^ int.from_bytes(signature, "little")
        # All values at once: the highest bit of each becomes 1 where any of its bits differs; nothing is carried over.
        differing = (((other & self._rests) + self._rests) | other) & self._tops
        return self._permutations - differing.bit_count()

    def _share_a_band(self, other: bytes | bytearray, signature: bytes) -> bool:
        width = self._width
        return any(other[at : at + width] == signature[at : at + width] for at in range(0, self._size, width))


def _sketch(signature: bytes) -> int:
    """The lowest bit of each value, and above them all the second lowest of each."""
    bytes_ = signature[::4]
    return int(bytes_.translate(_SECOND) + bytes_.translate(_LOWEST), 2)
