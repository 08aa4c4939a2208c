"""One command's work on a run: every kind of job is grown, then the summary is written.

Dialogues and the kinds that are independent of them are grown together; then the kinds that follow the dialogues.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping

import msgspec
from msgspec import UNSET

from intersafe.engines.metrics import Figures
from intersafe.errors import BudgetReached, SeedsExhausted, StorageError
from intersafe.generation.context import RunContext
from intersafe.generation.grower import Grower, Stages, open_cast
from intersafe.generation.job_kind import JobKind, KindRun
from intersafe.generation.kinds import DIALOGUES, KINDS
from intersafe.generation.monitor import Monitor
from intersafe.generation.progress import Progress
from intersafe.generation.resume import resume_kind
from intersafe.generation.scheduler import Scheduler
from intersafe.generation.shortfall import how_far
from intersafe.generation.workers.driver import RayWorkers
from intersafe.models.open import clear_batches
from intersafe.run.budget import prices_of
from intersafe.run.directory import Run
from intersafe.run.funnel import Funnel, Summary
from intersafe.run.incidents import write_incidents
from intersafe.storage.files import write_whole

LIMIT_CHECK = 0.25
"""Seconds between two checks whether a limit is reached."""


async def grow_run(context: RunContext) -> None:
    """Grows what is missing and writes the summary; `SeedsExhausted` if the jobs do not suffice."""
    dialogues = resume_kind(DIALOGUES, context, context.request.n)
    (context.path / "summary.json").unlink(missing_ok=True)
    try:
        async with open_grower(context) as grower:
            monitor = Monitor(context.recipe, grower.models)
            try:
                async with monitor:
                    runs = await _grow_kinds(context, grower, dialogues, monitor.figures)
                    context.writer.flush()
                    missing, short = _shortfalls(context, runs)
            finally:
                await context.writer.close()
    finally:
        context.request.display.look()
        context.request.display.end()
        with contextlib.suppress(StorageError):  # the counts of one command are not worth another error
            context.lease.check()
            write_incidents(context.path, context.incidents())
    _write_summary(context, runs, missing, short, monitor.figures)
    if missing:
        raise SeedsExhausted("; and ".join(missing))


@contextlib.asynccontextmanager
async def open_grower(context: RunContext) -> AsyncIterator[Grower]:
    """This process with its own models, or the workers of a cluster."""
    if context.workers:
        async with RayWorkers(context) as workers:
            yield workers
        return
    async with contextlib.AsyncExitStack() as closing:
        shared = open_cast(
            closing,
            context.recipe,
            prompts=context.prepared.prompts,
            journal=context.journal,
            images=context.images,
            budget=context.budget,
            hooks=context.hooks,
            index=context.request.index,
            older=context.request.older,
            batches=context.path / "batches",
        )
        yield Stages(context.recipe, context.prepared.manifest, shared)


async def _grow_kinds(
    context: RunContext, grower: Grower, dialogues: KindRun, engines: Mapping[str, Figures]
) -> list[KindRun]:
    """Grows every kind that the recipe wants, until it has enough or its jobs are used up."""
    if dialogues.wanted > dialogues.jobs:
        context.say(
            f"{dialogues.wanted:,} dialogues cannot come of {dialogues.jobs:,} jobs: "
            "raise `samples`, or add seeds or strategies"
        )
    n = dialogues.wanted
    runs = [dialogues, *(resume_kind(kind, context, n) for kind in _others(context, n) if not kind.follows_dialogues)]
    progress = Progress(
        n,
        dialogues.jobs,
        dialogues.funnel,
        context.journal,
        grower.in_flight,
        before=dialogues.funnel.accepted,
        others={run.kind.name: (run.funnel, run.wanted) for run in runs if run is not dialogues},
        budget=context.budget,
        waiting=grower.waiting,
        engines=engines,
    )
    context.request.display.begin(progress)
    try:
        async with _shown(context, grower), context.budget.lasting():
            await _together(Scheduler(run, grower, context.writer) for run in runs)
            accepted = dialogues.funnel.accepted
            for kind in (kind for kind in _others(context, accepted) if kind.follows_dialogues):
                context.writer.flush()  # its jobs are made from the dialogues on disk
                run = resume_kind(kind, context, accepted)
                runs.append(run)
                progress.others[kind.name] = run.funnel, run.wanted
                await Scheduler(run, grower, context.writer).work()
    except BudgetReached as reached:
        now = context.budget.reached() or str(reached)
        raise BudgetReached(f"{context.path}: {how_far(progress)} accepted; {now}") from None
    return runs


def _others(context: RunContext, dialogues: int) -> list[JobKind]:
    """The kinds that the recipe wants besides dialogues."""
    return [kind for kind in KINDS.values() if kind is not DIALOGUES and kind.wanted(context.recipe, dialogues)]


async def _together(schedulers: Iterable[Scheduler]) -> None:
    """Works on several kinds at once. An error in one ends all, but each meets the limits of a budget by itself."""
    tasks = [asyncio.create_task(scheduler.work()) for scheduler in schedulers]
    reached: BudgetReached | None = None
    try:
        for finished in asyncio.as_completed(tasks):
            try:
                await finished
            except BudgetReached as error:
                reached = error
        if reached:
            raise reached
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _shortfalls(context: RunContext, runs: Iterable[KindRun]) -> tuple[list[str], list[str]]:
    """Why outcomes are missing, and the cells below their quota; tells the user of cells and of optional outcomes."""
    missing: list[str] = []
    short: list[str] = []
    for run in runs:
        found = run.kind.shortfall(run, Run(context.path))
        for cell in found.cells:
            context.say(f"below its quota: {cell}")
        short += found.cells
        if found.reason and run.kind.may_fall_short:
            context.say(found.reason)
        elif found.reason:
            missing.append(found.reason)
    return missing, short


def _write_summary(
    context: RunContext, runs: Iterable[KindRun], missing: list[str], short: list[str], engines: dict[str, Figures]
) -> None:
    """Writes the file that means complete; no batch is needed after it."""
    cast = context.recipe.cast
    funnels = {"dialogues": Funnel(), "refusals": Funnel(), "twins": Funnel()}
    funnels |= {run.kind.name: run.funnel for run in runs}
    summary = Summary(
        n=context.request.n,
        complete=not missing,
        funnel=funnels.pop("dialogues"),
        refusals=funnels.pop("refusals"),
        twins=funnels.pop("twins"),
        short=tuple(short),
        roles=context.journal.roles,
        excluded_seeds=len(context.prepared.manifest.excluded),
        scripted=any(model.spec.backend == "scripted" for model in cast.models.values()),
        prices=prices_of(context.recipe.cast),
        engines=engines,
        incidents=context.incidents(),
        others=funnels or UNSET,
    )
    clear_batches(context.path / "batches")
    write_whole(context.path / "summary.json", msgspec.json.format(msgspec.json.encode(summary)) + b"\n")


# --- the display -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _shown(context: RunContext, grower: Grower) -> AsyncIterator[None]:
    """Updates the display during the block, and says when a limit is reached while calls are in flight."""
    tasks = [asyncio.create_task(_look(context)), asyncio.create_task(_tell_limit(context, grower))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _look(context: RunContext) -> None:
    while True:
        await asyncio.sleep(context.request.display.interval)
        context.request.display.look()


async def _tell_limit(context: RunContext, grower: Grower) -> None:
    if not context.budget.is_bound:
        return
    why = ""
    while not why:
        await asyncio.sleep(LIMIT_CHECK)
        why = context.budget.reached()
    await asyncio.sleep(2 * LIMIT_CHECK)  # by then the calls that only waited have ended
    if flying := sum(grower.in_flight.values()):
        calls = "1 call in flight is ending" if flying == 1 else f"{flying} calls in flight are ending"
        context.say(f"limit reached ({why.partition(';')[0]}), {calls}")
