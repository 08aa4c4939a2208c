"""The estimate: a few sample jobs of each kind, grown with the real cast, and what a run of n dialogues takes by them.

A ratio estimator: how many turns, pictures and victims the jobs of a run have is known beforehand, since jobs are pure
functions of the recipe; what a turn or a picture takes is taken from the samples (Cochran, Sampling Techniques, ch. 6).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import structs

from intersafe.errors import InputError, SeedsExhausted
from intersafe.generation.generate import BESIDE, generate_dialogues
from intersafe.generation.jobs import job_count, jobs
from intersafe.generation.prepare import prepare
from intersafe.generation.progress import Display
from intersafe.generation.scheduler import is_full
from intersafe.generation.shortfall import losses
from intersafe.recipe.sections import Cast, Member, Price, Recipe, TwinSettings
from intersafe.records import Ended, Job, Seed
from intersafe.run.budget import prices_of
from intersafe.run.directory import Run, run_path
from intersafe.run.journal import RoleTally, entries_of, tally
from intersafe.run.manifest import differences
from intersafe.run.outcomes import LINES

REFUSALS = 3
"""Samples of each refusal group."""
TWINS = 0.3
"""Twins for each sample dialogue, at least."""
LOOKED_AT = 20_000
"""Jobs that are looked at for their mean number of turns and pictures."""
TRIES = 10
"""Jobs that are tried for each sample that is wanted; a recipe that loses more is to be mended first."""
CPU = 0.0006
"""Seconds of one core that a call costs here, everything included (docs/performance.md)."""


class Amount(msgspec.Struct, frozen=True):
    """A total over the whole run, and one standard error of it; the latter is None where one sample tells no spread."""

    total: float
    error: float | None


class Sampled(msgspec.Struct, frozen=True):
    """One kind of job: what was tried, what was kept, and how many are needed."""

    tried: int
    kept: int
    wanted: int
    jobs: float
    """That it takes to keep as many as are wanted, if as many are turned down as among the samples."""


class Estimate(msgspec.Struct, frozen=True):
    """What a run will take."""

    n: int
    run: Path
    """Where the samples are."""
    recipe: Recipe
    sampled: dict[str, Sampled]
    """By kind: `dialogues`, `refusals <group>`, `twins`."""
    roles: dict[str, RoleTally]
    """Totals by role; `seconds` are those of answering, one call after the other."""
    calls: Amount
    tokens: Amount
    cost: Amount
    unpriced: tuple[str, ...]
    """Roles without a price."""
    times: dict[str, float]
    """Seconds that each bound alone would take; the largest is the run's."""
    most_jobs: int
    """Dialogue jobs that the recipe has."""

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return max(self.times.values())


def estimate_run(
    recipe: Recipe,
    *,
    n: int | None = None,
    samples: int = 8,
    run: str | Path | None = None,
    reuse: str | Path | None = None,
    display: Display | None = None,
) -> Estimate:
    """Grows the samples, unless they are there, and works out what `n` dialogues (default: the recipe's) take.

    Raises what `generate_dialogues` does; `SeedsExhausted` where the samples cannot be had at all.
    """
    wanted = recipe.n if n is None else n
    path = run_path(run if run is not None else f"{recipe.name}-estimate")
    _check_no_run(path, recipe)
    have = Run(path).funnel().accepted if (path / "recipe.json").exists() else 0
    least = max(min(samples, wanted), have)
    try:
        generate_dialogues(sample_recipe(recipe), run=path, n=least, reuse=reuse, display=display, tries=TRIES)
    except SeedsExhausted as error:
        (display or Display()).say(_what_was_kept(Run(path), recipe, error))
    return estimate_from(Run(path), recipe, wanted)


def _check_no_run(path: Path, recipe: Recipe) -> None:
    """`InputError` where the directory holds a run of the recipe itself and not of its samples."""
    if not (path / "recipe.json").exists() or recipe.outcome == sample_recipe(recipe).outcome:
        return
    manifest = Run(path).manifest
    if not differences(manifest, structs.replace(manifest, recipe=recipe.outcome)):
        raise InputError(
            "holds a run, and an estimate's samples have other quotas than a run",
            at=path,
            remedy=f"name another --run, with --reuse {path} to take over what was paid for",
        )


