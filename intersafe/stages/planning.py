"""Plan: decompose a seed's query into ordered steps, score each, ask again for the weak ones (AM3Safety).

The planner also says which steps get a painted image; how many do is part of the job.
"""

from collections.abc import Sequence

from intersafe.errors import JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast
from intersafe.recipe.sections import PlanSettings
from intersafe.records import Job, Plan, Reason, Step, StepScore
from intersafe.replies import PicturePlanAnswer, PlanAnswer, StepAnswer
from intersafe.stages.calls import structured
from intersafe.stages.conversation import concern_of, seed_images
from intersafe.stages.judging import score_step


async def make_plan(job: Job, cast: JobCast, settings: PlanSettings) -> Plan:
    """One step for each turn of the job, each scored at or above the threshold; `JobRejected` if that fails."""
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
    """The steps, and the numbers (from 1) of those that get a painted image."""
    values = concern_of(job) | {
        "strategy": job.strategy,
        "strategy_summary": cast.prompts[f"attacker/{job.strategy}"].render("summary", {}),
        "n_steps": job.turns,
        "n_pictures": job.pictures,
    }
    kind: type[PlanAnswer] = PicturePlanAnswer if job.pictures else PlanAnswer
    sizes = (("steps", job.turns), *((("pictures", job.pictures),) if job.pictures else ()))
    problem: Reason | None = None
    for _ in range(settings.tries):
        answer = await structured(
            cast,
            "attacker",
            "planner/decompose",
            values | {"problem": problem.detail if problem else ""},
            kind,
            stage="plan",
            tries=settings.tries,
            images=seed_images(job),
            sizes=sizes,
        )
        pictures = frozenset(answer.pictures if isinstance(answer, PicturePlanAnswer) else ())
        problem = _problem(job, answer.steps, pictures)
        if problem is None:
            return _allowed(list(answer.steps)), pictures
    assert problem is not None
    raise JobRejected("plan", problem.word, problem.detail)


def _problem(job: Job, steps: Sequence[str], pictures: frozenset[int]) -> Reason | None:
    """What is wrong with a plan before its steps are scored."""
    if len(steps) != job.turns:
        return Reason("step_count", f"{len(steps)} steps for {job.turns} turns")
    # The first step has an image already where the seed brings one.
    eligible = range(2 if job.seed.image else 1, job.turns + 1)
    if len(pictures) != job.pictures or not pictures <= set(eligible):
        asked = f"{job.pictures} of {list(eligible)} were asked for"
        return Reason("picture_steps", f"pictures for steps {sorted(pictures)}, {asked}")
    return None


async def _rewrite(
    job: Job, cast: JobCast, settings: PlanSettings, texts: Sequence[str], position: int, score: StepScore
) -> str:
    """Another text for the step at `position`."""
    values = concern_of(job) | {
        "steps": list(texts),
        "position": position + 1,
        "step": texts[position],
        "score": score,
    }
    tries, images = settings.tries, seed_images(job)
    answer = await structured(
        cast, "attacker", "planner/rewrite", values, StepAnswer, stage="plan", tries=tries, images=images
    )
    return _allowed([*texts[:position], answer.step, *texts[position + 1 :]])[position]


def _allowed(steps: list[str]) -> list[str]:
    """The steps; they are read as one text, since the attacker and the judge are sent all of them."""
    if excluded_together(steps):
        raise JobRejected("plan", "excluded")
    return steps
