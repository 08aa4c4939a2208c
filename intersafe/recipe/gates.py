"""The sections of a recipe that the gates read."""

from typing import Annotated, Literal

from msgspec import Meta

from intersafe.recipe.base import Positive, Section, Share


class RuleSettings(Section, frozen=True):
    """What a curator may change about the rules."""

    overlap: Share = 0.9
    """Two user messages repeat each other when their word sets share this much (words in both / words in either)."""
    overlap_words: Positive = 6
    """Messages with fewer different words than this repeat each other only when they are equal."""
    script: Literal["latin", "any"] = "latin"
    """The script that the talk is expected in; `any` switches the rule off. A script is not a language."""
    script_share: Share = 0.8
    """The least share of a message's letters that belong to the script."""
    description_words: Annotated[int, Meta(ge=3, le=100)] = 8
    """A user message that shares a run of so many words with what the painter was told gives it away."""
    image_phrases: tuple[str, ...] = (
        "image description:",
        "image prompt:",
        "picture description:",
        "description of the image:",
        "prompt for the image:",
        "[image:",
        "[image description",
        "[image of",
        "<image:",
    )
    """Anywhere in a user message these show that the painter's text leaked. Case, quotes and spacing are ignored."""
    image_openings: tuple[str, ...] = (
        "generate an image of",
        "create an image of",
        "draw an image of",
        "generate a picture of",
        "create a picture of",
    )
    """The same, but only where a user message opens with them."""


class DuplicateSettings(Section, frozen=True):
    """When two dialogues count as the same: MinHash over the user's side of the talk."""

    threshold: Share = 0.6
    """Estimated Jaccard similarity of the two users' sides, from which on a dialogue is a near-duplicate."""
    unit: Literal["word", "char"] = "char"
    """What a shingle is made of; `char` forgives typing errors and suits scripts without spaces."""
    size: Annotated[int, Meta(ge=1, le=32)] = 5
    """Units in a shingle."""
    permutations: Annotated[int, Meta(ge=32, le=1024, multiple_of=32)] = 128
    """Values in a signature: more of them estimate closer (standard error up to 0.5 / sqrt) and cost 4 bytes each."""


class ImageSettings(Section, frozen=True):
    """Similar images within one dialogue."""

    distance: Annotated[int, Meta(ge=0, le=64)] = 4
    """Perceptual hashes (64 bits) at most this far apart count as the same picture."""


class CoverageSettings(Section, frozen=True):
    """Quotas: how far one value of an axis may run ahead of its share of what was accepted.

    `even` gives every value of the run the same share, a mapping names shares (those of one axis sum to 1), null leaves
    the axis alone.
    """

    category: Literal["even"] | dict[str, Share] | None = "even"
    strategy: Literal["even"] | dict[str, Share] | None = None
    victim: Literal["even"] | dict[str, Share] | None = None
    """By model identity, `openai:model`."""
    turns: Literal["even"] | dict[str, Share] | None = None
    """By number of turns."""
    tolerance: Annotated[float, Meta(ge=0, le=1e9)] = 0.10
    """Share of its share that a value may have on top of it."""
    slack: Annotated[float, Meta(ge=1, le=1e9)] = 5.0
    """Dialogues on top of that, so that the first few of a run are not held to a share."""


class Gates(Section, frozen=True):
    """The gates in the order in which they decide; `null` switches one off."""

    rules: RuleSettings | None = RuleSettings()
    images: ImageSettings | None = ImageSettings()
    coverage: CoverageSettings | None = CoverageSettings()
    duplicates: DuplicateSettings | None = DuplicateSettings()