def _what_was_kept(run: Run, recipe: Recipe, error: SeedsExhausted) -> str:
    """The few samples that there are, in words; `SeedsExhausted` where there is none of some kind."""
    dialogues, refusals = run.funnel(), run.funnel("refusals")
    groups = list(recipe.refusals.groups) if recipe.refusals else []
    told = []
    for name, funnel in {"": dialogues, " of refusals": refusals}.items():
        if not funnel.ended:
            continue
        where = f"sample jobs{name}"
        if not funnel.accepted:
            raise SeedsExhausted(
                f"none of {funnel.jobs} {where} was kept ({losses(funnel.ended)}): nothing to estimate from; mend what "
                f"loses them, then estimate in a new --run with --reuse {run.path}, which takes over what was paid for"
            )
        told.append(f"only {funnel.accepted} of {funnel.jobs} {where} were kept, most lost to {losses(funnel.ended)}")
    if missing := [name for name in groups if not refusals.groups.get(name)]:
        raise SeedsExhausted(f"no sample of refusals {', '.join(missing)} was kept; {error}")
    return "; ".join(told)


def sample_recipe(recipe: Recipe) -> Recipe:
    """The recipe whose jobs ask what the recipe's ask, with few refusals, some twins and no quotas."""
    refusals, twins = recipe.refusals, recipe.twins
    if refusals:
        groups = {name: structs.replace(group, n=min(group.n, REFUSALS)) for name, group in refusals.groups.items()}
        refusals = structs.replace(refusals, groups=groups)
    if twins:
        twins = TwinSettings(ratio=max(twins.ratio, TWINS))
    gates = structs.replace(recipe.gates, coverage=None)
    return structs.replace(recipe, cast=_direct(recipe.cast), refusals=refusals, twins=twins, gates=gates)


def _direct(cast: Cast) -> Cast:
    """The cast asked at once: nobody waits a day for an estimate."""
    one = {role: structs.replace(member, batch=False) for role, member in cast.members.items()}
    victims = tuple(one.pop(f"victim:{number}") for number in range(len(cast.victims)))
    return structs.replace(cast, victims=victims, **one)


def estimate_from(run: Run, recipe: Recipe, n: int) -> Estimate:
    """What `n` dialogues take by the samples of that run; asks nobody."""
    prices, prepared = prices_of(recipe.cast), prepare(recipe)
    used = _used(run, prices)
    strata, picture = _strata(run, recipe, n, used), _picture(used.values())
    for kind, stratum in strata.items():
        if kind == "dialogues":
            pictures = _weigh_dialogues(stratum, recipe, lambda: jobs(recipe, prepared.seeds.seeds))
        else:
            pictures = _weigh_beside(stratum, prepared.groups.get(kind.removeprefix("refusals "), ()))
        if pictures and recipe.cast.painter and not any("painter" in job.used for job in stratum.jobs):
            _add(stratum.more.setdefault("painter", RoleTally()), picture, pictures)
    roles: dict[str, RoleTally] = {}
    by_kind: dict[str, float] = {}
    for kind, stratum in strata.items():
        found = stratum.totals()
        by_kind[kind] = sum(total.seconds for total in found.values())
        for role, total in found.items():
            _add(roles.setdefault(role, RoleTally()), total, 1.0)
    return Estimate(
        n=n,
        run=run.path,
        recipe=recipe,
        sampled={kind: stratum.sampled for kind, stratum in strata.items()},
        roles=roles,
        calls=_amount(strata.values(), lambda t: t.calls),
        tokens=_amount(strata.values(), lambda t: t.prompt_tokens + t.completion_tokens),
        cost=_amount(strata.values(), lambda t: t.cost),
        unpriced=tuple(role for role in sorted(roles) if role not in prices),
        times=_times(recipe, roles, by_kind),
        most_jobs=job_count(recipe, prepared.seeds.seeds),
    )


# --- the samples -----------------------------------------------------------------------------------------------------

