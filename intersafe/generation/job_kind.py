"""What a job kind is: the parts that each kind defines, and the values that these parts work on.

`kinds.py` has the table of all kinds. Dialogues come first in a run; other kinds are grown together with them, or
follow them: then job k belongs to the k-th accepted dialogue.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from intersafe.generation.streak import LosingStreak
from intersafe.models.cast import JobCast
from intersafe.recipe.sections import Recipe
from intersafe.records import Dialogue, Ended, Job, Provenance, Reason, Seed
from intersafe.run.directory import Run
from intersafe.run.funnel import Funnel
from intersafe.run.kinds import AnyJob, KindRecords, Outcome


class JobInputs(NamedTuple):
    """What the jobs of a run are made from."""

    recipe: Recipe
    seeds: Sequence[Seed]
    groups: Callable[[], Mapping[str, Sequence[Seed]]] = dict
    """The seeds of each refusal group."""
    dialogues: Callable[[], Iterator[Dialogue]] = lambda: iter(())
    """The accepted dialogues in job order."""
    accepted: int = 0
    """Their number, for a kind that follows the dialogues; 0 for the others, whose jobs do not depend on it."""


class GateInputs(NamedTuple):
    """What the gates of a kind are made from."""

    recipe: Recipe
    values: Mapping[str, Sequence[str]]
    """The values that the run's jobs can have on each axis of the quotas."""
    perceptual_hash: Callable[[str], int]
    """64 bits of an image, by reference."""
    root: Path
    """The run directory, for caches."""


class KindGates(Protocol):
    """The gates of a kind in one run, with what they remember; they are asked in job order."""

    def skip(self, job: Any, ahead: float = 0.0) -> Reason | None:
        """Why the job need not be grown, if `ahead` outcomes of other sorts are accepted before its turn.

        At its turn `ahead` is 0, and the answer decides whether the job was grown or not.
        """
        ...

    def check(self, outcome: Any) -> Reason | None:
        """The reason to reject the outcome, or None."""
        ...

    def add(self, outcome: Any) -> None:
        """Remembers an accepted outcome."""
        ...


class Met(NamedTuple):
    """The roles and prompt files that a job can meet: those that its record names."""

    roles: frozenset[str]
    prompts: frozenset[str]


class Shortfall(NamedTuple):
    """What a kind did not get, in words."""

    reason: str = ""
    """Why outcomes are missing and what to change; empty if none is missing."""
    cells: tuple[str, ...] = ()
    """The cells that stayed below their quota."""


SizeOf = Callable[[Any, str], float]
"""The size of a job for a role: what the role uses is estimated in proportion to it."""


def keep_ended(ended: Ended, gates: KindGates) -> Literal["keep"]:
    """No job that ended is grown again by `regate`."""
    return "keep"


def same_size(sampled: Sequence[Any]) -> SizeOf:
    """Every job uses the same, and none has a painted image."""
    return lambda job, role: float(role != "painter")


@dataclass(frozen=True)
class JobKind:
    """One kind of job. Everything else in `generation/` treats all kinds alike."""

    records: KindRecords
    """The types of its jobs and outcomes, and its files."""
    wanted: Callable[[Recipe, int], Mapping[str, int]]
    """Outcomes that a run of n dialogues wants, by group, or under "" without groups; empty if there are none."""
    job_count: Callable[[JobInputs], int]
    jobs: Callable[[JobInputs, int], Iterator[AnyJob]]
    """Its jobs in order, from a given place on."""
    grow: Callable[[Any, JobCast, Recipe, Provenance], Awaitable[Outcome]]
    """Takes a job through the stages; `JobEnded` if nothing comes of it."""
    gates: Callable[[GateInputs], KindGates]
    met: Callable[[Recipe, Any], Met]
    shortfall: "Callable[[KindRun, Run], Shortfall]"
    rehearsed: Callable[[Recipe, Job, Dialogue | None], tuple[Recipe, AnyJob]]
    """A recipe and a job that meet every prompt of the kind; with a dialogue if it follows one. For rehearsals."""
    group_of: Callable[[str], str] = lambda key: ""
    """The group of a job, by its key."""
    sizes: Callable[[Sequence[Any]], SizeOf] = same_size
    """How large jobs are for each role, given the sampled ones; for the estimate."""
    reconsider: Callable[[Ended, Any], Literal["keep", "grow", "stop"]] = keep_ended
    """What `regate` does with a job that ended, given the new gates: grow it again, or decide nothing from it on."""
    follows_dialogues: bool = False
    """True if its jobs belong to accepted dialogues, and so are grown after all dialogues."""
    divisor: int = 1
    """Its concurrency is `limits.concurrency` divided by this, and at least 1."""
    may_fall_short: bool = False
    """True if a run is complete once every job was tried, however few outcomes there are."""
    stops_if_all_fail: bool = False
    """True if the run stops, to be resumed, when all jobs failed and none was decided, however few they are."""
    compares_images: bool = False
    """True if its gates compare the images of an outcome."""

    @property
    def name(self) -> str:
        """As journals, files and commands write it."""
        return self.records.name

    def concurrency(self, limit: int) -> int:
        """Jobs grown at once, if `limit` dialogues are."""
        return max(1, limit // self.divisor)


@dataclass(frozen=True)
class KindRun:
    """One kind in one run: what it wants, what it has, and its remaining jobs."""

    kind: JobKind
    inputs: JobInputs
    wanted: int
    gates: KindGates
    funnel: Funnel
    streak: LosingStreak
    first: int
    """The first job that is not decided."""
    jobs: int
    """Number of all jobs, the decided ones included."""
    queue: Iterator[AnyJob]
    """The jobs from `first` on."""
    concurrency: int

    @property
    def filled(self) -> bool:
        """True once there are as many outcomes as wanted."""
        return self.funnel.accepted >= self.wanted
