"""Losing streaks: when a kind of job stops, since what it still wants does not come."""

from dataclasses import dataclass

from intersafe.records import Ended
from intersafe.run.kinds import Outcome

HOPELESS = 1_000
"""Jobs lost in a row that end a kind in any case: a yield below 0.1 % is not worth its cost."""
LOST = 200
"""Jobs lost since the last accepted outcome that end a kind whose quotas keep rejecting other jobs. At a yield of 5 %
200 jobs are lost in a row once in 28,000 times, at 2 % once in 57."""
FULL = 20
"""Jobs that quotas must have rejected meanwhile: with fewer, the kind does not wait for a quota."""


@dataclass
class LosingStreak:
    """How the jobs ended since the last one that was accepted."""

    full: int = 0
    """Rejected by quotas, or because their group is complete."""
    lost: int = 0
    """Ended in any other way, although there was room for them."""

    @property
    def lasting(self) -> bool:
        """True once the kind should stop: what there is room for does not come, or nothing comes at all."""
        return (self.lost >= LOST and self.full >= FULL) or self.lost >= HOPELESS

    def count(self, outcome: Outcome | Ended) -> None:
        """Counts one more decided job."""
        if not isinstance(outcome, Ended):
            self.full = self.lost = 0
        elif is_full(outcome):
            self.full += 1
        else:
            self.lost += 1


def is_full(ended: Ended) -> bool:
    """True if the job ended because there is enough of its sort, whatever would have come of it."""
    return ended.stage == "gates" and (ended.reason.endswith("_full") or ended.reason == "group_complete")
