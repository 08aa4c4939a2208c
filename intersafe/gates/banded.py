"""MinHash signatures in a banded index (LSH), compact: one byte string for all of them and tables of 4-byte numbers.

A hash table of objects takes some 3 KB for each signature, this one less than 1. Tables are never moved: where one is
full a larger one is begun beside it, so that no insertion has to wait for millions of others.
"""

from array import array

_FIRST_ROOM = 4096
_GROWTH = 4
_LOWEST, _SECOND = (bytes(48 + (byte >> bit & 1) for byte in range(256)) for bit in (0, 1))
"""A byte to the digit 0 or 1 of one of its bits."""


class BandedSignatures:
    """Signatures by number, from 1 in the order in which they were added, searchable for the nearest.

    A signature is the bytes of its values, 4 for each. Two are compared if all values of at least one band agree.
    """

    def __init__(self, permutations: int, bands: int, least: int) -> None:
        """`least`: how many values must agree for a signature to be found at all."""
        self._permutations, self._bands, self._least = permutations, bands, least
        self._size, self._width = 4 * permutations, 4 * permutations // bands
        self._signatures = bytearray(self._size)
        self._low, self._high = [0], [0]
        self._next = array("I", bytes(4 * bands))
        """For each signature and band the signature that stood in its slot before it; 0 where there was none."""
        self._tables: list[tuple[array[int], int]] = []
        """For each band and slot the signature that came last, and how many slots a band has."""
        self._room = 0
        # The highest bit of each value, and all bits but that one.
        self._tops = int.from_bytes(b"\0\0\0\x80" * permutations, "little")
        self._rests = int.from_bytes(b"\xff\xff\xff\x7f" * permutations, "little")

    def __len__(self) -> int:
        return len(self._low) - 1

    def add(self, signature: bytes) -> None:
        """Remembers a signature."""
        if not self._room:
            self._begin_table()
        self._room -= 1
        number = len(self) + 1
        self._signatures += signature
        low, high = _sketch(signature)
        self._low.append(low)
        self._high.append(high)
        heads, slots = self._tables[-1]
        places = [band * slots + value % slots for band, value in enumerate(self._hashes(signature))]
        self._next.extend([heads[place] for place in places])
        for place in places:
            heads[place] = number

    def nearest(self, signature: bytes) -> tuple[int, int] | None:
        """Number of the nearest and how many of its values agree, the earliest of equals; None if none is near."""
        best, most = 0, self._least - 1
        for number in sorted(self._alike(signature)):
            agreeing = self._agreeing(number, signature)
            if agreeing > most and self._share_a_band(number, signature):
                best, most = number, agreeing
        return (best, most) if best else None

    def candidates(self, signature: bytes) -> set[int]:
        """Numbers of all that share a slot in a band: those to be compared, and a few that got there by chance."""
        found: set[int] = set()
        before, bands = self._next, self._bands
        hashes = self._hashes(signature)
        for heads, slots in self._tables:
            for band, value in enumerate(hashes):
                number = heads[band * slots + value % slots]
                while number:
                    found.add(number)
                    number = before[number * bands + band]
        return found

    def _begin_table(self) -> None:
        slots = _FIRST_ROOM * _GROWTH ** len(self._tables)
        self._tables.append((array("I", bytes(4)) * (slots * self._bands), slots))
        self._room = slots

    def _hashes(self, signature: bytes) -> list[int]:
        # They differ by process; what they bring together by chance is told apart in `nearest`.
        width = self._width
        return [hash(signature[at : at + width]) for at in range(0, self._size, width)]

    def _alike(self, signature: bytes) -> list[int]:
        """The candidates that may have enough in common: all that have, and few others.

        Values that agree do so in their lowest two bits: more than `allowed` differences there settle it, at a tenth of
        what it costs to compare the values. A slot that thousands share stays cheap.
        """
        mine, also_mine = _sketch(signature)
        low, high, allowed = self._low, self._high, self._permutations - self._least
        return [
            number
            for number in self.candidates(signature)
            if ((mine ^ low[number]) | (also_mine ^ high[number])).bit_count() <= allowed
        ]

    def _stored(self, number: int) -> bytearray:
        return self._signatures[number * self._size : (number + 1) * self._size]

    def _agreeing(self, number: int, signature: bytes) -> int:
        other = int.from_bytes(self._stored(number), "little") ^ int.from_bytes(signature, "little")
        # All values at once: the highest bit of each becomes 1 where any of its bits differs; nothing is carried over.
        differing = (((other & self._rests) + self._rests) | other) & self._tops
        return self._permutations - differing.bit_count()

    def _share_a_band(self, number: int, signature: bytes) -> bool:
        other, width = self._stored(number), self._width
        return any(other[at : at + width] == signature[at : at + width] for at in range(0, self._size, width))


def _sketch(signature: bytes) -> tuple[int, int]:
    """The lowest bit of each value as one number, and the second lowest."""
    bytes_ = signature[::4]
    return int(bytes_.translate(_LOWEST), 2), int(bytes_.translate(_SECOND), 2)
