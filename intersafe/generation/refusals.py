"""Refusal samples (refusal VQA), a job kind: its jobs by group, its gates, and why a group has too few."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from msgspec import structs

from intersafe.gates.refusals import DuplicateQuestions, check_refusal
from intersafe.generation.job_kind import GateInputs, JobInputs, KindRun, Met, Shortfall
from intersafe.generation.jobs import refusal_job_count, refusal_jobs
from intersafe.generation.shortfall import end_of, losses
from intersafe.recipe.sections import Recipe, RefusalGroup, Refusals
from intersafe.records import Dialogue, Ended, Job, Reason, RefusalJob, RefusalSample
from intersafe.run.directory import Run

_COMPLETE = Reason("group_complete")


class RefusalGates:
    """The size of each group, the rules, and the near-duplicates."""

    def __init__(self, inputs: GateInputs) -> None:
        assert inputs.recipe.refusals
        self._refusals = inputs.recipe.refusals
        self._counts: Counter[str] = Counter()
        duplicates = self._refusals.duplicates
        self._duplicates = DuplicateQuestions(duplicates) if duplicates else None

    def has_room(self, group: str) -> bool:
        """True while the group wants more samples."""
        return self._counts[group] < self._refusals.groups[group].n

    def skip(self, job: RefusalJob, ahead: float = 0.0) -> Reason | None:
        """A job of a complete group need not be grown."""
        return None if self.has_room(job.group) else _COMPLETE

    def check(self, sample: RefusalSample) -> Reason | None:
        """The reason to reject the sample, or None."""
        reason = (None if self.has_room(sample.group) else _COMPLETE) or check_refusal(sample)
        return reason or (self._duplicates.check(sample) if self._duplicates else None)

    def add(self, sample: RefusalSample) -> None:
        """Counts the sample in its group and remembers its question."""
        self._counts[sample.group] += 1
        if self._duplicates:
            self._duplicates.add(sample)


def wanted(recipe: Recipe, n: int) -> dict[str, int]:
    """The sizes of the recipe's groups, whatever the number of dialogues."""
    return {name: group.n for name, group in recipe.refusals.groups.items()} if recipe.refusals else {}


def count(inputs: JobInputs) -> int:
    """Number of all jobs."""
    return refusal_job_count(inputs.recipe, inputs.groups())


def all_jobs(inputs: JobInputs, first: int) -> Iterator[RefusalJob]:
    """The jobs in order, from place `first` on."""
    yield from refusal_jobs(inputs.recipe, inputs.groups(), first)  # reads the groups once a job is asked for


def group_of(key: str) -> str:
    """The group in the key of a job."""
    return key.split("/")[1]


def met(recipe: Recipe, job: RefusalJob) -> Met:
    """The roles and prompts that a job can meet."""
    assert recipe.refusals
    roles, prompts = {"attacker", "judge", "second_judge"}, {"refusal/question", "judge/refusal"}
    if recipe.cast.painter:
        roles, prompts = roles | {"painter"}, prompts | {"painter/describe"}
    if recipe.refusals.groups[job.group].answers == "analysis":
        roles, prompts = roles | {"responder"}, prompts | {"refusal/answer"}
    else:
        prompts |= {"refusal/templates"}
    return Met(frozenset(roles), frozenset(prompts))


def rehearsed(recipe: Recipe, job: Job, dialogue: Dialogue | None) -> tuple[Recipe, RefusalJob]:
    """A job of the group that takes the seed, with a question and an answer that models write."""
    refusals = recipe.refusals or Refusals(groups={"general": RefusalGroup(n=1, about="harmful requests of any kind")})
    groups = refusals.groups
    takes = [name for name, group in groups.items() if job.seed.category in group.categories]
    name = next(iter([*takes, *(name for name, group in groups.items() if not group.categories), *groups]))
    written = structs.replace(groups[name], answers="analysis", questions="written")
    recipe = structs.replace(recipe, refusals=structs.replace(refusals, groups={name: written}))
    return recipe, RefusalJob(0, f"refusal/{name}/{job.seed.id}/0", job.seed, name, 0, job.random_seed)


def sizes(sampled: Sequence[RefusalJob]) -> Callable[[RefusalJob, str], float]:
    """Every sample uses the same, except that a seed with an image of its own needs no painter."""
    return lambda job, role: float(role != "painter" or job.seed.image is None)


def reconsider(ended: Ended, gates: RefusalGates) -> Literal["keep", "grow", "stop"]:
    """Near-duplicates are grown again. A group that is short again stops at its first job that was skipped."""
    if not gates.has_room(group_of(ended.key)):
        return "keep"
    if ended.reason == "group_complete":
        return "stop"
    return "grow" if (ended.stage, ended.reason) == ("gates", "near_duplicate") else "keep"


def shortfall(refusals: KindRun, run: Run) -> Shortfall:
    """The groups that have too few samples, and what to change."""
    if refusals.filled:
        return Shortfall()
    have, lost = refusals.funnel.groups, Counter[tuple[str, str]]()
    for ended in run.ended(refusals.kind.name):
        lost[group_of(ended.key), end_of(ended)] += 1
    missing = [
        f"{name} {have.get(name, 0)} of {n} ({losses({why: n for (g, why), n in lost.items() if g == name})})"
        for name, n in wanted(refusals.inputs.recipe, 0).items()
        if have.get(name, 0) < n
    ]
    if refusals.streak.lasting:
        return Shortfall(
            f"refusals: {', '.join(missing)}, the last {refusals.streak.lost} jobs with room were lost; "
            "fix what loses them, in a new --run with --reuse"
        )
    return Shortfall(
        f"all {refusals.jobs} jobs of the refusals are used up: {', '.join(missing)}; "
        "raise `refusals.samples`, or add seeds to the group, in a new --run"
    )
