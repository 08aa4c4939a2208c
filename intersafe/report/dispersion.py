"""How far embeddings are apart: the mean cosine distance and the Vendi score; `docs/stats.md` says what each shows.

NumPy computes both in milliseconds; without it they are computed in pure Python, to the same 9 digits, and the Vendi
score only for small samples.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

PURE_PYTHON = 200
"""Most vectors of a Vendi score without NumPy: about 2 seconds, growing with the cube of their number."""
_HALVINGS = 50
"""Of the interval [0, 1], for an eigenvalue: the error is below 1e-15."""

Vector = Sequence[float]
Matrix = Sequence[Sequence[float]]


def mean_cosine_distance(vectors: Sequence[Vector]) -> float:
    """Mean over all pairs of 1 - cosine, 0 to 2; at least two vectors, none of length zero."""
    n = len(vectors)
    array = _unit_array(vectors)
    # The sum over all pairs is the squared length of the sum, less the n pairs of a vector with itself.
    if array is not None:
        whole = float((array.sum(axis=0) ** 2).sum())
    else:
        units = [_unit(vector) for vector in vectors]
        whole = math.fsum(math.fsum(column) ** 2 for column in zip(*units, strict=True))
    return 1 - (whole - n) / (n * (n - 1))


def vendi_score(vectors: Sequence[Vector]) -> float | None:
    """exp of the entropy of the eigenvalues of the cosine matrix / n: 1, all alike, to n (Friedman & Dieng 2023).

    None for more than `PURE_PYTHON` vectors where NumPy is not installed.
    """
    array = _unit_array(vectors)
    if array is not None:
        import numpy as np

        eigenvalues = np.linalg.eigvalsh(array @ array.T / len(array)).tolist()
    elif len(vectors) <= PURE_PYTHON:
        eigenvalues = _eigenvalues(_cosines([_unit(vector) for vector in vectors]))
    else:
        return None
    return math.exp(-math.fsum(x * math.log(x) for x in eigenvalues if x > 0))


def _unit_array(vectors: Sequence[Vector]) -> "NDArray[float64] | None":
    """The vectors at length 1 as the rows of an array; None without NumPy."""
    try:
        import numpy as np
    except ImportError:
        return None
    array = np.asarray(vectors, dtype=np.float64)
    units: NDArray[float64] = array / np.linalg.norm(array, axis=1, keepdims=True)
    return units


# --- pure Python -----------------------------------------------------------------------------------------------------


def _cosines(units: Sequence[Vector]) -> Matrix:
    """The cosine matrix / n of unit vectors."""
    n = len(units)
    half = [[_dot(one, other) / n for other in units[: i + 1]] for i, one in enumerate(units)]
    return [[half[max(i, j)][min(i, j)] for j in range(n)] for i in range(n)]


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
