"""Finds dialogues that ask nearly the same as one accepted before, and dialogues that show the same image twice.

Text: MinHash signatures of the user's side (Broder 1997) in a banded index, by rensa. The defaults are chosen by
`bench/dedup_quality.py`; figures and limits are in `docs/gates.md`.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

from rensa import RMinHash, RMinHashLSH

from intersafe.gate_settings import DuplicateSettings
from intersafe.messages import fold
from intersafe.records import Dialogue, Reason

_SEED = 1
_LEAST_RECALL = 0.95


class TextIndex:
    """Sets of texts by name, searchable for the nearest."""

    def __init__(self, settings: DuplicateSettings) -> None:
        self._settings = settings
        self._names: list[str] = []
        self._signatures: list[RMinHash] = []
        bands = bands_for(settings.threshold, settings.permutations)
        self._bands = RMinHashLSH(settings.threshold, settings.permutations, bands)

    def add(self, name: str, texts: Iterable[str]) -> None:
        """Remembers the texts under that name."""
        signature = self._signature(texts)
        self._bands.insert(len(self._names), signature)
        self._names.append(name)
        self._signatures.append(signature)

    def nearest(self, texts: Iterable[str]) -> tuple[str, float] | None:
        """Name and estimated similarity (0 to 1) of the nearest candidate, the earliest of equals; None without one."""
        signature = self._signature(texts)
        candidates = sorted(set(self._bands.query(signature)))
        if not candidates:
            return None
        # `max` keeps the first of equals, which with sorted keys does not depend on the order the index answers in.
        best = max(candidates, key=lambda key: signature.jaccard(self._signatures[key]))
        return self._names[best], signature.jaccard(self._signatures[best])

    def _signature(self, texts: Iterable[str]) -> RMinHash:
        signature = RMinHash(self._settings.permutations, _SEED)
        # A signature is a minimum over the shingles: the order of a set, which differs by process, does not matter.
        signature.update(list(text_shingles(texts, self._settings)))
        return signature


class DuplicateIndex:
    """The user's sides of all accepted dialogues, searchable for a near-duplicate."""

    def __init__(self, settings: DuplicateSettings) -> None:
        self._threshold, self._index = settings.threshold, TextIndex(settings)

    def check(self, dialogue: Dialogue) -> Reason | None:
        """`near_duplicate` with the id of the most similar accepted dialogue, or None."""
        found = self.nearest(dialogue)
        return Reason("near_duplicate", found[0]) if found and found[1] >= self._threshold else None

    def add(self, dialogue: Dialogue) -> None:
        """Remembers an accepted dialogue."""
        self._index.add(dialogue.id, _asked(dialogue))

    def nearest(self, dialogue: Dialogue) -> tuple[str, float] | None:
        """Id and estimated similarity (0 to 1) of the nearest candidate, the earliest of equals; None without one."""
        return self._index.nearest(_asked(dialogue))


def shingles(dialogue: Dialogue, settings: DuplicateSettings) -> set[str]:
    """The overlapping runs of `size` words or characters of the user's messages, none across two messages."""
    return text_shingles(_asked(dialogue), settings)


def _asked(dialogue: Dialogue) -> list[str]:
    return [turn.user.text for turn in dialogue.turns]


def text_shingles(texts: Iterable[str], settings: DuplicateSettings) -> set[str]:
    """The overlapping runs of `size` words or characters of the texts, none across two of them."""
    size = settings.size
    found: set[str] = set()
    for text in map(fold, texts):
        if settings.unit == "word":
            words = text.split()
            found.update(" ".join(words[i : i + size]) for i in range(max(len(words) - size, 0) + 1))
        else:
            found.update([text[i : i + size] for i in range(max(len(text) - size, 0) + 1)])
    return found


def bands_for(threshold: float, permutations: int) -> int:
    """The fewest bands with which a pair at the threshold becomes a candidate with a probability of at least 0.95.

    Fewer bands have more rows each and so fewer candidates to look at. Where none suffices, one row per band.
    """
    fitting = (bands for bands in range(1, permutations + 1) if permutations % bands == 0)
    return next(
        (bands for bands in fitting if 1 - (1 - threshold ** (permutations // bands)) ** bands >= _LEAST_RECALL),
        permutations,
    )


def similar_images(hashes: Sequence[int], distance: int) -> Reason | None:
    """`similar_images` with the places (from 1) of the first two hashes at most `distance` bits apart, or None.

    `hashes` are 64-bit perceptual hashes, one for each image of a dialogue in the order of the talk: an image that two
    turns show is in it twice.
    """
    for (i, one), (j, other) in combinations(enumerate(hashes, 1), 2):
        if (one ^ other).bit_count() <= distance:
            return Reason("similar_images", f"images {i} and {j}")
    return None
