"""All gates of a recipe in their order, for a run that is generated and for one that is gated again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from intersafe.gates import Gate
from intersafe.gates.dedup import SIGNATURES, DuplicateIndex, similar_images
from intersafe.gates.quota import Quota
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
        self._settings, self._hash = settings, perceptual_hash
        self.quota = Quota(settings.coverage, values) if settings.coverage else None
        cache = root / SIGNATURES if root else None
        duplicates = DuplicateIndex(settings.duplicates, cache) if settings.duplicates else None
        # The quotas come first: a job that they reject may never be grown, so no other gate could give its reason.
        self._first: list[Gate] = [self.quota] if self.quota else []
        self._last: list[Gate] = [duplicates] if duplicates else []

    def full(self, job: Job, ahead: float) -> Reason | None:
        """Why the job need not be grown, assuming that `ahead` more dialogues are accepted before it is decided."""
        return self.quota.check(job, ahead) if self.quota else None

    def check(self, dialogue: Dialogue) -> Reason | None:
        """The reason to reject the dialogue, or None."""
        return next((reason for reason in self._reasons(dialogue) if reason), None)

    def add(self, dialogue: Dialogue) -> None:
        """Remembers an accepted dialogue."""
        for gate in (*self._first, *self._last):
            gate.add(dialogue)

    def _reasons(self, dialogue: Dialogue) -> Iterator[Reason | None]:
        settings = self._settings
        for gate in self._first:
            yield gate.check(dialogue)
        yield check_excluded(dialogue)
        if settings.rules:
            yield check_rules(dialogue, settings.rules)
        if settings.images and len(dialogue.images) > 1:
            yield similar_images([self._hash(ref) for ref in dialogue.images], settings.images.distance)
        for gate in self._last:
            yield gate.check(dialogue)
