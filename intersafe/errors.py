"""The exceptions of intersafe, and the exit codes of the command line.

IntersafeError
├── InputError        wrong input: one line with place and remedy                       exit 2, nothing written
├── SeedsExhausted    all jobs are done and fewer than `n` dialogues were accepted      exit 3, resumable
├── ServiceGone       a model's service did not answer for longer than the patience     exit 4, resumable
├── StorageError      the run directory cannot be written (disk full, read-only)        exit 4, resumable
├── BudgetReached     a limit on tokens, cost or time is reached                        exit 5, resumable
├── in release/       VersionTaken, TagConflict 3, RemoteChanged 4, AccessRefused 5, NetworkGaveUp 6
└── JobEnded          one job ends here; the run continues
    ├── JobRejected   the method or a gate rejected the dialogue
    └── CallFailed    one call failed for good: refused by the server, blocked, never parseable
"""

from typing import Literal


class IntersafeError(Exception):
    """Base of every exception that intersafe raises on purpose."""

    exit_code = 1


class InputError(IntersafeError):
    """The user's input is wrong; the message is one line with file, place and remedy."""

    exit_code = 2

    def __init__(self, what: str, *, at: object = None, line: int | None = None, remedy: str = "") -> None:
        """`at` is the file or flag, `line` its line counted from 1, `remedy` says how to correct it."""
        self.what, self.at, self.remedy = what, at, remedy
        place = "" if at is None else f"{at}:{line}: " if line else f"{at}: "
        super().__init__(f"{place}{what}" + (f"; {remedy}" if remedy else ""))


class SeedsExhausted(IntersafeError):
    """All jobs are done and fewer than `n` dialogues were accepted."""

    exit_code = 3


class ServiceGone(IntersafeError):
    """A service did not answer within the patience of the run."""

    exit_code = 4


class StorageError(IntersafeError):
    """The run directory cannot be written."""

    exit_code = 4


class BudgetReached(IntersafeError):
    """A limit on tokens, cost or time is reached; all replies that were paid for are kept."""

    exit_code = 5


class JobEnded(IntersafeError):
    """Ends one job; the funnel counts `stage` and `reason`, the record keeps `detail` too."""

    kind: Literal["rejected", "failed"] = "failed"

    def __init__(self, stage: str, reason: str, detail: str = "") -> None:
        """`reason` is one snake_case word of a small set; free text goes into `detail`."""
        super().__init__(f"{stage}: {reason}" + (f" ({detail})" if detail else ""))
        self.stage, self.reason, self.detail = stage, reason, detail


class JobRejected(JobEnded):
    """The method or a gate rejected the dialogue."""

    kind = "rejected"


class CallFailed(JobEnded):
    """One call failed for good; it never counts as a safe or an unsafe verdict."""

    kind = "failed"
