"""Clean: of two images that look alike the later one is removed and its turn is asked again (AM3Safety).

The perceptual hash decides first; where it is not sure the judge compares the images, if the recipe asks for it.
"""

from itertools import combinations
from typing import NamedTuple

from intersafe.errors import JobRejected
from intersafe.recipe.sections import CleanSettings
from intersafe.records import Message, RemovedImage, Turn
from intersafe.stages.conversation import Conversation
from intersafe.stages.conversing import attacker_writes, victim_replies
from intersafe.stages.judging import judge_turn, same_image


class _Shown(NamedTuple):
    """One image of the conversation: which of which turn, both 0-based."""

    turn: int
    place: int
    image: str


async def clean(conversation: Conversation, settings: CleanSettings) -> None:
    """Removes images until no two look alike; `JobRejected` where the recipe wants no repair.

    The turns after a repaired one stay as they are: the judge, who sees all of it next, says whether it is coherent.
    """
    compared: dict[tuple[str, str], bool] = {}
    while found := await _first_similar(conversation, settings, compared):
        earlier, later = found
        if not settings.repair:
            raise JobRejected("clean", "similar_images", f"turns {earlier.turn + 1} and {later.turn + 1}")
        await _ask_again(conversation, later, earlier.image)


async def _ask_again(conversation: Conversation, shown: _Shown, like: str) -> None:
    """Writes the turn of that image again without it, since it looks like the earlier image `like`."""
    with conversation.reopened(shown.turn) as old:
        conversation.removed.append(RemovedImage(shown.turn, old.origins[shown.place], like))
        origins = tuple(origin for place, origin in enumerate(old.origins) if place != shown.place)
        step = conversation.plan.steps[shown.turn]
        message = await attacker_writes(conversation, step, origins, image_removed=True)
        reply = await victim_replies(conversation, message, origins)
        verdict = await judge_turn(conversation, message, reply.text)
        conversation.turns.append(Turn(message, Message("assistant", reply.text), verdict, reply.finish, origins))


async def _first_similar(
    conversation: Conversation, settings: CleanSettings, compared: dict[tuple[str, str], bool]
) -> tuple[_Shown, _Shown] | None:
    """The first two images that look alike, in their order; `compared` holds what the judge said before."""
    shown = [
        _Shown(number, place, origin.image)
        for number, turn in enumerate(conversation.turns)
        for place, origin in enumerate(turn.origins)
    ]
    for one, other in combinations(shown, 2):
        bits = conversation.cast.difference(one.image, other.image)
        if bits <= settings.distance:
            return one, other
        if settings.judge_distance is None or bits > settings.judge_distance:
            continue
        pair = (one.image, other.image)
        if pair not in compared:
            compared[pair] = await same_image(conversation, pair)
        if compared[pair]:
            return one, other
    return None
