"""Respond: for every turn the answer that an aligned assistant should give, judged and stored beside the victim's.

The responder sees what the victim saw before that turn and nothing else that its prompt file does not name: no plan,
no verdict, not the victim's reply to this message. An answer that the judge rejects is asked for again with the judge's
reason. After an unsafe turn of the victim the answer is a safe recovery.
"""

from msgspec import structs

from intersafe.checks.messages import fold, is_blank, same
from intersafe.errors import JobRejected
from intersafe.exclusions import excluded_together
from intersafe.recipe.gates import RuleSettings
from intersafe.recipe.sections import RespondSettings
from intersafe.records import IMAGE_MARK, Aligned, Message, Reason, Turn, Verdict, images_of, transcript
from intersafe.replies import AlignedAnswer, AlignedVerdictAnswer
from intersafe.stages.calls import judged, structured
from intersafe.stages.conversation import Conversation, concern_of
from intersafe.stages.judging import rubric_of

_SAME = RuleSettings()
"""When two answers count as the same; not the recipe's rules, since it may have none."""


async def respond(conversation: Conversation, settings: RespondSettings) -> None:
    """Gives every turn its aligned answer; `JobRejected` if one cannot be had."""
    for number, turn in enumerate(conversation.turns):
        aligned = await _align(conversation, number, settings)
        conversation.turns[number] = structs.replace(turn, aligned=aligned)


async def _align(conversation: Conversation, number: int, settings: RespondSettings) -> Aligned:
    """The answer for turn `number` (0-based), asked for until the rules and the judge accept it."""
    earlier, texts = conversation.turns[:number], conversation.texts
    problem, failure = "", Reason("")
    for _ in range(settings.tries):
        text = await _write(conversation, number, problem, settings.tries)
        if excluded_together([*texts, text]):
            raise JobRejected("respond", "excluded", f"answer of turn {number + 1}")
        if rule := _rule_problem(conversation, text):
            problem, failure = rule.detail, rule
            continue
        answer = await _judge(conversation, number, text, settings.tries)
        if answer.safety == "safe" and answer.appropriate:
            verdict = Verdict(answer.safety, answer.refusal, answer.harmless, answer.helpful, answer.reason)
            return Aligned(text, verdict, recovery=any(turn.verdict.safety == "unsafe" for turn in earlier))
        unsafe = answer.safety == "unsafe"
        failure = Reason("unsafe_answer" if unsafe else "not_appropriate", answer.reason)
        problem = "it was judged unsafe" if unsafe else "it was judged not to suit the user's message"
        if _may_be_told(conversation, answer.reason):
            problem += f": {answer.reason}"
    raise JobRejected("respond", failure.word, f"turn {number + 1}: {failure.detail}")


async def _write(conversation: Conversation, number: int, problem: str, tries: int) -> str:
    """The responder's answer to the message of that turn."""
    earlier, turn = conversation.turns[:number], conversation.turns[number]
    seen, images = len(images_of(earlier)), images_of([*earlier, turn])
    marks = "".join(f"[image {i}] " for i in range(seen + 1, len(images) + 1))
    values = concern_of(conversation.job) | {
        "transcript": transcript(earlier),
        "turn": number + 1,
        "message": f"{marks}{turn.user.text}",
        "problem": problem,
        "has_image": bool(images),
    }
    prompt, cast = "responder/aligned", conversation.cast
    answer = await structured(
        cast, "responder", prompt, values, AlignedAnswer, stage="respond", tries=tries, images=images
    )
    return answer.answer.strip()


async def _judge(conversation: Conversation, number: int, text: str, tries: int) -> AlignedVerdictAnswer:
    """The judge on the answer in place of the victim's, with the same images."""
    user = conversation.turns[number].user
    turns = [*conversation.turns[:number], Turn(user, Message("assistant", text), Verdict("undetermined"))]
    images = images_of(turns)
    values = concern_of(conversation.job) | {
        "transcript": transcript(turns),
        "turn": len(turns),
        "answer": text,
        "rubric": rubric_of(conversation),
        "has_image": bool(images),
    }
    return await judged(conversation.cast, "judge/aligned", values, AlignedVerdictAnswer, images, tries)


def _rule_problem(conversation: Conversation, text: str) -> Reason | None:
    """What is wrong with an answer by the rules that come before the judge."""
    if is_blank(text):
        return Reason("empty_message", "it was empty")
    if IMAGE_MARK.search(text):
        return Reason("image_mark", "it names an image by a mark in brackets, which the user does not see")
    for turn in conversation.turns:
        if turn.verdict.safety == "unsafe" and same(fold(text), fold(turn.reply.text), _SAME):
            return Reason("unsafe_answer", "it repeats a reply that was judged unsafe")
    return None


def _may_be_told(conversation: Conversation, reason: str) -> bool:
    """True if a judge's reason may go to the responder, who must not learn the seed's query from it."""
    query = fold(conversation.job.seed.query)
    return f" {query} " not in f" {fold(reason)} " and not excluded_together([*conversation.texts, reason])
