"""Rehearsal: what each role would see, or saw, without asking any model.

Before a run: the messages that a prompt file makes for one seed, caught while the scripted cast grows the job with the
recipe's own prompts and settings. After it: all messages of a job, caught while it is grown again from the journal.
"""

import contextlib
from pathlib import Path

import msgspec
from msgspec import structs

from intersafe.errors import CallFailed, InputError, JobEnded
from intersafe.generate import grow, run_anywhere
from intersafe.jobs import jobs
from intersafe.journal import Entry
from intersafe.models import Call, Reply
from intersafe.models.cast import Company, JobCast
from intersafe.models.scripted import ScriptedModel
from intersafe.prepare import provenance_of
from intersafe.records import Job, Provenance
from intersafe.runs import Run
from intersafe.settings import Cast, Member, Recipe, nearest
from intersafe.stages.seeding import load_seeds
from intersafe.templates import load_prompts


class _Nothing:
    """A journal that keeps nothing."""

    def take(self, key: str) -> Entry | None:
        """Never has an entry."""

    def add(self, entry: Entry) -> None:
        """Forgets the entry."""


def rehearse(recipe: Recipe, name: str, seed_id: str, turn: int) -> Call:
    """The call that prompt `name` makes at `turn` (from 1) of a talk about that seed; `InputError` if there is none."""
    prompts = load_prompts(Path(recipe.prompts))
    if name not in prompts.prompts:
        raise InputError(
            f"no prompt {name!r}" + nearest(name, list(prompts.prompts)), remedy="`intersafe prompts list` shows all"
        )
    job = _job(recipe, name, seed_id, turn)
    judge = "weak" if name == "planner/rewrite" else "flawless"
    cast = Cast(
        attacker=Member(model="scripted:flawless"),
        victims=tuple(Member(model="scripted:flawless") for _ in recipe.cast.victims),
        judge=Member(model=f"scripted:{judge}"),
    )
    models = {role: ScriptedModel(member.spec.model) for role, member in cast.members.items()}
    calls: list[Call] = []
    company = Company(cast, models, prompts, _Nothing(), observe=lambda call, _: calls.append(call))

    async def talk() -> None:
        with contextlib.suppress(JobEnded):
            await grow(job, JobCast(company, job), recipe, Provenance({}, {}, {}, "", {}, scripted=True))

    run_anywhere(talk)
    made = [call for call in calls if call.prompt == name]
    once = len(made) == 1 or name in ("planner/decompose", "judge/dialogue", "planner/rewrite")
    if not made or (turn > 1 and once) or turn > len(made):
        raise InputError(f"{name} is not asked in turn {turn}", remedy="leave --turn out, or give a lower one")
    return made[turn - 1]


def _job(recipe: Recipe, name: str, seed_id: str, turn: int) -> Job:
    """A job of that seed, with the strategy that the prompt is about, long enough to reach the turn."""
    if turn > 16:
        raise InputError("a dialogue has at most 16 turns", at="--turn", remedy="give a lower one")
    seeds = load_seeds(recipe.seed_paths).seeds
    if seed_id not in {seed.id for seed in seeds}:
        raise InputError(
            f"no seed {seed_id!r}" + nearest(seed_id, [seed.id for seed in seeds]),
            at=", ".join(recipe.seeds),
            remedy="name one of that file",
        )
    if name.startswith("attacker/"):
        recipe = structs.replace(recipe, strategies=(name.removeprefix("attacker/"),))
    job = next(job for job in jobs(recipe, seeds) if job.seed.id == seed_id)
    return structs.replace(job, turns=max(turn, round(recipe.turns.mean)))


class _Unasked:
    """Stands for a model whose replies are all in the journal."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    async def answer(self, call: Call) -> Reply:
        raise CallFailed(call.role, "not_in_journal")

    async def aclose(self) -> None:
        """Nothing to let go of."""


class _Kept:
    """The journal of one job, read-only."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.take = entries.get

    def add(self, entry: Entry) -> None:
        """Nothing is written when looking back."""


def calls_of(run: Run, index: int) -> list[tuple[Call, Reply]]:
    """What each role saw and said while a job was grown: the job is grown again from the journal, asking nobody."""
    try:
        recipe = msgspec.convert(run.manifest.resolved, Recipe)
    except msgspec.ValidationError as error:
        raise InputError(f"not a recipe: {error}", at=run.path / "recipe.json", remedy="restore the file") from None
    job = next(jobs(recipe, run.seeds(), index), None)
    if job is None:
        raise InputError(f"no job {index} in this run", at=run.path, remedy="restore seeds.jsonl")
    models = {role: _Unasked(member.identity) for role, member in recipe.cast.members.items()}
    seen: list[tuple[Call, Reply]] = []
    prompts = load_prompts(run.path / "prompts", recipe.strategies)
    company = Company(
        recipe.cast, models, prompts, _Kept(run.entries(index)), observe=lambda call, reply: seen.append((call, reply))
    )
    provenance = provenance_of(recipe, run.manifest, job)

    async def again() -> None:
        with contextlib.suppress(JobEnded):
            await grow(job, JobCast(company, job), recipe, provenance)

    run_anywhere(again)
    return seen
