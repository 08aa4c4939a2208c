"""Converse: per step the attacker writes the user's message, the victim answers, the judge gives a verdict (AM3Safety).

The roles have threads of their own: the victim sees its system prompt, the talk and the images and nothing else; the
attacker sees the talk and the step; the judge sees all of it. A turn that the victim refused outright may be taken
back and asked in another way; what was taken back stays in the record, since accepted and pruned branches of one
prefix make preference pairs.
"""

from collections.abc import Sequence

from intersafe.errors import CallFailed, JobRejected
from intersafe.messages import message_problem
from intersafe.models.cast import JobCast, Unanswered
from intersafe.records import Job, Message, Plan, PrunedTurn, Turn, transcript
from intersafe.replies import MessageAnswer
from intersafe.settings import ConverseSettings, RuleSettings
from intersafe.stages.judging import concern_of, judge_turn, seed_images
from intersafe.taxonomy import excluded_together


async def converse(
    job: Job, plan: Plan, cast: JobCast, settings: ConverseSettings, rules: RuleSettings | None
) -> tuple[tuple[Turn, ...], tuple[PrunedTurn, ...]]:
    """One turn for each step of the plan, and the turns that were taken back on the way."""
    turns: list[Turn] = []
    pruned: list[PrunedTurn] = []
    for position in range(len(plan.steps)):
        while True:
            refused = bool(pruned) and pruned[-1].index == position
            said = [message.text for turn in (*turns, *(p.turn for p in pruned)) for message in (turn.user, turn.reply)]
            user = await _write_message(job, plan, cast, settings, rules, turns, said, refused)
            turn = await _take_turn(job, cast, settings, turns, said, user)
            if turn.verdict.refusal != "full" or len(pruned) >= settings.backtracks:
                break
            pruned.append(PrunedTurn(position, turn, "refused"))
        turns.append(turn)
    return tuple(turns), tuple(pruned)


async def _take_turn(
    job: Job, cast: JobCast, settings: ConverseSettings, turns: Sequence[Turn], said: Sequence[str], user: Message
) -> Turn:
    """The victim answers the talk so far and this message; the judge gives its verdict."""
    system = Message("system", cast.prompts["victim/system"].render("system", {}))
    talk = [message for turn in turns for message in (turn.user, turn.reply)]
    answer = await cast.ask(cast.victim, "victim/system", (system, *talk, user))
    if answer.finish == "blocked":
        raise CallFailed("converse", "blocked", f"the victim's service blocked turn {len(turns) + 1}")
    if answer.finish == "length":
        raise JobRejected("converse", "truncated", f"reply of turn {len(turns) + 1}")
    if not answer.text.strip():
        raise JobRejected("converse", "empty_reply", f"turn {len(turns) + 1}")
    if excluded_together([*said, user.text, answer.text]):
        raise JobRejected("converse", "excluded", f"reply of turn {len(turns) + 1}")
    reply = Message("assistant", answer.text.strip())
    verdict = await judge_turn(job, cast, turns, user, reply, settings.tries)
    return Turn(user, reply, verdict, answer.finish)


async def _write_message(
    job: Job,
    plan: Plan,
    cast: JobCast,
    settings: ConverseSettings,
    rules: RuleSettings | None,
    turns: Sequence[Turn],
    said: Sequence[str],
    refused: bool,
) -> Message:
    """The user's next message; one that leaks, repeats or says nothing is asked for again, with the problem named."""
    values = concern_of(job) | {
        "transcript": transcript(turns),
        "turn": len(turns) + 1,
        "n_turns": job.turns,
        "step": plan.steps[len(turns)].text,
        "refused": refused,
        "judge_reason": turns[-1].verdict.reason if turns else "",
    }
    problem = None
    for _ in range(settings.tries):
        try:
            answer = await cast.answer(
                "attacker",
                f"attacker/{job.strategy}",
                values | {"problem": " ".join(problem).replace("_", " ") if problem else ""},
                MessageAnswer,
                images=seed_images(job),
                tries=settings.tries,
            )
        except Unanswered as error:
            raise JobRejected("converse", f"attacker_{error.reason}", error.detail) from None
        text = answer.message.strip()
        # All that was said is read as one text: a concern that is spread over the turns must not pass.
        if excluded_together([*said, text]):
            raise JobRejected("converse", "excluded", f"message of turn {len(turns) + 1}")
        earlier = [turn.user.text for turn in turns]
        problem = message_problem(text, earlier, job.seed.query, plan, rules) if rules else None
        if problem is None:
            return Message("user", text, () if turns else seed_images(job))
    assert problem is not None
    raise JobRejected("converse", problem.word, problem.detail or f"turn {len(turns) + 1}")
