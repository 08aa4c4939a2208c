"""Strata: the sample jobs of one kind and group, and what all such jobs of a run use by them (a ratio estimator).

How many turns, pictures and victims the jobs of a run have is known beforehand, since jobs are pure functions of the
recipe. What a turn or a picture uses is taken from the samples (Cochran, Sampling Techniques, ch. 6).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import msgspec
from msgspec import structs

from intersafe.generation.job_kind import JobInputs, JobKind
from intersafe.generation.kinds import KINDS
from intersafe.generation.streak import is_full
from intersafe.recipe.sections import Price
from intersafe.records import Ended
from intersafe.run.directory import Run
from intersafe.run.journal import RoleTally, entries_of, tally
from intersafe.run.kinds import AnyJob

LOOKED_AT = 20_000
"""Jobs of a run whose mean size is computed."""

Used = dict[str, RoleTally]
"""What one job used, by role."""


class Amount(msgspec.Struct, frozen=True):
    """A total over the whole run, and one standard error of it; None if a single sample shows no spread."""

    total: float
    error: float | None


class Sampled(msgspec.Struct, frozen=True):
    """The samples of one stratum."""

    tried: int
    accepted: int
    wanted: int
    """Outcomes that the run needs."""
    jobs: float
    """Jobs that this takes if as many are rejected as among the samples."""


class SampleJob(NamedTuple):
    """A decided sample job that asked a model."""

    number: int
    used: Used


@dataclass
class Stratum:
    """The sample jobs of one kind and group."""

    kind: JobKind
    group: str
    sampled: Sampled
    jobs: list[SampleJob]
    weight: dict[str, float] = field(default_factory=dict)
    """By role: how much of the whole run one unit of a sample's use represents."""
    sizes: list[dict[str, float]] = field(default_factory=list)
    """By sample and role: the size in proportion to which the role is used."""
    more: Used = field(default_factory=dict)
    """What will be used and no sample used."""

    @property
    def name(self) -> str:
        """Kind and group, as `refusals health`."""
        return f"{self.kind.name} {self.group}".rstrip()

    def weigh(self, inputs: JobInputs) -> float:
        """Weighs the samples by the sizes of all jobs of the run; returns the pictures of the whole run."""
        last = self.jobs[-1].number if self.jobs else -1
        known = {job.index: job for job in islice(self.kind.jobs(inputs, 0), last + 1)}
        sampled = [known[job.number] for job in self.jobs]
        size = self.kind.sizes(sampled)
        looked_at = list(islice(self._all_jobs(inputs), max(1, min(LOOKED_AT, math.ceil(self.sampled.jobs)))))

        def whole(role: str) -> float:
            return self.sampled.jobs * sum(size(job, role) for job in looked_at) / max(1, len(looked_at))

        roles = sorted({role for job in self.jobs for role in job.used})
        self.sizes = [{role: size(job, role) for role in roles} for job in sampled]
        seen = {role: sum(sizes[role] for sizes in self.sizes) for role in roles}
        self.weight = {role: whole(role) / seen[role] if seen[role] else 0.0 for role in roles}
        return whole("painter")

    def _all_jobs(self, inputs: JobInputs) -> Iterator[AnyJob]:
        return (job for job in self.kind.jobs(inputs, 0) if self.kind.group_of(job.key) == self.group)

    def totals(self) -> Used:
        """What the whole run uses for the jobs of this stratum."""
        totals: Used = {role: structs.replace(part) for role, part in self.more.items()}
        for job in self.jobs:
            for role, part in job.used.items():
                add_weighted(totals.setdefault(role, RoleTally()), part, self.weight[role])
        return totals

    def error_squared(self, value: Callable[[RoleTally], float]) -> float | None:
        """The square of the standard error of that total; None if a single sample shows no spread."""
        count = len(self.jobs)
        if count < 2:
            return None
        values = [{role: value(used) for role, used in job.used.items()} for job in self.jobs]
        each: dict[str, float] = {}
        for role in self.weight:
            seen = sum(sizes[role] for sizes in self.sizes)
            each[role] = sum(used.get(role, 0.0) for used in values) / seen if seen else 0.0
        squares = 0.0
        for used, sizes in zip(values, self.sizes, strict=True):
            squares += sum(w * (used.get(role, 0.0) - each[role] * sizes[role]) for role, w in self.weight.items()) ** 2
        return squares * count / (count - 1)


def strata_of(run: Run, n: int, inputs: JobInputs, prices: Mapping[str, Price]) -> list[Stratum]:
    """The strata of a run of `n` dialogues, weighed by the samples in `run`."""
    used = _used(run, prices)
    picture, strata = _picture(used.values()), []
    for kind in KINDS.values():
        for group, wanted in kind.wanted(inputs.recipe, n).items():
            stratum = _stratum(kind, group, wanted, n, run, used)
            pictures = stratum.weigh(inputs)
            if pictures and inputs.recipe.cast.painter and not any("painter" in job.used for job in stratum.jobs):
                add_weighted(stratum.more.setdefault("painter", RoleTally()), picture, pictures)
            strata.append(stratum)
    return strata


def _stratum(kind: JobKind, group: str, wanted: int, n: int, run: Run, used: Mapping[tuple[str, int], Used]) -> Stratum:
    """The decided sample jobs of that kind and group that asked a model."""
    jobs, accepted = [], 0
    for outcome in run.outcomes(kind.name):
        is_skipped = isinstance(outcome, Ended) and is_full(outcome)
        if kind.group_of(outcome.key) == group and (kind.name, outcome.job) in used and not is_skipped:
            jobs.append(SampleJob(outcome.job, used[kind.name, outcome.job]))
            accepted += not isinstance(outcome, Ended)
    # With no accepted sample, every dialogue is tried.
    needed = wanted * len(jobs) / accepted if accepted else float(n if jobs else 0)
    jobs.sort(key=lambda job: job.number)
    return Stratum(kind, group, Sampled(len(jobs), accepted, wanted, needed), jobs)


def _used(run: Run, prices: Mapping[str, Price]) -> dict[tuple[str, int], Used]:
    """What each job used, by kind and number."""
    used: dict[tuple[str, int], Used] = {}
    for path in sorted((run.path / "journal").glob("*.jsonl")):
        for entry in entries_of(path):
            tally(used.setdefault((entry.kind, entry.job), {}), entry, prices)
    return used


def _picture(jobs: Iterable[Used]) -> RoleTally:
    """What one call of the painter uses."""
    total, one = RoleTally(), RoleTally()
    for used in jobs:
        add_weighted(total, used.get("painter", RoleTally()), 1.0)
    add_weighted(one, total, 1 / max(1, total.calls))
    return one if total.calls else RoleTally(calls=1)


def add_weighted(total: RoleTally, part: RoleTally, weight: float) -> None:
    """Adds `weight` times `part` to `total`."""
    for name in part.__struct_fields__:
        setattr(total, name, getattr(total, name) + weight * getattr(part, name))


def amount_of(strata: Iterable[Stratum], value: Callable[[RoleTally], float]) -> Amount:
    """The total over all strata, and its standard error."""
    total, squares = 0.0, 0.0
    has_single = False
    for stratum in strata:
        here = sum(value(used) for used in stratum.totals().values())
        total += here
        error = stratum.error_squared(value) if here else 0.0
        has_single = has_single or error is None
        squares += error or 0.0
    return Amount(total, None if has_single else math.sqrt(squares))
