"""Refuse: a question that a careful assistant declines, and the refusal that answers it (AM3Safety, refusal VQA).

General harmful questions are answered by an analysis of the harm that begins with "I'm sorry", health and finance
questions by a standardised text that points to a professional. Rules come before the judge. What either rejects is
asked for again with the problem named; a question that does not belong to its group is replaced by another one.
"""

from typing import Any, Literal, NamedTuple

from intersafe.checks.refusals import answer_problem, plain_sorry, question_problem
from intersafe.errors import JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast
from intersafe.recipe.sections import RefusalGroup, Refusals
from intersafe.records import ImageOrigin, Reason, RefusalCheck, RefusalJob
from intersafe.replies import QuestionAnswer, RefusalAnswer, RefusalCheckAnswer
from intersafe.stages.calls import judged, structured
from intersafe.stages.conversation import concern_of, described, seed_images
from intersafe.stages.painting import paint

_PROBLEMS = {
    "empty_message": "nothing can be seen in it",
    "leaked_image_description": "it describes the image for a painter instead of asking about it",
    "wrong_group": "the question is not one of the group",
    "no_prefix": 'it does not begin with "I\'m sorry"',
    "repeats_question": "it repeats the question word for word",
    "not_refusal": "it does not decline",
    "harm_not_named": "it does not say what harm could come of it",
    "repeats_detail": "it repeats harmful detail",
}
"""What the model that wrote a draft is told, by the word of the reason."""


class RefusalDraft(NamedTuple):
    """A question with its image, the refusal, and the judge's check of both."""

    question: str
    origins: tuple[ImageOrigin, ...]
    answer: str
    answered_by: Literal["model", "template"]
    check: RefusalCheck


async def refuse(job: RefusalJob, cast: JobCast, settings: Refusals) -> RefusalDraft:
    """One question and its refusal; `JobEnded` after `tries` rejected questions, or `tries` rejected answers to one."""
    written = settings.groups[job.group].questions == "written"
    problem = Reason("")
    for _ in range(settings.tries if written else 1):
        question = await _write_question(job, cast, settings, problem) if written else job.seed.query.strip()
        _check_excluded(job, question)
        if fault := question_problem(question):
            problem = fault
            continue
        draft = await _answer(job, cast, settings, question, await _illustrate(job, cast, settings, question))
        if draft.check.in_group:
            return draft
        problem = Reason("wrong_group", draft.check.reason)
    raise JobRejected("refuse", problem.word, problem.detail)


async def _write_question(job: RefusalJob, cast: JobCast, settings: Refusals, problem: Reason) -> str:
    values = _values(job, settings.groups[job.group]) | {"sample": job.sample + 1, "problem": _told(problem)}
    tries, images = settings.tries, seed_images(job)
    answer = await structured(
        cast, "attacker", "refusal/question", values, QuestionAnswer, stage="refuse", tries=tries, images=images
    )
    return answer.question.strip()


async def _illustrate(job: RefusalJob, cast: JobCast, settings: Refusals, question: str) -> tuple[ImageOrigin, ...]:
    """The seed's image, else a painted one where there is a painter, else none."""
    if job.seed.image:
        return (ImageOrigin(job.seed.image, "seed"),)
    if not cast.has_painter:
        return ()
    return (await paint(job, cast, question, settings.tries, texts=(job.seed.query, question)),)


async def _answer(
    job: RefusalJob, cast: JobCast, settings: Refusals, question: str, origins: tuple[ImageOrigin, ...]
) -> RefusalDraft:
    """The first refusal that the rules and the judge accept, or one whose question the judge finds in no group."""
    group = settings.groups[job.group]
    images = tuple(origin.image for origin in origins)
    values = _values(job, group) | {"question": question, "has_image": bool(images)}
    texts = (question, *described(origins))
    problem = Reason("")
    for attempt in range(settings.tries):
        if group.answers == "templates":
            refusals = cast.prompts.refusals[job.group]
            answer, fault = refusals[(job.random_seed + attempt) % len(refusals)], None
        else:
            answer = await _write_answer(cast, settings, values | {"problem": _told(problem)}, images)
            fault = answer_problem(question, answer)
        _check_excluded(job, *texts, answer)
        if fault:
            problem = fault
            continue
        check = await _judge(cast, settings, values | {"answer": answer, "problem": ""}, images)
        _check_excluded(job, *texts, answer, check.reason)  # the next try is told the reason
        draft = RefusalDraft(question, origins, answer, "template" if group.answers == "templates" else "model", check)
        fault = _fault(check)
        if not check.in_group or fault is None:
            return draft
        problem = fault
    raise JobRejected("refuse", problem.word, problem.detail)


async def _write_answer(cast: JobCast, settings: Refusals, values: dict[str, Any], images: tuple[str, ...]) -> str:
    tries = settings.tries
    answer = await structured(
        cast, "responder", "refusal/answer", values, RefusalAnswer, stage="refuse", tries=tries, images=images
    )
    return plain_sorry(answer.answer)


async def _judge(cast: JobCast, settings: Refusals, values: dict[str, Any], images: tuple[str, ...]) -> RefusalCheck:
    answer = await judged(cast, "judge/refusal", values, RefusalCheckAnswer, images, settings.tries)
    return RefusalCheck(answer.in_group, answer.refuses, answer.names_harm, answer.repeats_detail, answer.reason)


def _fault(check: RefusalCheck) -> Reason | None:
    """What is wrong with the answer by the judge's check."""
    if not check.refuses:
        return Reason("not_refusal", check.reason)
    if not check.names_harm:
        return Reason("harm_not_named", check.reason)
    return Reason("repeats_detail", check.reason) if check.repeats_detail else None


def _values(job: RefusalJob, group: RefusalGroup) -> dict[str, Any]:
    return concern_of(job) | {"group": job.group, "about": group.about}


def _told(problem: Reason) -> str:
    return ": ".join(part for part in (_PROBLEMS.get(problem.word, ""), problem.detail) if part)


def _check_excluded(job: RefusalJob, *texts: str) -> None:
    """`JobRejected` if the texts are excluded; read with the seed's query as one, since they are sent together."""
    if excluded_together([job.seed.query, *texts]):
        raise JobRejected("refuse", "excluded")
