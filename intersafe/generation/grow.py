"""The order of the stages: how a dialogue, a refusal sample and a benign twin are grown."""

import hashlib
from typing import Any

import msgspec

from intersafe.models.cast import JobCast
from intersafe.recipe.sections import Recipe
from intersafe.records import Check, Dialogue, Job, Provenance, RefusalJob, RefusalSample, Turn, said_in
from intersafe.run.kinds import TwinJob
from intersafe.stages.cleaning import clean
from intersafe.stages.conversing import converse
from intersafe.stages.judging import check_dialogue
from intersafe.stages.planning import make_plan
from intersafe.stages.refusing import refuse
from intersafe.stages.responding import respond
from intersafe.stages.twinning import make_twin


async def grow_dialogue(job: Job, cast: JobCast, recipe: Recipe, provenance: Provenance) -> Dialogue:
    """Plan, converse, clean, check, respond: one dialogue, or `JobEnded` with the stage and the reason."""
    rules = recipe.gates.rules
    plan = await make_plan(job, cast, recipe.plan)
    turns, pruned = await converse(job, plan, cast, recipe.converse, rules)
    removed: tuple[Any, ...] = ()
    if recipe.clean:
        turns, removed = await clean(job, plan, cast, turns, recipe.clean, recipe.converse, rules)
    check: Check = await check_dialogue(job, cast, turns, recipe.converse.tries)
    if recipe.respond:
        taken_back = said_in([pruned_turn.turn for pruned_turn in pruned])
        turns = await respond(job, cast, turns, recipe.respond, said=taken_back)
    return Dialogue(
        _name(job, provenance, turns),
        job.index,
        job.key,
        job.seed,
        job.strategy,
        recipe.cast.victims[job.victim].identity,
        job.sample,
        plan,
        turns,
        pruned,
        check,
        provenance,
        removed,
    )


async def grow_refusal(job: RefusalJob, cast: JobCast, recipe: Recipe, provenance: Provenance) -> RefusalSample:
    """Question, image, answer, check: one refusal sample, or `JobEnded` with the stage and the reason."""
    assert recipe.refusals
    draft = await refuse(job, cast, recipe.refusals)
    name = _digest(job.key, provenance.recipe, (draft.question, draft.answer))
    return RefusalSample(
        name,
        job.index,
        job.key,
        job.group,
        job.seed,
        draft.question,
        draft.answer,
        draft.answered_by,
        draft.check,
        provenance,
        draft.origins,
    )


async def grow_twin(job: TwinJob, cast: JobCast, recipe: Recipe, provenance: Provenance) -> Dialogue:
    """The benign twin of a dialogue, with aligned answers if the recipe wants them; or `JobEnded`."""
    original = job.original
    goal, plan, turns, check = await make_twin(original, job, cast, recipe.converse, recipe.gates.rules)
    if recipe.respond:
        turns = await respond(job, cast, turns, recipe.respond)
    return msgspec.structs.replace(
        original,
        id=_name(job, provenance, turns),
        job=job.index,
        key=job.key,
        plan=plan,
        turns=turns,
        pruned=(),
        check=check,
        provenance=provenance,
        removed=(),
        twin_of=original.id,
        goal=goal,
    )


def _name(job: Job, provenance: Provenance, turns: tuple[Turn, ...]) -> str:
    return _digest(job.key, provenance.recipe, tuple(m.text for turn in turns for m in (turn.user, turn.reply)))


def _digest(key: str, recipe: str, texts: tuple[str, ...]) -> str:
    return hashlib.blake2b(msgspec.json.encode((key, recipe, texts)), digest_size=8).hexdigest()
