"""The kinds of job: dialogues, refusal samples and benign twins, and the gates that decide on each."""

from collections import Counter
from collections.abc import Iterator

import msgspec

from intersafe.gates.chain import Chain
from intersafe.gates.refusals import DuplicateQuestions, check_refusal
from intersafe.gates.rules import check_excluded, check_rules
from intersafe.generation.grow import Grower
from intersafe.generation.scheduler import AnyJob, Outcome
from intersafe.recipe.gates import RuleSettings
from intersafe.recipe.sections import Recipe
from intersafe.records import Dialogue, Job, Reason, RefusalJob, RefusalSample


class _Line:
    """What the three lines share."""

    name = ""

    def __init__(self, recipe: Recipe, grower: Grower) -> None:
        self._recipe, self._grower = recipe, grower

    async def grow(self, job: AnyJob) -> Outcome:
        """The outcome of a job; `JobEnded` if there is none."""
        return await self._grower.grow(self.name, job)

    def skip(self, job: AnyJob, ahead: float = 0.0) -> Reason | None:
        """Every job is grown."""
        return None


class Dialogues(_Line):
    """The main line."""

    def __init__(self, recipe: Recipe, grower: Grower, chain: Chain, n: int) -> None:
        """`chain` decides; it has been told of what was accepted before."""
        super().__init__(recipe, grower)
        self.chain, self.wanted = chain, n

    def skip(self, job: AnyJob, ahead: float = 0.0) -> Reason | None:
        """Jobs that a quota would turn down."""
        assert isinstance(job, Job)
        return self.chain.full(job, ahead)

    def check(self, outcome: Outcome) -> Reason | None:
        """All gates of the recipe."""
        assert isinstance(outcome, Dialogue)
        return self.chain.check(outcome)

    def add(self, outcome: Outcome) -> None:
        """Tells the gates with memory."""
        assert isinstance(outcome, Dialogue)
        self.chain.add(outcome)


_COMPLETE = Reason("group_complete")


class RefusalLine(_Line):
    """Refusal VQA: so many samples for each group."""

    name = "refusals"

    def __init__(self, recipe: Recipe, grower: Grower) -> None:
        super().__init__(recipe, grower)
        assert recipe.refusals
        self._refusals = recipe.refusals
        self.wanted = sum(group.n for group in self._refusals.groups.values())
        self.counts: Counter[str] = Counter()
        duplicates = self._refusals.duplicates
        self._duplicates = DuplicateQuestions(duplicates) if duplicates else None

    def skip(self, job: AnyJob, ahead: float = 0.0) -> Reason | None:
        """Jobs of a group that has all it wants."""
        assert isinstance(job, RefusalJob)
        return None if self.has_room(job.group) else _COMPLETE

    def has_room(self, group: str) -> bool:
        """True while the group wants more samples."""
        return self.counts[group] < self._refusals.groups[group].n

    def check(self, outcome: Outcome) -> Reason | None:
        """The group's size, the rules and the near-duplicates."""
        assert isinstance(outcome, RefusalSample)
        reason = (None if self.has_room(outcome.group) else _COMPLETE) or check_refusal(outcome)
        return reason or (self._duplicates.check(outcome) if self._duplicates else None)

    def add(self, outcome: Outcome) -> None:
        """Counts the sample in its group."""
        assert isinstance(outcome, RefusalSample)
        self.counts[outcome.group] += 1
        if self._duplicates:
            self._duplicates.add(outcome)


def check_twin(twin: Dialogue, rules: RuleSettings | None) -> Reason | None:
    """The rules; a twin is held to no quota and may be near its dialogue."""
    return check_excluded(twin) or (check_rules(twin, rules) if rules else None)


class Twins(_Line):
    """Benign twins: job k belongs to the k-th accepted dialogue."""

    name = "twins"

    def __init__(self, recipe: Recipe, grower: Grower, wanted: int) -> None:
        super().__init__(recipe, grower)
        self.wanted = wanted
        self._originals: dict[int, Dialogue] = {}

    def jobs(self, dialogues: Iterator[Dialogue], jobs: Iterator[Job], first: int) -> Iterator[Job]:
        """A job for each dialogue from place `first` on; `jobs` are all of the main line, both in job order."""
        for place, dialogue in enumerate(dialogues):
            job = next(job for job in jobs if job.index == dialogue.job)
            if place >= first:
                self._originals[place] = dialogue
                yield msgspec.structs.replace(job, index=place, key=f"{dialogue.key}/twin")

    async def grow(self, job: AnyJob) -> Outcome:
        """The twin of the job's dialogue."""
        return await self._grower.grow(self.name, job, self._originals.pop(job.index))

    def check(self, outcome: Outcome) -> Reason | None:
        """The rules alone."""
        assert isinstance(outcome, Dialogue)
        return check_twin(outcome, self._recipe.gates.rules)

    def add(self, outcome: Outcome) -> None:
        """Nothing to remember."""
