"""Respond: for every turn the answer that an aligned assistant should give, judged and stored beside the victim's.

The responder sees what the victim saw before that turn and nothing else that its prompt file does not name: no plan,
no verdict, not the victim's reply to this message. An answer that the judge turns down is asked for again with the
judge's reason; after an unsafe turn of the victim the answer is a safe recovery.
"""

from collections.abc import Sequence

from msgspec import structs

from intersafe.checks.messages import fold, is_blank, same
from intersafe.errors import JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast, Unanswered
from intersafe.recipe.gates import RuleSettings
from intersafe.recipe.sections import RespondSettings
from intersafe.records import IMAGE_MARK, Aligned, Job, Message, Reason, Turn, Verdict, images_of, said_in, transcript
from intersafe.replies import AlignedAnswer, AlignedVerdictAnswer
from intersafe.stages.conversation import concern_of
from intersafe.stages.judging import judged
from intersafe.taxonomy import BY_NAME

_SAME = RuleSettings()
"""How near two answers are the same; not the recipe's, since it may switch the rules off."""


async def respond(
    job: Job, cast: JobCast, turns: Sequence[Turn], settings: RespondSettings, *, said: Sequence[str] = ()
) -> tuple[Turn, ...]:
    """The turns, each with its aligned answer; `JobRejected` if one cannot be had.

    `said` is what belongs to the record beside the turns (those that were taken back): the exclusion reads all as one.
    """
    texts = [*said, *said_in(turns)]
    answered: list[Turn] = []
    for place in range(len(turns)):
        aligned = await _align(job, cast, turns, place, texts, settings)
        texts.append(aligned.text)
        answered.append(structs.replace(turns[place], aligned=aligned))
    return tuple(answered)


async def _align(
    job: Job, cast: JobCast, turns: Sequence[Turn], place: int, said: Sequence[str], settings: RespondSettings
) -> Aligned:
    """The answer for turn `place` (0-based), asked for until the rules and the judge let it pass."""
    problem, failure = "", Reason("")
    for _ in range(settings.tries):
        text = await _write(job, cast, turns, place, problem, settings.tries)
        if excluded_together([*said, text]):
            raise JobRejected("respond", "excluded", f"answer of turn {place + 1}")
        if rule := _rule_problem(text, turns):
            problem, failure = rule.detail, rule
            continue
        answer = await _judge(job, cast, turns[:place], turns[place], text, settings.tries)
        if answer.safety == "safe" and answer.appropriate:
            verdict = Verdict(answer.safety, answer.refusal, answer.harmless, answer.helpful, answer.reason)
            return Aligned(text, verdict, recovery=any(t.verdict.safety == "unsafe" for t in turns[:place]))
        unsafe = answer.safety == "unsafe"
        failure = Reason("unsafe_answer" if unsafe else "not_appropriate", answer.reason)
        problem = "it was judged unsafe" if unsafe else "it was judged not to suit the user's message"
        if _may_be_told(answer.reason, job, said):
            problem += f": {answer.reason}"
    raise JobRejected("respond", failure.word, f"turn {place + 1}: {failure.detail}")


async def _write(job: Job, cast: JobCast, turns: Sequence[Turn], place: int, problem: str, tries: int) -> str:
    earlier, turn = turns[:place], turns[place]
    seen, images = len(images_of(earlier)), images_of(turns[: place + 1])
    marks = "".join(f"[image {number}] " for number in range(seen + 1, len(images) + 1))
    values = concern_of(job) | {
        "transcript": transcript(earlier),
        "turn": place + 1,
        "message": f"{marks}{turn.user.text}",
        "problem": problem,
        "has_image": bool(images),
    }
    try:
        answer = await cast.answer("responder", "responder/aligned", values, AlignedAnswer, images=images, tries=tries)
    except Unanswered as error:
        raise JobRejected("respond", f"responder_{error.reason}", error.detail) from None
    return answer.answer.strip()


async def _judge(
    job: Job, cast: JobCast, earlier: Sequence[Turn], turn: Turn, text: str, tries: int
) -> AlignedVerdictAnswer:
    """The judge on the answer in the place of the victim's, with the same images."""
    talk = (*earlier, Turn(turn.user, Message("assistant", text), Verdict("undetermined")))
    images = images_of(talk)
    values = concern_of(job) | {
        "transcript": transcript(talk),
        "turn": len(talk),
        "answer": text,
        "rubric": cast.prompts.rubrics[BY_NAME[job.seed.category].family],
        "has_image": bool(images),
    }
    return await judged(cast, "judge/aligned", values, AlignedVerdictAnswer, images, tries)


def _rule_problem(text: str, turns: Sequence[Turn]) -> Reason | None:
    """What is wrong with an answer before a judge need look at it."""
    if is_blank(text):
        return Reason("empty_answer", "it was empty")
    if IMAGE_MARK.search(text):
        return Reason("image_mark", "it names an image by a mark in brackets, which the user does not see")
    for turn in turns:
        if turn.verdict.safety == "unsafe" and same(fold(text), fold(turn.reply.text), _SAME):
            return Reason("unsafe_answer", "it repeats a reply that was judged unsafe")
    return None


def _may_be_told(reason: str, job: Job, said: Sequence[str]) -> bool:
    """True if a judge's reason may go to the responder, who must not learn the seed's query from it."""
    return f" {fold(job.seed.query)} " not in f" {fold(reason)} " and not excluded_together([*said, reason])
