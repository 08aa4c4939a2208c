"""Rehearsal: the messages that a prompt file makes for one seed, without asking any model.

They are caught while the scripted cast grows the job with the recipe's own prompts and settings.
"""

import contextlib
import tempfile
from pathlib import Path

from msgspec import structs

from intersafe.errors import InputError, JobEnded
from intersafe.generation.grow import grow_dialogue, grow_refusal, grow_twin
from intersafe.generation.jobs import jobs
from intersafe.images.store import ImageStore, read_image
from intersafe.models.base import Call
from intersafe.models.cast import JobCast, SharedCast
from intersafe.models.scripted.chat import ScriptedModel
from intersafe.models.scripted.painter import ScriptedPainter
from intersafe.recipe.sections import (
    Cast,
    CleanSettings,
    Member,
    Painter,
    Recipe,
    RefusalGroup,
    Refusals,
    RespondSettings,
)
from intersafe.records import Job, Provenance, RefusalJob
from intersafe.run.journal import Entry
from intersafe.seeds.load import Seeds, load_seeds
from intersafe.storage.loops import run_anywhere
from intersafe.templates.load import load_prompts
from intersafe.wording import nearest

_NOWHERE = Provenance({}, {}, {}, "", {}, scripted=True)
_ONCE = ("planner/decompose", "planner/rewrite", "planner/twin", "judge/dialogue")
"""Prompts that belong to the whole talk and to no turn."""


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
    seeds = load_seeds(recipe.seed_paths)
    job = _job(recipe, seeds, name, seed_id, turn)
    judge = "weak" if name == "planner/rewrite" else "flawless"
    cast = Cast(
        attacker=Member(model="scripted:flawless"),
        victims=tuple(Member(model="scripted:flawless") for _ in recipe.cast.victims),
        judge=Member(model=f"scripted:{judge}"),
        responder=Member(model="scripted:flawless"),
        painter=Painter(model="scripted:flawless") if recipe.cast.painter else None,
    )
    look = CleanSettings(distance=0, judge_distance=64) if name == "judge/images" else recipe.clean
    respond = recipe.respond or RespondSettings()
    recipe = structs.replace(recipe, cast=cast, clean=look, respond=respond)
    models = {role: ScriptedModel(member.spec.model) for role, member in cast.members.items()}
    calls: list[Call] = []

    async def talk() -> None:
        painter = ScriptedPainter("flawless", "96x96") if cast.painter else None
        company = SharedCast(
            cast=cast,
            models=models,
            prompts=prompts,
            journal=_Nothing(),
            observe=lambda c, _: calls.append(c),
            painter=painter,
            images=store,
        )
        with contextlib.suppress(JobEnded):
            await _grow(recipe, company, job, name)

    with tempfile.TemporaryDirectory() as folder:
        store = ImageStore(Path(folder))
        if job.seed.image:
            store.put(read_image(seeds.files[job.seed.image]))
        run_anywhere(talk)
    made = [call for call in calls if call.prompt == name]
    once = len(made) == 1 or name in _ONCE
    if not made or (turn > 1 and once) or turn > len(made):
        where = f" in turn {turn}" if turn > 1 else " about this seed by this recipe"
        raise InputError(f"{name} is not asked{where}", remedy="give another --seed or --turn")
    return made[turn - 1]


async def _grow(recipe: Recipe, company: SharedCast, job: Job, name: str) -> None:
    """Grows what the prompt belongs to: a refusal, or a dialogue and, if need be, its twin."""
    if name.startswith("refusal/") or name == "judge/refusal":
        group, refusals = _group_of(recipe, job)
        asked = RefusalJob(0, f"refusal/{group}/{job.seed.id}/0", job.seed, group, 0, job.random_seed)
        await grow_refusal(asked, JobCast(company, asked, "refusals"), refusals, _NOWHERE)
        return
    dialogue = await grow_dialogue(job, JobCast(company, job), recipe, _NOWHERE)
    if name == "planner/twin":
        await grow_twin(dialogue, job, JobCast(company, job, "twins"), recipe, _NOWHERE)


def _group_of(recipe: Recipe, job: Job) -> tuple[str, Refusals]:
    """The group of refusals that takes the seed, answered by the responder so that every prompt is asked."""
    refusals = recipe.refusals or Refusals(groups={"general": RefusalGroup(n=1, about="harmful requests of any kind")})
    groups = refusals.groups
    takes = [name for name, group in groups.items() if job.seed.category in group.categories]
    name = next(iter([*takes, *(name for name, group in groups.items() if not group.categories), *groups]))
    chosen = structs.replace(groups[name], answers="analysis", questions="written")
    return name, structs.replace(refusals, groups={name: chosen})


def _job(recipe: Recipe, seeds: Seeds, name: str, seed_id: str, turn: int) -> Job:
    """A job of that seed, with the strategy that the prompt is about, long enough to reach the turn."""
    if turn > 16:
        raise InputError("a dialogue has at most 16 turns", at="--turn", remedy="give a lower one")
    if seed_id not in {seed.id for seed in seeds.seeds}:
        raise InputError(
            f"no seed {seed_id!r}" + nearest(seed_id, [seed.id for seed in seeds.seeds]),
            at=", ".join(recipe.seeds),
            remedy="name one of that file",
        )
    if name.startswith("attacker/"):
        recipe = structs.replace(recipe, strategies=(name.removeprefix("attacker/"),))
    job = next(job for job in jobs(recipe, seeds.seeds) if job.seed.id == seed_id)
    turns = max(turn, round(recipe.turns.mean))
    wanted = {"painter/describe": turn, "judge/images": 2}.get(name, job.pictures)
    pictures = min(max(job.pictures, wanted), turns - (job.seed.image is not None)) if recipe.cast.painter else 0
    return structs.replace(job, turns=turns, pictures=pictures)
