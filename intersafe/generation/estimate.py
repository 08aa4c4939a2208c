"""The estimate: grows a few sample jobs of each kind with the real cast, and predicts what n dialogues take."""

from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import structs

from intersafe.errors import SeedsExhausted
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.job_kind import JobInputs
from intersafe.generation.kinds import DIALOGUES, KINDS
from intersafe.generation.prepare import prepare
from intersafe.generation.progress import Display
from intersafe.generation.shortfall import losses
from intersafe.generation.strata import Amount, Sampled, Stratum, Used, add_weighted, amount_of, strata_of
from intersafe.recipe.sections import Cast, Member, Recipe, TwinSettings
from intersafe.run.budget import prices_of
from intersafe.run.directory import Run, run_path
from intersafe.run.journal import RoleTally
from intersafe.run.outcomes import count_accepted

REFUSALS = 3
"""Samples of each refusal group."""
TWINS = 0.3
"""Twins per sample dialogue, at least."""
TRIES = 10
"""Jobs that are tried per wanted sample; a recipe that loses more needs fixing first."""
CPU = 0.0006
"""Seconds of one core per call, everything included (docs/performance.md)."""


class Estimate(msgspec.Struct, frozen=True):
    """What a run will take."""

    n: int
    run: Path
    """Where the samples are."""
    recipe: Recipe
    sampled: dict[str, Sampled]
    """By stratum: `dialogues`, `refusals <group>`, `twins`."""
    roles: dict[str, RoleTally]
    """Totals by role; `seconds` are the sum of the answer times."""
    calls: Amount
    tokens: Amount
    cost: Amount
    unpriced: tuple[str, ...]
    """Roles without a price."""
    times: dict[str, float]
    """Seconds that each bound alone would take; the largest bounds the run."""
    most_jobs: int
    """Number of dialogue jobs that the recipe has."""

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
    """Grows the samples that are missing, and predicts what `n` dialogues (default: the recipe's) take.

    Raises what `generate_dialogues` does; `SeedsExhausted` if no sample of some kind is accepted.
    """
    wanted = recipe.n if n is None else n
    path = run_path(run if run is not None else f"{recipe.name}-estimate")
    least = max(min(samples, wanted), count_accepted(path))
    try:
        generate_dialogues(
            sample_recipe(recipe), run=path, n=least, reuse=reuse, display=display, tries=TRIES, purpose="estimate"
        )
    except SeedsExhausted as error:
        (display or Display()).say(_accepted_samples(Run(path), recipe, error))
    return estimate_from(Run(path), recipe, wanted)


def _accepted_samples(run: Run, recipe: Recipe, error: SeedsExhausted) -> str:
    """The few samples that were accepted, in words; `SeedsExhausted` if some kind has none."""
    told, missing = [], []
    for kind in (kind for kind in KINDS.values() if not kind.may_fall_short):
        funnel = run.funnel(kind.name)
        missing += [
            f"{kind.name} {group}" for group in kind.wanted(recipe, 1) if group and not funnel.groups.get(group)
        ]
        if not funnel.ended:
            continue
        jobs = f"{funnel.jobs} sample jobs for {kind.name}"
        if not funnel.accepted:
            raise SeedsExhausted(
                f"none of {jobs} was accepted ({losses(funnel.ended)}): nothing to estimate from; fix what loses them, "
                f"then estimate in a new --run with --reuse {run.path}, which takes over what was paid for"
            )
        told.append(f"only {funnel.accepted} of {jobs} were accepted, most lost to {losses(funnel.ended)}")
    if missing:
        raise SeedsExhausted(f"no sample of {', '.join(missing)} was accepted; {error}")
    return "; ".join(told)


def sample_recipe(recipe: Recipe) -> Recipe:
    """The recipe whose jobs ask what the recipe's jobs ask, with few refusals, some twins and no quotas."""
    refusals, twins = recipe.refusals, recipe.twins
    if refusals:
        groups = {name: structs.replace(group, n=min(group.n, REFUSALS)) for name, group in refusals.groups.items()}
        refusals = structs.replace(refusals, groups=groups)
    if twins:
        twins = TwinSettings(ratio=max(twins.ratio, TWINS))
    gates = structs.replace(recipe.gates, coverage=None)
    return structs.replace(recipe, cast=_without_batches(recipe.cast), refusals=refusals, twins=twins, gates=gates)


