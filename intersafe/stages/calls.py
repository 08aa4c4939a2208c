"""Calls of the stages: structured answers, the judge's, and the reason of a job that a call leaves without one.

A reply that cannot be used ends its job with the reason `<role>_<fault>`, the same in every stage: the role is
`attacker`, `responder`, `victim` or `painter`, the fault is one of

    unparseable   no answer of the schema, though asked again
    truncated     cut off by the token limit
    blocked       blocked by the service's filter
    refused       the service says that the model refused the call
    no_image, image_url, bad_image     of a painter: nothing, a link instead of bytes, bytes that are no image

A judge has no such reason: what it leaves unanswered is `undetermined`.

The stages (column `stage` of a rejected or failed job) and their reasons:

    plan       <attacker>, excluded, step_count, picture_steps, weak_step
    converse   <attacker>, victim_blocked (failed), victim_truncated, excluded, empty_message, repeated_message,
               leaked_plan, leaked_image_description
    paint      <attacker>, <painter> (failed), excluded, empty_description
    clean      similar_images; a turn that is asked again ends as in converse
    check      no_risk, incoherent
    respond    <responder>, excluded, empty_message, image_mark, unsafe_answer, not_appropriate
    refuse     <attacker>, <responder>, excluded, empty_message, leaked_image_description, wrong_group, no_prefix,
               repeats_question, not_refusal, harm_not_named, repeats_detail
    twin       <attacker>, excluded, message_count, empty_goal, empty_message, image_mark, copied_message,
               repeated_message, leaked_plan, leaked_image_description, unsafe, still_risky, incoherent;
               a victim's reply ends it as in converse
    judge      undetermined
    gates      excluded, turn_count, empty_message, victim_truncated, repeated_message, leaked_plan,
               leaked_image_description, image_without_origin, language, similar_images, near_duplicate,
               category_full, strategy_full, victim_full, turns_full; of a refusal sample also no_prefix,
               repeats_question, group_complete

`<attacker>` stands for `attacker_unparseable` and the like. All these jobs are rejected but for those marked failed,
where the service may be at fault.

Where no reply comes at all, the stage is the role that was called (`attacker`, `victim`, `judge`, `second_judge`,
`responder`, `painter`). The job is rejected as `too_long` where the conversation outgrew the model's context, and as
`excluded` where an unparseable answer must not be sent back with its correction. It fails as `too_long` where the first
prompt does not fit, or as `bad_request`, `server_error` or `out_of_memory`. A job that meets a defect of intersafe
fails in the stage `internal`, with the name of the exception as its reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from intersafe.errors import JobRejected
from intersafe.models.cast import JobCast, Unanswered
from intersafe.replies import A


async def structured(
    cast: JobCast,
    role: str,
    prompt: str,
    values: Mapping[str, Any],
    kind: type[A],
    *,
    stage: str,
    tries: int,
    images: Sequence[str] = (),
    sizes: tuple[tuple[str, int], ...] = (),
) -> A:
    """The role's structured answer to a prompt file; `JobRejected` in `stage` if there is none after `tries`.

    `images` go with the prompt; `sizes` fixes the lengths of lists in the answer.
    """
    try:
        return await cast.answer(role, prompt, values, kind, images=images, tries=tries, sizes=sizes)
    except Unanswered as error:
        raise JobRejected(stage, unusable(role, error.reason), error.detail) from None


async def judged(
    cast: JobCast, prompt: str, values: Mapping[str, Any], kind: type[A], images: Sequence[str], tries: int
) -> A:
    """The judge's structured answer, or the second judge's where the recipe names one; else `JobRejected`."""
    judges = ("judge", "second_judge") if cast.has_second_judge else ("judge",)
    problem = ""
    for judge in judges:
        try:
            return await cast.answer(judge, prompt, values, kind, images=images, tries=tries)
        except Unanswered as error:
            problem = str(error)
    raise JobRejected("judge", "undetermined", problem)


def unusable(role: str, fault: str) -> str:
    """The reason of a job that ends because a reply of that role cannot be used."""
    return f"{role}_{fault}"
