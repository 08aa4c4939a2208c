"""Twin: the same images and structure as a dialogue, the intent turned harmless (MTMCS-Bench, arXiv 2601.06757).

The attacker sees the dialogue and writes the user's side anew; the victim answers it turn by turn with the original's
images. What it refuses is over-refusal: it is kept, labelled by the judge, and never taken back.
"""

from collections.abc import Sequence
from typing import NamedTuple

from intersafe.checks.messages import fold, is_blank, message_problem, regularise, same
from intersafe.errors import JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast, Unanswered
from intersafe.recipe.gates import RuleSettings
from intersafe.recipe.sections import ConverseSettings
from intersafe.records import (
    IMAGE_MARK,
    Check,
    Dialogue,
    Job,
    Message,
    Plan,
    Reason,
    Step,
    StepScore,
    Turn,
    origins_of,
    transcript,
)
from intersafe.replies import TwinAnswer
from intersafe.stages.conversation import concern_of
from intersafe.stages.conversing import take_turn
from intersafe.stages.judging import judge_dialogue

UNSCORED = StepScore(0, 0, 0, "not scored: the user's side of a benign twin is written as a whole")


class Twin(NamedTuple):
    """What the record of a benign twin is made from."""

    goal: str
    """What the user wants in it, harmless."""
    plan: Plan
    """The user's messages as steps, `UNSCORED`, with the pictures of the original's."""
    turns: tuple[Turn, ...]
    check: Check
    """`risk` is False, `coherent` True."""


async def make_twin(
    dialogue: Dialogue, job: Job, cast: JobCast, settings: ConverseSettings, rules: RuleSettings | None
) -> Twin:
    """The benign twin of a dialogue grown from `job`; `JobRejected` if its messages or the judge allow none."""
    goal, plan = await _write(dialogue, job, cast, settings, rules)
    messages = [step.text for step in plan.steps]
    # All messages from the start: none may reach the victim that an earlier reply makes part of an excluded talk.
    said = [*_descriptions(dialogue), *messages]
    turns: list[Turn] = []
    for text, original in zip(messages, dialogue.turns, strict=True):
        user = Message("user", text, original.user.images)
        turn = await take_turn(job, cast, settings.tries, turns, said, user, original.origins)
        if turn.verdict.safety == "unsafe":
            raise JobRejected("twin", "unsafe", f"turn {len(turns) + 1}: {turn.verdict.reason}")
        turns.append(turn)
        said.append(turn.reply.text)
    check = await judge_dialogue(job, cast, turns, settings.tries)
    if check.risk:
        raise JobRejected("twin", "still_risky", check.reason)
    if not check.coherent:
        raise JobRejected("twin", "incoherent", check.reason)
    return Twin(goal, plan, tuple(turns), check)


async def _write(
    dialogue: Dialogue, job: Job, cast: JobCast, settings: ConverseSettings, rules: RuleSettings | None
) -> tuple[str, Plan]:
    """The harmless goal and the user's messages; asked for again with the problem named."""
    values = concern_of(job) | {
        "transcript": transcript(dialogue.turns),
        "n_turns": len(dialogue.turns),
        "has_image": bool(dialogue.images),
    }
    sizes = (("messages", len(dialogue.turns)),)
    problem: Reason | None = None
    for _ in range(settings.tries):
        told = " ".join(problem).replace("_", " ").strip() if problem else ""
        try:
            answer = await cast.answer(
                "attacker",
                "planner/twin",
                values | {"problem": told},
                TwinAnswer,
                images=dialogue.images,
                tries=settings.tries,
                sizes=sizes,
            )
        except Unanswered as error:
            raise JobRejected("twin", f"attacker_{error.reason}", error.detail) from None
        goal = answer.goal.strip()
        texts = [regularise(text, rules) if rules else text.strip() for text in answer.messages]
        if excluded_together([*_descriptions(dialogue), goal, *texts]):
            raise JobRejected("twin", "excluded")
        problem = _problem(dialogue, job, goal, texts, rules)
        if problem is None:
            return goal, _plan(dialogue, texts)
    assert problem is not None
    raise JobRejected("twin", problem.word, problem.detail)


def _problem(
    dialogue: Dialogue, job: Job, goal: str, texts: Sequence[str], rules: RuleSettings | None
) -> Reason | None:
    """What is wrong with the user's side, first its form, then each message by the rules that hold for any talk."""
    if len(texts) != len(dialogue.turns):
        return Reason("message_count", f"{len(texts)} messages for {len(dialogue.turns)} turns")
    if is_blank(goal):
        return Reason("empty_goal")
    originals = [turn.user.text for turn in dialogue.turns]
    plan, descriptions = _plan(dialogue, texts), _descriptions(dialogue)
    for place, text in enumerate(texts):
        if is_blank(text):
            return Reason("empty_message", f"message {place + 1}")
        if IMAGE_MARK.search(text):
            return Reason("image_mark", f"message {place + 1} names an image by a mark that the assistant does not see")
        if any(_alike(text, original, rules) for original in originals):
            return Reason("copied_message", f"message {place + 1} is one of the original conversation")
        if rules and (found := message_problem(text, texts[:place], job.seed.query, plan, rules, descriptions)):
            return Reason(found.word, f"message {place + 1} {found.detail}".strip())
    return None


def _alike(one: str, other: str, rules: RuleSettings | None) -> bool:
    return same(fold(one), fold(other), rules) if rules else fold(one) == fold(other)


def _plan(dialogue: Dialogue, texts: Sequence[str]) -> Plan:
    """The messages as steps: a dialogue has as many steps as turns, and nothing else was planned here."""
    pictures = [step.picture for step in dialogue.plan.steps]
    return Plan(tuple(Step(text, UNSCORED, picture) for text, picture in zip(texts, pictures, strict=True)))


def _descriptions(dialogue: Dialogue) -> list[str]:
    """What the painter was told for the original's images, which are the twin's."""
    return [origin.description for origin in origins_of(dialogue.turns) if origin.description]
