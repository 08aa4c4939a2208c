"""Paint: the attacker describes what there shall be to look at, the painter draws it (AM3Safety).

The description goes to the painter and into the image's origin, never into a talk. What the painter cannot draw is
asked for again: with another description where its service blocked the last one, else with other noise.
"""

from collections.abc import Sequence

from intersafe.checks.messages import is_blank
from intersafe.errors import CallFailed, JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast, Unanswered, Unpainted
from intersafe.records import ImageOrigin, Job, RefusalJob
from intersafe.replies import DescriptionAnswer
from intersafe.stages.conversation import concern_of


async def paint(
    job: Job | RefusalJob,
    cast: JobCast,
    step: str,
    tries: int,
    *,
    transcript: str = "",
    turn: int = 1,
    images: Sequence[str] = (),
    said: Sequence[str] = (),
) -> ImageOrigin:
    """A painted image for `step`, after a talk that is `said` and has shown `images`.

    `CallFailed` with the painter's last problem once `tries` images were none.
    """
    values = concern_of(job) | {
        "transcript": transcript,
        "turn": turn,
        "step": step,
        "has_image": bool(images),
    }
    problem, description = "", ""
    failure: CallFailed | None = None
    for left in reversed(range(tries)):
        if not description:
            try:
                answer = await cast.answer(
                    "attacker",
                    "painter/describe",
                    values | {"problem": problem},
                    DescriptionAnswer,
                    images=images,
                    tries=tries,
                )
            except Unanswered as error:
                raise JobRejected("paint", f"attacker_{error.reason}", error.detail) from None
            description = answer.description.strip()
            if excluded_together([*said, description]):
                raise JobRejected("paint", "excluded")
            if is_blank(description):
                description, problem = "", "the description was empty"
                continue
        try:
            return await cast.paint(description, last=left == 0)
        except Unpainted as error:
            failure = CallFailed("paint", error.reason, error.detail)
            problem = f"the painter gave no usable image: {str(error).replace('_', ' ')}"
            if error.reason == "blocked":
                description = ""
    if failure is None:
        raise JobRejected("paint", "empty_description")
    raise failure
