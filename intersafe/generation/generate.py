"""Generate: a recipe becomes a run, and a run that is there goes on where it stopped.

What a job has paid for is in the journal; a job that is grown again after a kill takes its replies from there and goes
on at the call where it stopped. Dialogues and refusal samples grow at the same time; twins come after the dialogues
that they belong to.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import msgspec

from intersafe.engines.log import stderr_to
from intersafe.errors import BudgetReached, InputError, SeedsExhausted, StorageError
from intersafe.gates.chain import Chain
from intersafe.generation.grow import Grower, Stages
from intersafe.generation.jobs import job_count, jobs, refusal_job_count, refusal_jobs
from intersafe.generation.kinds import Dialogues, RefusalLine, Twins
from intersafe.generation.monitor import Watch
from intersafe.generation.prepare import Prepared, check_same, open_directory, prepare
from intersafe.generation.progress import Display, Progress
from intersafe.generation.scheduler import Conductor, Drought, Line
from intersafe.generation.shortfall import how_far, losses, refusals_to_change, short_cells, what_to_change
from intersafe.generation.workers.driver import Farm
from intersafe.generation.workers.ray_cluster import Cluster, check_recipe, joined
from intersafe.images.store import ImageStore
from intersafe.models.base import Hooks
from intersafe.models.cast import SharedCast
from intersafe.models.http.pending import CHECK_EVERY
from intersafe.models.open import clear_batches, open_models, open_painter
from intersafe.recipe.sections import Recipe
from intersafe.records import Dialogue, Ended
from intersafe.run.budget import Budget, check_prices, prices_of
from intersafe.run.directory import Run, run_path
from intersafe.run.funnel import Funnel, Summary
from intersafe.run.journal import Journal, ReuseIndex
from intersafe.run.lock import Lease, lock
from intersafe.run.manifest import differences
from intersafe.run.outcomes import LINES, align_outcomes
from intersafe.storage.files import write_whole
from intersafe.storage.jsonl import GroupWriter
from intersafe.storage.loops import run_anywhere, stopped_by_signals

BESIDE = 8
"""One job of another line is grown for so many dialogues."""
ENGINE_LOG = "engines.log"
"""What engines of this process say, in the run directory."""
FEWEST_TRIES = 20
"""Jobs of a line that are tried where their number is limited, however few outcomes it wants."""


def generate_dialogues(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    n: int | None = None,
    reuse: str | Path | None = None,
    display: Display | None = None,
    cluster: Cluster | None = None,
    tries: int | None = None,
    servers: contextlib.AbstractContextManager[None] | None = None,
) -> Run:
    """Grows dialogues until `n` are kept (default: the recipe's) and returns the run; goes on with a run that is there.

    Raises `InputError`, `SeedsExhausted`, `ServiceGone`, `BudgetReached` or `StorageError`; all but the first leave a
    run that the same call resumes, as does Ctrl-C (`KeyboardInterrupt`). Works inside a notebook's running event loop.
    With `tries` a line has that many jobs for each outcome that it wants, and no more. `servers` are entered for as
    long as models are asked: not at all where the input is wrong or the run is complete.
    """
    check_prices(recipe)
    if cluster:
        check_recipe(recipe)
    path = run_path(run if run is not None else recipe.name)
    prepared = prepare(recipe, path)
    older = run_path(reuse) if reuse is not None else None
    index = ReuseIndex(older) if older and not cluster else None  # workers have one of their own
    wanted = recipe.n if n is None else n
    if wanted < 1:
        raise InputError(f"n is {wanted}", remedy="ask for at least 1 dialogue")
    _check_images(path)
    if not _is_complete(path, prepared, wanted):
        if tries is None and path.name.endswith("-estimate"):
            _check_no_samples(path, prepared)
        check_same(path, prepared)  # before anything is touched there; once more when the run is this process's
        with servers or contextlib.nullcontext():
            run_anywhere(lambda: _session(prepared, path, wanted, older, index, display or Display(), cluster, tries))
    return Run(path)


def _check_images(path: Path) -> None:
    """`InputError` where images that the run's records name are gone: only a new run can have them painted again."""
    if not (path / "recipe.json").exists() or not (lost := Run(path).lost_images()):
        return
    raise InputError(
        f"{len(lost)} images that its records name are gone, the first is {lost[0]}",
        at=path / "images",
        remedy=f"restore the folder, or name a new --run with --reuse {path}: it pays for nothing but them",
    )


def _check_no_samples(path: Path, prepared: Prepared) -> None:
    if (path / "recipe.json").exists() and differences(Run(path).manifest, prepared.manifest):
        raise InputError(
            "holds the samples of an estimate, which have other quotas than a run",
            at=path,
            remedy=f"name another --run, with --reuse {path} to take over what was paid for",
        )


def _is_complete(path: Path, prepared: Prepared, n: int) -> bool:
    """True if the run holds exactly `n` dialogues made from the same things; `InputError` if it holds more."""
    if not (path / "recipe.json").exists():
        return False
    run = Run(path)
    summary = run.summary
    if summary is None or differences(run.manifest, prepared.manifest):
        return False
    if summary.funnel.accepted > n:
        raise _too_many(path, summary.funnel.accepted, n)
    return summary.complete and summary.funnel.accepted == n


def _too_many(path: Path, accepted: int, n: int) -> InputError:
    return InputError(f"holds {accepted} dialogues, more than --n {n}", at=path, remedy="name another --run")


async def _session(
    prepared: Prepared,
    path: Path,
    n: int,
    older: Path | None,
    index: ReuseIndex | None,
    display: Display,
    cluster: Cluster | None,
    tries: int | None,
) -> None:
    """One process's work on a run, in a cluster where one is asked for."""
    async with joined(cluster) as workers:
        await _work(prepared, path, n, older, index, display, workers, tries)


async def _work(
    prepared: Prepared,
    path: Path,
    n: int,
    older: Path | None,
    index: ReuseIndex | None,
    display: Display,
    workers: int,
    tries: int | None,
) -> None:
    """Opens the run, goes on where it stopped, grows, closes."""
    lease = lock(path)
    try:
        if lease.news:
            display.say(lease.news)
        with stopped_by_signals():
            if newer := open_directory(path, prepared):
                display.say(f"{path} was begun by other versions ({newer}): its old part stays as it is")
            # A library in this process writes pages where the display is.
            hushed = any(member.in_process for member in prepared.recipe.cast.members.values())
            with stderr_to(path / ENGINE_LOG) if hushed else contextlib.nullcontext():
                await _Session(prepared, path, n, display, workers, lease, tries).run(older, index)
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror}; mend it, then run the same command again"
        ) from None
    finally:
        lease.release()


