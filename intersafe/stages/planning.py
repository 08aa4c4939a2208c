"""Plan: decompose a seed's query into ordered steps, score each, ask again for the weak ones (AM3Safety).

The planner also says which steps get a painted picture; how many there are is the job's.
"""

from collections.abc import Sequence

from intersafe.errors import JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast, Unanswered
from intersafe.recipe.sections import PlanSettings
from intersafe.records import Job, Plan, Step, StepScore
from intersafe.replies import PicturePlanAnswer, PlanAnswer, StepAnswer
from intersafe.stages.conversation import concern_of, seed_images
from intersafe.stages.judging import score_step


async def make_plan(job: Job, cast: JobCast, settings: PlanSettings) -> Plan:
    """As many steps as the job has turns, each scored at or above the threshold; `JobRejected` if that fails."""
    texts, pictures = await _decompose(job, cast, settings)
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
        steps.append(Step(texts[position], score, position + 1 in pictures))
    return Plan(tuple(steps), retries)


async def _decompose(job: Job, cast: JobCast, settings: PlanSettings) -> tuple[list[str], frozenset[int]]:
    """The steps, and the numbers (from 1) of those that get a picture of their own."""
    values = concern_of(job) | {
        "strategy": job.strategy,
        "strategy_summary": cast.prompts[f"attacker/{job.strategy}"].render("summary", {}),
        "n_steps": job.turns,
        "n_pictures": job.pictures,
    }
    kind: type[PlanAnswer] = PicturePlanAnswer if job.pictures else PlanAnswer
    sizes = (("steps", job.turns), *((("pictures", job.pictures),) if job.pictures else ()))
    reason, problem = "step_count", ""
    for _ in range(settings.tries):
        try:
            answer = await cast.answer(
                "attacker",
                "planner/decompose",
                values | {"problem": problem},
                kind,
                images=seed_images(job),
                tries=settings.tries,
                sizes=sizes,
            )
        except Unanswered as error:
            raise JobRejected("plan", error.reason, error.detail) from None
        pictures = frozenset(answer.pictures if isinstance(answer, PicturePlanAnswer) else ())
        if len(answer.steps) != job.turns:
            reason, problem = "step_count", f"{len(answer.steps)} steps for {job.turns} turns"
        elif len(pictures) != job.pictures or not pictures <= _eligible(job):
            problem = (
                f"pictures for steps {sorted(pictures)}, {job.pictures} of {sorted(_eligible(job))} were asked for"
            )
        else:
            return _allowed(list(answer.steps)), pictures
    raise JobRejected("plan", reason, problem)


def _eligible(job: Job) -> set[int]:
    """The steps that may get a picture; the first has one already where the seed brings it."""
    return set(range(2 if job.seed.image else 1, job.turns + 1))


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
