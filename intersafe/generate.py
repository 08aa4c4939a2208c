"""Generate: jobs, stages, gates, run; many jobs at once, decided in job order, until `n` dialogues are kept.

Jobs finish in any order and wait in a bounded window for the jobs before them. Gates decide in job order, so with
deterministic models the outcome files are the same bytes for any concurrency and any number of kills in between. What
a job has paid for is in the journal; a job that is grown again after a kill takes its replies from there and goes on
at the call where it stopped.
"""

import asyncio
import contextlib
import hashlib
import math
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from intersafe.errors import InputError, IntersafeError, JobEnded, SeedsExhausted, ServiceGone, StorageError
from intersafe.files import write_whole
from intersafe.gates import Gate
from intersafe.gates.dedup import DuplicateIndex, similar_images
from intersafe.gates.quota import Balance
from intersafe.gates.rules import check_excluded, check_rules
from intersafe.images import ImageStore
from intersafe.jobs import job_count, jobs
from intersafe.journal import GroupWriter, Journal, ReuseIndex
from intersafe.models import open_models
from intersafe.models.cast import Company, JobCast, Replies
from intersafe.prepare import Prepared, open_directory, prepare, provenance_of
from intersafe.records import Check, Dialogue, Ended, Job, Provenance, Reason
from intersafe.runs import (
    Funnel,
    Manifest,
    Run,
    Summary,
    align_outcomes,
    differences,
    lock,
    outcome_row,
    run_path,
)
from intersafe.settings import Recipe
from intersafe.stages.conversing import converse
from intersafe.stages.judging import check_dialogue
from intersafe.stages.planning import make_plan

FAILURES = 32
"""Jobs in a row that may fail before the run stops: then the fault is not theirs."""
WINDOW = 4
"""Jobs that may be started and not yet decided, for each one that is grown at once."""


# --- one dialogue ----------------------------------------------------------------------------------------------------


async def grow(job: Job, cast: JobCast, recipe: Recipe, provenance: Provenance) -> Dialogue:
    """Plan, converse, check: one dialogue, or `JobEnded` with the stage and the reason."""
    plan = await make_plan(job, cast, recipe.plan)
    turns, pruned = await converse(job, plan, cast, recipe.converse, recipe.gates.rules)
    check: Check = await check_dialogue(job, cast, turns, recipe.converse.tries)
    texts = [message.text for turn in turns for message in (turn.user, turn.reply)]
    name = hashlib.blake2b(msgspec.json.encode((job.key, provenance.recipe, texts)), digest_size=8).hexdigest()
    victim = recipe.cast.victims[job.victim].identity
    return Dialogue(
        name, job.index, job.key, job.seed, job.strategy, victim, job.sample, plan, turns, pruned, check, provenance
    )


