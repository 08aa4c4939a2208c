"""Jobs: the seed, strategy, victim and sample number of each job of a run, in order.

The order interleaves the categories, so that every prefix is balanced, and spreads strategies and victims evenly over
the seeds. Refusal jobs have their own order, which interleaves their groups by size. Nothing is drawn from a shared
random state: the same recipe and seeds always give the same job at the same place.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

from intersafe.errors import InputError
from intersafe.recipe.sections import Images, Recipe, RefusalGroup, Refusals, Turns
from intersafe.records import Job, RefusalJob, Seed
from intersafe.taxonomy import CATEGORIES
from intersafe.wording import nearest


def job_count(recipe: Recipe, seeds: Sequence[Seed]) -> int:
    """Number of dialogue jobs."""
    return len(seeds) * len(recipe.strategies) * len(recipe.cast.victims) * recipe.samples


def jobs(recipe: Recipe, seeds: Sequence[Seed], first: int = 0) -> Iterator[Job]:
    """The dialogue jobs in order, from place `first` on."""
    by_category = [[s for s in seeds if s.category == c.name] for c in CATEGORIES]
    columns = [column for column in by_category if column]
    pairs = len(recipe.strategies) * len(recipe.cast.victims)
    victims = [victim.identity for victim in recipe.cast.victims]
    index = 0
    for row in range(max(map(len, columns), default=0) * pairs * recipe.samples):
        for number, column in enumerate(columns):
            if row >= len(column) * pairs * recipe.samples:
                continue
            if index >= first:
                place = row % len(column)
                round_ = row // len(column)
                # Rotating by seed and category spreads the pairs: one pass over the seeds meets all of them.
                pair = (round_ + place + number) % pairs
                strategy = recipe.strategies[pair % len(recipe.strategies)]
                victim = pair // len(recipe.strategies)
                sample = round_ // pairs
                yield _job(
                    recipe=recipe,
                    index=index,
                    seed=column[place],
                    strategy=strategy,
                    victim=victim,
                    identity=victims[victim],
                    sample=sample,
                )
            index += 1


def _job(recipe: Recipe, index: int, seed: Seed, strategy: str, victim: int, identity: str, sample: int) -> Job:
    key = f"{seed.id}/{strategy}/{identity}/{sample}"
    digest = hashlib.blake2b(f"{recipe.seed} {key}".encode(), digest_size=16).digest()
    turns = _draw(recipe.turns, digest[8:])
    pictures = 0
    if recipe.cast.painter:
        images = min(_draw(recipe.images, digest[8:] + b"images"), turns)
        pictures = max(0, images - (seed.image is not None))
    random_seed = int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
    return Job(
        index=index,
        key=key,
        seed=seed,
        strategy=strategy,
        victim=victim,
        sample=sample,
        turns=turns,
        pictures=pictures,
        random_seed=random_seed,
    )


def _draw(settings: Turns | Images, noise: bytes) -> int:
    """`min` plus a binomial draw up to `max`, with 16 bits of noise per trial, so that the mean is nearly exact."""
    span = settings.max - settings.min
    if span == 0:
        return settings.min
    chance = (settings.mean - settings.min) / span * 65_536
    more = hashlib.blake2b(noise, digest_size=2 * span).digest()
    return settings.min + sum(int.from_bytes(more[i : i + 2], "big") < chance for i in range(0, 2 * span, 2))


# --- refusals ------------------------------------------------------------------------------------------------------


def seeds_by_group(
    refusals: Refusals, seeds: Sequence[Seed], own: Mapping[str, Sequence[Seed]] | None = None
) -> dict[str, tuple[Seed, ...]]:
    """The seeds of each group, in its categories: from `own` if the group names files, else from `seeds`.

    `InputError` for an unknown category, a group without seeds, or an `n` that its seeds cannot give.
    """
    known = [category.name for category in CATEGORIES]
    named = {name for group in refusals.groups.values() for name in group.categories}
    found: dict[str, tuple[Seed, ...]] = {}
    for name, group in refusals.groups.items():
        where = f"refusals.groups.{name}"
        for category in group.categories:
            if category not in known:
                what = f"{where}: unknown category {category!r}" + nearest(category, known)
                raise InputError(what, remedy="name one of the 14")
        source = (own or {})[name] if group.seeds else seeds
        taken = set(group.categories) or set(known) - named
        found[name] = tuple(seed for seed in source if seed.category in taken)
        if not found[name]:
            raise InputError(f"{where}: no seed in its categories", remedy="name others, or give it its own `seeds`")
        most = len(found[name]) * _samples(refusals, group)
        if group.n > most:
            raise InputError(
                f"{where}: n {group.n}, but its {len(found[name])} seeds give {most} questions at most",
                remedy="lower n, add seeds or raise refusals.samples",
            )
    return found


def refusal_job_count(recipe: Recipe, by_group: Mapping[str, Sequence[Seed]]) -> int:
    """Number of refusal jobs."""
    assert recipe.refusals
    groups = recipe.refusals.groups
    return sum(len(seeds) * _samples(recipe.refusals, groups[name]) for name, seeds in by_group.items())


def refusal_jobs(recipe: Recipe, by_group: Mapping[str, Sequence[Seed]], first: int = 0) -> Iterator[RefusalJob]:
    """The refusal jobs in order, from place `first` on; every prefix has the groups in proportion to their n."""
    assert recipe.refusals
    groups = recipe.refusals.groups
    queues = {name: _in_turn(seeds, _samples(recipe.refusals, groups[name])) for name, seeds in by_group.items()}
    # Webster's method in whole numbers: recipes whose n have the same proportions give the same order.
    step = {name: math.lcm(*(group.n for group in groups.values())) // groups[name].n for name in queues}
    due = dict(step)
    for index in range(refusal_job_count(recipe, by_group)):
        found = None
        while found is None:
            name = min(due, key=due.__getitem__)
            found = next(queues[name], None)
            due[name] += 2 * step[name]
            if found is None:
                del due[name]
        if index >= first:
            seed, sample = found
            key = f"refusal/{name}/{seed.id}/{sample}"
            digest = hashlib.blake2b(f"{recipe.seed} {key}".encode(), digest_size=4).digest()
            yield RefusalJob(index, key, seed, name, sample, int.from_bytes(digest, "big") & 0x7FFFFFFF)


def _samples(refusals: Refusals, group: RefusalGroup) -> int:
    """Questions per seed of the group."""
    return refusals.samples if group.questions == "written" else 1


def _in_turn(seeds: Sequence[Seed], samples: int) -> Iterator[tuple[Seed, int]]:
    """Every seed with every sample number: categories in turn, and all seeds of a category before second samples."""
    by_category = [[s for s in seeds if s.category == c.name] for c in CATEGORIES]
    columns = [column for column in by_category if column]
    for row in range(max(map(len, columns), default=0) * samples):
        for column in columns:
            if row < len(column) * samples:
                yield column[row % len(column)], row // len(column)
