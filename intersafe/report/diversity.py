"""How varied a set of texts is: distinct-n, self-BLEU, the spread of embeddings; what each shows is in `docs/stats.md`.

Everything is exact and in plain Python; the tests hold it against values of NLTK and NumPy.
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
_HALVINGS = 50
"""Of the interval [0, 1], for an eigenvalue: the error is below 1e-15."""

Vector = Sequence[float]
Matrix = Sequence[Sequence[float]]


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

Grams = Counter[tuple[str, ...]]


def self_bleu(texts: Sequence[Sequence[str]], order: int = 4) -> float | None:
    """Mean BLEU of each text against all others, 0 to 1, higher is less varied (Zhu et al. 2018, Texygen).

    Uniform weights up to `order`, clipped counts, closest reference length; None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    grams = [[_ngrams(text, n) for text in texts] for n in range(1, order + 1)]
    peaks = [_peaks(counts) for counts in grams]
    lengths = Counter(map(len, texts))
    return math.fsum(_bleu(i, len(text), grams, peaks, lengths) for i, text in enumerate(texts)) / len(texts)


def _ngrams(text: Sequence[str], n: int) -> Grams:
    return Counter(zip(*(text[i:] for i in range(n)), strict=False))


class _Peak(msgspec.Struct):
    """The highest count of an n-gram in one text, whose it is, and the highest in any other text."""

    highest: int
    owner: int
    next: int = 0


def _peaks(counts: Sequence[Grams]) -> dict[tuple[str, ...], _Peak]:
    # With the two highest counts, "the highest in all other texts" takes one look instead of one for each text.
    found: dict[tuple[str, ...], _Peak] = {}
    for owner, grams in enumerate(counts):
        for gram, count in grams.items():
            peak = found.get(gram)
            if peak is None:
                found[gram] = _Peak(count, owner)
            elif count > peak.highest:
                peak.next, peak.highest, peak.owner = peak.highest, count, owner
            elif count > peak.next:
                peak.next = count
    return found


def _bleu(
    place: int,
    length: int,
    grams: Sequence[Sequence[Grams]],
    peaks: Sequence[dict[tuple[str, ...], _Peak]],
    lengths: Counter[int],
) -> float:
    logs = 0.0
    for n, (counts, highest) in enumerate(zip(grams, peaks, strict=True), 1):
        hits = 0
        for gram, count in counts[place].items():
            peak = highest[gram]
            hits += min(count, peak.next if peak.owner == place else peak.highest)
        if n == 1 and hits == 0:
            return 0.0
        logs += math.log((hits or _NO_MATCH) / max(1, length - n + 1))
    others = (other for other, count in lengths.items() if count > (other == length))
    closest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(min(0.0, 1 - closest / length) + logs / len(grams))


# --- embeddings ------------------------------------------------------------------------------------------------------


def mean_cosine_distance(vectors: Sequence[Vector]) -> float:
    """Mean over all pairs of 1 - cosine, 0 to 2; at least two vectors, none of length zero."""
    n = len(vectors)
    units = [_unit(vector) for vector in vectors]
    # The sum over all pairs is the squared length of the sum, less the n pairs of a vector with itself.
    whole = math.fsum(math.fsum(column) ** 2 for column in zip(*units, strict=True))
    return 1 - (whole - n) / (n * (n - 1))


def vendi_score(vectors: Sequence[Vector]) -> float:
    """exp of the entropy of the eigenvalues of the cosine matrix / n: 1, all alike, to n (Friedman & Dieng 2023)."""
    units = [_unit(vector) for vector in vectors]
    n = len(units)
    half = [[_dot(one, other) / n for other in units[: i + 1]] for i, one in enumerate(units)]
    kernel = [[half[max(i, j)][min(i, j)] for j in range(n)] for i in range(n)]
    return math.exp(-math.fsum(x * math.log(x) for x in _eigenvalues(kernel) if x > 0))


def _unit(vector: Vector) -> list[float]:
    length = math.hypot(*vector)
    return [x / length for x in vector]


def _dot(one: Vector, other: Vector) -> float:
    return sum(map(float.__mul__, one, other))


def _eigenvalues(matrix: Matrix) -> list[float]:
    """Of a symmetric matrix whose eigenvalues lie in [0, 1], rising: by bisection on Sturm's count."""
    diagonal, squares = _tridiagonal(matrix)
    found = []
    for place in range(len(diagonal)):
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if _below(middle, diagonal, squares) > place:
                high = middle
            else:
                low = middle
        found.append((low + high) / 2)
    return found


def _below(x: float, diagonal: Sequence[float], squares: Sequence[float]) -> int:
    """How many eigenvalues are less than `x`."""
    count, pivot = 0, 1.0
    for value, square in zip(diagonal, (0.0, *squares), strict=True):
        pivot = value - x - square / pivot
        count += pivot < 0
        pivot = pivot or 1e-300
    return count


def _tridiagonal(matrix: Matrix) -> tuple[list[float], list[float]]:
    """The diagonal, and the squares beside it, of a tridiagonal matrix with the same eigenvalues (Householder)."""
    rows: Matrix = matrix
    diagonal, squares = [], []
    while len(rows) > 1:
        diagonal.append(rows[0][0])
        mirror = list(rows[0][1:])
        square = _dot(mirror, mirror)
        squares.append(square)
        rows = [row[1:] for row in rows[1:]]
        mirror[0] += math.copysign(math.sqrt(square), mirror[0])
        if length := _dot(mirror, mirror):
            shift = [2 * _dot(row, mirror) / length for row in rows]
            half = _dot(shift, mirror) / length
            shift = [s - half * m for s, m in zip(shift, mirror, strict=True)]
            rows = [
                [x - m * b - s * a for x, a, b in zip(row, mirror, shift, strict=True)]
                for row, m, s in zip(rows, mirror, shift, strict=True)
            ]
    return [*diagonal, rows[0][0]], squares
