"""Rehearsal: the messages that a prompt file makes for one seed, without asking any model.

The job is grown by the scripted cast with the recipe's own prompts and settings, and the call in question is caught
on its way.
"""

import asyncio
import contextlib
from pathlib import Path

from msgspec import structs

from intersafe.errors import InputError, JobEnded
from intersafe.generate import grow, provenance_of
from intersafe.jobs import jobs
from intersafe.models import Call
from intersafe.models.cast import Company, JobCast
from intersafe.models.scripted import ScriptedModel
from intersafe.recipe import Cast, Member, Recipe, nearest
from intersafe.records import Job
from intersafe.runs import Entry
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
            await grow(job, JobCast(company, job), recipe, provenance_of(recipe, {}, {}, job))

    asyncio.run(talk())
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