@dataclass
class _Session:
    prepared: Prepared
    path: Path
    n: int
    display: Display
    workers: int
    """Those of a cluster; 0 where this process grows the jobs itself."""
    lease: Lease
    tries: int | None = None
    """Jobs for each outcome that a line wants; all that there are where it is None."""
    began: float = field(default_factory=time.monotonic)
    watch: Watch = field(init=False)

    async def run(self, older: Path | None, index: ReuseIndex | None) -> None:
        """Opens what the jobs share, works on every line, and writes the summary last."""
        recipe, path = self.prepared.recipe, self.path
        firsts = {line: align_outcomes(path, line) for line in LINES}
        images = ImageStore(path / "images")
        chain = Chain(recipe.gates, self.prepared.values, images.perceptual_hash, path)
        funnel, drought = _remember(Run(path), chain)
        if funnel.accepted > self.n:
            raise _too_many(path, funnel.accepted, self.n)
        (path / "summary.json").unlink(missing_ok=True)
        writer = GroupWriter(path, self.lease.check)
        journal = Journal(writer, prices=prices_of(recipe.cast))
        budget = Budget(recipe.limits, journal.roles, began=self.began)
        journal.load(path / "journal", firsts)
        try:
            async with self._grower(journal, budget, images, older, index) as grower:
                try:
                    async with self.watch:
                        done, funnels, short = await self._lines(
                            grower, journal, writer, chain, funnel, drought, firsts
                        )
                finally:
                    await writer.close()
        finally:
            self.display.look()
            self.display.end()
        scripted = any(model.spec.backend == "scripted" for model in recipe.cast.models.values())
        excluded = len(self.prepared.manifest.excluded)
        summary = Summary(
            self.n, not done, funnels[0], funnels[1], funnels[2], tuple(short), journal.roles, excluded, scripted
        )
        summary.prices, summary.engines = prices_of(recipe.cast), self.watch.figures
        clear_batches(path / "batches")
        write_whole(path / "summary.json", msgspec.json.format(msgspec.json.encode(summary)) + b"\n")
        if done:
            raise SeedsExhausted(done)

    @contextlib.asynccontextmanager
    async def _grower(
        self, journal: Journal, budget: Budget, images: ImageStore, older: Path | None, index: ReuseIndex | None
    ) -> AsyncIterator[Grower]:
        """What takes jobs through the stages: this process, or the workers of a cluster."""
        recipe, path, say = self.prepared.recipe, self.path, self.display.say
        self.watch = Watch(recipe, {})
        if self.workers:
            async with Farm(self.prepared, path, self.workers, journal, budget, images, say, older) as farm:
                yield farm
            return
        hooks = Hooks(say, may_send=budget.check if budget.is_bound else None)
        async with contextlib.AsyncExitStack() as closing:
            models = open_models(
                recipe.cast, recipe.limits, images, hooks, folder=path / "batches", engine_of=recipe.engine
            )
            for model in set(models.values()):
                closing.push_async_callback(model.aclose)
            self.watch = Watch(recipe, models)
            drawing = recipe.cast.painter
            painter = open_painter(drawing, recipe.limits, hooks) if drawing else None
            if painter:
                closing.push_async_callback(painter.aclose)
            older_images = ImageStore(older / "images") if older else None
            company = SharedCast(
                cast=recipe.cast,
                models=models,
                prompts=self.prepared.prompts,
                journal=journal,
                hooks=hooks,
                budget=budget,
                older=index,
                painter=painter,
                images=images,
                older_images=older_images,
            )
            yield Stages(recipe, self.prepared.manifest, company)

    async def _lines(
        self,
        grower: Grower,
        journal: Journal,
        writer: GroupWriter,
        chain: Chain,
        funnel: Funnel,
        drought: Drought,
        firsts: dict[str, int],
    ) -> tuple[str, list[Funnel], list[str]]:
        """Works on every line; returns what is missing, in words, the three funnels and the cells that stayed short."""
        recipe, seeds = self.prepared.recipe, self.prepared.seeds.seeds
        concurrency = recipe.limits.concurrency
        main = Dialogues(recipe, grower, chain, self.n)
        total = self._most(job_count(recipe, seeds), self.n)
        first = firsts[""]
        queue = islice(jobs(recipe, seeds, first), max(0, total - first))
        dialogues = Conductor(main, writer, queue, funnel, concurrency, first, total, drought)
        if self.n > total:
            self.display.say(
                f"{self.n:,} dialogues cannot come of {total:,} jobs: raise `samples`, or add seeds or strategies"
            )
        progress = Progress(self.n, total, funnel, journal, grower.in_flight, funnel.accepted)
        progress.budget, progress.waiting, progress.engines = grower.budget, grower.waiting, self.watch.figures
        working: list[Conductor] = [dialogues]
        funnels = [funnel, Funnel(), Funnel()]
        refusals: Conductor | None = None
        if recipe.refusals:
            refusals = self._refusals(grower, writer, firsts["refusals"], max(1, concurrency // BESIDE))
            working.append(refusals)
            funnels[1] = refusals.funnel
            progress.beside["refusals"] = (refusals.funnel, refusals.line.wanted)
        self.display.begin(progress)
        looking = asyncio.create_task(self._look(grower))
        try:
            async with grower.budget.lasting() if grower.budget else contextlib.nullcontext():
                await _together(working)
                if recipe.twins:
                    twins = self._twins(grower, writer, firsts["twins"], concurrency, funnel.accepted)
                    funnels[2] = twins.funnel
                    progress.beside["twins"] = (twins.funnel, twins.line.wanted)
                    await twins.work()
                    if not twins.filled:
                        got = f"{twins.funnel.accepted} of {twins.line.wanted} twins"
                        self.display.say(f"{got}: every dialogue was tried ({losses(twins.funnel.ended)})")
        except BudgetReached as reached:
            now = (grower.budget and grower.budget.reached()) or str(reached)
            raise BudgetReached(f"{self.path}: {how_far(progress)} kept; {now}") from None
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        writer.flush()
        short = short_cells(Run(self.path), chain, self.prepared, dialogues)
        for cell in short:
            self.display.say(f"below its quota: {cell}")
        missing = [] if dialogues.filled else [what_to_change(dialogues, short)]
        if refusals is not None and not refusals.filled:
            missing.append(refusals_to_change(Run(self.path), recipe, refusals))
        return "; and ".join(missing), funnels, short

    def _most(self, jobs: int, wanted: int) -> int:
        """How many of the jobs of a line may be tried."""
        return jobs if self.tries is None else min(jobs, max(FEWEST_TRIES, self.tries * wanted))

    def _refusals(self, grower: Grower, writer: GroupWriter, first: int, concurrency: int) -> Conductor:
        recipe, groups = self.prepared.recipe, self.prepared.groups
        assert recipe.refusals
        line, funnel = RefusalLine(recipe, grower), Funnel()
        run, last = Run(self.path), -1
        for outcome in run.outcomes("refusals"):
            funnel.count(outcome)
            if not isinstance(outcome, (Ended, Dialogue)):
                line.add(outcome)
                last = outcome.job
        drought = _drought_since(last, run.ended("refusals"))
        total = self._most(refusal_job_count(recipe, groups), line.wanted)
        queue = islice(refusal_jobs(recipe, groups, first), max(0, total - first))
        return Conductor(line, writer, queue, funnel, concurrency, first, total, drought)

    def _twins(self, grower: Grower, writer: GroupWriter, first: int, concurrency: int, dialogues: int) -> Conductor:
        """Of the dialogues that were kept, be they all that were asked for or not."""
        recipe, run = self.prepared.recipe, Run(self.path)
        assert recipe.twins
        writer.flush()
        funnel = Funnel()
        for outcome in run.outcomes("twins"):
            funnel.count(outcome)
        line: Line = Twins(recipe, grower, round(recipe.twins.ratio * dialogues))
        assert isinstance(line, Twins)
        queue = line.jobs(run.dialogues(), jobs(recipe, self.prepared.seeds.seeds), first)
        return Conductor(line, writer, queue, funnel, concurrency, first, dialogues)

    async def _look(self, grower: Grower) -> None:
        """Has the display look now and then, and says when a limit is reached and calls are still under way."""
        telling = asyncio.create_task(self._tell(grower))
        try:
            while True:
                await asyncio.sleep(self.display.interval)
                self.display.look()
        finally:
            telling.cancel()

    async def _tell(self, grower: Grower) -> None:
        if grower.budget is None or not grower.budget.is_bound:
            return
        why = ""
        while not why:
            await asyncio.sleep(CHECK_EVERY)
            why = grower.budget.reached()
        await asyncio.sleep(2 * CHECK_EVERY)  # by then the calls have ended that only waited
        if flying := sum(grower.in_flight.values()):
            calls = "1 call in flight is ending" if flying == 1 else f"{flying} calls in flight are ending"
            self.display.say(f"limit reached ({why.partition(';')[0]}), {calls}")


async def _together(conductors: list[Conductor]) -> None:
    """Works on several lines at once; what ends one of them ends all, but for a budget: each notices that itself."""
    tasks = [asyncio.create_task(conductor.work()) for conductor in conductors]
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


def _remember(run: Run, chain: Chain) -> tuple[Funnel, Drought]:
    """The funnel, the gates as they were when the last dialogue was decided, and what became of the jobs since."""
    funnel, last = Funnel(), -1
    for dialogue in run.dialogues():
        funnel.count(dialogue)
        chain.add(dialogue)
        last = dialogue.job
    for ended in run.ended():
        funnel.count(ended)
    return funnel, _drought_since(last, run.ended())


def _drought_since(last: int, ended: Iterable[Ended]) -> Drought:
    drought = Drought()
    for one in ended:
        if one.job > last:
            drought.count(one)
    return drought
