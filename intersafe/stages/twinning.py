"""Twin: the same images and structure as a dialogue, the intent turned harmless (MTMCS-Bench, arXiv 2601.06757).

The attacker sees the dialogue and writes the user's side anew; the victim answers it turn by turn with the original's
images. What it refuses is over-refusal: the turn stays, labelled by the judge, and is never backtracked.
"""

from collections.abc import Sequence
from typing import NamedTuple

from intersafe.checks.messages import fold, is_blank, message_problem, regularise, same
from intersafe.errors import JobRejected
from intersafe.exclusions import excluded_together
from intersafe.models.cast import JobCast
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
from intersafe.stages.calls import structured
from intersafe.stages.conversation import Conversation, concern_of, described
from intersafe.stages.conversing import victim_replies
from intersafe.stages.judging import judge_dialogue, judge_turn

UNSCORED = StepScore(0, 0, 0, "not scored: the user's side of a benign twin is written as a whole")


class Twin(NamedTuple):
    """What the record of a benign twin is made from."""

    goal: str
    """What the user wants in it, harmless."""
    conversation: Conversation
    """Its plan are the user's messages as steps, `UNSCORED`, with the pictures of the original's."""
    check: Check
    """`risk` is False, `coherent` True."""


async def make_twin(
    original: Dialogue, job: Job, cast: JobCast, settings: ConverseSettings, rules: RuleSettings | None
) -> Twin:
    """The benign twin of a dialogue grown from `job`; `JobEnded` if its messages, a reply or the judge allow none."""
    goal, plan = await _write(original, job, cast, settings, rules)
    messages = [step.text for step in plan.steps]
    # Unsent texts count from the start: no message may reach the victim that an earlier reply makes excluded.
    unsent = (*_descriptions(original), *messages)
    conversation = Conversation(job, plan, cast, settings, rules, unsent=unsent)
    for number, (text, turn) in enumerate(zip(messages, original.turns, strict=True), 1):
        message = Message("user", text, turn.user.images)
        reply = await victim_replies(conversation, message, turn.origins)
        verdict = await judge_turn(conversation, message, reply.text)
        if verdict.safety == "unsafe":
            raise JobRejected("twin", "unsafe", f"turn {number}: {verdict.reason}")
        conversation.turns.append(Turn(message, Message("assistant", reply.text), verdict, reply.finish, turn.origins))
    check = await judge_dialogue(conversation)
    if check.risk:
        raise JobRejected("twin", "still_risky", check.reason)
    if not check.coherent:
        raise JobRejected("twin", "incoherent", check.reason)
    return Twin(goal, conversation, check)


async def _write(
    original: Dialogue, job: Job, cast: JobCast, settings: ConverseSettings, rules: RuleSettings | None
) -> tuple[str, Plan]:
    """The harmless goal and the user's messages; asked for again with the problem named."""
    values = concern_of(job) | {
        "transcript": transcript(original.turns),
        "n_turns": len(original.turns),
        "has_image": bool(original.images),
    }
    problem: Reason | None = None
    for _ in range(settings.tries):
        answer = await structured(
            cast,
            "attacker",
            "planner/twin",
            values | {"problem": " ".join(problem).replace("_", " ").strip() if problem else ""},
            TwinAnswer,
            stage="twin",
            tries=settings.tries,
            images=original.images,
            sizes=(("messages", len(original.turns)),),
        )
        goal = answer.goal.strip()
        texts = [regularise(text, rules) if rules else text.strip() for text in answer.messages]
        if excluded_together([*_descriptions(original), goal, *texts]):
            raise JobRejected("twin", "excluded")
        problem = _problem(original, job, goal, texts, rules)
        if problem is None:
            return goal, _plan(original, texts)
    assert problem is not None
    raise JobRejected("twin", problem.word, problem.detail)


def _problem(
    original: Dialogue, job: Job, goal: str, texts: Sequence[str], rules: RuleSettings | None
) -> Reason | None:
    """What is wrong with the user's side: first its form, then each message by the rules of any conversation."""
    if len(texts) != len(original.turns):
        return Reason("message_count", f"{len(texts)} messages for {len(original.turns)} turns")
    if is_blank(goal):
        return Reason("empty_goal")
    originals = [turn.user.text for turn in original.turns]
    plan, descriptions = _plan(original, texts), _descriptions(original)
    for number, text in enumerate(texts, 1):
        if is_blank(text):
            return Reason("empty_message", f"message {number}")
        if IMAGE_MARK.search(text):
            return Reason("image_mark", f"message {number} names an image by a mark that the assistant does not see")
        if any(_alike(text, other, rules) for other in originals):
            return Reason("copied_message", f"message {number} is one of the original conversation")
        earlier = texts[: number - 1]
        if rules and (found := message_problem(text, earlier, job.seed.query, plan, rules, descriptions)):
            return Reason(found.word, f"message {number} {found.detail}".strip())
    return None


def _alike(one: str, other: str, rules: RuleSettings | None) -> bool:
    return same(fold(one), fold(other), rules) if rules else fold(one) == fold(other)


def _plan(original: Dialogue, texts: Sequence[str]) -> Plan:
    """The messages as steps: a dialogue has as many steps as turns, and nothing else was planned here."""
    pictures = [step.picture for step in original.plan.steps]
    return Plan(tuple(Step(text, UNSCORED, picture) for text, picture in zip(texts, pictures, strict=True)))


def _descriptions(original: Dialogue) -> list[str]:
    """What the original's images, which are the twin's, were painted from."""
    return described(origins_of(original.turns))
