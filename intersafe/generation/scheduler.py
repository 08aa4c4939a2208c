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

from intersafe.errors import BudgetReached, IntersafeError, JobEnded, ServiceGone
from intersafe.models.http.faults import hint_for
from intersafe.records import Dialogue, Ended, Job, Reason, RefusalJob, RefusalSample
from intersafe.run.funnel import Funnel
from intersafe.run.outcomes import outcome_row
from intersafe.storage.jsonl import GroupWriter

FAILURES = 32
"""Jobs in a row that may fail before the run stops: then the fault is not theirs."""
HOPELESS = 1_000
"""Jobs lost in a row after which a line ends in any case: less than one in a thousand is not worth its money."""
LOST = 200
"""Jobs that may be lost since the last outcome that was kept, while quotas keep turning down others: then what is still
wanted does not come. At a yield of 5 % so many are lost in a row once in 28,000 times, at 2 % once in 57."""
FULL = 20
"""Jobs that quotas must have turned down meanwhile: without them it is no quota that the line waits for."""
WINDOW = 16
"""Jobs that may be started and not yet decided, for each one that is grown at once: behind one job that hangs the
others go on for as long as it takes to grow 16 in a row. A grown one that waits holds some 10 KB."""

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

    def skip(self, job: AnyJob, ahead: float = 0.0) -> Reason | None:
        """Why the job need not be grown, if `ahead` outcomes of other kinds are kept before its turn comes.

        At its turn `ahead` is 0, and the answer decides whether the job was grown or not.
        """
        ...

    def check(self, outcome: Outcome) -> Reason | None:
        """The gates' reason to turn the outcome down, or None."""
        ...

    def add(self, outcome: Outcome) -> None:
        """Told of every outcome that was kept, in job order."""
        ...


@dataclass
class Drought:
    """What became of the jobs since the last one that was kept."""

    full: int = 0
    """Turned down by quotas, or because their group is complete."""
    lost: int = 0
    """Ended in any other way: there was room for them."""

    @property
    def lasting(self) -> bool:
        """True once what there is room for does not come, or nothing comes at all."""
        return (self.lost >= LOST and self.full >= FULL) or self.lost >= HOPELESS

    def count(self, outcome: Outcome | Ended) -> None:
        """Takes one more decided job into account."""
        if not isinstance(outcome, Ended):
            self.full = self.lost = 0
        elif is_full(outcome):
            self.full += 1
        else:
            self.lost += 1


def is_full(ended: Ended) -> bool:
    """True if the job ended because there is enough of its kind, whatever would have come of it."""
    return ended.stage == "gates" and (ended.reason.endswith("_full") or ended.reason == "group_complete")


