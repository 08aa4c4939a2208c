"""The published figures of InterSafe-V (AM3Safety, arXiv 2601.04736), for comparison with those of a run."""

import msgspec

SOURCE = "InterSafe-V (AM3Safety, arXiv 2601.04736)"

PUBLISHED: dict[str, float] = {
    "dialogues": 11_270,
    "refusal samples": 500,
    "refusal samples, general": 300,
    "refusal samples, health": 100,
    "refusal samples, finance": 100,
    "rows": 11_770,
    "categories": 14,
    "mean turns": 4,
    "mean images": 1.53,
}
"""The paper prints the mean of the turns as "4", so the exact mean is between 3.5 and 4.5."""


class Compared(msgspec.Struct, frozen=True):
    """One figure of the run and the published one; `difference` is ours - theirs, None if ours is None."""

    figure: str
    ours: float | None
    published: float
    difference: float | None


def compare(ours: dict[str, float | None]) -> tuple[Compared, ...]:
    """Every published figure with the figure of the run; `ours` must have all of them."""
    return tuple(_compared(figure, ours[figure], theirs) for figure, theirs in PUBLISHED.items())


def _compared(figure: str, ours: float | None, theirs: float) -> Compared:
    # Rounded, since 1.54 - 1.53 as binary floats is not 0.01.
    return Compared(figure, ours, theirs, None if ours is None else round(ours - theirs, 4))
