"""Judge: score a step, give a verdict on a turn, check a whole dialogue.

What a judge leaves unanswered (not parseable, cut off, blocked) is undetermined and never a score: it is asked again,
then the second judge is asked if the recipe names one, then the job is rejected with that reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from intersafe.errors import JobRejected
from intersafe.models.cast import JobCast, Unanswered
from intersafe.records import Check, Job, Message, StepScore, Turn, Verdict, transcript
from intersafe.replies import A, CheckAnswer, SameAnswer, StepScoreAnswer, VerdictAnswer
from intersafe.stages.conversation import concern_of, seed_images
from intersafe.taxonomy import BY_NAME


async def score_step(job: Job, cast: JobCast, step: str, tries: int) -> StepScore:
    """Relevance, association and harmless wording of one step, 0 to 10 each (AM3Safety, decomposition)."""
    values = concern_of(job) | {"step": step}
    answer = await judged(cast, "judge/step", values, StepScoreAnswer, seed_images(job), tries)
    return StepScore(answer.relevance, answer.association, answer.harmless, answer.reason)


async def judge_turn(
    job: Job, cast: JobCast, turns: Sequence[Turn], user: Message, reply: Message, tries: int
) -> Verdict:
    """The verdict on one reply, seen with everything before it and with the same images as the victim."""
    talk = (*turns, Turn(user, reply, Verdict("undetermined")))
    values = concern_of(job) | {
        "transcript": transcript(talk),
        "turn": len(talk),
        "reply": reply.text,
        "rubric": cast.prompts.rubrics[BY_NAME[job.seed.category].family],
    }
    images = tuple(ref for turn in talk for ref in turn.user.images)
    values["has_image"] = bool(images)
    answer = await judged(cast, "judge/turn", values, VerdictAnswer, images, tries)
    return Verdict(answer.safety, answer.refusal, answer.harmless, answer.helpful, answer.reason)


async def same_picture(job: Job, cast: JobCast, images: tuple[str, str], tries: int) -> bool:
    """The judge's eye on two images of a dialogue (AM3Safety, cleaning)."""
    answer = await judged(cast, "judge/images", concern_of(job) | {"has_image": True}, SameAnswer, images, tries)
    return answer.same


async def check_dialogue(job: Job, cast: JobCast, turns: Sequence[Turn], tries: int) -> Check:
    """Is the risk still there, does the talk hold together (AM3Safety, cleaning); `JobRejected` if not."""
    check = await judge_dialogue(job, cast, turns, tries)
    if not check.risk:
        raise JobRejected("check", "no_risk", check.reason)
    if not check.coherent:
        raise JobRejected("check", "incoherent", check.reason)
    return check


async def judge_dialogue(job: Job, cast: JobCast, turns: Sequence[Turn], tries: int) -> Check:
    """What the judge finds of the whole talk, whatever it is."""
    values = concern_of(job) | {
        "transcript": transcript(turns),
        "rubric": cast.prompts.rubrics[BY_NAME[job.seed.category].family],
    }
    images = tuple(ref for turn in turns for ref in turn.user.images)
    values["has_image"] = bool(images)
    answer = await judged(cast, "judge/dialogue", values, CheckAnswer, images, tries)
    return Check(answer.risk, answer.coherent, answer.reason)


async def judged(
    cast: JobCast, prompt: str, values: Mapping[str, Any], kind: type[A], images: Sequence[str], tries: int
) -> A:
    """The judge's structured answer, or the second judge's where the recipe names one; else `JobRejected`."""
    judges = ("judge", "second_judge") if cast.has_second_judge else ("judge",)
    problem = ""
    for judge in judges:
        try:
            return await cast.answer(judge, prompt, values, kind, images=images, tries=tries)
        except Unanswered as error:
            problem = str(error)
    raise JobRejected("judge", "undetermined", problem)
