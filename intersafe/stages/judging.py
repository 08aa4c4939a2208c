"""Judge: score a step, give a verdict on a turn, compare two images, check a whole dialogue (AM3Safety).

What a judge leaves unanswered (not parseable, cut off, blocked) is undetermined and never a score: it is asked again,
then the second judge is asked if the recipe names one, then the job is rejected with that reason.
"""

from intersafe.errors import JobRejected
from intersafe.models.cast import JobCast
from intersafe.records import Check, Job, Message, StepScore, Turn, Verdict, images_of, transcript
from intersafe.replies import CheckAnswer, SameAnswer, StepScoreAnswer, VerdictAnswer
from intersafe.stages.calls import judged
from intersafe.stages.conversation import Conversation, concern_of, seed_images
from intersafe.taxonomy import BY_NAME


async def score_step(job: Job, cast: JobCast, step: str, tries: int) -> StepScore:
    """Relevance, association and harmless wording of one step, 0 to 10 each (AM3Safety, decomposition)."""
    values = concern_of(job) | {"step": step}
    answer = await judged(cast, "judge/step", values, StepScoreAnswer, seed_images(job), tries)
    return StepScore(answer.relevance, answer.association, answer.harmless, answer.reason)


async def judge_turn(conversation: Conversation, message: Message, reply: str) -> Verdict:
    """The verdict on the reply to the message, seen with everything before it and with the victim's images."""
    turns = [*conversation.turns, Turn(message, Message("assistant", reply), Verdict("undetermined"))]
    images = images_of(turns)
    values = concern_of(conversation.job) | {
        "transcript": transcript(turns),
        "turn": len(turns),
        "reply": reply,
        "rubric": rubric_of(conversation),
        "has_image": bool(images),
    }
    tries = conversation.settings.tries
    answer = await judged(conversation.cast, "judge/turn", values, VerdictAnswer, images, tries)
    return Verdict(answer.safety, answer.refusal, answer.harmless, answer.helpful, answer.reason)


async def same_image(conversation: Conversation, images: tuple[str, str]) -> bool:
    """True if two images of the conversation show the same to the judge (AM3Safety, cleaning)."""
    values = concern_of(conversation.job) | {"has_image": True}
    answer = await judged(conversation.cast, "judge/images", values, SameAnswer, images, conversation.settings.tries)
    return answer.same


async def check_dialogue(conversation: Conversation) -> Check:
    """Is the risk still there, is the conversation coherent (AM3Safety, cleaning); `JobRejected` if not."""
    check = await judge_dialogue(conversation)
    if not check.risk:
        raise JobRejected("check", "no_risk", check.reason)
    if not check.coherent:
        raise JobRejected("check", "incoherent", check.reason)
    return check


async def judge_dialogue(conversation: Conversation) -> Check:
    """What the judge says of the whole conversation, whatever it is."""
    images = conversation.images
    values = concern_of(conversation.job) | {
        "transcript": conversation.transcript,
        "rubric": rubric_of(conversation),
        "has_image": bool(images),
    }
    tries = conversation.settings.tries
    answer = await judged(conversation.cast, "judge/dialogue", values, CheckAnswer, images, tries)
    return Check(answer.risk, answer.coherent, answer.reason)


def rubric_of(conversation: Conversation) -> str:
    """The rubric of the family that the job's category belongs to."""
    return conversation.cast.prompts.rubrics[BY_NAME[conversation.job.seed.category].family]