# --- a run -----------------------------------------------------------------------------------------------------------


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
    """Starts jobs, takes them in as they finish and decides them in order."""

    n: int
    recipe: Recipe
    company: Company
    writer: GroupWriter
    queue: Iterator[Job]
    manifest: Manifest
    funnel: Funnel
    gates: list[Gate]
    images: ImageStore
    next: int
    """The first job that is not decided."""
    jobs: int
    """How many there are in all."""
    started: int = 0
    failing: list[Ended] = field(default_factory=list)
    """The failed jobs since the last one that did not fail: not decided as long as it may be a server's fault."""
    finished: dict[int, Dialogue | Ended] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def done(self) -> bool:
        """True once `n` dialogues are kept."""
        return self.funnel.accepted >= self.n

    async def work(self) -> None:
        """One of the workers: grows job after job, each to its end before the next."""
        while True:
            while not self._may_start() and not self.done:
                self.changed.clear()
                await self.changed.wait()
            if self.done:
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
        needed = math.ceil((self.n - self.funnel.accepted) / acceptance)
        return self.started - self.next < min(WINDOW * self.recipe.limits.concurrency, max(1, needed))

    async def _attempt(self, job: Job) -> Dialogue | Ended:
        """The one capture point: whatever ends a job becomes its record; what ends the run goes through."""
        provenance = provenance_of(self.recipe, self.manifest, job)
        try:
            return await grow(job, JobCast(self.company, job), self.recipe, provenance)
        except JobEnded as error:
            kind, stage, reason, detail = error.kind, error.stage, error.reason, error.detail
        except IntersafeError:
            raise
        except Exception as error:  # noqa: BLE001  a defect ends the job that met it, with its name, and no other
            kind, stage, reason, detail = "failed", "internal", type(error).__name__, str(error)[:300]
        return Ended(job.index, job.key, job.seed.category, kind, stage, reason, detail)

    def _decide_ready(self) -> None:
        """Decides all finished jobs that no earlier one holds back."""
        while not self.done and self.next in self.finished:
            outcome = self.finished.pop(self.next)
            self.next += 1
            if isinstance(outcome, Ended) and outcome.kind == "failed":
                self.failing.append(outcome)
                if len(self.failing) >= FAILURES:
                    raise self._all_fail()
                continue
            self.settle_failures()
            self._settle(self._through_gates(outcome) if isinstance(outcome, Dialogue) else outcome)
        self.changed.set()

    def settle_failures(self) -> None:
        """The jobs that failed did so for reasons of their own: others do not fail."""
        for ended in self.failing:
            self._settle(ended)
        self.failing.clear()

    def _settle(self, outcome: Dialogue | Ended) -> None:
        self.funnel.count(outcome)
        self.writer.add(*outcome_row(outcome))

    def finish(self) -> None:
        """No job is left: what failed is settled, unless nothing but failures came of the whole run."""
        if self.failing and not self.funnel.jobs:
            raise self._all_fail()
        self.settle_failures()

    def _all_fail(self) -> ServiceGone:
        last = self.failing[-1]
        return ServiceGone(
            f"{len(self.failing)} jobs in a row failed, the last one with {last.stage} {last.reason} ({last.detail}); "
            "mend the server, the key or the recipe, then run the same command again: none of them is decided yet"
        )

    def _through_gates(self, dialogue: Dialogue) -> Dialogue | Ended:
        for reason in self._reasons(dialogue):
            if reason:
                return Ended(
                    dialogue.job, dialogue.key, dialogue.seed.category, "rejected", "gates", reason.word, reason.detail
                )
        for gate in self.gates:
            gate.add(dialogue)
        return dialogue

    def _reasons(self, dialogue: Dialogue) -> Iterator[Reason | None]:
        settings = self.recipe.gates
        yield check_excluded(dialogue)
        if settings.rules:
            yield check_rules(dialogue, settings.rules)
        if settings.images and len(dialogue.images) > 1:
            hashes = [self.images.perceptual_hash(ref) for ref in dialogue.images]
            yield similar_images(hashes, settings.images.distance)
        for gate in self.gates:
            yield gate.check(dialogue)


def generate_dialogues(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    n: int | None = None,
    reuse: str | Path | None = None,
    display: Display | None = None,
) -> Run:
    """Grows dialogues until `n` are kept (default: the recipe's) and returns the run; goes on with a run that is there.

    Raises `InputError`, `SeedsExhausted`, `ServiceGone` or `StorageError`; all but the first leave a run that the same
    call resumes, as does Ctrl-C (`KeyboardInterrupt`). Works inside a notebook's running event loop.
    """
    prepared = prepare(recipe)
    path = run_path(run if run is not None else recipe.name)
    older = ReuseIndex(run_path(reuse)) if reuse is not None else None
    wanted = recipe.n if n is None else n
    if wanted < 1:
        raise InputError(f"n is {wanted}", remedy="ask for at least 1 dialogue")
    if not _is_complete(path, prepared, wanted):
        run_anywhere(lambda: _session(prepared, path, wanted, older, display or Display()))
    return Run(path)


def _is_complete(path: Path, prepared: Prepared, n: int) -> bool:
    """True if the run holds exactly `n` dialogues made from the same things; `InputError` if it holds more."""
    if not (path / "recipe.json").exists():
        return False
    run = Run(path)
    summary = run.summary
    if summary is None or differences(run.manifest, prepared.manifest):
        return False
    if summary.funnel.accepted > n:
        raise InputError(
            f"holds {summary.funnel.accepted} dialogues, more than --n {n}", at=path, remedy="name another --run"
        )
    return summary.funnel.accepted == n


def run_anywhere(make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs the coroutine to its end, beside the event loop of a notebook where there is one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(make())
        return
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None] | None]] = Future()

    async def work() -> None:
        begun.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        await make()

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(lambda: asyncio.run(work()))
        outer = asyncio.current_task()
        try:
            while not wait((done,), timeout=0.2).done:
                # `asyncio.run` answers Ctrl-C by cancelling its task, which this call keeps from noticing.
                if outer is not None and outer.cancelling():
                    raise KeyboardInterrupt
            done.result()
        except KeyboardInterrupt:
            loop, task = begun.result()
            if task is not None:
                loop.call_soon_threadsafe(task.cancel)  # or leaving the block would wait for the whole run
            raise


