"""The driver's side of Ray workers: it gives them jobs, collects the outcomes and replaces the workers that are lost.

Each worker (`worker.py`) is a Ray actor with its own event loop and its own journal file in the run directory, which
all machines share. Which worker grows a job decides nothing, so the bytes of the result are those of one process.

A lost worker is given up for good. Its journal file is never given to another, since it may still be writing unseen.
Its jobs go to other workers with all that its journal has of them. A new worker with a new file takes its place as
soon as the cluster has room.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import msgspec

from intersafe.errors import BudgetReached, InputError, JobEnded, JobRejected, ServiceGone, StorageError
from intersafe.generation.context import RunContext
from intersafe.generation.job_kind import JobKind
from intersafe.generation.kinds import KINDS
from intersafe.generation.workers.ray_cluster import first_line, library
from intersafe.generation.workers.worker import ENDS, Grown, Report, Setup, Worker, share_of, versions_here
from intersafe.generation.workers.worker_log import LOGGER, LogLine, log_again
from intersafe.models.base import ChatModel
from intersafe.run.incidents import over_workers
from intersafe.run.journal import Entry, RoleTally, entries_of, tally
from intersafe.run.kinds import AnyJob, Outcome

PERIOD = 1.0
"""Seconds between two reports of the workers; longer for more than 100 of them."""
STARTING = 60.0
"""Seconds that the first worker may take to start, whatever the patience."""
SILENCE = 60.0
"""Seconds that a worker may take for a report: after that its process hangs, and its jobs would wait forever."""
CLOSING = 20.0
"""Seconds that the workers have to close their journals."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts to start a worker; the first pause is one second."""
LOSSES = 5
"""Workers that may be lost while they grow the same job; after that the job may be the cause."""

JobId = tuple[str, int]
"""Kind and number of a job."""


@dataclass(eq=False)
class WorkerHandle:
    """One worker, as the driver sees it."""

    journal: str
    """Its file in the run directory."""
    actor: Any
    node: str = ""
    growing: set[JobId] = field(default_factory=set)
    """The jobs that it has."""
    report: Report = field(default_factory=lambda: Report({}, {}, []))
    """Its latest report."""
    reporting: "asyncio.Task[None] | None" = None
    lost: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done once it is given up."""
    left: "asyncio.Task[dict[JobId, list[Entry]]] | None" = None
    """Reads what a lost worker's journal has of its jobs."""

    def messages(self) -> list[str]:
        """Its messages for the user since the last call."""
        said, self.report.said[:] = list(self.report.said), []
        return said

    def log_lines(self) -> list[LogLine]:
        """What it logged since the last call."""
        logged, self.report.logged[:] = list(self.report.logged), []
        return logged


