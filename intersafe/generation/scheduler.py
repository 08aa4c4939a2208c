"""The scheduler: grows many jobs of one kind at once and decides them in job order, until the kind has what it wants.

Jobs finish in any order and wait in a bounded window for the jobs before them. The gates decide in job order, so with
deterministic models the outcome files are the same bytes for any concurrency and any number of kills.
"""

import asyncio
import logging
import math
from dataclasses import dataclass, field

from intersafe.errors import BudgetReached, IntersafeError, JobEnded, ServiceGone
from intersafe.generation.grower import Grower
from intersafe.generation.job_kind import KindRun
from intersafe.generation.streak import is_full
from intersafe.models.http.faults import hint_for
from intersafe.records import Ended
from intersafe.run.kinds import AnyJob, Outcome, ended_by, rejected_by_gates
from intersafe.run.outcomes import outcome_row
from intersafe.storage.jsonl import GroupWriter

FAILURES = 32
"""Jobs that may fail in a row before the run stops: then the jobs are not the cause."""
WINDOW = 16
"""Started and undecided jobs for each job that is grown at once: while one job hangs, the others continue for as long
as it takes to grow 16 in a row. A grown job that waits holds some 10 KB."""

_log = logging.getLogger(__name__)


@dataclass
class Scheduler:
    """Starts the jobs of a kind, collects them as they finish and decides them in order.

    A job that there will hardly be room for is postponed instead of grown. At its turn it is rejected at no cost, or
    grown after all; so growing ahead changes the cost and no decision.
    """

    run: KindRun
    grower: Grower
    writer: GroupWriter
    next: int = field(init=False)
    """The first job that is not decided."""
    started: int = field(init=False)
    """The first job that is not started."""
    held: list[Ended] = field(default_factory=list)
    """The jobs that failed since the last one that did not, and the skipped jobs between them. They are not decided,
    since a server may be the cause."""
    finished: dict[int, tuple[AnyJob, Outcome | Ended]] = field(default_factory=dict)
    postponed: dict[int, AnyJob] = field(default_factory=dict)
    drained: bool = False
    """True once the queue is empty."""
    stopped: BudgetReached | None = None
    """Set once a worker meets a limit: no further job starts, and the started ones end at their next call."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.next = self.started = self.run.first

    @property
    def over(self) -> bool:
        """True once nothing more is decided: the kind is filled, or what it still wants does not come."""
        return self.run.filled or self.run.streak.lasting

    async def work(self) -> None:
        """Runs workers until the kind is over or its jobs are used up; an error in one worker ends all.

        Only `BudgetReached` lets the calls in flight end first, and keeps what comes of them.
        """
        useful = min(self.run.concurrency, self.run.jobs - self.next)
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
        """One worker: grows job after job, each to its end before the next."""
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
            elif self.stopped or (self.drained and not self.postponed):
                return
            else:
                self.changed.clear()
                await self.changed.wait()

    async def _take(self) -> AnyJob | None:
        """A job to grow now, or None; postpones the jobs that there is hardly room for."""
        while not self.over and not self.stopped:
            if self.next in self.postponed:  # its turn has come, and there is room
                return self.postponed.pop(self.next)
            if self.drained or not self._may_start():
                break
            job = next(self.run.queue, None)
            if job is None:
                self.drained = True
                break
            self.started = job.index + 1
            growing = job.index - self.next - len(self.postponed)
            if self.run.gates.skip(job, growing / (1 + self.run.streak.lost)) is None:
                return job
            self.postponed[job.index] = job
            self._decide_ready()
            await asyncio.sleep(0)  # thousands in a row may be rejected here: let the other jobs continue
        return None

    def _may_start(self) -> bool:
        """True while there is room in the window, and not many more jobs are started than are still needed."""
        funnel = self.run.funnel
        acceptance = max(0.05, (funnel.accepted + 1) / (funnel.jobs + 1))
        needed = math.ceil((self.run.wanted - funnel.accepted) / acceptance)
        return self.started - self.next < min(WINDOW * self.run.concurrency, max(1, needed))

    async def _attempt(self, job: AnyJob) -> Outcome | Ended:
        """The one place that catches errors: what ends a job becomes its record, what ends the run passes through."""
        try:
            return await self.grower.grow(self.run.kind, job)
        except JobEnded as error:
            ended = ended_by(job, error)
        except IntersafeError:
            raise
        except Exception as error:  # noqa: BLE001  a defect ends the job that met it, by name, and no other job
            ended = ended_by(job, JobEnded("internal", type(error).__name__, str(error)[:300]))
        if ended.kind == "failed":
            _log.warning("job %s failed: %s %s (%s)", job.key, ended.stage, ended.reason, ended.detail)
        return ended

    def _decide_ready(self) -> None:
        """Decides all jobs that wait for no earlier job."""
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
        """The decision on the next job; None if it must be grown first."""
        job, outcome = self.finished.get(self.next, (self.postponed.get(self.next), None))
        if job is None:
            return None
        if reason := self.run.gates.skip(job):
            outcome = rejected_by_gates(job.index, job.key, job.seed.category, reason)
        elif outcome is None:
            return None
        elif not isinstance(outcome, Ended):
            outcome = self._through_gates(outcome)
        self.finished.pop(self.next, None)
        self.postponed.pop(self.next, None)
        return outcome

    def _settle_held(self) -> bool:
        """Decides the failed jobs: another job did not fail, so they are the cause. False if the kind is then over.

        Then nothing more is decided, as in a run that is killed and resumed at this point.
        """
        held, self.held = self.held, []
        for ended in held:
            if self.over:
                return False
            self._settle(ended)
        return not self.over

    def _settle(self, outcome: Outcome | Ended) -> None:
        self.run.streak.count(outcome)
        self.run.funnel.count(outcome)
        self.writer.add(*outcome_row(outcome, self.run.kind.name))

    def _finish(self) -> None:
        """No job is left: decides the failed ones, unless nothing but failures came of a kind that must not fail."""
        if self.held and not self.run.funnel.jobs and self.run.kind.stops_if_all_fail:
            raise self._all_fail()
        self._settle_held()

    def _all_fail(self) -> ServiceGone:
        failed = [ended for ended in self.held if ended.kind == "failed"]
        last = failed[-1]
        return ServiceGone(
            f"{len(failed)} jobs in a row failed, the last one with {last.stage} {last.reason} ({last.detail}); "
            f"{hint_for(last.detail) or 'fix the server, the key or the recipe'}, "
            "then run the same command again: none of them is decided yet"
        )

    def _through_gates(self, outcome: Outcome) -> Outcome | Ended:
        if reason := self.run.gates.check(outcome):
            return rejected_by_gates(outcome.job, outcome.key, outcome.seed.category, reason)
        self.run.gates.add(outcome)
        return outcome
