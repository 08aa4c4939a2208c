"""All gates of a recipe in their order, for a run that is generated and for one that is gated again."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from intersafe.gates import Gate
from intersafe.gates.dedup import SIGNATURES, DuplicateIndex, similar_images
from intersafe.gates.quota import CoverageQuota
from intersafe.gates.rules import check_excluded, check_rules
from intersafe.recipe.gates import Gates
from intersafe.records import Dialogue, Job, Reason


class Chain:
    """Asks every gate in order; the first that rejects gives the reason."""

    def __init__(
        self,
        settings: Gates,
        values: Mapping[str, Sequence[str]],
        perceptual_hash: Callable[[str], int],
        root: Path | None = None,
    ) -> None:
        """`values`: what the run's jobs can have on each axis; `perceptual_hash`: 64 bits of an image by reference.

        `root` is the run's folder, for a cache that makes resuming faster; nothing there changes a decision.
        """
        rules, images = settings.rules, settings.images
        cache = root / SIGNATURES if root else None
        self.quota = CoverageQuota(settings.coverage, values) if settings.coverage else None
        duplicates = DuplicateIndex(settings.duplicates, cache) if settings.duplicates else None
        self._checks: list[Callable[[Dialogue], Reason | None]] = []
        # The quotas come first: a job that they reject may never be grown, so no other gate could give its reason.
        if self.quota:
            self._checks.append(self.quota.check)
        self._checks.append(check_excluded)
        if rules:
            self._checks.append(partial(check_rules, settings=rules))
        if images:
            self._checks.append(partial(_check_images, perceptual_hash=perceptual_hash, distance=images.distance))
        if duplicates:
            self._checks.append(duplicates.check)
        self._remembering: list[Gate] = [gate for gate in (self.quota, duplicates) if gate]

    def full(self, job: Job, ahead: float) -> Reason | None:
        """Why the job need not be grown, assuming that `ahead` more dialogues are accepted before it is decided."""
        return self.quota.check(job, ahead) if self.quota else None

    def check(self, dialogue: Dialogue) -> Reason | None:
        """The reason to reject the dialogue, or None."""
        return next((reason for check in self._checks if (reason := check(dialogue))), None)

    def add(self, dialogue: Dialogue) -> None:
        """Remembers an accepted dialogue."""
        for gate in self._remembering:
            gate.add(dialogue)


def _check_images(dialogue: Dialogue, perceptual_hash: Callable[[str], int], distance: int) -> Reason | None:
    if len(dialogue.images) < 2:  # no image need be read
        return None
    return similar_images([perceptual_hash(ref) for ref in dialogue.images], distance)
