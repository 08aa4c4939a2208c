"""The figures of a run as a tree of frozen values: what `intersafe stats` writes as JSON.

A mean or a share is None if there is nothing to divide by. `docs/stats.md` defines each figure.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import msgspec

from intersafe.report.cost import Costs
from intersafe.report.diversity import Distinct
from intersafe.report.published import Compared
from intersafe.run.incidents import Incidents

RunState = Literal["complete", "jobs_exhausted", "incomplete"]


class Proportion(msgspec.Struct, frozen=True):
    """`count` of `total`."""

    count: int
    total: int
    share: float | None

    @classmethod
    def of(cls, count: int, total: int) -> "Proportion":
        """The proportion; its share is None if the total is 0."""
        return cls(count, total, count / total if total else None)


class Histogram(msgspec.Struct, frozen=True):
    """Dialogues by number of something (turns, images), and the mean."""

    counts: dict[int, int]
    mean: float | None

    @classmethod
    def of(cls, counts: Mapping[int, int]) -> "Histogram":
        """The histogram with these counts by value."""
        size = sum(counts.values())
        total = sum(value * count for value, count in counts.items())
        return cls(dict(sorted(counts.items())), total / size if size else None)


class About(msgspec.Struct, frozen=True):
    """Which run this is."""

    run: str
    """Name of its folder."""
    recipe: str
    digest: str
    state: RunState
    short: tuple[str, ...]
    """What stayed below its quota in a run that used up its jobs."""
    scripted: tuple[str, ...]
    """Roles with scripted models: their texts are not model output."""
    versions: dict[str, str]


class Sizes(msgspec.Struct, frozen=True):
    """Numbers of dialogues, samples, twins and seeds."""

    dialogues: int
    refusals: int
    rows: int
    """Dialogues and refusal samples, as the paper counts."""
    twins: int
    seeds: int
    """Different seeds of the dialogues."""
    refusal_groups: dict[str, int]
    refusals_with_image: Proportion
    refusals_answered_by: dict[str, int]


class ImageFigures(msgspec.Struct, frozen=True):
    """Images of the dialogues; an image in two turns counts twice."""

    all: Histogram
    seed: Histogram
    painted: Histogram
    with_image: Proportion
    """Dialogues with at least one."""


class CurvePoint(msgspec.Struct, frozen=True):
    """One turn of the first-unsafe-turn curve (Kaplan & Meier 1958)."""

    turn: int
    at_risk: int
    """Dialogues that have this turn and no unsafe turn before it."""
    unsafe: int
    """Of these, unsafe in this turn."""
    censored: int
    """Of these, safe in this turn and without a further one."""
    hazard: float
    survival: float
    """Estimated share without an unsafe turn up to here, if no dialogue were shorter."""


class SafetyFigures(msgspec.Struct, frozen=True):
    """Safety and refusals of the victims, by the judge."""

    verdicts: dict[str, int]
    """Turns by safety."""
    asr: Proportion
    """Attack success rate: dialogues with an unsafe turn."""
    first_unsafe: tuple[CurvePoint, ...]
    asr_by_turns: dict[int, Proportion]
    asr_by_victim: dict[str, Proportion]
    refusals: dict[str, int]
    """Turns by refusal kind."""
    refusals_by_turn: dict[int, dict[str, int]]


class AlignedFigures(msgspec.Struct, frozen=True):
    """The aligned answers, by the judge."""

    answers: int
    safe: Proportion
    recoveries_safe: Proportion
    """Of the answers that follow an unsafe turn."""
    refusals: dict[str, int]


class TwinFigures(msgspec.Struct, frozen=True):
    """How the victims answered the benign twins."""

    turns: int
    over_refusal: Proportion
    """Twins with a full refusal."""
    refused_turns: Proportion
    unsafe: Proportion
    """Twins with an unsafe turn; a benign conversation should have none."""
    refusals: dict[str, int]


class EndedCount(msgspec.Struct, frozen=True):
    """Jobs of one kind (dialogues, refusals, twins) that ended for the same reason."""

    line: str  # the kind of job; `stats --json` publishes this name
    kind: str
    stage: str
    reason: str
    count: int


class Losses(msgspec.Struct, frozen=True):
    """Jobs without an accepted dialogue, sample or twin, and removed images."""

    ended: tuple[EndedCount, ...]
    yielded: Proportion
    """Accepted dialogues of the decided jobs."""
    near_duplicates: dict[str, int]
    """Rejected near-duplicates by job kind."""
    similar_images: int
    """Dialogues rejected for similar images."""
    images_removed: dict[str, int]
    """Removed from accepted dialogues, by source."""
    seeds_excluded: int
    """Seeds excluded by rule."""


class Dispersion(msgspec.Struct, frozen=True):
    """How far apart the embeddings of the sample are."""

    embedder: str
    dimensions: int
    mean_cosine_distance: float
    vendi: float | None
    """None for a large sample where NumPy is not installed."""


class Diversity(msgspec.Struct, frozen=True):
    """How varied the user messages are: over all dialogues, and on a sample of fixed size."""

    all: Distinct
    sample: int
    """Dialogues in the sample."""
    of_sample: Distinct
    self_bleu_4: float | None
    dispersion: Dispersion | None
    """None without an embedder, or for a sample of fewer than two."""


class Stats(msgspec.Struct, frozen=True):
    """All figures of one run."""

    about: About
    published: tuple[Compared, ...]
    sizes: Sizes
    turns: Histogram
    images: ImageFigures
    categories: dict[str, int]
    strategies: dict[str, int]
    victims: dict[str, int]
    sources: dict[str, dict[str, int]]
    """Source of the seed to its licences, in dialogues."""
    safety: SafetyFigures
    aligned: AlignedFigures
    twins: TwinFigures
    losses: Losses
    diversity: Diversity
    costs: Costs
    v: int = 1
    incidents: dict[str, Incidents] = {}
    """Retries, throttling and outages by role."""


def ranked(counts: Counter[str]) -> dict[str, int]:
    """Most frequent first, equals by name: the same for rows in any order."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
