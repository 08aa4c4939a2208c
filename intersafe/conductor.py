"""The conductor: many jobs of one line at once, decided in job order, until the line has what it was asked for.

A *line* is a kind of job with outcome files of its own: dialogues, refusal samples, benign twins. Jobs finish in any
order and wait in a bounded window for the jobs before them; the line's gates decide in job order, so with deterministic
models the outcome files are the same bytes for any concurrency and any number of kills in between.
"""

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from intersafe.errors import IntersafeError, JobEnded, ServiceGone
from intersafe.journal import GroupWriter, Journal
from intersafe.records import Dialogue, Ended, Job, Reason, RefusalJob, RefusalSample
from intersafe.runs import Funnel, outcome_row

FAILURES = 32
"""Jobs in a row that may fail before the run stops: then the fault is not theirs."""
STALLED = 500
"""Jobs in a row that quotas alone may turn down before the line ends: what is still wanted does not come."""
WINDOW = 4
"""Jobs that may be started and not yet decided, for each one that is grown at once."""

AnyJob = Job | RefusalJob
Outcome = Dialogue | RefusalSample


class Line(Protocol):
    """What a kind of job is grown by and held to."""

    @property
    def name(self) -> str:
        """Empty for dialogues, else the name of the outcome files and of the journal's line."""
        ...

    @property
    def wanted(self) -> int:
        """How many outcomes to keep."""
        ...

    async def grow(self, job: AnyJob) -> Outcome:
        """The outcome of a job; `JobEnded` with stage and reason if there is none."""
        ...

    def skip(self, job: AnyJob) -> Reason | None:
        """Why the job need not be grown; what is said once holds for good."""
        ...

    def check(self, outcome: Outcome) -> Reason | None:
        """The gates' reason to turn the outcome down, or None."""
        ...

    def add(self, outcome: Outcome) -> None:
        """Told of every outcome that was kept, in job order."""
        ...


@dataclass
class Progress:
    """How far a run is; the same object all along, for a display to look at."""

    n: int
    jobs: int
    """How many there are in all."""
    funnel: Funnel
    journal: Journal
    in_flight: dict[str, int]
    before: int = 0
    """Dialogues that were there when this process began."""
    beside: dict[str, tuple[Funnel, int]] = field(default_factory=dict)
    """The other lines: what they have kept and how much they want."""


class Display:
    """Shows how a run goes; this one shows nothing."""

    interval = 60.0
    """Seconds between two looks."""

    def begin(self, progress: Progress) -> None:
        """The run begins, or goes on."""

    def look(self) -> None:
        """Time to show how far it is."""

    def say(self, text: str) -> None:
        """Something that the user should know now."""

    def end(self) -> None:
        """Nothing more comes."""


