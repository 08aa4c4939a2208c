"""Replay: what each role saw and said in a finished job, grown again from the journal. No model is asked."""

import contextlib
from collections.abc import Callable

import msgspec

from intersafe.errors import CallFailed, InputError, JobEnded
from intersafe.generation.job_kind import JobInputs
from intersafe.generation.kinds import DIALOGUES
from intersafe.generation.provenance import provenance_of
from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Painted, Reply
from intersafe.models.cast import JobCast, SharedCast
from intersafe.recipe.sections import Recipe
from intersafe.run.directory import Run
from intersafe.run.journal import Entry
from intersafe.storage.loops import run_anywhere
from intersafe.templates.load import load_prompts, needed_by

NOT_PAID = "not_in_journal"
"""The reason of a call that has no reply in the journal."""


class _Unasked:
    """A model whose replies are all in the journal."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    async def answer(self, call: Call) -> Reply:
        raise CallFailed(call.role, NOT_PAID)

    async def paint(self, call: Call) -> Painted:
        raise CallFailed(call.role, NOT_PAID)

    async def aclose(self) -> None:
        """Nothing to close."""


class _ReadOnly:
    """The journal of one job."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.take = entries.get

    def add(self, entry: Entry) -> None:
        """A replay writes nothing."""


class Replay:
    """Grows the jobs of a run again from its journal."""

    def __init__(self, run: Run) -> None:
        """`InputError` if the run's own recipe or prompts cannot be read."""
        self.run = run
        try:
            self.recipe = msgspec.convert(run.manifest.resolved, Recipe)
        except msgspec.ValidationError as error:
            at = run.path / "recipe.json"
            raise InputError(f"not a recipe: {error}", at=at, remedy="restore the file") from None
        self.prompts = load_prompts(run.path / "prompts", self.recipe.strategies, needed_by(self.recipe), alone=True)
        self.images = ImageStore(run.path / "images")

    def shared(self, entries: dict[str, Entry], observe: Callable[[Call, Reply], None] | None = None) -> SharedCast:
        """The cast with those entries as its only replies."""
        cast = self.recipe.cast
        models = {role: _Unasked(member.identity) for role, member in cast.members.items()}
        painter = _Unasked(cast.painter.identity) if cast.painter else None
        return SharedCast(
            cast=cast,
            models=models,
            prompts=self.prompts,
            journal=_ReadOnly(entries),
            observe=observe,
            painter=painter,
            images=self.images,
        )


def calls_of(run: Run, index: int) -> list[tuple[Call, Reply]]:
    """What each role saw and said while a dialogue was grown."""
    replay = Replay(run)
    job = next(DIALOGUES.jobs(JobInputs(replay.recipe, run.seeds()), index), None)
    if job is None:
        raise InputError(f"no job {index} in this run", at=run.path, remedy="restore seeds.jsonl")
    seen: list[tuple[Call, Reply]] = []
    shared = replay.shared(run.entries(index), lambda call, reply: seen.append((call, reply)))
    provenance = provenance_of(replay.recipe, run.manifest, DIALOGUES.met(replay.recipe, job))

    async def again() -> None:
        with contextlib.suppress(JobEnded):
            await DIALOGUES.grow(job, JobCast(shared, job), replay.recipe, provenance)

    run_anywhere(again)
    return seen
