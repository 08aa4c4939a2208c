"""A conversation while it grows, and what the stages share about its job."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from intersafe.models.cast import JobCast
from intersafe.recipe.gates import RuleSettings
from intersafe.recipe.sections import ConverseSettings
from intersafe.records import (
    ImageOrigin,
    Job,
    Plan,
    PrunedTurn,
    RefusalJob,
    RemovedImage,
    Turn,
    images_of,
    origins_of,
    texts_of,
    transcript,
)
from intersafe.taxonomy import BY_NAME


@dataclass
class Conversation:
    """What one job has said so far, and what it is grown from. The stages change it in place.

    A stage that raises leaves it as it is then: the job ends, and its conversation with it.
    """

    job: Job
    plan: Plan
    cast: JobCast
    settings: ConverseSettings
    rules: RuleSettings | None
    """The rules of the gates on one message; None where the recipe has none."""
    turns: list[Turn] = field(default_factory=list)
    backtracked: list[PrunedTurn] = field(default_factory=list)
    """Turns that the victim refused and that were asked in another way."""
    removed: list[RemovedImage] = field(default_factory=list)
    """Images that looked like an earlier one."""
    later: list[Turn] = field(default_factory=list)
    """The turns after the next one, where that one is written again."""
    unsent: Sequence[str] = ()
    """Texts that are written and not yet sent: those of a twin, whose messages are written together."""

    @property
    def images(self) -> tuple[str, ...]:
        """References of the images shown so far, in their order."""
        return images_of(self.turns)

    @property
    def transcript(self) -> str:
        """The turns so far as text."""
        return transcript(self.turns)

    @property
    def descriptions(self) -> list[str]:
        """What its images were painted from, the removed ones included."""
        kept = origins_of([*self.turns, *self.later])
        return described([*kept, *(image.origin for image in self.removed)])

    @property
    def texts(self) -> list[str]:
        """All that belongs to its record: every turn, kept or backtracked, unsent texts, descriptions of images."""
        turns = [*self.turns, *(pruned.turn for pruned in self.backtracked), *self.later]
        return [*texts_of(turns), *described(image.origin for image in self.removed), *self.unsent]

    @contextlib.contextmanager
    def reopened(self, position: int) -> Iterator[Turn]:
        """Yields the turn at `position` (0-based) and takes it out; what is appended meanwhile comes in its place."""
        turn, self.later = self.turns[position], self.turns[position + 1 :]
        del self.turns[position:]
        yield turn
        self.turns += self.later
        self.later = []


def described(origins: Iterable[ImageOrigin]) -> list[str]:
    """What images were painted from; nothing for those of a seed."""
    return [origin.description for origin in origins if origin.description]


def concern_of(job: Job | RefusalJob) -> dict[str, Any]:
    """What every prompt about the job's seed is offered."""
    category = BY_NAME[job.seed.category]
    return {
        "category": category.name,
        "concern": category.concern,
        "query": job.seed.query,
        "has_image": job.seed.image is not None,
    }


def seed_images(job: Job | RefusalJob) -> tuple[str, ...]:
    """References of the seed's images: none or one."""
    return (job.seed.image,) if job.seed.image else ()
