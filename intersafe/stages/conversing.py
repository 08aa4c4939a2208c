"""Converse: per step the attacker writes the user's message, the victim replies, the judge gives a verdict (AM3Safety).

Each role has a thread of its own. The victim sees its system prompt, the conversation and the images, nothing else. The
attacker sees the conversation, its images and the step. The judge sees all of it. A step that needs an image gets a
painted one first; the attacker then writes about the image and not from its description. A turn that the victim refused
outright may be backtracked: it is asked in another way. The record keeps it, since accepted and backtracked branches of
one prefix make preference pairs.
"""

from intersafe.checks.messages import message_problem, regularise, repeats_description
from intersafe.errors import CallFailed, JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.base import Reply
from intersafe.recipe.gates import RuleSettings
from intersafe.records import ImageOrigin, Message, PrunedTurn, Reason, Step, Turn
from intersafe.replies import MessageAnswer
from intersafe.stages.calls import structured, unusable
from intersafe.stages.conversation import Conversation, concern_of, described, seed_images
from intersafe.stages.judging import judge_turn
from intersafe.stages.painting import paint


async def converse(conversation: Conversation) -> None:
    """One turn for each step of the plan; `JobEnded` if a message, an image, a reply or a verdict cannot be had."""
    for step in conversation.plan.steps:
        origins = await illustrate(conversation, step)
        while True:
            message = await attacker_writes(conversation, step, origins)
            reply = await victim_replies(conversation, message, origins)
            verdict = await judge_turn(conversation, message, reply.text)
            turn = Turn(message, Message("assistant", reply.text), verdict, reply.finish, origins)
            if verdict.refusal != "full" or len(conversation.backtracked) >= conversation.settings.backtracks:
                break
            conversation.backtracked.append(PrunedTurn(len(conversation.turns), turn, "refused"))
        conversation.turns.append(turn)


async def illustrate(conversation: Conversation, step: Step) -> tuple[ImageOrigin, ...]:
    """The images of the next message: the seed's in the first, a painted one where the plan wants it."""
    first = not conversation.turns
    own = tuple(ImageOrigin(image, "seed") for image in seed_images(conversation.job)) if first else ()
    if not step.picture:
        return own
    painted = await paint(
        conversation.job,
        conversation.cast,
        step.text,
        conversation.settings.tries,
        turns=conversation.turns,
        images=(*conversation.images, *(origin.image for origin in own)),
        texts=conversation.texts,
    )
    return (*own, painted)


async def attacker_writes(
    conversation: Conversation, step: Step, origins: tuple[ImageOrigin, ...], *, image_removed: bool = False
) -> Message:
    """The user's next message with those images; one that leaks, repeats or says nothing is asked for again.

    `image_removed`: the image that this message was about was taken out of the conversation.
    """
    number, tries = len(conversation.turns) + 1, conversation.settings.tries
    own = tuple(origin.image for origin in origins)
    images = (*conversation.images, *own)
    values = concern_of(conversation.job) | {
        "transcript": conversation.transcript,
        "turn": number,
        "n_turns": conversation.job.turns,
        "step": step.text,
        "refused": _was_refused(conversation) and not image_removed,
        "has_image": bool(images),
        "has_picture": bool(origins),
        "judge_reason": conversation.turns[-1].verdict.reason if conversation.turns else "",
    }
    texts = [*conversation.texts, *described(origins)]
    note = "there is no picture with this message, speak of an earlier one or of none" if image_removed else ""
    problem: Reason | None = None
    for _ in range(tries):
        answer = await structured(
            conversation.cast,
            "attacker",
            f"attacker/{conversation.job.strategy}",
            values | {"problem": _told(note, problem)},
            MessageAnswer,
            stage="converse",
            tries=tries,
            images=images,
        )
        text = regularise(answer.message, conversation.rules) if conversation.rules else answer.message.strip()
        # All texts are read as one: a concern that is spread over the turns must not pass.
        if excluded_together([*texts, text]):
            raise JobRejected("converse", "excluded", f"message of turn {number}")
        problem = _problem(conversation, text, origins)
        if problem is None:
            return Message("user", text, own)
    assert problem is not None
    raise JobRejected("converse", problem.word, problem.detail or f"turn {number}")


async def victim_replies(conversation: Conversation, message: Message, origins: tuple[ImageOrigin, ...]) -> Reply:
    """The victim's reply to the conversation so far and this message; `JobEnded` where it cannot be used.

    `origins` are those of the message's images.
    """
    cast, where = conversation.cast, f"reply of turn {len(conversation.turns) + 1}"
    system = Message("system", cast.prompts["victim/system"].render("system", {}))
    before = [earlier for turn in conversation.turns for earlier in (turn.user, turn.reply)]
    reply = await cast.ask(cast.victim, "victim/system", (system, *before, message))
    if reply.finish == "blocked":
        raise CallFailed("converse", unusable("victim", "blocked"), where)
    if reply.finish == "length":
        raise JobRejected("converse", unusable("victim", "truncated"), where)
    if not reply.text.strip():
        raise JobRejected("converse", "empty_message", where)
    if excluded_together([*conversation.texts, *described(origins), message.text, reply.text]):
        raise JobRejected("converse", "excluded", where)
    return Reply(reply.text.strip(), reply.finish)


def _was_refused(conversation: Conversation) -> bool:
    """True if the victim refused an earlier version of the next turn."""
    return bool(conversation.backtracked) and conversation.backtracked[-1].index == len(conversation.turns)


def _told(note: str, problem: Reason | None) -> str:
    """What the attacker is told about its last version."""
    words = " ".join(problem).replace("_", " ") if problem else ""
    return ", ".join(part for part in (note, words) if part)


def _problem(conversation: Conversation, text: str, origins: tuple[ImageOrigin, ...]) -> Reason | None:
    """What is wrong with a user message; its number in the record counts the turns that come later too."""
    descriptions = [*conversation.descriptions, *described(origins)]
    if conversation.rules is None:
        # No recipe lets the victim read a description.
        leaks = repeats_description(text, descriptions, RuleSettings())
        return Reason("leaked_image_description") if leaks else None
    others = [turn.user.text for turn in conversation.turns]
    if conversation.later:
        others += ["", *(turn.user.text for turn in conversation.later)]  # the empty one is this turn's own place
    job = conversation.job
    return message_problem(text, others, job.seed.query, conversation.plan, conversation.rules, descriptions)
