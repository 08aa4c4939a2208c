"""Dialogues, the main job kind: its jobs, its gates, what its jobs can meet, and why a run has too few."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

from intersafe.gates.chain import Chain
from intersafe.gates.quota import value_of
from intersafe.generation.job_kind import GateInputs, JobInputs, KindRun, Met, Shortfall
from intersafe.generation.jobs import job_count, jobs
from intersafe.generation.shortfall import CONTEXT_REMEDY, end_of, losses, too_long
from intersafe.recipe.sections import Recipe
from intersafe.records import Dialogue, Ended, Job, Reason
from intersafe.run.directory import Run
from intersafe.taxonomy import BY_NAME

JUDGING = ("judge/turn", "judge/dialogue", "victim/system")
"""Prompts that every conversation meets."""


class DialogueGates:
    """All gates of the recipe; the quotas also say which jobs need not be grown."""

    def __init__(self, inputs: GateInputs) -> None:
        self.chain = Chain(inputs.recipe.gates, inputs.values, inputs.perceptual_hash, inputs.root)

    def skip(self, job: Job, ahead: float = 0.0) -> Reason | None:
        """The quota that would reject the job."""
        return self.chain.full(job, ahead)

    def check(self, dialogue: Dialogue) -> Reason | None:
        """The reason to reject the dialogue, or None."""
        return self.chain.check(dialogue)

    def add(self, dialogue: Dialogue) -> None:
        """Remembers an accepted dialogue."""
        self.chain.add(dialogue)


def wanted(recipe: Recipe, n: int) -> dict[str, int]:
    """As many as the run is asked for."""
    return {"": n}


def count(inputs: JobInputs) -> int:
    """Number of all jobs."""
    return job_count(inputs.recipe, inputs.seeds)


def all_jobs(inputs: JobInputs, first: int) -> Iterator[Job]:
    """The jobs in order, from place `first` on."""
    return jobs(inputs.recipe, inputs.seeds, first)


def conversation_met(recipe: Recipe, job: Job) -> Met:
    """What any job with a victim can meet, twins included."""
    prompts = {*JUDGING, f"judge/rubrics/{BY_NAME[job.seed.category].family}"}
    roles = {"attacker", "judge", "second_judge", f"victim:{job.victim}"}
    if recipe.respond:
        roles, prompts = roles | {"responder"}, prompts | {"responder/aligned", "judge/aligned"}
    return Met(frozenset(roles), frozenset(prompts))


def met(recipe: Recipe, job: Job) -> Met:
    """The roles and prompts that a job can meet."""
    roles, prompts = conversation_met(recipe, job)
    prompts |= {"planner/decompose", "planner/rewrite", "judge/step", f"attacker/{job.strategy}"}
    if recipe.cast.painter:
        roles, prompts = roles | {"painter"}, prompts | {"painter/describe"}
        if recipe.clean and recipe.clean.judge_distance is not None:
            prompts |= {"judge/images"}
    return Met(roles, prompts)


def rehearsed(recipe: Recipe, job: Job, dialogue: Dialogue | None) -> tuple[Recipe, Job]:
    """The recipe and the job themselves."""
    return recipe, job


def sizes(sampled: Sequence[Job]) -> Callable[[Job, str], float]:
    """A job's size is its number of pictures for the painter, and its number of turns for the others.

    A victim has the turns of its own jobs; a victim that no sample met counts as the first that was sampled.
    """
    victims = {job.victim for job in sampled}

    def size(job: Job, role: str) -> float:
        if role == "painter":
            return float(job.pictures)
        name, _, number = role.partition(":")
        counted_as = job.victim if job.victim in victims else min(victims)
        return float(job.turns) if name != "victim" or counted_as == int(number) else 0.0

    return size


def reconsider(ended: Ended, gates: DialogueGates) -> Literal["keep", "grow"]:
    """What the old gates rejected is grown again, as far as it ever was: a quota may have skipped the job."""
    return "grow" if ended.stage == "gates" else "keep"


# --- too few ---------------------------------------------------------------------------------------------------------


def shortfall(dialogues: KindRun, run: Run) -> Shortfall:
    """The cells below their quota, and why there are too few dialogues."""
    cells = _short_cells(dialogues, run)
    return Shortfall("" if dialogues.filled else _what_to_change(dialogues, cells), tuple(cells))


def _what_to_change(dialogues: KindRun, short: Sequence[str]) -> str:
    funnel, streak = dialogues.funnel, dialogues.streak
    accepted = f"{funnel.accepted} of {dialogues.wanted} dialogues were accepted ({losses(funnel.ended)})"
    cells = "; ".join(short[:3])
    remedy = CONTEXT_REMEDY if too_long(funnel.ended) else ""
    if streak.lasting:
        where = f" that the quotas had room for were lost: {cells}" if cells else " were all lost"
        return (
            f"{accepted}, and the last {streak.lost} jobs{where}; "
            f"{remedy or 'fix what loses them, or loosen the gates'}, in a new --run with --reuse"
        )
    return (
        f"all {dialogues.jobs} jobs are used up and {accepted}" + (f"; below quota: {cells}" if cells else "") + "; "
        f"{remedy or 'raise `samples`, add seeds or strategies, or loosen the gate that rejects most'}, in a new --run"
    )


def _short_cells(dialogues: KindRun, run: Run) -> list[str]:
    """The cells below their quota, each with what was lost there; with too few dialogues, awaited cells too."""
    assert isinstance(dialogues.gates, DialogueGates)
    quota = dialogues.gates.chain.quota
    if quota is None:
        return []
    short = quota.short()
    named = {(axis, value) for axis, value, _, _ in short}
    short += [] if dialogues.filled else [cell for cell in quota.awaited() if cell[:2] not in named]
    if not short:
        return []
    lost, decided = _lost_by_cell(dialogues, run, [(axis, value) for axis, value, _, _ in short])
    return [
        f"{axis} {value} {have} of {need} (of {decided[axis, value]} jobs: {losses(lost[axis, value])})"
        for axis, value, have, need in short
    ]


_Cell = tuple[str, str]


def _lost_by_cell(
    dialogues: KindRun, run: Run, cells: Sequence[_Cell]
) -> tuple[Mapping[_Cell, Counter[str]], Mapping[_Cell, int]]:
    """How the jobs of each cell ended, and how many were decided."""
    ended = {one.job: end_of(one) for one in run.ended()}
    lost: dict[_Cell, Counter[str]] = {cell: Counter() for cell in cells}
    decided = dict.fromkeys(lost, 0)
    victims = [victim.identity for victim in dialogues.inputs.recipe.cast.victims]
    for job in islice(all_jobs(dialogues.inputs, 0), dialogues.funnel.jobs):
        for axis, value in lost:
            if value_of(job, axis, victims) == value:
                decided[axis, value] += 1
                if job.index in ended:
                    lost[axis, value][ended[job.index]] += 1
    return lost, decided
