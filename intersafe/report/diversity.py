"""How varied a set of texts is: distinct-n and self-BLEU; `docs/stats.md` says what each shows.

Both are exact and in pure Python; the tests compare them with values of NLTK.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:['\u2019][^\W{_CJK}]+)*|[^\w\s]")
_NO_MATCH = 0.1
"""Stands for zero matching n-grams: "method 1" of Chen & Cherry (2014), as in Texygen."""


def tokens_of(text: str) -> list[str]:
    """Words, punctuation marks and single Chinese or Japanese characters, after NFKC and case folding."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


# --- distinct-n ------------------------------------------------------------------------------------------------------


class Distinct(msgspec.Struct, frozen=True):
    """distinct-n (Li et al. 2016): different n-grams / tokens; None where there are no tokens."""

    tokens: int
    distinct_1: float | None
    distinct_2: float | None


class NgramCounter:
    """The different words and pairs of words of all texts so far: some 100 bytes for each different pair."""

    def __init__(self, texts: Iterable[Sequence[str]] = ()) -> None:
        self.tokens = 0
        self._numbers: dict[str, int] = {}
        self._pairs: set[int] = set()
        for text in texts:
            self.add(text)

    def add(self, tokens: Sequence[str]) -> None:
        """Takes in one text; a pair never spans two texts."""
        self.tokens += len(tokens)
        numbers = [self._numbers.setdefault(token, len(self._numbers)) for token in tokens]
        self._pairs.update([one << 32 | other for one, other in pairwise(numbers)])

    @property
    def distinct(self) -> Distinct:
        """Where the count stands."""
        if not self.tokens:
            return Distinct(0, None, None)
        return Distinct(self.tokens, len(self._numbers) / self.tokens, len(self._pairs) / self.tokens)


# --- self-BLEU -------------------------------------------------------------------------------------------------------


def self_bleu(texts: Sequence[Sequence[str]], order: int = 4) -> float | None:
    """Mean BLEU of each text against all others, 0 to 1, higher is less varied (Zhu et al. 2018, Texygen).

    Uniform weights up to `order`, clipped counts, closest reference length; None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    unmatched = [_unmatched(texts, n) for n in range(1, order + 1)]
    lengths = Counter(map(len, texts))
    return math.fsum(_bleu(len(text), [u[i] for u in unmatched], lengths) for i, text in enumerate(texts)) / len(texts)


def _unmatched(texts: Sequence[Sequence[str]], n: int) -> list[int]:
    """For each text, how many of its n-grams no other text has as often.

    Only the text with the highest count of an n-gram can have more of it than any other one. So one pass that keeps the
    two highest counts replaces a comparison of all pairs of texts.
    """
    highest: dict[tuple[str, ...], tuple[int, int]] = {}  # count, and the text that has it
    second: dict[tuple[str, ...], int] = {}
    for place, text in enumerate(texts):
        for gram, count in Counter(zip(*(text[i:] for i in range(n)), strict=False)).items():
            most = highest.get(gram)
            if most is None:
                highest[gram] = (count, place)
            elif count > most[0]:
                highest[gram], second[gram] = (count, place), most[0]
            elif count > second.get(gram, 0):
                second[gram] = count
    unmatched = [0] * len(texts)
    for gram, (count, place) in highest.items():
        unmatched[place] += count - second.get(gram, 0)
    return unmatched


def _bleu(length: int, unmatched: Sequence[int], lengths: Counter[int]) -> float:
    """BLEU of one text of that length; `unmatched` by order of the n-grams."""
    logs = 0.0
    for n, missing in enumerate(unmatched, 1):
        grams = max(0, length - n + 1)
        hits = grams - missing
        if n == 1 and hits == 0:
            return 0.0
        logs += math.log((hits or _NO_MATCH) / max(1, grams))
    others = (other for other, count in lengths.items() if count > (other == length))
    closest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(min(0.0, 1 - closest / length) + logs / len(unmatched))
