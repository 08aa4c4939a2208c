"""Quotas: keep the values of each axis (category, strategy, victim, turn count) near their shares at all times."""

from collections import Counter
from collections.abc import Mapping, Sequence

from intersafe.recipe.gates import CoverageSettings
from intersafe.records import Dialogue, Job, Reason

AXES = ("category", "strategy", "victim", "turns")


def value_of(grown: Dialogue | Job, axis: str, victims: Sequence[str]) -> str:
    """The value of a dialogue on an axis, or of the dialogue that a job would give; `victims` by a job's number."""
    if axis == "category":
        return grown.seed.category
    if axis == "strategy":
        return grown.strategy
    if isinstance(grown, Job):
        return victims[grown.victim] if axis == "victim" else str(grown.turns)
    return grown.victim if axis == "victim" else str(len(grown.turns))


def shares_of(settings: CoverageSettings, values: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """The share of every value on every axis that has quotas; `values`: those that the run's jobs can have."""
    shares: dict[str, dict[str, float]] = {}
    for axis in AXES:
        wanted = getattr(settings, axis)
        if wanted == "even":
            shares[axis] = dict.fromkeys(values[axis], 1 / len(values[axis]))
        elif wanted is not None:
            shares[axis] = dict(wanted)
    return shares


class CoverageQuota:
    """Rejects a dialogue whose value on an axis would get too far ahead of its share.

    The limit depends on what was accepted so far and not on the number asked for, so that a longer run begins with the
    decisions of a shorter one.
    """

    def __init__(self, settings: CoverageSettings, values: Mapping[str, Sequence[str]]) -> None:
        """`values`: those that the run's jobs can have; a value without jobs would hold back the others for good."""
        self.shares = shares_of(settings, values)
        self.counts: dict[str, Counter[str]] = {axis: Counter(dict.fromkeys(s, 0)) for axis, s in self.shares.items()}
        self._accepted = 0
        self._settings, self._values = settings, values

    def check(self, dialogue: Dialogue | Job, ahead: float = 0.0) -> Reason | None:
        """`category_full`, `strategy_full`, `victim_full`, `turns_full`, or None; `ValueError` for an unknown value.

        A job has these values before it is grown; `ahead` more dialogues may be accepted before it is decided.
        """
        for axis in self.shares:
            value = self._value(dialogue, axis)
            count, limit = self.counts[axis][value] + 1, self._limit(axis, value, ahead)
            if count > limit:
                return Reason(f"{axis}_full", f"{value}: {count} where {limit:.1f} is the limit")
        return None

    def _limit(self, axis: str, value: str, ahead: float = 0.0) -> float:
        """The most that a value may have once one more is accepted."""
        share = self.shares[axis].get(value)
        if share is None:
            return 0.0
        return (1 + self._settings.tolerance) * share * (self._accepted + ahead + 1) + self._settings.slack

    def add(self, dialogue: Dialogue) -> None:
        """Counts an accepted dialogue."""
        for axis in self.shares:
            self.counts[axis][self._value(dialogue, axis)] += 1
        self._accepted += 1

    def _value(self, grown: Dialogue | Job, axis: str) -> str:
        value = value_of(grown, axis, self._values.get("victim", ()))
        if value not in self._values[axis]:
            raise ValueError(f"{axis} {value!r} is not one of the run's: {', '.join(self._values[axis])}")
        return value

    def short(self) -> list[tuple[str, str, int, int]]:
        """The cells below their quota: axis, value, how many there are, and the least that the share allows."""
        least = 1 - self._settings.tolerance
        return [
            (axis, value, self.counts[axis][value], need)
            for axis, shares in self.shares.items()
            for value, share in shares.items()
            if self.counts[axis][value] < (need := int(least * share * self._accepted - self._settings.slack))
        ]

    def awaited(self) -> list[tuple[str, str, int, int]]:
        """The cells that the full ones of their axis wait for: as `short`, but with the whole share as the need."""
        found = []
        for axis, shares in self.shares.items():
            counts = self.counts[axis]
            free = [value for value in shares if counts[value] + 1 <= self._limit(axis, value)]
            if len(free) < len(shares):
                wanted = {value: max(counts[value] + 1, round(shares[value] * self._accepted)) for value in free}
                found += [(axis, value, counts[value], wanted[value]) for value in free]
        return found