Used = dict[str, RoleTally]
"""What one job used, by role."""


class _Job(NamedTuple):
    place: int
    key: str
    used: Used


@dataclass
class _Stratum:
    """The sample jobs of one kind."""

    sampled: Sampled
    jobs: list[_Job]
    weight: dict[str, float] = field(default_factory=dict)
    """By role: how much of the whole run what a sample job used stands for."""
    sizes: list[dict[str, float]] = field(default_factory=list)
    """For each job and role: the size in proportion to which it uses something."""
    more: Used = field(default_factory=dict)
    """What is known to come and was not among the samples."""

    def weigh(self, size: Callable[[_Job, str], float], whole: Callable[[str], float]) -> None:
        """A job's size by role, known for the samples and, as `whole`, for all jobs of the run together."""
        roles = sorted({role for job in self.jobs for role in job.used})
        self.sizes = [{role: size(job, role) for role in roles} for job in self.jobs]
        seen = {role: sum(sizes[role] for sizes in self.sizes) for role in roles}
        self.weight = {role: whole(role) / seen[role] if seen[role] else 0.0 for role in roles}

    def totals(self) -> Used:
        """What the whole run uses for jobs of this kind."""
        totals: Used = {role: structs.replace(part) for role, part in self.more.items()}
        for job in self.jobs:
            for role, part in job.used.items():
                _add(totals.setdefault(role, RoleTally()), part, self.weight[role])
        return totals

    def error_squared(self, value: Callable[[RoleTally], float]) -> float | None:
        """The square of the standard error of that total; None where one sample tells no spread."""
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


def _used(run: Run, prices: Mapping[str, Price]) -> dict[tuple[str, int], Used]:
    """What each job used, by line and number."""
    used: dict[tuple[str, int], Used] = {}
    for path in sorted((run.path / "journal").glob("*.jsonl")):
        for entry in entries_of(path):
            tally(used.setdefault((entry.line, entry.job), {}), entry, prices)
    return used


def _picture(jobs: Iterable[Used]) -> RoleTally:
    """What one call of the painter uses."""
    total, one = RoleTally(), RoleTally()
    for used in jobs:
        _add(total, used.get("painter", RoleTally()), 1.0)
    _add(one, total, 1 / max(1, total.calls))
    return one if total.calls else RoleTally(calls=1)


def _strata(run: Run, recipe: Recipe, n: int, used: Mapping[tuple[str, int], Used]) -> dict[str, _Stratum]:
    """The decided sample jobs that asked a model, by kind."""
    wanted = {"dialogues": n}
    wanted |= {f"refusals {name}": group.n for name, group in recipe.refusals.groups.items()} if recipe.refusals else {}
    wanted |= {"twins": round(recipe.twins.ratio * n)} if recipe.twins else {}
    tried: dict[str, list[_Job]] = {kind: [] for kind in wanted}
    kept = dict.fromkeys(wanted, 0)
    for line in LINES:
        for outcome in run.outcomes(line):
            kind = f"refusals {outcome.key.split('/')[1]}" if line == "refusals" else line or "dialogues"
            if (line, outcome.job) in used and not (isinstance(outcome, Ended) and is_full(outcome)):
                tried[kind].append(_Job(outcome.job, outcome.key, used[line, outcome.job]))
                kept[kind] += not isinstance(outcome, Ended)
    strata = {}
    for kind, sample in tried.items():
        # Twins that none was kept of: then every dialogue is tried.
        needed = wanted[kind] * len(sample) / kept[kind] if kept[kind] else float(n if sample else 0)
        sampled = Sampled(len(sample), kept[kind], wanted[kind], needed)
        strata[kind] = _Stratum(sampled, sorted(sample, key=lambda job: job.place))
    return strata