@dataclass
class Conductor:
    """Starts the jobs of a line, takes them in as they finish and decides them in order."""

    line: Line
    writer: GroupWriter
    queue: Iterator[AnyJob]
    funnel: Funnel
    concurrency: int
    next: int
    """The first job that is not decided."""
    jobs: int
    """How many there are in all."""
    stalled: int = 0
    """Jobs in a row, up to now, that quotas alone turned down."""
    started: int = field(init=False)
    failing: list[Ended] = field(default_factory=list)
    """The failed jobs since the last one that did not fail: not decided as long as it may be a server's fault."""
    finished: dict[int, Outcome | Ended] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.started = self.next

    @property
    def filled(self) -> bool:
        """True once the line has kept what it wants."""
        return self.funnel.accepted >= self.line.wanted

    @property
    def over(self) -> bool:
        """True once no further job shall start: filled, or quotas let nothing through any more."""
        return self.filled or self.stalled >= STALLED

    async def work(self) -> None:
        """Workers until the line is over or its jobs are used up; whatever ends one of them ends all."""
        useful = min(self.concurrency, self.jobs - self.next)
        workers = [asyncio.create_task(self._work()) for _ in range(useful)]
        try:
            pending = set(workers)
            while pending and not self.over:
                finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for worker in finished:
                    worker.result()
            if not self.over:
                self._finish()
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self) -> None:
        """One of the workers: grows job after job, each to its end before the next."""
        while True:
            while not self._may_start() and not self.over:
                self.changed.clear()
                await self.changed.wait()
            if self.over:
                return
            job = next(self.queue, None)
            if job is None:
                return
            self.started = job.index + 1
            self.finished[job.index] = await self._attempt(job)
            self._decide_ready()

    def _may_start(self) -> bool:
        """Not more jobs ahead of the decisions than the window, nor many more than are still needed."""
        acceptance = max(0.05, (self.funnel.accepted + 1) / (self.funnel.jobs + 1))
        needed = math.ceil((self.line.wanted - self.funnel.accepted) / acceptance)
        return self.started - self.next < min(WINDOW * self.concurrency, max(1, needed))

    async def _attempt(self, job: AnyJob) -> Outcome | Ended:
        """The one capture point: whatever ends a job becomes its record; what ends the run goes through."""
        if reason := self.line.skip(job):
            return _ended(job, "rejected", "gates", reason.word, reason.detail)
        try:
            return await self.line.grow(job)
        except JobEnded as error:
            return _ended(job, error.kind, error.stage, error.reason, error.detail)
        except IntersafeError:
            raise
        except Exception as error:  # noqa: BLE001  a defect ends the job that met it, with its name, and no other
            return _ended(job, "failed", "internal", type(error).__name__, str(error)[:300])

    def _decide_ready(self) -> None:
        """Decides all finished jobs that no earlier one holds back."""
        while not self.over and self.next in self.finished:
            outcome = self.finished.pop(self.next)
            self.next += 1
            if isinstance(outcome, Ended) and outcome.kind == "failed":
                self.failing.append(outcome)
                if len(self.failing) >= FAILURES:
                    raise self._all_fail()
                continue
            self._settle_failures()
            self._settle(outcome if isinstance(outcome, Ended) else self._through_gates(outcome))
        self.changed.set()

    def _settle_failures(self) -> None:
        """The jobs that failed did so for reasons of their own: others do not fail."""
        for ended in self.failing:
            self._settle(ended)
        self.failing.clear()

    def _settle(self, outcome: Outcome | Ended) -> None:
        self.stalled = stalled_after(self.stalled, outcome)
        self.funnel.count(outcome)
        self.writer.add(*outcome_row(outcome, self.line.name))

    def _finish(self) -> None:
        """No job is left: what failed is settled, unless nothing but failures came of the whole line."""
        if self.failing and not self.funnel.jobs:
            raise self._all_fail()
        self._settle_failures()

    def _all_fail(self) -> ServiceGone:
        last = self.failing[-1]
        return ServiceGone(
            f"{len(self.failing)} jobs in a row failed, the last one with {last.stage} {last.reason} ({last.detail}); "
            "mend the server, the key or the recipe, then run the same command again: none of them is decided yet"
        )

    def _through_gates(self, outcome: Outcome) -> Outcome | Ended:
        if reason := self.line.check(outcome):
            category = outcome.seed.category
            return Ended(outcome.job, outcome.key, category, "rejected", "gates", reason.word, reason.detail)
        self.line.add(outcome)
        return outcome


def _ended(job: AnyJob, kind: str, stage: str, reason: str, detail: str) -> Ended:
    assert kind in ("rejected", "failed")
    return Ended(job.index, job.key, job.seed.category, kind, stage, reason, detail)  # type: ignore[arg-type]


def stalled_after(stalled: int, outcome: Outcome | Ended) -> int:
    """The jobs in a row that quotas alone turned down, after one more; other rejections neither count nor break it."""
    if not isinstance(outcome, Ended):
        return 0
    return stalled + (outcome.stage == "gates" and outcome.reason.endswith("_full"))
