"""Where a job kind resumes: what the run has of it, what its gates remember, and which jobs remain."""

from itertools import islice

from intersafe.generation.context import RunContext
from intersafe.generation.job_kind import GateInputs, JobInputs, JobKind, KindGates, KindRun
from intersafe.generation.streak import LosingStreak
from intersafe.run.directory import Run
from intersafe.run.funnel import Funnel

FEWEST_TRIES = 20
"""Jobs of a kind that may be tried if their number is limited, however few outcomes it wants."""


def resume_kind(kind: JobKind, context: RunContext, dialogues: int) -> KindRun:
    """The kind in this run. `dialogues` is the number to grow, or of accepted ones for a kind that follows them."""
    recipe, run = context.recipe, Run(context.path)
    gates = kind.gates(GateInputs(recipe, context.prepared.values, context.images.perceptual_hash, context.path))
    funnel, streak = recall(run, kind, gates)
    prepared = context.prepared
    accepted = dialogues if kind.follows_dialogues else 0
    inputs = JobInputs(recipe, prepared.seeds.seeds, lambda: prepared.groups, run.dialogues, accepted)
    wanted, first = sum(kind.wanted(recipe, dialogues).values()), context.undecided[kind.name]
    jobs = kind.job_count(inputs)
    if context.request.tries is not None:
        jobs = min(jobs, max(FEWEST_TRIES, context.request.tries * wanted))
    queue = islice(kind.jobs(inputs, first), max(0, jobs - first))
    concurrency = kind.concurrency(recipe.limits.concurrency)
    return KindRun(
        kind=kind,
        inputs=inputs,
        wanted=wanted,
        gates=gates,
        funnel=funnel,
        streak=streak,
        first=first,
        jobs=jobs,
        queue=queue,
        concurrency=concurrency,
    )


def recall(run: Run, kind: JobKind, gates: KindGates) -> tuple[Funnel, LosingStreak]:
    """The funnel and the losing streak of the decided jobs; shows the accepted outcomes to the gates."""
    funnel, streak, last = Funnel(), LosingStreak(), -1
    for outcome in run.accepted(kind.name):
        funnel.count(outcome)
        gates.add(outcome)
        last = outcome.job
    for ended in run.ended(kind.name):
        funnel.count(ended)
        if ended.job > last:
            streak.count(ended)
    return funnel, streak
