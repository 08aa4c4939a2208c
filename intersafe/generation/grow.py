"""The order of the stages: how a dialogue, a refusal sample and a benign twin are grown.

A *grower* takes jobs through the stages, in this process (`Stages`) or in others (`workers/driver.py`).
"""

import hashlib
from typing import Any, Protocol

import msgspec

from intersafe.generation.prepare import provenance_of
from intersafe.generation.scheduler import AnyJob, Outcome
from intersafe.models.cast import JobCast, SharedCast
from intersafe.recipe.sections import Recipe, Refusals
from intersafe.records import Dialogue, Job, Provenance, RefusalJob, RefusalSample, Turn
from intersafe.run.budget import Budget
from intersafe.run.manifest import Manifest
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
        _name(job, provenance, turns),
        job.index,
        job.key,
        job.seed,
        job.strategy,
        recipe.cast.victims[job.victim].identity,
        job.sample,
        plan,
        turns,
        tuple(conversation.backtracked),
        check,
        provenance,
        tuple(conversation.removed),
    )


async def grow_refusal(job: RefusalJob, cast: JobCast, refusals: Refusals, provenance: Provenance) -> RefusalSample:
    """Question, image, answer, check: one refusal sample, or `JobEnded` with the stage and the reason."""
    draft = await refuse(job, cast, refusals)
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


async def grow_twin(original: Dialogue, job: Job, cast: JobCast, recipe: Recipe, provenance: Provenance) -> Dialogue:
    """The benign twin of a dialogue, with aligned answers where the recipe wants them; or `JobEnded`."""
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


class Grower(Protocol):
    """Whatever takes a job through the stages of its line."""

    @property
    def in_flight(self) -> dict[str, int]:
        """Calls under way by role; the same object all along."""
        ...

    @property
    def waiting(self) -> dict[str, str]:
        """The services that are away, and why; the same object all along."""
        ...

    @property
    def budget(self) -> Budget | None:
        """What the run may use."""
        ...

    async def grow(self, line: str, job: AnyJob, original: Dialogue | None = None) -> Outcome:
        """The outcome of a job; `JobEnded` if there is none. `original` is the dialogue that a twin belongs to."""
        ...


class Stages:
    """The stages of every line, in this process."""

    def __init__(self, recipe: Recipe, manifest: Manifest, company: SharedCast) -> None:
        self.in_flight, self.waiting, self.budget = company.in_flight, company.hooks.outages, company.budget
        self._recipe, self._manifest, self._company = recipe, manifest, company
        self._provenances: dict[tuple[Any, ...], Provenance] = {}

    async def grow(self, line: str, job: AnyJob, original: Dialogue | None = None) -> Outcome:
        """The outcome of a job; `JobEnded` if there is none."""
        cast, provenance = JobCast(self._company, job, line or "dialogues"), self._provenance(line, job)
        if isinstance(job, RefusalJob):
            assert self._recipe.refusals
            return await grow_refusal(job, cast, self._recipe.refusals, provenance)
        if original is not None:
            return await grow_twin(original, job, cast, self._recipe, provenance)
        return await grow_dialogue(job, cast, self._recipe, provenance)

    def _provenance(self, line: str, job: AnyJob) -> Provenance:
        """The same object for all jobs that can have met the same models and prompts."""
        met = (job.seed.category, job.strategy, job.victim) if isinstance(job, Job) else (job.group,)
        place = (line, *met)
        if place not in self._provenances:
            self._provenances[place] = provenance_of(self._recipe, self._manifest, job, line)
        return self._provenances[place]
