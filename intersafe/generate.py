"""Generate: a recipe becomes a run, and a run that is there goes on where it stopped.

What a job has paid for is in the journal; a job that is grown again after a kill takes its replies from there and goes
on at the call where it stopped. Dialogues and refusal samples grow at the same time; twins come after the dialogues
that they belong to.
"""

import asyncio
import os
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from intersafe.conductor import STALLED, Conductor, Display, Line, Progress, stalled_after
from intersafe.errors import InputError, SeedsExhausted, StorageError
from intersafe.files import write_whole
from intersafe.gates.chain import Chain
from intersafe.images import ImageStore
from intersafe.jobs import job_count, jobs, refusal_job_count, refusal_jobs
from intersafe.journal import GroupWriter, Journal, ReuseIndex
from intersafe.lines import Dialogues, RefusalLine, Twins
from intersafe.loops import run_anywhere, stopped_by_signals
from intersafe.models import open_models, open_painter
from intersafe.models.cast import Company
from intersafe.prepare import Prepared, open_directory, prepare
from intersafe.records import Dialogue, Ended, Job
from intersafe.runs import LINES, Funnel, Run, Summary, align_outcomes, differences, lock, run_path
from intersafe.settings import Recipe

BESIDE = 8
"""One job of another line is grown for so many dialogues."""


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
    older = run_path(reuse) if reuse is not None else None
    index = ReuseIndex(older) if older else None
    wanted = recipe.n if n is None else n
    if wanted < 1:
        raise InputError(f"n is {wanted}", remedy="ask for at least 1 dialogue")
    if not _is_complete(path, prepared, wanted):
        run_anywhere(lambda: _session(prepared, path, wanted, older, index, display or Display()))
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
        raise _too_many(path, summary.funnel.accepted, n)
    return summary.complete and summary.funnel.accepted == n


def _too_many(path: Path, accepted: int, n: int) -> InputError:
    return InputError(f"holds {accepted} dialogues, more than --n {n}", at=path, remedy="name another --run")


async def _session(
    prepared: Prepared, path: Path, n: int, older: Path | None, index: ReuseIndex | None, display: Display
) -> None:
    """One process's work on a run: open, go on where it stopped, grow, close."""
    held = lock(path)
    try:
        with stopped_by_signals():
            if newer := open_directory(path, prepared):
                display.say(f"{path} was begun by other versions ({newer}): its old part stays as it is")
            await _Session(prepared, path, n, display).run(older, index)
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror}; mend it, then run the same command again"
        ) from None
    finally:
        os.close(held)


