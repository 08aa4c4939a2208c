"""Benign twins, a job kind: job k belongs to the k-th accepted dialogue."""

from collections.abc import Iterator

import msgspec

from intersafe.gates.rules import check_excluded, check_rules
from intersafe.generation.dialogues import conversation_met
from intersafe.generation.job_kind import GateInputs, JobInputs, Met
from intersafe.generation.jobs import jobs
from intersafe.recipe.sections import Recipe
from intersafe.records import Dialogue, Job, Reason
from intersafe.run.kinds import TwinJob


class TwinGates:
    """The rules alone: a twin has no quota, and may be similar to its dialogue."""

    def __init__(self, inputs: GateInputs) -> None:
        self._rules = inputs.recipe.gates.rules

    def skip(self, job: TwinJob, ahead: float = 0.0) -> Reason | None:
        """Every job is grown."""
        return None

    def check(self, twin: Dialogue) -> Reason | None:
        """The reason to reject the twin, or None."""
        return check_excluded(twin) or (check_rules(twin, self._rules) if self._rules else None)

    def add(self, twin: Dialogue) -> None:
        """Nothing to remember."""


def wanted(recipe: Recipe, n: int) -> dict[str, int]:
    """A share of the dialogues."""
    return {"": round(recipe.twins.ratio * n)} if recipe.twins else {}


def count(inputs: JobInputs) -> int:
    """One job per accepted dialogue."""
    return inputs.accepted


def all_jobs(inputs: JobInputs, first: int) -> Iterator[TwinJob]:
    """A job for each accepted dialogue, from place `first` on."""
    of_dialogues = jobs(inputs.recipe, inputs.seeds)
    for number, dialogue in enumerate(inputs.dialogues()):
        job = next(job for job in of_dialogues if job.index == dialogue.job)
        if number >= first:
            yield twin_job(job, dialogue, number)


def twin_job(job: Job, dialogue: Dialogue, number: int) -> TwinJob:
    """The job of the twin of a dialogue that `job` grew."""
    fields = msgspec.structs.asdict(job) | {"index": number, "key": f"{dialogue.key}/twin"}
    return TwinJob(**fields, original=dialogue)


def met(recipe: Recipe, job: Job) -> Met:
    """The roles and prompts that a job can meet."""
    roles, prompts = conversation_met(recipe, job)
    return Met(roles, prompts | {"planner/twin"})


def rehearsed(recipe: Recipe, job: Job, dialogue: Dialogue | None) -> tuple[Recipe, Job]:
    """The twin of the dialogue, or the dialogue's own job while it is not grown."""
    return recipe, twin_job(job, dialogue, 0) if dialogue else job
