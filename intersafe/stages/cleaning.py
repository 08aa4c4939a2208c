"""Clean: images of one dialogue that look alike; the later one goes and its turn is asked again (AM3Safety).

The perceptual hash decides first; where it is not sure the judge looks at both images, if the recipe asks for it.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from intersafe.errors import JobRejected
from intersafe.models.cast import JobCast
from intersafe.recipe.gates import RuleSettings
from intersafe.recipe.sections import CleanSettings, ConverseSettings
from intersafe.records import ImageOrigin, Job, Plan, RemovedImage, Turn
from intersafe.stages.conversing import Asking, take_turn, write_message
from intersafe.stages.judging import same_picture


class _Place(NamedTuple):
    """Which image of which turn, both 0-based."""

    turn: int
    image: int


async def clean(
    job: Job,
    plan: Plan,
    cast: JobCast,
    turns: Sequence[Turn],
    settings: CleanSettings,
    converse: ConverseSettings,
    rules: RuleSettings | None,
) -> tuple[tuple[Turn, ...], tuple[RemovedImage, ...]]:
    """The turns without images that look like an earlier one, and what was taken out.

    `JobRejected` where the recipe wants no repair. The turns after a repaired one stay as they are: whether the talk
    still holds together is for the judge to say, who sees all of it next.
    """
    talk = list(turns)
    removed: list[RemovedImage] = []
    looked: dict[tuple[str, str], bool] = {}
    while found := await _first_similar(job, cast, talk, settings, converse.tries, looked):
        earlier, place = found
        old = talk[place.turn]
        if not settings.repair:
            raise JobRejected("clean", "similar_images", f"turns {earlier.turn + 1} and {place.turn + 1}")
        like = talk[earlier.turn].origins[earlier.image].image
        removed.append(RemovedImage(place.turn, old.origins[place.image], like))
        origins = tuple(origin for number, origin in enumerate(old.origins) if number != place.image)
        before, later = talk[: place.turn], talk[place.turn + 1 :]
        hidden = [image.origin.description for image in removed if image.origin.description]
        asking = Asking(job, plan, cast, converse, rules, before, later=later, removed=hidden)
        user = await write_message(asking, origins, lost_image=True)
        talk[place.turn] = await take_turn(job, cast, converse.tries, before, asking.said, user, origins)
    return tuple(talk), tuple(removed)


async def _first_similar(
    job: Job,
    cast: JobCast,
    turns: Sequence[Turn],
    settings: CleanSettings,
    tries: int,
    looked: dict[tuple[str, str], bool],
) -> tuple[_Place, _Place] | None:
    """The first two images that look alike, in the order of the talk; `looked` holds what the judge said before."""
    shown: list[tuple[_Place, ImageOrigin]] = [
        (_Place(turn, image), origin) for turn, t in enumerate(turns) for image, origin in enumerate(t.origins)
    ]
    for (one, first), (other, second) in combinations(shown, 2):
        bits = cast.difference(first.image, second.image)
        if bits <= settings.distance:
            return one, other
        if settings.judge_distance is None or bits > settings.judge_distance:
            continue
        pair = (first.image, second.image)
        if pair not in looked:
            looked[pair] = await same_picture(job, cast, pair, tries)
        if looked[pair]:
            return one, other
    return None
