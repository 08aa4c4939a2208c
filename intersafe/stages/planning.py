"""Plan: decompose a seed's query into ordered steps, score each, ask again for the weak ones (AM3Safety)."""

from collections.abc import Sequence

from intersafe.errors import JobRejected
from intersafe.models.cast import JobCast, Unanswered
from intersafe.records import Job, Plan, Step, StepScore
from intersafe.replies import PlanAnswer, StepAnswer
from intersafe.settings import PlanSettings
from intersafe.stages.judging import concern_of, score_step, seed_images
from intersafe.taxonomy import excluded_together


async def make_plan(job: Job, cast: JobCast, settings: PlanSettings) -> Plan:
    """As many steps as the job has turns, each scored at or above the threshold; `JobRejected` if that fails."""
    texts = await _decompose(job, cast, settings)
    steps: list[Step] = []
    retries = 0
    for position in range(job.turns):
        for left in reversed(range(settings.tries)):
            score = await score_step(job, cast, texts[position], settings.tries)
            if score.weakest >= settings.threshold:
                break
            if left == 0:
                raise JobRejected("plan", "weak_step", f"step {position + 1} scored {score.weakest}")
            texts[position] = await _rewrite(job, cast, settings, texts, position, score)
            retries += 1
        steps.append(Step(texts[position], score))
    return Plan(tuple(steps), retries)


async def _decompose(job: Job, cast: JobCast, settings: PlanSettings) -> list[str]:
    values = concern_of(job) | {
        "strategy": job.strategy,
        "strategy_summary": cast.prompts[f"attacker/{job.strategy}"].render("summary", {}),
        "n_steps": job.turns,
    }
    found = 0
    for _ in range(settings.tries):
        try:
            answer = await cast.answer(
                "attacker",
                "planner/decompose",
                values,
                PlanAnswer,
                images=seed_images(job),
                tries=settings.tries,
                items=job.turns,
            )
        except Unanswered as error:
            raise JobRejected("plan", error.reason, error.detail) from None
        found = len(answer.steps)
        if found == job.turns:
            return _allowed(list(answer.steps))
    raise JobRejected("plan", "step_count", f"{found} steps for {job.turns} turns")


async def _rewrite(
    job: Job, cast: JobCast, settings: PlanSettings, texts: Sequence[str], position: int, score: StepScore
) -> str:
    values = concern_of(job) | {
        "steps": list(texts),
        "position": position + 1,
        "step": texts[position],
        "score": score,
    }
    try:
        answer = await cast.answer(
            "attacker", "planner/rewrite", values, StepAnswer, images=seed_images(job), tries=settings.tries
        )
    except Unanswered as error:
        raise JobRejected("plan", error.reason, error.detail) from None
    return _allowed([*texts[:position], answer.step, *texts[position + 1 :]])[position]


def _allowed(steps: list[str]) -> list[str]:
    """The steps; read as one text, since they are sent as one."""
    if excluded_together(steps):
        raise JobRejected("plan", "excluded")
    return steps
