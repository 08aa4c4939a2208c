"""Paint: the attacker describes an image, the painter draws it (AM3Safety).

The description goes to the painter and into the image's origin, never into a conversation. What the painter cannot draw
is asked for again: with another description where its service blocked the last one, else with another seed.
"""

from collections.abc import Sequence
from typing import Any

from intersafe.checks.messages import is_blank
from intersafe.errors import CallFailed, JobEnded, JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast, Unpainted
from intersafe.records import ImageOrigin, Job, RefusalJob, Turn, transcript
from intersafe.replies import DescriptionAnswer
from intersafe.stages.calls import structured, unusable
from intersafe.stages.conversation import concern_of


async def paint(
    job: Job | RefusalJob,
    cast: JobCast,
    subject: str,
    tries: int,
    *,
    turns: Sequence[Turn] = (),
    images: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> ImageOrigin:
    """A painted image for `subject`, a step or a question; `JobEnded` with the last problem after `tries`.

    `turns` are the conversation so far, `images` what it has shown, `texts` all that an exclusion must be read with.
    """
    values = concern_of(job) | {
        "transcript": transcript(turns),
        "turn": len(turns) + 1,
        "step": subject,
        "has_image": bool(images),
    }
    problem = description = ""
    failure: JobEnded = JobRejected("paint", "empty_description")
    for left in reversed(range(tries)):
        if not description:
            description = await _describe(cast, values | {"problem": problem}, images, texts, tries)
            if not description:
                problem = "the description was empty"
                continue
        try:
            return await cast.paint(description, last=left == 0)
        except Unpainted as error:
            failure = CallFailed("paint", unusable("painter", error.reason), error.detail)
            problem = f"the painter gave no usable image: {str(error).replace('_', ' ')}"
            if error.reason == "blocked":
                description = ""
    raise failure


async def _describe(
    cast: JobCast, values: dict[str, Any], images: Sequence[str], texts: Sequence[str], tries: int
) -> str:
    """The attacker's description for the painter, empty if nothing in it can be seen; `JobRejected` if excluded."""
    answer = await structured(
        cast, "attacker", "painter/describe", values, DescriptionAnswer, stage="paint", tries=tries, images=images
    )
    description = answer.description.strip()
    if excluded_together([*texts, description]):
        raise JobRejected("paint", "excluded")
    return "" if is_blank(description) else description