def _weigh_dialogues(stratum: _Stratum, recipe: Recipe, all_jobs: Callable[[], Iterator[Job]]) -> float:
    """Dialogues use in proportion to their turns, painters to the pictures, victims to the turns that are theirs.

    Returns the pictures of the whole run.
    """
    known = {job.index: job for job in islice(all_jobs(), stratum.jobs[-1].place + 1)}
    looked_at = list(islice(all_jobs(), max(1, min(LOOKED_AT, math.ceil(stratum.sampled.jobs)))))
    sampled = {known[job.place].victim for job in stratum.jobs}
    stands_for = {victim: victim if victim in sampled else min(sampled) for victim in range(len(recipe.cast.victims))}

    def size(job: Job, role: str) -> float:
        if role == "painter":
            return float(job.pictures)
        kind, _, number = role.partition(":")
        return float(job.turns) if kind != "victim" or stands_for[job.victim] == int(number) else 0.0

    def whole(role: str) -> float:
        return stratum.sampled.jobs * sum(size(job, role) for job in looked_at) / len(looked_at)

    stratum.weigh(lambda job, role: size(known[job.place], role), whole)
    return whole("painter")


def _weigh_beside(stratum: _Stratum, seeds: Sequence[Seed]) -> float:
    """Refusal samples and twins use as much each; but for a seed with an image of its own no refusal is painted.

    Returns the pictures of the whole run; twins have those of their dialogues.
    """
    bare = {seed.id for seed in seeds if seed.image is None}
    share = len(bare) / len(seeds) if seeds else 1.0

    def size(job: _Job, role: str) -> float:
        painted = not seeds or job.key.split("/", 2)[2].rpartition("/")[0] in bare
        return float(painted or role != "painter")

    stratum.weigh(size, lambda role: stratum.sampled.jobs * (share if role == "painter" else 1.0))
    return stratum.sampled.jobs * share if seeds else 0.0


def _add(total: RoleTally, part: RoleTally, weight: float) -> None:
    """Adds so many times a part."""
    for name in part.__struct_fields__:
        setattr(total, name, getattr(total, name) + weight * getattr(part, name))


def _amount(strata: Iterable[_Stratum], value: Callable[[RoleTally], float]) -> Amount:
    total, squares = 0.0, 0.0
    alone = False
    for stratum in strata:
        here = sum(value(used) for used in stratum.totals().values())
        total += here
        error = stratum.error_squared(value) if here else 0.0
        alone = alone or error is None
        squares += error or 0.0
    return Amount(total, None if alone else math.sqrt(squares))


# --- time ------------------------------------------------------------------------------------------------------------


def _times(recipe: Recipe, roles: Used, by_kind: Mapping[str, float]) -> dict[str, float]:
    """Seconds by what may hold a run up: each model with its limits, the dialogues at once, our own work."""
    times: dict[str, float] = {}
    cast = recipe.cast.models
    for spec in dict.fromkeys((isinstance(model, Member), model.model) for model in cast.values()):
        named = [r for r, model in cast.items() if (isinstance(model, Member), model.model) == spec and r in roles]
        direct = [role for role in named if not _is_batch(recipe, role)]
        if not direct:
            continue
        model = cast[direct[0]]
        where = " and ".join(direct)
        total = RoleTally()
        for role in direct:
            _add(total, roles[role], 1.0)
        at_once = min(cast[role].concurrency for role in direct)
        times[f"{where}, {at_once} calls at once"] = total.seconds / at_once
        if model.rpm:
            times[f"{where}, {model.rpm:,} requests a minute"] = 60 * total.calls / model.rpm
        if model.tpm:
            tokens = total.prompt_tokens + total.completion_tokens
            times[f"{where}, {model.tpm:,} tokens a minute"] = 60 * tokens / model.tpm
    at_once = recipe.limits.concurrency
    times[f"{at_once} dialogues at once"] = by_kind["dialogues"] / at_once + by_kind.get("twins", 0.0) / at_once
    beside = max(1, at_once // BESIDE)
    refusals = sum(seconds for kind, seconds in by_kind.items() if kind.startswith("refusals"))
    times |= {f"{beside} refusals at once": refusals / beside} if recipe.refusals else {}
    return times | {"one core's work for the calls": CPU * sum(total.calls for total in roles.values())}


def _is_batch(recipe: Recipe, role: str) -> bool:
    model = recipe.cast.models[role]
    return isinstance(model, Member) and model.batch