class RayWorkers:
    """A `Grower` whose jobs run in Ray workers; an async context manager around all growing."""

    def __init__(self, context: RunContext, *, silence: float = SILENCE) -> None:
        """The context's journal hands its replies over to the workers, and its tallies follow their reports.

        The context's image store is given the perceptual hashes, so that the gates open no image here.
        """
        recipe, workers = context.recipe, context.workers
        self.in_flight: Counter[str] = Counter()
        """Calls in flight by role, by the latest reports."""
        self.waiting: dict[str, str] = {}
        self.models: Mapping[str, ChatModel] = {}
        self._ray, self._root, self._context = library(), context.path.resolve(), context
        self._recipe, self._count, self._silence = share_of(recipe, workers), workers, silence
        limit = recipe.limits.concurrency
        at_once = sum(kind.concurrency(limit) for kind in KINDS.values() if not kind.follows_dialogues)
        self._room = ceil(at_once / workers)
        self._patience = max(STARTING, recipe.limits.patience)
        self._paid = context.journal.hand_over()
        self._before = {role: msgspec.structs.replace(spent) for role, spent in context.journal.roles.items()}
        self._gone: list[WorkerHandle] = []
        self._handles: list[WorkerHandle] = []
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._problem: Exception | None = None
        self._closing = False
        self._trouble = "none was scheduled: has the cluster free CPUs?"
        self._alone_since = time.monotonic()

    async def __aenter__(self) -> "RayWorkers":
        self._tasks = [asyncio.create_task(self._keep_one()) for _ in range(self._count)]
        self._tasks.append(asyncio.create_task(self._supervise()))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Lets the workers close their journals, and counts all that they paid for."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._closing = True
        handles = list(self._handles)
        problems = await asyncio.gather(*(self._close(handle) for handle in handles))
        self._pass_on(handles)
        await asyncio.gather(*(handle.left for handle in self._gone if handle.left), return_exceptions=True)
        self._count_up()
        if problem := next(filter(None, problems), ""):
            raise StorageError(problem)

    # --- a job -------------------------------------------------------------------------------------------------------

    async def grow(self, kind: JobKind, job: AnyJob) -> Outcome:
        """The outcome of a job, grown by the worker with the fewest jobs, and by another one if that is lost."""
        job_id, encode = (kind.name, job.index), msgspec.msgpack.encode
        paid, encoded = self._paid.pop(job_id, []), encode(job)
        for _ in range(LOSSES):
            self._context.budget.check()
            handle = await self._free_handle()
            handle.growing.add(job_id)
            try:
                grown = await self._ask(handle, handle.actor.grow.remote(kind.name, encoded, encode(paid)))
            finally:
                if not handle.lost.done():
                    handle.growing.discard(job_id)
                    self._changed.set()
            if grown is not None:
                for reference, found in grown.hashes.items():
                    self._context.images.remember(reference, found)
                return _outcome_of(grown, kind)
            assert handle.left is not None
            paid = [*paid, *(await asyncio.shield(handle.left)).get(job_id, ())]
        raise ServiceGone(
            f"{LOSSES} workers in a row were lost while they grew the job {job.key} (the last one: {self._trouble}); "
            "give the workers more memory, then run the same command again: nothing is lost"
        )

    async def _ask(self, handle: WorkerHandle, ref: Any) -> Grown | None:
        """The worker's answer; None if it is lost."""
        answer: asyncio.Future[Any] = asyncio.wrap_future(ref.future())
        either: list[asyncio.Future[Any]] = [answer, handle.lost]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._ray.cancel(ref)
            answer.cancel()
            raise
        if not answer.done():
            answer.cancel()
            return None
        try:
            grown: Grown = answer.result()
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            raise JobEnded("internal", type(cause).__name__, str(cause)[:300]) from None
        except self._ray.exceptions.RayError as error:
            self._lose(handle, error)
            return None
        return grown

    async def _free_handle(self) -> WorkerHandle:
        """The worker with the fewest jobs, as soon as one has room."""
        while True:
            if self._problem is not None:
                raise self._problem
            handle = min(self._handles, key=lambda handle: len(handle.growing), default=None)
            if handle is not None and len(handle.growing) < self._room:
                return handle
            self._changed.clear()
            await self._changed.wait()

    # --- workers come and go -----------------------------------------------------------------------------------------

    async def _keep_one(self) -> None:
        """Keeps one worker running: starts it, and another one whenever it is lost."""
        pause = 1.0
        while self._problem is None:
            try:
                handle = self._start()
            except OSError as error:
                what = f"{self._root}: cannot be written ({error.strerror})"
                self._end(StorageError(f"{what}; fix it, then run the same command again"))
                return
            try:
                opened: Grown = await asyncio.wrap_future(handle.actor.open.remote().future())
            except asyncio.CancelledError:
                self._ray.kill(handle.actor)
                raise
            except self._ray.exceptions.RayError as error:
                self._trouble = first_line(getattr(error, "cause", None) or error)
                if "failed to import" in str(error) or "No module named" in str(error):
                    self._end(InputError(self._trouble, at="--ray", remedy="install intersafe on every machine"))
                self._ray.kill(handle.actor)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if opened.kind == "run":
                self._ray.kill(handle.actor)
                self._end(ENDS[opened.stage](opened.detail))
                return
            handle.node, pause = opened.detail, 1.0
            self._handles.append(handle)
            self._changed.set()
            await asyncio.wait([handle.lost])

    def _start(self) -> WorkerHandle:
        """A new worker. Its new file is created here: so the worker can tell whether it sees the driver's directory."""
        journal = f"journal/w-{secrets.token_hex(8)}.jsonl"
        path = self._root / journal
        path.parent.mkdir(exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        seal = hashlib.sha256((self._root / "recipe.json").read_bytes()).hexdigest()
        older, manifest = self._context.request.older, self._context.prepared.manifest
        reuse = str(older.resolve()) if older else ""
        setup = Setup(
            run=str(self._root),
            recipe=self._recipe,
            manifest=manifest,
            seal=seal,
            journal=journal,
            versions=versions_here(),
            reuse=reuse,
            log_level=LOGGER.getEffectiveLevel(),
        )
        # A restart by Ray would write to the same file again, so a lost worker stays lost.
        kind = self._ray.remote(Worker).options(
            num_cpus=1, max_restarts=0, max_concurrency=10 * self._room + 100, scheduling_strategy="SPREAD"
        )
        return WorkerHandle(journal, kind.remote(msgspec.msgpack.encode(setup)))

    def _lose(self, handle: WorkerHandle, error: BaseException) -> None:
        """Gives a worker up for good, once; its jobs continue when its journal is read."""
        if handle.lost.done():
            return
        handle.lost.set_result(None)
        self._handles.remove(handle)
        self._gone.append(handle)
        self._trouble = _why_lost(error)
        handle.left = asyncio.create_task(self._read_left(handle))
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(handle.actor)
        if not self._handles:
            self._alone_since = time.monotonic()
        if self._closing:
            return
        self._context.say(
            f"a worker on {handle.node} is lost ({self._trouble}): its {len(handle.growing)} jobs continue elsewhere "
            f"from its journal, {len(self._handles)} of {self._count} workers are left, another one is being started",
            logging.WARNING,
        )

    async def _read_left(self, handle: WorkerHandle) -> dict[JobId, list[Entry]]:
        """What a lost worker's journal has of its jobs; its report then has the tallies of that file."""
        jobs, roles = set(handle.growing), dict[str, RoleTally]()

        def read() -> dict[JobId, list[Entry]]:
            found: dict[JobId, list[Entry]] = {}
            for entry in entries_of(self._root / handle.journal):
                tally(roles, entry, self._context.journal.prices)
                if (entry.kind, entry.job) in jobs:
                    found.setdefault((entry.kind, entry.job), []).append(entry)
            return found

        left = await asyncio.to_thread(read)
        handle.report = Report(roles, {}, [], incidents=handle.report.incidents)
        return left

    def _end(self, problem: Exception) -> None:
        """Ends the run: every job that waits for a worker raises the problem."""
        self._problem = self._problem or problem
        self._changed.set()

    async def _close(self, handle: WorkerHandle) -> str:
        """Closes a worker; what went wrong with its journal."""
        try:
            closing = asyncio.wrap_future(handle.actor.close.remote().future())
            handle.report, problem = await asyncio.wait_for(closing, CLOSING)
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            self._lose(handle, error)
            return ""
        self._ray.kill(handle.actor)
        return str(problem)

    # --- supervision -------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Collects the workers' reports: their calls, their messages, whether a budget is used up."""
        stopped, began, may_be_few = False, time.monotonic(), True
        while True:
            await asyncio.sleep(max(PERIOD, self._count / 100))
            handles = list(self._handles)
            for handle in handles:
                if handle.reporting is None or handle.reporting.done():
                    handle.reporting = asyncio.create_task(self._fetch_report(handle))
            if reporting := [handle.reporting for handle in handles if handle.reporting]:
                await asyncio.wait(reporting, timeout=PERIOD)
            self._count_up()
            self._pass_on(handles)
            if may_be_few and time.monotonic() - began > STARTING / 2:
                may_be_few = False
                if len(self._handles) < self._count:
                    have = f"{len(self._handles)} of {self._count} workers"
                    self._context.say(f"{have} are running; the others wait for free CPUs")
            if not self._handles and time.monotonic() - self._alone_since >= self._patience:
                self._end(
                    ServiceGone(
                        f"no worker started for {self._patience:.0f} s ({self._trouble}); "
                        "fix the cluster, then run the same command again, with --ray or without: nothing is lost"
                    )
                )
            if not stopped:
                stopped = await self._stop_if_used_up(handles)

    def _pass_on(self, handles: list[WorkerHandle]) -> None:
        """Shows the workers' messages, which their log lines have too, and logs these again."""
        for text in dict.fromkeys(text for handle in handles for text in handle.messages()):
            self._context.request.display.say(text)
        log_again(handle.log_lines() for handle in handles)

    async def _fetch_report(self, handle: WorkerHandle) -> None:
        try:
            answer = asyncio.wrap_future(handle.actor.report.remote().future())
            handle.report = await asyncio.wait_for(answer, self._silence)
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            self._lose(handle, error)

    async def _stop_if_used_up(self, handles: list[WorkerHandle]) -> bool:
        try:
            self._context.budget.check()
        except BudgetReached as reached:
            stopping = [asyncio.wrap_future(handle.actor.stop.remote(str(reached)).future()) for handle in handles]
            await asyncio.gather(*stopping, return_exceptions=True)
            return True
        return False

    def _count_up(self) -> None:
        """Tallies and incidents of the run: those before, and those of every worker; lost ones by their files."""
        roles = {role: msgspec.structs.replace(spent) for role, spent in self._before.items()}
        handles = (*self._handles, *self._gone)
        for handle in handles:
            for role, spent in handle.report.roles.items():
                whole = roles.setdefault(role, RoleTally())
                for name in RoleTally.__struct_fields__:
                    setattr(whole, name, getattr(whole, name) + getattr(spent, name))
        self._context.journal.roles.update(roles)
        self._context.hooks.incidents.update(over_workers(*(handle.report.incidents for handle in handles)))
        self.in_flight.clear()
        self.waiting.clear()
        for handle in self._handles:
            self.in_flight.update(handle.report.in_flight)
            self.waiting.update(handle.report.waiting)


def _outcome_of(grown: Grown, kind: JobKind) -> Outcome:
    """The outcome that a worker sent; raises what ended the job or the run."""
    if grown.kind == "run":
        raise ENDS[grown.stage](grown.detail)
    if grown.kind != "accepted":
        ended = JobRejected if grown.kind == "rejected" else JobEnded
        raise ended(grown.stage, grown.reason, grown.detail)
    return msgspec.msgpack.decode(grown.record, type=kind.records.outcome)


def _why_lost(error: BaseException) -> str:
    """Ray's reason in brief."""
    if isinstance(error, TimeoutError):
        return "it no longer answered"
    text = str(error)
    return "its machine is gone" if "node" in text and "dead" in text.lower() else "its process ended"
