"""Jobs: which seed, strategy, victim and sample number stand at which place of a run.

The order interleaves the categories, so that every prefix is balanced, and walks strategies and victims evenly over
the seeds. Nothing is drawn from a shared random state: the same recipe and seeds give the same job at the same place,
always.
"""

import hashlib
from collections.abc import Iterator, Sequence

from intersafe.records import Job, Seed
from intersafe.settings import Recipe, Turns
from intersafe.taxonomy import CATEGORIES


def job_count(recipe: Recipe, seeds: Sequence[Seed]) -> int:
    """How many jobs there are in all."""
    return len(seeds) * len(recipe.strategies) * len(recipe.cast.victims) * recipe.samples


def jobs(recipe: Recipe, seeds: Sequence[Seed], first: int = 0) -> Iterator[Job]:
    """The jobs in their order, from place `first` on."""
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
                yield _job(recipe, index, column[place], strategy, victim, victims[victim], sample)
            index += 1


def _job(recipe: Recipe, index: int, seed: Seed, strategy: str, victim: int, identity: str, sample: int) -> Job:
    key = f"{seed.id}/{strategy}/{identity}/{sample}"
    digest = hashlib.blake2b(f"{recipe.seed} {key}".encode(), digest_size=16).digest()
    turns = _turns(recipe.turns, digest[8:])
    return Job(index, key, seed, strategy, victim, sample, turns, int.from_bytes(digest[:4], "big") & 0x7FFFFFFF)


def _turns(turns: Turns, noise: bytes) -> int:
    """`min` plus a binomial draw: one byte of noise for each further turn, so the mean is exact to 1/256 a turn."""
    span = turns.max - turns.min
    if span == 0:
        return turns.min
    chance = (turns.mean - turns.min) / span
    more = hashlib.blake2b(noise, digest_size=span).digest()
    return turns.min + sum(byte < chance * 256 for byte in more)
