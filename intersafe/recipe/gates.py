"""The `gates` section of a recipe."""

from typing import Annotated, Literal

from msgspec import Meta

from intersafe.recipe.base import Positive, Section, Share


class RuleSettings(Section, frozen=True):
    """Settings of the rules on messages."""

    overlap: Share = 0.9
    """Two user messages repeat each other from this Jaccard similarity of their word sets (both / either)."""
    overlap_words: Positive = 6
    """Messages with fewer different words than this repeat each other only if they are equal."""
    script: Literal["latin", "any"] = "latin"
    """Expected script of the conversation; `any` switches the rule off. A script is not a language."""
    script_share: Share = 0.8
    """Least share of the letters of a message that belong to the script."""
    description_words: Annotated[int, Meta(ge=3, le=100)] = 8
    """A user message leaks the image description if it shares this many words in a row with it."""
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
    """Texts that show a leaked image description anywhere in a user message; case, quotes and spacing are ignored."""
    image_openings: tuple[str, ...] = (
        "generate an image of",
        "create an image of",
        "draw an image of",
        "generate a picture of",
        "create a picture of",
    )
    """The same, but only at the start of a user message."""


class DuplicateSettings(Section, frozen=True):
    """When two dialogues count as duplicates: MinHash over the user messages."""

    threshold: Share = 0.6
    """Estimated Jaccard similarity of the user messages from which on a dialogue is a near-duplicate."""
    unit: Literal["word", "char"] = "char"
    """Unit of a shingle; `char` tolerates typing errors and suits scripts without spaces."""
    size: Annotated[int, Meta(ge=1, le=32)] = 5
    """Units per shingle."""
    permutations: Annotated[int, Meta(ge=32, le=1024, multiple_of=32)] = 128
    """Values in a signature, 4 bytes each. The standard error of the estimate is at most 0.5 / sqrt(permutations)."""


class ImageSettings(Section, frozen=True):
    """When two images of one dialogue count as the same."""

    distance: Annotated[int, Meta(ge=0, le=64)] = 4
    """Perceptual hashes (64 bits) at most this far apart count as the same image."""


class CoverageSettings(Section, frozen=True):
    """Quotas: how far one value of an axis may exceed its share of the accepted dialogues.

    `even` gives every value of the run the same share, a mapping sets shares that sum to 1, null sets no quota.
    """

    category: Literal["even"] | dict[str, Share] | None = "even"
    strategy: Literal["even"] | dict[str, Share] | None = None
    victim: Literal["even"] | dict[str, Share] | None = None
    """By model identity, `openai:model`."""
    turns: Literal["even"] | dict[str, Share] | None = None
    """By number of turns."""
    tolerance: Annotated[float, Meta(ge=0, le=1e9)] = 0.10
    """How far a value may exceed its share, as a fraction of that share."""
    slack: Annotated[float, Meta(ge=1, le=1e9)] = 5.0
    """Dialogues allowed on top of that, so that the quotas do not apply to the first few of a run."""


class Gates(Section, frozen=True):
    """The gates in the order in which they decide; null switches one off."""

    rules: RuleSettings | None = RuleSettings()
    images: ImageSettings | None = ImageSettings()
    coverage: CoverageSettings | None = CoverageSettings()
    duplicates: DuplicateSettings | None = DuplicateSettings()