async def _session(prepared: Prepared, path: Path, n: int, older: Replies | None, display: Display) -> None:
    """One process's work on a run: open, go on where it stopped, grow, close."""
    held = lock(path)
    try:
        with _stopped_by_signals():
            if newer := open_directory(path, prepared):
                display.say(f"{path} was begun by other versions ({newer}): its old part stays as it is")
            await _grow_all(prepared, path, n, older, display)
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror}; mend it, then run the same command again"
        ) from None
    finally:
        os.close(held)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop the run as Ctrl-C does: cleanly, and as `KeyboardInterrupt`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    terminated: list[bool] = []

    def stop() -> None:
        terminated.append(True)
        task.cancel()

    for name in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(name, stop)
    try:
        yield
    except asyncio.CancelledError:
        if terminated:
            raise KeyboardInterrupt from None
        raise
    finally:
        for name in (signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(name)


async def _grow_all(prepared: Prepared, path: Path, n: int, older: Replies | None, display: Display) -> None:
    recipe, seeds = prepared.recipe, prepared.seeds.seeds
    first = align_outcomes(path)
    funnel, gates = _remember(Run(path), recipe, {seed.category for seed in seeds})
    if funnel.accepted > n:
        raise InputError(f"holds {funnel.accepted} dialogues, more than --n {n}", at=path, remedy="name another --run")
    (path / "summary.json").unlink(missing_ok=True)
    writer, images = GroupWriter(path), ImageStore(path / "images")
    journal = Journal(writer)
    journal.load(path / "journal", first)
    models = open_models(recipe.cast, recipe.limits, images, display.say)
    company = Company(recipe.cast, models, prepared.prompts, journal, older)
    conductor = Conductor(
        n=n,
        recipe=recipe,
        company=company,
        writer=writer,
        queue=jobs(recipe, seeds, first),
        manifest=prepared.manifest,
        funnel=funnel,
        gates=gates,
        images=images,
        next=first,
        jobs=job_count(recipe, seeds),
        started=first,
    )
    if n > conductor.jobs:
        display.say(
            f"{n:,} dialogues cannot come of {conductor.jobs:,} jobs: raise `samples`, or add seeds or strategies"
        )
    display.begin(Progress(n, conductor.jobs, funnel, journal, company.in_flight, funnel.accepted))
    try:
        await _work(conductor, display)
    finally:
        try:
            await writer.close()
        finally:
            await asyncio.gather(*(model.aclose() for model in set(models.values())))
            display.look()
            display.end()
    scripted = any(member.spec.backend == "scripted" for member in recipe.cast.members.values())
    summary = Summary(n, conductor.done, funnel, journal.roles, len(prepared.seeds.excluded), scripted)
    write_whole(path / "summary.json", msgspec.json.format(msgspec.json.encode(summary)) + b"\n")
    if not conductor.done:
        raise SeedsExhausted(_what_to_change(conductor))


def _remember(run: Run, recipe: Recipe, categories: set[str]) -> tuple[Funnel, list[Gate]]:
    """The funnel and the gates as they were when the last dialogue was decided."""
    funnel = Funnel()
    gates: list[Gate] = []
    settings = recipe.gates
    if settings.balance:
        gates.append(Balance(sorted(categories), settings.balance))
    if settings.duplicates:
        gates.append(DuplicateIndex(settings.duplicates))
    for outcome in run.outcomes():
        funnel.count(outcome)
        if isinstance(outcome, Dialogue):
            for gate in gates:
                gate.add(outcome)
    return funnel, gates


async def _work(conductor: Conductor, display: Display) -> None:
    """Workers until `n` are kept, the jobs are used up or something ends the run; nothing is left running."""
    useful = min(conductor.recipe.limits.concurrency, conductor.jobs - conductor.next)
    workers = {asyncio.create_task(conductor.work()) for _ in range(useful)}
    looking = asyncio.create_task(_look(display))
    try:
        pending = workers
        while pending and not conductor.done:
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for worker in finished:
                worker.result()
        if not conductor.done:
            conductor.finish()
    finally:
        for task in (*workers, looking):
            task.cancel()
        await asyncio.gather(*workers, looking, return_exceptions=True)


async def _look(display: Display) -> None:
    while True:
        await asyncio.sleep(display.interval)
        display.look()


def _what_to_change(conductor: Conductor) -> str:
    funnel = conductor.funnel
    lost = sorted(funnel.ended.items(), key=lambda item: -item[1])[:4]
    why = ", ".join(f"{number} {place}" for place, number in lost) or "none was lost"
    return (
        f"all {conductor.jobs} jobs are used up and {funnel.accepted} of {conductor.n} dialogues were kept ({why}); "
        "raise `samples`, add seeds or strategies, or loosen the gate that rejects most, in a new --run"
    )
