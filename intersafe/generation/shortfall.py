"""What a run did not get, in words: how far it is, what stayed short, where jobs were lost, and what helps.

A count alone helps nobody; each of these names the reasons that cost most and the change that would mend them.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import islice

from intersafe.gates.chain import Chain
from intersafe.gates.quota import value_of
from intersafe.generation.jobs import jobs
from intersafe.generation.prepare import Prepared
from intersafe.generation.progress import Progress
from intersafe.generation.scheduler import Conductor
from intersafe.recipe.sections import Recipe
from intersafe.records import Ended
from intersafe.run.directory import Run


def how_far(progress: Progress) -> str:
    """What every line has kept of what it wants."""
    beside = "".join(f", {f.accepted:,} of {wanted:,} {line}" for line, (f, wanted) in progress.beside.items())
    return f"{progress.funnel.accepted:,} of {progress.n:,} dialogues{beside}"


def losses(ended: Mapping[str, int]) -> str:
    """The four places where most jobs ended."""
    lost = sorted(ended.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{number} {place}" for place, number in lost) or "none was lost"


def _too_long(ended: Mapping[str, int]) -> bool:
    """True if most jobs that were lost did not fit into a model's context."""
    lost = sum(number for place, number in ended.items() if place.endswith(" too_long"))
    return 2 * lost > sum(ended.values())


def _place(ended: Ended) -> str:
    return f"{ended.kind} {ended.stage} {ended.reason}"


def what_to_change(conductor: Conductor, short: list[str]) -> str:
    """Why there are too few dialogues, and what to do; `short` as `short_cells` gives it."""
    funnel, drought = conductor.funnel, conductor.drought
    kept = f"{funnel.accepted} of {conductor.line.wanted} dialogues were kept ({losses(funnel.ended)})"
    cells = "; ".join(short[:3])
    mend = "raise `max_model_len` in `serve` or lower `turns.max`" if _too_long(funnel.ended) else ""
    if drought.lasting:
        where = f" that the quotas had room for were lost: {cells}" if cells else " were all lost"
        return (
            f"{kept}, and the last {drought.lost} jobs{where}; "
            f"{mend or 'mend what loses them, or loosen the gates'}, in a new --run with --reuse"
        )
    return (
        f"all {conductor.jobs} jobs are used up and {kept}" + (f"; below quota: {cells}" if cells else "") + "; "
        f"{mend or 'raise `samples`, add seeds or strategies, or loosen the gate that rejects most'}, in a new --run"
    )


def refusals_to_change(run: Run, recipe: Recipe, conductor: Conductor) -> str:
    """Why there are too few refusal samples, by group, and what to do."""
    assert recipe.refusals
    have, lost = conductor.funnel.groups, Counter[tuple[str, str]]()
    for ended in run.ended("refusals"):
        lost[ended.key.split("/")[1], _place(ended)] += 1
    missing = [
        f"{name} {have.get(name, 0)} of {group.n} ({losses({why: n for (g, why), n in lost.items() if g == name})})"
        for name, group in recipe.refusals.groups.items()
        if have.get(name, 0) < group.n
    ]
    if conductor.drought.lasting:
        return (
            f"refusals: {', '.join(missing)}, the last {conductor.drought.lost} jobs with room were lost; "
            "mend what loses them in a new --run with --reuse"
        )
    return (
        f"all {conductor.jobs} jobs of the refusals are used up: {', '.join(missing)}; "
        "raise `refusals.samples`, or add seeds to the group, in a new --run"
    )


def short_cells(run: Run, chain: Chain, prepared: Prepared, dialogues: Conductor) -> list[str]:
    """The cells below their quota, each with what was lost there; where dialogues are missing, those waited for too."""
    if chain.quota is None:
        return []
    short = chain.quota.short()
    named = {(axis, value) for axis, value, _, _ in short}
    short += [] if dialogues.filled else [cell for cell in chain.quota.awaited() if cell[:2] not in named]
    if not short:
        return []
    ended = {one.job: _place(one) for one in run.ended()}
    lost: dict[tuple[str, str], Counter[str]] = {(axis, value): Counter() for axis, value, _, _ in short}
    decided = dict.fromkeys(lost, 0)
    recipe, victims = prepared.recipe, prepared.values["victim"]
    for job in islice(jobs(recipe, prepared.seeds.seeds), dialogues.funnel.jobs):
        for axis, value in lost:
            if value_of(job, axis, victims) == value:
                decided[axis, value] += 1
                if job.index in ended:
                    lost[axis, value][ended[job.index]] += 1
    return [
        f"{axis} {value} {count} of {need} (of {decided[axis, value]} jobs: {losses(lost[axis, value])})"
        for axis, value, count, need in short
    ]