def _without_batches(cast: Cast) -> Cast:
    """The cast with every member asked directly: a batch may take a day."""
    one = {role: structs.replace(member, batch=False) for role, member in cast.members.items()}
    victims = tuple(one.pop(f"victim:{number}") for number in range(len(cast.victims)))
    return structs.replace(cast, victims=victims, **one)


def estimate_from(run: Run, recipe: Recipe, n: int) -> Estimate:
    """What `n` dialogues take by the samples of that run; asks no model."""
    prices, prepared = prices_of(recipe.cast), prepare(recipe)
    inputs = JobInputs(recipe, prepared.seeds.seeds, lambda: prepared.groups, run.dialogues)
    strata = strata_of(run, n, inputs, prices)
    roles = _added_up(strata)
    return Estimate(
        n=n,
        run=run.path,
        recipe=recipe,
        sampled={stratum.name: stratum.sampled for stratum in strata},
        roles=roles,
        calls=amount_of(strata, lambda t: t.calls),
        tokens=amount_of(strata, lambda t: t.prompt_tokens + t.completion_tokens),
        cost=amount_of(strata, lambda t: t.cost),
        unpriced=tuple(role for role in sorted(roles) if role not in prices),
        times=_times(recipe, roles, strata),
        most_jobs=DIALOGUES.job_count(inputs),
    )


def _added_up(strata: Iterable[Stratum]) -> Used:
    roles: Used = {}
    for stratum in strata:
        for role, total in stratum.totals().items():
            add_weighted(roles.setdefault(role, RoleTally()), total, 1.0)
    return roles


# --- time ------------------------------------------------------------------------------------------------------------


def _times(recipe: Recipe, roles: Used, strata: Iterable[Stratum]) -> dict[str, float]:
    """Seconds by what bounds a run: each model with its limits, the jobs at once, our own work."""
    times: dict[str, float] = {}
    cast = recipe.cast.models
    for spec in dict.fromkeys((isinstance(model, Member), model.model) for model in cast.values()):
        named = [r for r, model in cast.items() if (isinstance(model, Member), model.model) == spec and r in roles]
        if direct := [role for role in named if not _is_batch(recipe, role)]:
            times |= _times_of_model(recipe, direct, roles)
    times |= _times_of_kinds(recipe, strata)
    return times | {"one core's work for the calls": CPU * sum(total.calls for total in roles.values())}


def _times_of_model(recipe: Recipe, direct: list[str], roles: Used) -> dict[str, float]:
    """The bounds of one model that answers in these roles."""
    cast = recipe.cast.models
    model, names, total = cast[direct[0]], " and ".join(direct), RoleTally()
    for role in direct:
        add_weighted(total, roles[role], 1.0)
    at_once = min(cast[role].concurrency for role in direct)
    times = {f"{names}, {at_once} calls at once": total.seconds / at_once}
    if model.rpm:
        times[f"{names}, {model.rpm:,} requests a minute"] = 60 * total.calls / model.rpm
    if model.tpm:
        tokens = total.prompt_tokens + total.completion_tokens
        times[f"{names}, {model.tpm:,} tokens a minute"] = 60 * tokens / model.tpm
    return times


def _times_of_kinds(recipe: Recipe, strata: Iterable[Stratum]) -> dict[str, float]:
    """The time of each kind at its concurrency; kinds that follow the dialogues add to theirs."""
    times: dict[str, float] = {}
    limit = recipe.limits.concurrency
    for stratum in strata:
        kind = DIALOGUES if stratum.kind.follows_dialogues else stratum.kind
        bound = f"{kind.concurrency(limit)} {kind.name} at once"
        seconds = sum(total.seconds for total in stratum.totals().values())
        times[bound] = times.get(bound, 0.0) + seconds / stratum.kind.concurrency(limit)
    return times


def _is_batch(recipe: Recipe, role: str) -> bool:
    model = recipe.cast.models[role]
    return isinstance(model, Member) and model.batch
