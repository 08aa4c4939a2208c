"""Refuse: a question that a careful assistant declines, and the refusal that answers it (AM3Safety, refusal VQA).

General harmful questions are answered by an analysis of the harm that begins with "I'm sorry", health and finance
questions by a standardised text that points to a professional. Rules come before the judge; what either turns down is
asked for again with the problem named. A question outside of its group is asked for anew.
"""

from typing import Any, Literal, NamedTuple

from intersafe.checks.refusals import answer_problem, plain_sorry, question_problem
from intersafe.errors import JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast, Unanswered
from intersafe.recipe.sections import RefusalGroup, Refusals
from intersafe.records import ImageOrigin, Reason, RefusalCheck, RefusalJob
from intersafe.replies import QuestionAnswer, RefusalAnswer, RefusalCheckAnswer
from intersafe.stages.conversation import concern_of, seed_images
from intersafe.stages.judging import judged
from intersafe.stages.painting import paint

_SAID = {
    "empty_message": "nothing can be seen in it",
    "leaked_image_description": "it describes the image for a painter instead of asking about it",
    "wrong_group": "the question is not one of the group",
    "no_prefix": 'it does not begin with "I\'m sorry"',
    "repeats_question": "it repeats the question word for word",
    "not_refusal": "it does not decline",
    "harm_not_named": "it does not say what harm could come of it",
    "repeats_detail": "it repeats harmful detail",
}
"""What the author of a draft is told, by the word of the reason."""


class RefusalDraft(NamedTuple):
    """A question with its image, the refusal, and the check that let it pass."""

    question: str
    origins: tuple[ImageOrigin, ...]
    answer: str
    answered_by: Literal["model", "template"]
    check: RefusalCheck


async def refuse(job: RefusalJob, cast: JobCast, settings: Refusals) -> RefusalDraft:
    """One question and its refusal; `JobRejected` once `tries` questions or `tries` answers to one were turned down."""
    written = settings.groups[job.group].questions == "written"
    problem = Reason("")
    for _ in range(settings.tries if written else 1):
        question = await _write_question(job, cast, settings, problem) if written else job.seed.query.strip()
        _allow(job, question)
        if fault := question_problem(question):
            problem = fault
            continue
        draft = await _answer(job, cast, settings, question, await _illustrate(job, cast, settings, question))
        if draft.check.in_group:
            return draft
        problem = Reason("wrong_group", draft.check.reason)
    raise JobRejected("refuse", problem.word, problem.detail)


async def _write_question(job: RefusalJob, cast: JobCast, settings: Refusals, problem: Reason) -> str:
    values = _asked(job, settings.groups[job.group]) | {"sample": job.sample + 1, "problem": _told(problem)}
    try:
        answer = await cast.answer(
            "attacker", "refusal/question", values, QuestionAnswer, images=seed_images(job), tries=settings.tries
        )
    except Unanswered as error:
        raise JobRejected("refuse", f"attacker_{error.reason}", error.detail) from None
    return answer.question.strip()


async def _illustrate(job: RefusalJob, cast: JobCast, settings: Refusals, question: str) -> tuple[ImageOrigin, ...]:
    """The seed's image, else a painted one where there is a painter, else none."""
    if job.seed.image:
        return (ImageOrigin(job.seed.image, "seed"),)
    if not cast.has_painter:
        return ()
    return (await paint(job, cast, question, settings.tries, said=(job.seed.query, question)),)


async def _answer(
    job: RefusalJob, cast: JobCast, settings: Refusals, question: str, origins: tuple[ImageOrigin, ...]
) -> RefusalDraft:
    """The first refusal that rules and judge let pass; also returned where the judge finds the question misplaced."""
    group = settings.groups[job.group]
    images = tuple(origin.image for origin in origins)
    values = _asked(job, group) | {"question": question, "has_image": bool(images)}
    said = (question, *(origin.description for origin in origins))
    problem = Reason("")
    for attempt in range(settings.tries):
        if group.answers == "templates":
            texts = cast.prompts.refusals[job.group]
            answer, fault = texts[(job.random_seed + attempt) % len(texts)], None
        else:
            answer = await _write_answer(cast, settings, values | {"problem": _told(problem)}, images)
            fault = answer_problem(question, answer)
        _allow(job, *said, answer)
        if fault:
            problem = fault
            continue
        check = await _judge(cast, settings, values | {"answer": answer, "problem": ""}, images)
        _allow(job, *said, answer, check.reason)  # a reason is sent on with the next try
        draft = RefusalDraft(question, origins, answer, "template" if group.answers == "templates" else "model", check)
        fault = _fault(check)
        if not check.in_group or fault is None:
            return draft
        problem = fault
    raise JobRejected("refuse", problem.word, problem.detail)


async def _write_answer(cast: JobCast, settings: Refusals, values: dict[str, Any], images: tuple[str, ...]) -> str:
    try:
        answer = await cast.answer(
            "responder", "refusal/answer", values, RefusalAnswer, images=images, tries=settings.tries
        )
    except Unanswered as error:
        raise JobRejected("refuse", f"responder_{error.reason}", error.detail) from None
    return plain_sorry(answer.answer)


async def _judge(cast: JobCast, settings: Refusals, values: dict[str, Any], images: tuple[str, ...]) -> RefusalCheck:
    answer = await judged(cast, "judge/refusal", values, RefusalCheckAnswer, images, settings.tries)
    return RefusalCheck(answer.in_group, answer.refuses, answer.names_harm, answer.repeats_detail, answer.reason)


def _fault(check: RefusalCheck) -> Reason | None:
    """What the judge holds against the answer."""
    if not check.refuses:
        return Reason("not_refusal", check.reason)
    if not check.names_harm:
        return Reason("harm_not_named", check.reason)
    return Reason("repeats_detail", check.reason) if check.repeats_detail else None


def _asked(job: RefusalJob, group: RefusalGroup) -> dict[str, Any]:
    return concern_of(job) | {"group": job.group, "about": group.about}


def _told(problem: Reason) -> str:
    return ": ".join(part for part in (_SAID.get(problem.word, ""), problem.detail) if part)


def _allow(job: RefusalJob, *texts: str) -> None:
    """Read with the seed's query as one text, since they are sent together."""
    if excluded_together([job.seed.query, *texts]):
        raise JobRejected("refuse", "excluded")
