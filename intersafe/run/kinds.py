"""What a run stores of each job kind: the types of its jobs and outcomes, and the names of its files.

How the jobs of a kind are made, grown and gated is in `generation/kinds.py`.
"""

from typing import NamedTuple

from intersafe.errors import JobEnded
from intersafe.records import Dialogue, Ended, Job, Reason, RefusalJob, RefusalSample

AnyJob = Job | RefusalJob
Outcome = Dialogue | RefusalSample


class TwinJob(Job, frozen=True, kw_only=True):
    """The job of a benign twin, with the dialogue that the twin belongs to."""

    original: Dialogue


class KindRecords(NamedTuple):
    """The records of one job kind."""

    name: str
    """As journals, summaries and commands write it."""
    noun: str
    """One outcome, in words."""
    job: type[AnyJob]
    outcome: type[Outcome]
    accepted: str
    """Name of the file with the accepted outcomes, in job order."""
    rejected: str
    failed: str

    @property
    def files(self) -> tuple[str, str, str]:
        """The three outcome files: accepted, rejected, failed."""
        return self.accepted, self.rejected, self.failed


def records_of(name: str, noun: str, job: type[AnyJob], outcome: type[Outcome]) -> KindRecords:
    """The records of a kind whose files have its name."""
    return KindRecords(
        name=name,
        noun=noun,
        job=job,
        outcome=outcome,
        accepted=f"{name}.jsonl",
        rejected=f"{name}-rejected.jsonl",
        failed=f"{name}-failed.jsonl",
    )


RECORDS: dict[str, KindRecords] = {
    "dialogues": KindRecords(
        name="dialogues",
        noun="dialogue",
        job=Job,
        outcome=Dialogue,
        accepted="dialogues.jsonl",
        rejected="rejected.jsonl",
        failed="failed.jsonl",
    ),
    "refusals": records_of("refusals", "refusal sample", RefusalJob, RefusalSample),
    "twins": records_of("twins", "twin", TwinJob, Dialogue),
}
"""By name, in the order in which a run decides them."""


def ended_by(job: AnyJob, end: JobEnded) -> Ended:
    """The record of a job that an exception ended."""
    return Ended(job.index, job.key, job.seed.category, end.kind, end.stage, reason=end.reason, detail=end.detail)


def rejected_by_gates(job: int, key: str, category: str, reason: Reason) -> Ended:
    """The record of a job that the gates rejected; `job` is its index."""
    return Ended(job, key, category, "rejected", "gates", reason=reason.word, detail=reason.detail)
