"""The order of the stages: how a dialogue, a refusal sample and a benign twin are grown."""

import hashlib

import msgspec

from intersafe.models.cast import JobCast
from intersafe.recipe.sections import Recipe
from intersafe.records import Dialogue, Job, Provenance, RefusalJob, RefusalSample, Turn
from intersafe.run.kinds import TwinJob
from intersafe.stages.cleaning import clean
from intersafe.stages.conversation import Conversation
from intersafe.stages.conversing import converse
from intersafe.stages.judging import check_dialogue
from intersafe.stages.planning import make_plan
from intersafe.stages.refusing import refuse
from intersafe.stages.responding import respond
from intersafe.stages.twinning import make_twin


async def grow_dialogue(job: Job, cast: JobCast, recipe: Recipe, provenance: Provenance) -> Dialogue:
    """Plan, converse, clean, check, respond: one dialogue, or `JobEnded` with the stage and the reason."""
    plan = await make_plan(job, cast, recipe.plan)
    conversation = Conversation(job, plan, cast, recipe.converse, recipe.gates.rules)
    await converse(conversation)
    if recipe.clean:
        await clean(conversation, recipe.clean)
    check = await check_dialogue(conversation)
    if recipe.respond:
        await respond(conversation, recipe.respond)
    turns = tuple(conversation.turns)
    return Dialogue(
        id=_name(job, provenance, turns),
        job=job.index,
        key=job.key,
        seed=job.seed,
        strategy=job.strategy,
        victim=recipe.cast.victims[job.victim].identity,
        sample=job.sample,
        plan=plan,
        turns=turns,
        pruned=tuple(conversation.backtracked),
        check=check,
        provenance=provenance,
        removed=tuple(conversation.removed),
    )


async def grow_refusal(job: RefusalJob, cast: JobCast, recipe: Recipe, provenance: Provenance) -> RefusalSample:
    """Question, image, answer, check: one refusal sample, or `JobEnded` with the stage and the reason."""
    assert recipe.refusals
    draft = await refuse(job, cast, recipe.refusals)
    name = _digest(job.key, provenance.recipe, (draft.question, draft.answer))
    return RefusalSample(
        id=name,
        job=job.index,
        key=job.key,
        group=job.group,
        seed=job.seed,
        question=draft.question,
        answer=draft.answer,
        answered_by=draft.answered_by,
        check=draft.check,
        provenance=provenance,
        origins=draft.origins,
    )


async def grow_twin(job: TwinJob, cast: JobCast, recipe: Recipe, provenance: Provenance) -> Dialogue:
    """The benign twin of a dialogue, with aligned answers if the recipe wants them; or `JobEnded`."""
    original = job.original
    goal, conversation, check = await make_twin(original, job, cast, recipe.converse, recipe.gates.rules)
    if recipe.respond:
        await respond(conversation, recipe.respond)
    turns = tuple(conversation.turns)
    return msgspec.structs.replace(
        original,
        id=_name(job, provenance, turns),
        job=job.index,
        key=job.key,
        plan=conversation.plan,
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
