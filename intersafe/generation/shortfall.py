"""What a run did not get, in words: how far it is, where jobs were lost, and what helps.

A count alone does not help. Each message names the reasons that cost most and the change that would fix them.
"""

from collections.abc import Mapping

from intersafe.generation.job_kind import KindRun, Shortfall
from intersafe.generation.progress import Progress
from intersafe.records import Ended
from intersafe.run.directory import Run

CONTEXT_REMEDY = "raise `max_model_len` in `serve` or lower `turns.max`"
"""What helps if most jobs were lost since they did not fit a model's context."""


def how_far(progress: Progress) -> str:
    """What every kind has of what it wants."""
    others = "".join(f", {f.accepted:,} of {wanted:,} {kind}" for kind, (f, wanted) in progress.others.items())
    return f"{progress.funnel.accepted:,} of {progress.n:,} dialogues{others}"


def all_tried(kind: KindRun, run: Run) -> Shortfall:
    """The shortfall of a kind that may fall short: how many outcomes it has, and what was lost."""
    if kind.filled:
        return Shortfall()
    have = f"{kind.funnel.accepted} of {kind.wanted} {kind.kind.name}"
    lost = losses(kind.funnel.ended)
    if kind.streak.lasting:
        return Shortfall(f"{have}, and the last {kind.streak.lost} jobs were all lost ({lost}); fix what loses them")
    return Shortfall(f"{have}: every job was tried ({lost})")


def losses(ended: Mapping[str, int]) -> str:
    """The four ends that most jobs met."""
    lost = sorted(ended.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{number} {end}" for end, number in lost) or "none was lost"


def too_long(ended: Mapping[str, int]) -> bool:
    """True if most jobs that were lost did not fit into a model's context."""
    lost = sum(number for end, number in ended.items() if end.endswith(" too_long"))
    return 2 * lost > sum(ended.values())


def end_of(ended: Ended) -> str:
    """How a job ended, as the funnel counts it."""
    return f"{ended.kind} {ended.stage} {ended.reason}"
