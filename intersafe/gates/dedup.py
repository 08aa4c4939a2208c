"""Finds dialogues whose user asks nearly the same as in an accepted one, and dialogues that show the same image twice.

Text: MinHash signatures of the user's messages (Broder 1997) by rensa, in a banded index. `bench/dedup_quality.py`
chose the defaults, `bench/dedup_scale.py` measures the cost for a million dialogues; figures and limits are in
`docs/gates.md`.
"""

import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import msgspec
from rensa import RMinHash

from intersafe.checks.messages import fold
from intersafe.gates.index.banded import BandedSignatures
from intersafe.gates.index.scratch import Scratch
from intersafe.gates.index.signatures import SignatureFile
from intersafe.recipe.gates import DuplicateSettings
from intersafe.records import Dialogue, Reason

SIGNATURES = "index/duplicates.bin"
"""The file in a run's folder that caches the signatures of its accepted dialogues."""
_NAME = 8
"""Bytes of a name in the index."""
_SEED = 1
_LEAST_RECALL = 0.95


class TextIndex:
    """Sets of texts by name, searchable for near-duplicates."""

    def __init__(self, settings: DuplicateSettings, folder: Path | None = None) -> None:
        """With a `folder` they are stored in private scratch files there, otherwise in memory."""
        self._settings, self._folder = settings, folder
        self._names: Scratch | None = None
        self._long_names: dict[int, str] = {}
        bands = bands_for(settings.threshold, settings.permutations)
        counts = range(settings.permutations + 1)
        least = next(count for count in counts if count / settings.permutations >= settings.threshold)
        self._signatures = BandedSignatures(settings.permutations, bands, least, folder)

    def __len__(self) -> int:
        return len(self._signatures)

    def add(self, name: str, signature: bytes) -> None:
        """Stores the signature of some texts under that name."""
        if self._names is None:
            self._names = Scratch(self._folder)
        number = len(self)
        short = _bytes_of(name)
        if not short:
            self._long_names[number] = name
        self._names.write(_NAME * number, short or bytes(_NAME))
        self._signatures.add(signature)

    def nearest(self, signature: bytes) -> tuple[str, float] | None:
        """Name and estimated similarity of the nearest at the threshold or above, the earliest of equals; or None."""
        found = self._signatures.nearest(signature)
        return (self._name(found[0] - 1), found[1] / self._settings.permutations) if found else None

    def candidates(self, signature: bytes) -> int:
        """How many stored signatures a search compares."""
        return len(self._signatures.candidates(signature))

    def _name(self, number: int) -> str:
        assert self._names
        if number in self._long_names:
            return self._long_names[number]
        return self._names.read(_NAME * number, _NAME).hex()


def _bytes_of(name: str) -> bytes:
    """The name as 8 bytes if it is 16 hexadecimal digits, as ids are; otherwise no bytes."""
    try:
        short = bytes.fromhex(name)
    except ValueError:
        return b""
    return short if len(short) == _NAME and short.hex() == name else b""


class DuplicateIndex:
    """The user's messages of all accepted dialogues, searchable for a near-duplicate."""

    def __init__(self, settings: DuplicateSettings, file: Path | None = None) -> None:
        """`file` caches signatures from one process to the next; without it they are computed again.

        The index itself is in scratch files beside it, or in memory if there is no `file`.
        """
        self._settings, self._index = settings, TextIndex(settings, file.parent if file else None)
        self._file = SignatureFile(file, _made_by(settings), 4 * settings.permutations) if file else None
        self._last: tuple[Dialogue, bytes] | None = None

    def check(self, dialogue: Dialogue) -> Reason | None:
        """`near_duplicate` with the id of the most similar accepted dialogue, or None."""
        found = self.nearest(dialogue)
        return Reason("near_duplicate", found[0]) if found else None

    def add(self, dialogue: Dialogue) -> None:
        """Remembers an accepted dialogue."""
        self._index.add(dialogue.id, self._cached(dialogue) if self._file else self._signature(dialogue))

    def nearest(self, dialogue: Dialogue) -> tuple[str, float] | None:
        """Id and estimated similarity of the nearest at the threshold or above, the earliest of equals; or None."""
        return self._index.nearest(self._signature(dialogue))

    def candidates(self, dialogue: Dialogue) -> int:
        """How many accepted dialogues `check` compares with this one."""
        return self._index.candidates(self._signature(dialogue))

    def _signature(self, dialogue: Dialogue) -> bytes:
        # `add` follows the `check` of the same dialogue: one signature serves both.
        if self._last is None or self._last[0] is not dialogue:
            self._last = dialogue, signature_of(_asked(dialogue), self._settings)
        return self._last[1]

    def _cached(self, dialogue: Dialogue) -> bytes:
        """The signature from the file, or computed and stored there."""
        assert self._file
        position, row = len(self._index), msgspec.json.encode((dialogue.id, _asked(dialogue)))
        if (signature := self._file.get(position, row)) is None:
            signature = self._signature(dialogue)
            self._file.put(position, row, signature)
        return signature


def signature_of(texts: Iterable[str], settings: DuplicateSettings) -> bytes:
    """The MinHash signature of the texts: `permutations` values of 4 bytes."""
    signature = RMinHash(settings.permutations, _SEED)
    # A minimum over the shingles: neither their order nor repeats matter.
    signature.update([shingle for text in texts for shingle in _shingles(fold(text), settings)])
    return array("I", signature.digest()).tobytes()


def _made_by(settings: DuplicateSettings) -> bytes:
    """All that a signature depends on: settings and versions by name, and the signature of a probe text."""
    texts = ("The \uff26irst, \u201cstra\xdfe\u201d: 3.5 \u20ac!", "\xc7a va? \u0418\u0306 e\u0301\u200b \u4e2d\u6587")
    probe = signature_of(texts, settings)
    named = (settings, version("rensa"), RMinHash.ALGORITHM_VERSION, unicodedata.unidata_version)
    return msgspec.json.encode(named) + probe


def _asked(dialogue: Dialogue) -> list[str]:
    return [turn.user.text for turn in dialogue.turns]


def shingles(texts: Iterable[str], settings: DuplicateSettings) -> set[str]:
    """The overlapping runs of `size` words or characters of the texts, none across two of them."""
    return {shingle for text in texts for shingle in _shingles(fold(text), settings)}


def _shingles(text: str, settings: DuplicateSettings) -> Iterable[str]:
    size = settings.size
    if settings.unit == "word":
        words = text.split()
        return [" ".join(words[i : i + size]) for i in range(max(len(words) - size, 0) + 1)]
    return [text[i : i + size] for i in range(max(len(text) - size, 0) + 1)]


def bands_for(threshold: float, permutations: int) -> int:
    """The fewest bands with which a pair at the threshold becomes a candidate with a probability of at least 0.95.

    Fewer bands have more rows each and so fewer candidates. Where no number suffices, every band has one row.
    """
    fitting = (bands for bands in range(1, permutations + 1) if permutations % bands == 0)
    return next(
        (bands for bands in fitting if 1 - (1 - threshold ** (permutations // bands)) ** bands >= _LEAST_RECALL),
        permutations,
    )


def similar_images(hashes: Sequence[int], distance: int) -> Reason | None:
    """`similar_images` with the numbers (from 1) of the first two images at most `distance` bits apart, or None.

    `hashes` are 64-bit perceptual hashes, one for each image of a dialogue in the order of its turns; an image that two
    turns show is in it twice.
    """
    for (i, one), (j, other) in combinations(enumerate(hashes, 1), 2):
        if (one ^ other).bit_count() <= distance:
            return Reason("similar_images", f"images {i} and {j}")
    return None
