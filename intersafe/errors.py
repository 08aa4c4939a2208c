"""The failure vocabulary.

IntersafeError
├── InputError        what the user gave is wrong: one line with place and remedy   exit 2, nothing written
├── SeedsExhausted    the jobs are used up before `n` dialogues were kept           exit 3, resumable
├── ServiceGone       a model's service stayed away longer than the patience        exit 4, resumable
├── StorageError      the run directory cannot be written (disk full, read-only)    exit 4, resumable
├── BudgetReached     a limit on tokens, cost or time is reached                    exit 5, resumable
├── of release/       VersionTaken, TagConflict 3, RemoteChanged 4, AccessRefused 5, NetworkGaveUp 6
└── JobEnded          this one job ends here; the run goes on
    ├── JobRejected   the method or a gate turned the dialogue down
    └── CallFailed    one call failed for good: refused by the server, blocked, never parseable
"""

from typing import Literal


class IntersafeError(Exception):
    """Root of every failure that intersafe raises on purpose."""

    exit_code = 1


class InputError(IntersafeError):
    """The user's input is wrong; the message names file, place and remedy in one line."""

    exit_code = 2

    def __init__(self, what: str, *, at: object = None, line: int | None = None, remedy: str = "") -> None:
        """`at` is the file (or flag), `line` its 1-based line, `remedy` what to do about it."""
        self.what = what
        place = "" if at is None else f"{at}:{line}: " if line else f"{at}: "
        super().__init__(f"{place}{what}" + (f"; {remedy}" if remedy else ""))


class SeedsExhausted(IntersafeError):
    """Every job was tried and fewer than `n` dialogues were kept."""

    exit_code = 3


class ServiceGone(IntersafeError):
    """A service did not come back within the patience of the run."""

    exit_code = 4


class StorageError(IntersafeError):
    """The run directory cannot be written."""

    exit_code = 4


class BudgetReached(IntersafeError):
    """A limit that the user set on tokens, cost or time is reached; what was paid for is kept."""

    exit_code = 5


class JobEnded(IntersafeError):
    """Ends one job: `stage` and `reason` are counted in the funnel, `detail` is kept beside them."""

    kind: Literal["rejected", "failed"] = "failed"

    def __init__(self, stage: str, reason: str, detail: str = "") -> None:
        """`reason` is one snake_case word of a small set; free text belongs in `detail`."""
        super().__init__(f"{stage}: {reason}" + (f" ({detail})" if detail else ""))
        self.stage, self.reason, self.detail = stage, reason, detail


class JobRejected(JobEnded):
    """The method or a gate turned the dialogue down."""

    kind = "rejected"


class CallFailed(JobEnded):
    """One call failed for good; it is never scored as a safe or an unsafe verdict."""

    kind = "failed"
