"""Rehearsal: the messages that a prompt file makes for one seed. No model is asked.

The scripted cast grows the job with the recipe's own prompts and settings, and its calls are recorded.
"""

import contextlib
import tempfile
from pathlib import Path

from msgspec import structs

from intersafe.errors import InputError, JobEnded
from intersafe.generation.job_kind import JobInputs, JobKind
from intersafe.generation.kinds import DIALOGUES, KINDS
from intersafe.images.store import ImageStore, read_image
from intersafe.models.base import Call
from intersafe.models.cast import JobCast, SharedCast
from intersafe.models.scripted.chat import ScriptedModel
from intersafe.models.scripted.painter import ScriptedPainter
from intersafe.recipe.sections import Cast, CleanSettings, Member, Painter, Recipe, RespondSettings
from intersafe.records import Dialogue, Job, Provenance
from intersafe.run.journal import Entry
from intersafe.seeds.load import Seeds, load_seeds
from intersafe.storage.loops import run_anywhere
from intersafe.templates.load import load_prompts
from intersafe.wording import nearest

_NOWHERE = Provenance({}, {}, {}, "", {}, scripted=True)
_ONCE = ("planner/decompose", "planner/rewrite", "planner/twin", "judge/dialogue")
"""Prompts that are asked once per conversation and belong to no turn."""


class _Nothing:
    """A journal that stores nothing."""

    def take(self, key: str) -> Entry | None:
        """Never has an entry."""

    def add(self, entry: Entry) -> None:
        """Forgets the entry."""


def rehearse(recipe: Recipe, name: str, seed_id: str, turn: int) -> Call:
    """The call that prompt `name` makes at `turn` (from 1) of a dialogue about that seed; `InputError` if none does."""
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
    clean = CleanSettings(distance=0, judge_distance=64) if name == "judge/images" else recipe.clean
    respond = recipe.respond or RespondSettings()
    recipe = structs.replace(recipe, cast=cast, clean=clean, respond=respond)
    models = {role: ScriptedModel(member.spec.model) for role, member in cast.members.items()}
    calls: list[Call] = []

    async def grow() -> None:
        painter = ScriptedPainter("flawless", "96x96") if cast.painter else None
        shared = SharedCast(
            cast=cast,
            models=models,
            prompts=prompts,
            journal=_Nothing(),
            observe=lambda c, _: calls.append(c),
            painter=painter,
            images=store,
        )
        with contextlib.suppress(JobEnded):
            await _grow(recipe, shared, job, name)

    with tempfile.TemporaryDirectory() as folder:
        store = ImageStore(Path(folder))
        if job.seed.image:
            store.put(read_image(seeds.files[job.seed.image]))
        run_anywhere(grow)
    made = [call for call in calls if call.prompt == name]
    once = len(made) == 1 or name in _ONCE
    if not made or (turn > 1 and once) or turn > len(made):
        where = f" in turn {turn}" if turn > 1 else " about this seed by this recipe"
        raise InputError(f"{name} is not asked{where}", remedy="give another --seed or --turn")
    return made[turn - 1]


async def _grow(recipe: Recipe, shared: SharedCast, job: Job, prompt: str) -> None:
    """Grows a job of the first kind that meets the prompt, and first the dialogue that it belongs to, if any."""
    kind = _kind_of(recipe, job, prompt)
    dialogue = await DIALOGUES.grow(job, JobCast(shared, job), recipe, _NOWHERE) if kind.follows_dialogues else None
    assert dialogue is None or isinstance(dialogue, Dialogue)
    changed, own = kind.rehearsed(recipe, job, dialogue)
    await kind.grow(own, JobCast(shared, own, kind.name), changed, _NOWHERE)


def _kind_of(recipe: Recipe, job: Job, prompt: str) -> JobKind:
    """The first kind whose jobs meet the prompt; dialogues if none does."""
    for kind in KINDS.values():
        changed, own = kind.rehearsed(recipe, job, None)
        if prompt in kind.met(changed, own).prompts:
            return kind
    return DIALOGUES


def _job(recipe: Recipe, seeds: Seeds, name: str, seed_id: str, turn: int) -> Job:
    """A job of that seed, with the strategy of the prompt, long enough to reach the turn."""
    if turn > 16:
        raise InputError("a dialogue has at most 16 turns", at="--turn", remedy="give a lower one")
    if seed_id not in {seed.id for seed in seeds.seeds}:
        raise InputError(
            f"no seed {seed_id!r}" + nearest(seed_id, [seed.id for seed in seeds.seeds]),
            at=", ".join(recipe.seeds),
            remedy="name a seed of that file",
        )
    if name.startswith("attacker/"):
        recipe = structs.replace(recipe, strategies=(name.removeprefix("attacker/"),))
    job = next(job for job in DIALOGUES.jobs(JobInputs(recipe, seeds.seeds), 0) if job.seed.id == seed_id)
    assert isinstance(job, Job)
    turns = max(turn, round(recipe.turns.mean))
    wanted = {"painter/describe": turn, "judge/images": 2}.get(name, job.pictures)
    pictures = min(max(job.pictures, wanted), turns - (job.seed.image is not None)) if recipe.cast.painter else 0
    return structs.replace(job, turns=turns, pictures=pictures)
