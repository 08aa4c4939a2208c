"""Keeps the categories of a run in balance while it grows, whatever the number of dialogues asked for."""

from collections import Counter
from collections.abc import Sequence

from intersafe.records import Dialogue, Reason
from intersafe.settings import BalanceSettings


class Balance:
    """Turns a dialogue down when its category would leave the others too far behind.

    The limit follows from what was accepted so far and not from the number asked for, so that a longer run goes on with
    the decisions of a shorter one.
    """

    def __init__(self, categories: Sequence[str], settings: BalanceSettings) -> None:
        """`categories` are those of the run's seeds; a category without seeds would hold back the others for good."""
        self._counts = Counter(dict.fromkeys(categories, 0))
        self._settings = settings

    def check(self, dialogue: Dialogue) -> Reason | None:
        """`category_full`, or None; raises `ValueError` for a category that the run does not have."""
        count = self._count(dialogue) + 1
        even = (self._counts.total() + 1) / len(self._counts)
        limit = (1 + self._settings.tolerance) * even + self._settings.slack
        if count <= limit:
            return None
        return Reason("category_full", f"{dialogue.seed.category}: {count} where {limit:.1f} is the limit")

    def add(self, dialogue: Dialogue) -> None:
        """Counts an accepted dialogue; raises `ValueError` for a category that the run does not have."""
        self._counts[dialogue.seed.category] = self._count(dialogue) + 1

    def _count(self, dialogue: Dialogue) -> int:
        if dialogue.seed.category not in self._counts:
            raise ValueError(f"category {dialogue.seed.category!r} is not one of the run's: {', '.join(self._counts)}")
        return self._counts[dialogue.seed.category]