@dataclass
class _Session:
    prepared: Prepared
    path: Path
    n: int
    display: Display

    async def run(self, older: Path | None, index: ReuseIndex | None) -> None:
        """Opens what the jobs share, works on every line, and writes the summary last."""
        recipe, path = self.prepared.recipe, self.path
        firsts = {line: align_outcomes(path, line) for line in LINES}
        images = ImageStore(path / "images")
        chain = Chain(recipe.gates, self.prepared.values, images.perceptual_hash)
        funnel, stalled = _remember(Run(path), chain)
        if funnel.accepted > self.n:
            raise _too_many(path, funnel.accepted, self.n)
        (path / "summary.json").unlink(missing_ok=True)
        writer = GroupWriter(path)
        journal = Journal(writer)
        journal.load(path / "journal", firsts)
        say = self.display.say
        models = open_models(recipe.cast, recipe.limits, images, say)
        painter = open_painter(recipe.cast.painter, recipe.limits, say) if recipe.cast.painter else None
        older_images = ImageStore(older / "images") if older else None
        company = Company(
            recipe.cast, models, self.prepared.prompts, journal, index, None, painter, images, older_images
        )
        try:
            done, funnels, short = await self._lines(company, journal, writer, chain, funnel, stalled, firsts)
        finally:
            try:
                await writer.close()
            finally:
                closing = [model.aclose() for model in set(models.values())]
                await asyncio.gather(*closing, *([painter.aclose()] if painter else []))
                self.display.look()
                self.display.end()
        scripted = any(model.spec.backend == "scripted" for model in recipe.cast.models.values())
        excluded = len(self.prepared.seeds.excluded)
        summary = Summary(
            self.n, not done, funnels[0], funnels[1], funnels[2], tuple(short), journal.roles, excluded, scripted
        )
        write_whole(path / "summary.json", msgspec.json.format(msgspec.json.encode(summary)) + b"\n")
        if done:
            raise SeedsExhausted(done)

    async def _lines(
        self,
        company: Company,
        journal: Journal,
        writer: GroupWriter,
        chain: Chain,
        funnel: Funnel,
        stalled: int,
        firsts: dict[str, int],
    ) -> tuple[str, list[Funnel], list[str]]:
        """Works on every line; returns what is missing, in words, the three funnels and the cells that stayed short."""
        recipe, manifest, seeds = self.prepared.recipe, self.prepared.manifest, self.prepared.seeds.seeds
        concurrency = recipe.limits.concurrency
        main = Dialogues(recipe, manifest, company, chain, self.n)
        total = job_count(recipe, seeds)
        first = firsts[""]
        dialogues = Conductor(
            main, writer, jobs(recipe, seeds, first), funnel, concurrency, first, total, stalled=stalled
        )
        if self.n > total:
            self.display.say(
                f"{self.n:,} dialogues cannot come of {total:,} jobs: raise `samples`, or add seeds or strategies"
            )
        progress = Progress(self.n, total, funnel, journal, company.in_flight, funnel.accepted)
        working: list[Conductor] = [dialogues]
        funnels = [funnel, Funnel(), Funnel()]
        refusals: Conductor | None = None
        if recipe.refusals:
            refusals = self._refusals(company, writer, firsts["refusals"], max(1, concurrency // BESIDE))
            working.append(refusals)
            funnels[1] = refusals.funnel
            progress.beside["refusals"] = (refusals.funnel, refusals.line.wanted)
        self.display.begin(progress)
        looking = asyncio.create_task(self._look())
        try:
            await _together(working)
            if recipe.twins and dialogues.filled:
                twins = self._twins(company, writer, firsts["twins"], concurrency)
                funnels[2] = twins.funnel
                progress.beside["twins"] = (twins.funnel, twins.line.wanted)
                await twins.work()
                if not twins.filled:
                    got = f"{twins.funnel.accepted} of {twins.line.wanted} twins"
                    self.display.say(f"{got}: every dialogue was tried ({_losses(twins.funnel)})")
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        writer.flush()
        short = _short_cells(Run(self.path), recipe, chain, self.prepared)
        for cell in short:
            self.display.say(f"below its quota: {cell}")
        missing = "" if dialogues.filled else _what_to_change(dialogues, short)
        if not missing and refusals is not None and not refusals.filled:
            missing = _refusals_to_change(recipe, refusals)
        return missing, funnels, short

    def _refusals(self, company: Company, writer: GroupWriter, first: int, concurrency: int) -> Conductor:
        recipe, groups = self.prepared.recipe, self.prepared.groups
        assert recipe.refusals
        line, funnel = RefusalLine(recipe, self.prepared.manifest, company), Funnel()
        for outcome in Run(self.path).outcomes("refusals"):
            funnel.count(outcome)
            if not isinstance(outcome, (Ended, Dialogue)):
                line.add(outcome)
        queue, total = refusal_jobs(recipe, groups, first), refusal_job_count(recipe, groups)
        return Conductor(line, writer, queue, funnel, concurrency, first, total)

    def _twins(self, company: Company, writer: GroupWriter, first: int, concurrency: int) -> Conductor:
        recipe, run = self.prepared.recipe, Run(self.path)
        assert recipe.twins
        writer.flush()
        funnel = Funnel()
        for outcome in run.outcomes("twins"):
            funnel.count(outcome)
        line: Line = Twins(recipe, self.prepared.manifest, company, round(recipe.twins.ratio * self.n))
        assert isinstance(line, Twins)
        queue = line.jobs(run.dialogues(), jobs(recipe, self.prepared.seeds.seeds), first)
        return Conductor(line, writer, queue, funnel, concurrency, first, self.n)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self.display.interval)
            self.display.look()


async def _together(conductors: list[Conductor]) -> None:
    """Works on several lines at once; what ends one of them ends all."""
    tasks = [asyncio.create_task(conductor.work()) for conductor in conductors]
    try:
        for finished in asyncio.as_completed(tasks):
            await finished
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _remember(run: Run, chain: Chain) -> tuple[Funnel, int]:
    """The funnel, the gates as they were when the last dialogue was decided, and how many jobs quotas last stopped."""
    funnel, last = Funnel(), -1
    for outcome in run.outcomes():
        funnel.count(outcome)
        if isinstance(outcome, Dialogue):
            chain.add(outcome)
            last = outcome.job
    stalled = 0
    for ended in run.ended():
        if ended.job > last:
            stalled = stalled_after(stalled, ended)
    return funnel, stalled


# --- what is missing, in words ---------------------------------------------------------------------------------------


def _losses(funnel: Funnel) -> str:
    lost = sorted(funnel.ended.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{number} {place}" for place, number in lost) or "none was lost"


def _what_to_change(conductor: Conductor, short: list[str]) -> str:
    funnel = conductor.funnel
    kept = f"{funnel.accepted} of {conductor.line.wanted} dialogues were kept ({_losses(funnel)})"
    if conductor.stalled >= STALLED:
        cells = "; ".join(short[:3]) or "see the funnel"
        return (
            f"{kept}, and quotas turned down the last {STALLED} jobs that came so far: {cells}; "
            "mend what rejects there, or loosen `gates.coverage`, in a new --run with --reuse"
        )
    cells = f"; below quota: {'; '.join(short[:3])}" if short else ""
    return (
        f"all {conductor.jobs} jobs are used up and {kept}{cells}; "
        "raise `samples`, add seeds or strategies, or loosen the gate that rejects most, in a new --run"
    )


def _refusals_to_change(recipe: Recipe, conductor: Conductor) -> str:
    assert recipe.refusals
    groups = conductor.funnel.groups
    missing = [f"{name} {groups.get(name, 0)} of {g.n}" for name, g in recipe.refusals.groups.items()]
    return (
        f"all {conductor.jobs} jobs of the refusals are used up: {', '.join(missing)} ({_losses(conductor.funnel)}); "
        "raise `refusals.samples`, or add seeds to the group, in a new --run"
    )


def _short_cells(run: Run, recipe: Recipe, chain: Chain, prepared: Prepared) -> list[str]:
    """The cells below their quota, each with what was lost there."""
    if chain.quota is None or not (short := chain.quota.short()):
        return []
    ended = {e.job: f"{e.kind} {e.stage} {e.reason}" for e in run.ended()}
    lost: dict[tuple[str, str], Counter[str]] = {(axis, value): Counter() for axis, value, _, _ in short}
    grown = dict.fromkeys(lost, 0)
    seeds = prepared.seeds.seeds
    for job in islice(jobs(recipe, seeds), max(ended, default=-1) + 1):
        for cell in lost:
            if _value(job, cell[0], recipe) == cell[1]:
                grown[cell] += 1
                if job.index in ended:
                    lost[cell][ended[job.index]] += 1
    return [
        f"{axis} {value} {count} of {need} ({grown[axis, value]} jobs: "
        + (", ".join(f"{n} {why}" for why, n in lost[axis, value].most_common(3)) or "none was lost")
        + ")"
        for axis, value, count, need in short
    ]


def _value(job: Job, axis: str, recipe: Recipe) -> str:
    """Where a job stands on an axis of the quotas."""
    return {
        "category": job.seed.category,
        "strategy": job.strategy,
        "victim": recipe.cast.victims[job.victim].identity,
        "turns": str(job.turns),
    }[axis]