@dataclass
class Conductor:
    """Starts the jobs of a line, takes them in as they finish and decides them in order.

    A job that there will hardly be room for is put off instead of grown. When its turn comes it is turned down unpaid,
    or grown after all; so what is grown ahead changes the cost and no decision.
    """

    line: Line
    writer: GroupWriter
    queue: Iterator[AnyJob]
    funnel: Funnel
    concurrency: int
    next: int
    """The first job that is not decided."""
    jobs: int
    """How many there are in all."""
    drought: Drought = field(default_factory=Drought)
    started: int = field(init=False)
    held: list[Ended] = field(default_factory=list)
    """The failed jobs since the last one that was tried and did not fail, and those between them that were not tried:
    not decided as long as it may be a server's fault."""
    finished: dict[int, tuple[AnyJob, Outcome | Ended]] = field(default_factory=dict)
    put_off: dict[int, AnyJob] = field(default_factory=dict)
    drained: bool = False
    """True once the queue is empty."""
    stopped: BudgetReached | None = None
    """Set once a worker was told that a limit is reached: no further job starts, those under way go on to their next
    call."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.started = self.next

    @property
    def filled(self) -> bool:
        """True once the line has kept what it wants."""
        return self.funnel.accepted >= self.line.wanted

    @property
    def over(self) -> bool:
        """True once nothing more is decided: filled, or what is still wanted does not come."""
        return self.filled or self.drought.lasting

    async def work(self) -> None:
        """Workers until the line is over or its jobs are used up; whatever ends one of them ends all.

        `BudgetReached` alone lets the calls in flight end first, and what becomes of them is kept.
        """
        useful = min(self.concurrency, self.jobs - self.next)
        workers = [asyncio.create_task(self._work()) for _ in range(useful)]
        try:
            pending = set(workers)
            while pending and not self.over:
                finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for worker in finished:
                    worker.result()
            if not self.over and self.stopped:
                raise self.stopped
            if not self.over:
                self._finish()
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self) -> None:
        """One of the workers: grows job after job, each to its end before the next."""
        while not self.over and not self.stopped:
            if (job := await self._take()) is not None:
                try:
                    outcome = await self._attempt(job)
                except BudgetReached as reached:
                    self.stopped = reached
                    self.changed.set()
                    return
                self.finished[job.index] = job, outcome
                self._decide_ready()
            elif self.stopped or (self.drained and not self.put_off):
                return
            else:
                self.changed.clear()
                await self.changed.wait()

    async def _take(self) -> AnyJob | None:
        """A job that may be grown now, if there is one; others on the way to it are put off."""
        while not self.over and not self.stopped:
            if self.next in self.put_off:  # its turn has come, and there is room
                return self.put_off.pop(self.next)
            if self.drained or not self._may_start():
                break
            job = next(self.queue, None)
            if job is None:
                self.drained = True
                break
            self.started = job.index + 1
            growing = job.index - self.next - len(self.put_off)
            if self.line.skip(job, growing / (1 + self.drought.lost)) is None:
                return job
            self.put_off[job.index] = job
            self._decide_ready()
            await asyncio.sleep(0)  # thousands in a row may be turned down here: the other jobs go on
        return None

    def _may_start(self) -> bool:
        """Not more jobs ahead of the decisions than the window, nor many more than are still needed."""
        acceptance = max(0.05, (self.funnel.accepted + 1) / (self.funnel.jobs + 1))
        needed = math.ceil((self.line.wanted - self.funnel.accepted) / acceptance)
        return self.started - self.next < min(WINDOW * self.concurrency, max(1, needed))

    async def _attempt(self, job: AnyJob) -> Outcome | Ended:
        """The one capture point: whatever ends a job becomes its record; what ends the run goes through."""
        try:
            return await self.line.grow(job)
        except JobEnded as error:
            return _ended(job, error.kind, error.stage, error.reason, error.detail)
        except IntersafeError:
            raise
        except Exception as error:  # noqa: BLE001  a defect ends the job that met it, with its name, and no other
            return _ended(job, "failed", "internal", type(error).__name__, str(error)[:300])

    def _decide_ready(self) -> None:
        """Decides all jobs that no earlier one holds back."""
        while not self.over and (outcome := self._decision()) is not None:
            self.next += 1
            if isinstance(outcome, Ended) and (outcome.kind == "failed" or (self.held and is_full(outcome))):
                self.held.append(outcome)
                if sum(ended.kind == "failed" for ended in self.held) >= FAILURES:
                    raise self._all_fail()
                continue
            if not self._settle_held():
                break
            self._settle(outcome)
        self.changed.set()

    def _decision(self) -> Outcome | Ended | None:
        """The outcome of the next job to decide; None if it is to be grown first."""
        job, outcome = self.finished.get(self.next, (self.put_off.get(self.next), None))
        if job is None:
            return None
        if reason := self.line.skip(job):
            outcome = _ended(job, "rejected", "gates", reason.word, reason.detail)
        elif outcome is None:
            return None
        elif not isinstance(outcome, Ended):
            outcome = self._through_gates(outcome)
        self.finished.pop(self.next, None)
        self.put_off.pop(self.next, None)
        return outcome

    def _settle_held(self) -> bool:
        """The jobs that failed did so for reasons of their own: others do not fail. False if the line ends with them.

        Then nothing more is decided, just as a run that was killed and resumed here would find it.
        """
        held, self.held = self.held, []
        for ended in held:
            if self.over:
                return False
            self._settle(ended)
        return not self.over

    def _settle(self, outcome: Outcome | Ended) -> None:
        self.drought.count(outcome)
        self.funnel.count(outcome)
        self.writer.add(*outcome_row(outcome, self.line.name))

    def _finish(self) -> None:
        """No job is left: what failed is settled, unless the whole run came to nothing but failures."""
        if self.held and not self.funnel.jobs and not self.line.name:
            raise self._all_fail()
        self._settle_held()

    def _all_fail(self) -> ServiceGone:
        failed = [ended for ended in self.held if ended.kind == "failed"]
        last = failed[-1]
        return ServiceGone(
            f"{len(failed)} jobs in a row failed, the last one with {last.stage} {last.reason} ({last.detail}); "
            f"{hint_for(last.detail) or 'mend the server, the key or the recipe'}, "
            "then run the same command again: none of them is decided yet"
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
