"""Converse: per step the attacker writes the user's message, the victim answers, the judge gives a verdict (AM3Safety).

The roles have threads of their own: the victim sees its system prompt, the talk and the images and nothing else; the
attacker sees the talk, its images and the step; the judge sees all of it. A step that needs something to look at gets a
painted image first, and the attacker then writes about the image and not from its description. A turn that the victim
refused outright may be taken back and asked in another way; what was taken back stays in the record, since accepted and
pruned branches of one prefix make preference pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from intersafe.checks.messages import message_problem, regularise, repeats_description
from intersafe.errors import CallFailed, JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast, Unanswered
from intersafe.recipe.gates import RuleSettings
from intersafe.recipe.sections import ConverseSettings
from intersafe.records import (
    ImageOrigin,
    Job,
    Message,
    Plan,
    PrunedTurn,
    Reason,
    Turn,
    images_of,
    origins_of,
    said_in,
    transcript,
)
from intersafe.replies import MessageAnswer
from intersafe.stages.conversation import concern_of, seed_images
from intersafe.stages.judging import judge_turn
from intersafe.stages.painting import paint


class Asking(NamedTuple):
    """What one user message is written from."""

    job: Job
    plan: Plan
    cast: JobCast
    settings: ConverseSettings
    rules: RuleSettings | None
    turns: Sequence[Turn]
    """The talk before this message."""
    pruned: Sequence[PrunedTurn] = ()
    later: Sequence[Turn] = ()
    """The talk after it, where it is written again."""
    removed: Sequence[str] = ()
    """What the pictures were painted from that were taken out of the talk."""

    @property
    def said(self) -> list[str]:
        """All that was said, taken back or not."""
        return [*said_in([*self.turns, *(pruned.turn for pruned in self.pruned), *self.later]), *self.removed]


async def converse(
    job: Job, plan: Plan, cast: JobCast, settings: ConverseSettings, rules: RuleSettings | None
) -> tuple[tuple[Turn, ...], tuple[PrunedTurn, ...]]:
    """One turn for each step of the plan, and the turns that were taken back on the way."""
    turns: list[Turn] = []
    pruned: list[PrunedTurn] = []
    for position in range(len(plan.steps)):
        origins = await _images_of(Asking(job, plan, cast, settings, rules, turns, pruned))
        while True:
            asking = Asking(job, plan, cast, settings, rules, turns, pruned)
            refused = bool(pruned) and pruned[-1].index == position
            user = await write_message(asking, origins, refused=refused)
            turn = await take_turn(job, cast, settings.tries, turns, asking.said, user, origins)
            if turn.verdict.refusal != "full" or len(pruned) >= settings.backtracks:
                break
            pruned.append(PrunedTurn(position, turn, "refused"))
        turns.append(turn)
    return tuple(turns), tuple(pruned)


async def take_turn(
    job: Job,
    cast: JobCast,
    tries: int,
    turns: Sequence[Turn],
    said: Sequence[str],
    user: Message,
    origins: tuple[ImageOrigin, ...],
) -> Turn:
    """The victim answers the talk so far and this message; the judge gives its verdict."""
    system = Message("system", cast.prompts["victim/system"].render("system", {}))
    talk = [message for turn in turns for message in (turn.user, turn.reply)]
    answer = await cast.ask(cast.victim, "victim/system", (system, *talk, user))
    if answer.finish == "blocked":
        raise CallFailed("converse", "blocked", f"the victim's service blocked turn {len(turns) + 1}")
    if answer.finish == "length":
        raise JobRejected("converse", "truncated", f"reply of turn {len(turns) + 1}")
    if not answer.text.strip():
        raise JobRejected("converse", "empty_reply", f"turn {len(turns) + 1}")
    drawn = [origin.description for origin in origins if origin.description]
    if excluded_together([*said, *drawn, user.text, answer.text]):
        raise JobRejected("converse", "excluded", f"reply of turn {len(turns) + 1}")
    reply = Message("assistant", answer.text.strip())
    verdict = await judge_turn(job, cast, turns, user, reply, tries)
    return Turn(user, reply, verdict, answer.finish, origins)


async def write_message(
    asking: Asking, origins: tuple[ImageOrigin, ...], *, refused: bool = False, lost_image: bool = False
) -> Message:
    """The user's next message with those images; one that leaks, repeats or says nothing is asked for again.

    `lost_image`: the picture that this message was about was taken out of the talk.
    """
    job, plan, cast, settings, rules, turns, _, later, removed = asking
    others = [turn.user.text for turn in turns] + ([""] if later else []) + [turn.user.text for turn in later]
    painted = [*origins_of(turns), *origins, *origins_of(later)]
    descriptions = [*(origin.description for origin in painted if origin.description), *removed]
    images = (*images_of(turns), *(origin.image for origin in origins))
    values = concern_of(job) | {
        "transcript": transcript(turns),
        "turn": len(turns) + 1,
        "n_turns": job.turns,
        "step": plan.steps[len(turns)].text,
        "refused": refused,
        "has_image": bool(images),
        "has_picture": bool(origins),
        "judge_reason": turns[-1].verdict.reason if turns else "",
    }
    said = [*asking.said, *descriptions]
    note = "there is no picture with this message, speak of an earlier one or of none" if lost_image else ""
    problem: Reason | None = None
    for _ in range(settings.tries):
        words = ", ".join(part for part in (note, " ".join(problem).replace("_", " ") if problem else "") if part)
        try:
            answer = await cast.answer(
                "attacker",
                f"attacker/{job.strategy}",
                values | {"problem": words},
                MessageAnswer,
                images=images,
                tries=settings.tries,
            )
        except Unanswered as error:
            raise JobRejected("converse", f"attacker_{error.reason}", error.detail) from None
        text = regularise(answer.message, rules) if rules else answer.message.strip()
        # All that was said is read as one text: a concern that is spread over the turns must not pass.
        if excluded_together([*said, text]):
            raise JobRejected("converse", "excluded", f"message of turn {len(turns) + 1}")
        if rules:
            problem = message_problem(text, others, job.seed.query, plan, rules, descriptions)
        elif repeats_description(text, descriptions, RuleSettings()):  # no recipe lets the victim read one
            problem = Reason("leaked_image_description")
        else:
            problem = None
        if problem is None:
            return Message("user", text, tuple(origin.image for origin in origins))
    assert problem is not None
    raise JobRejected("converse", problem.word, problem.detail or f"turn {len(turns) + 1}")


async def _images_of(asking: Asking) -> tuple[ImageOrigin, ...]:
    """What the next turn shows: the seed's image in the first, a painted one where the plan wants it."""
    job, turns = asking.job, asking.turns
    shown = tuple(ImageOrigin(image, "seed") for image in seed_images(job)) if not turns else ()
    step = asking.plan.steps[len(turns)]
    if not step.picture:
        return shown
    painted = await paint(
        job,
        asking.cast,
        step.text,
        asking.settings.tries,
        transcript=transcript(turns),
        turn=len(turns) + 1,
        images=(*images_of(turns), *(origin.image for origin in shown)),
        said=asking.said,
    )
    return (*shown, painted)
