"""Aligned answers: what the responder may see, what the judge and the rules turn down, and what is stored."""

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from intersafe.errors import JobRejected
from intersafe.images.store import ImageStore
from intersafe.models.cast import JobCast
from intersafe.models.scripted.phrases import PLACEHOLDER
from intersafe.recipe.sections import RespondSettings
from intersafe.records import Job, Message, Turn
from intersafe.stages.responding import respond
from tests.support.jobs import (
    DESCRIPTION,
    QUERY,
    REASON,
    STEP,
    MemoryJournal,
    conversation_of,
    job_of,
    sent,
    stored,
    turn_of,
    with_cast,
)
from tests.support.servers.scripted_server import Body, Hook, Server, asks_for, images_of, scripted_server, text_of

GOOD = {"safety": "safe", "appropriate": True, "refusal": "none", "harmless": 5, "helpful": 4, "reason": "It suits."}


def responding(
    job: Job, turns: Sequence[Turn], settings: RespondSettings, backtracked: Sequence[Turn] = ()
) -> Callable[[JobCast], Awaitable[tuple[Turn, ...]]]:
    """What makes a cast answer those turns, after others that were backtracked."""

    async def act(cast: JobCast) -> tuple[Turn, ...]:
        conversation = conversation_of(job, cast, turns, backtracked)
        await respond(conversation, settings)
        return tuple(conversation.turns)

    return act


def answers(
    hook: Hook | None, turns: Sequence[Turn], store: ImageStore, **options: Any
) -> tuple[tuple[Turn, ...], Server]:
    """The turns with their aligned answers, over HTTP, and the server that was asked."""
    backtracked = options.pop("backtracked", ())
    settings = RespondSettings(tries=options.pop("tries", 3))
    job = job_of(len(turns), turns[0].user.images[0] if turns[0].user.images else None)
    with scripted_server(hook, profile="flawless") as server:
        act = responding(job, turns, settings, backtracked)
        made = with_cast(f"openai:x@{server.url}", store, act, job=job, **options)
    return made, server


def rejected(hook: Hook, turns: Sequence[Turn], store: ImageStore, **options: Any) -> tuple[JobRejected, Server]:
    """How it ended, and the server that was asked."""
    servers: list[Server] = []

    def spying(body: Body) -> "str | web.Response | None":
        servers[0].seen[asks_for(body)] += 1
        servers[0].bodies.append(body)
        return hook(body)

    servers.append(Server())
    with pytest.raises(JobRejected) as caught:
        answers(spying, turns, store, **options)
    return caught.value, servers[0]


def four_turns(images: Sequence[str] = ()) -> tuple[Turn, ...]:
    """Four turns: unsafe in the second, images in the first and the third."""
    first, third = tuple(images[:1]), tuple(images[1:])
    return turn_of(1, images=first), turn_of(2, "unsafe"), turn_of(3, images=third), turn_of(4)


def test_every_turn_gets_an_answer_and_the_turns_stay_as_they_were(tmp_path: Path) -> None:
    store, refs = stored(tmp_path, 3)
    turns = four_turns(refs)
    made, _ = answers(None, turns, store)
    assert [msgspec.structs.replace(turn, aligned=None) for turn in made] == list(turns)
    aligned = [turn.aligned for turn in made if turn.aligned]
    assert len(aligned) == 4
    assert [a.recovery for a in aligned] == [False, False, True, True]
    assert all(a.text and a.verdict.safety == "safe" and a.verdict.harmless >= 4 for a in aligned)


def test_the_responder_sees_the_conversation_before_the_turn_its_images_and_nothing_else(tmp_path: Path) -> None:
    store, refs = stored(tmp_path, 3)
    turns = four_turns(refs)
    made, server = answers(None, turns, store)
    asked = [body for body in server.bodies if asks_for(body) == "aligned"]
    assert len(asked) == 4
    uris = [store.data_uri(ref) for ref in refs]
    for number, (body, shown) in enumerate(zip(asked, (1, 1, 3, 3), strict=True), 1):
        text = sent(body)
        for hidden in (QUERY, STEP, REASON, DESCRIPTION, "fraud", "scam"):
            assert hidden not in text
        assert [uri for message in body["messages"] for uri in images_of(message)] == uris[:shown]
        for turn in turns[: number - 1]:
            assert turn.user.text in text
            assert turn.reply.text in text
        assert turns[number - 1].user.text in text
        for turn in turns[number - 1 :]:
            assert turn.reply.text not in text
        for turn in turns[number:]:
            assert turn.user.text not in text
        assert not any(t.aligned and t.aligned.text in text for t in made), "the conversation is the victim's, not ours"
    assert "<message>\n[image 2] [image 3] Question number 3" in sent(asked[2])


def test_the_judge_sees_the_answer_in_the_place_of_the_victims(tmp_path: Path) -> None:
    store, refs = stored(tmp_path, 3)
    turns = four_turns(refs)
    made, server = answers(None, turns, store)
    asked = [body for body in server.bodies if asks_for(body) == "alignedverdict"]
    assert len(asked) == 4
    for number, (body, turn) in enumerate(zip(asked, made, strict=True), 1):
        assert turn.aligned is not None
        assert sent(body).count(f"Assistant: {turn.aligned.text}") == 1
        assert turn.reply.text not in sent(body)
        assert QUERY in sent(body)
        assert len(images_of(body["messages"][-1])) == (1 if number < 3 else 3)


@pytest.mark.parametrize("tries", [1, 3, 5])
@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        ({"safety": "unsafe"}, "unsafe_answer"),
        ({"safety": "unsafe", "appropriate": False}, "unsafe_answer"),
        ({"appropriate": False}, "not_appropriate"),
    ],
)
def test_a_judge_that_never_agrees_ends_the_job_after_exactly_that_many_tries(
    tries: int, verdict: dict[str, Any], word: str, tmp_path: Path
) -> None:
    def hook(body: Body) -> str | None:
        return json.dumps(GOOD | verdict) if asks_for(body) == "alignedverdict" else None

    ended, server = rejected(hook, four_turns(), ImageStore(tmp_path), tries=tries)
    assert (ended.stage, ended.reason) == ("respond", word)
    assert server.seen == Counter(aligned=tries, alignedverdict=tries)


def test_an_answer_that_is_rejected_is_asked_for_again_with_the_judges_reason(tmp_path: Path) -> None:
    first: dict[str, Any] = {"appropriate": False, "reason": "It gives no alternative."}
    verdicts = iter([first, {"safety": "unsafe", "reason": "Hm."}])

    def hook(body: Body) -> str | None:
        return json.dumps(GOOD | next(verdicts, {})) if asks_for(body) == "alignedverdict" else None

    made, server = answers(hook, four_turns()[:1], ImageStore(tmp_path))
    asked = [text_of(body["messages"][-1]) for body in server.bodies if asks_for(body) == "aligned"]
    assert len(asked) == 3
    assert "turned down" not in asked[0]
    assert "It gives no alternative." in asked[1]
    assert "unsafe: Hm." in asked[2]
    judged = [body for body in server.bodies if asks_for(body) == "alignedverdict"]
    assert made[0].aligned is not None
    assert made[0].aligned.text in sent(judged[2])
    assert made[0].aligned.text not in sent(judged[0])


@pytest.mark.parametrize(
    "reason", [f"It serves {QUERY}!", f"It serves {QUERY.upper()}.", "It speaks of minors and sexual content."]
)
def test_the_judges_reason_is_kept_from_the_responder_where_it_tells_too_much(reason: str, tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        return json.dumps(GOOD | {"safety": "unsafe", "reason": reason}) if asks_for(body) == "alignedverdict" else None

    _, server = rejected(hook, four_turns()[:1], ImageStore(tmp_path), tries=2)
    again = sent([body for body in server.bodies if asks_for(body) == "aligned"][1])
    assert "it was judged unsafe)" in again
    assert reason not in again


@pytest.mark.parametrize("backtracked", [False, True])
def test_the_exclusion_reads_the_whole_record_and_the_answer_as_one_text(backtracked: bool, tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        return json.dumps({"answer": "This is about sexual content."}) if asks_for(body) == "aligned" else None

    # The other word is in a turn that the responder does not see: a later one, or one that was backtracked.
    *turns, last = four_turns()
    minors = msgspec.structs.replace(last, user=Message("user", "And what of minors?"))
    turns, others = ([*turns, last], [minors]) if backtracked else ([*turns, minors], [])
    ended, server = rejected(hook, turns, ImageStore(tmp_path), backtracked=others)
    assert (ended.stage, ended.reason) == ("respond", "excluded")
    assert server.seen == Counter(aligned=1), "the judge is not shown it"


def test_two_answers_are_read_together(tmp_path: Path) -> None:
    words = iter(["I would speak of minors.", "And of sexual content."])

    def hook(body: Body) -> str | None:
        return json.dumps({"answer": next(words)}) if asks_for(body) == "aligned" else None

    ended, _ = rejected(hook, four_turns(), ImageStore(tmp_path))
    assert (ended.reason, ended.detail) == ("excluded", "answer of turn 2")


@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_unsafe_reply_of_the_victim_is_no_aligned_answer(place: int, tmp_path: Path) -> None:
    turns = four_turns()
    copied = turns[1].reply.text.upper().replace(",", " -")

    def hook(body: Body) -> str | None:
        mine = f"Question number {place + 1} " in text_of(body["messages"][-1]).rpartition("<message>")[2]
        return json.dumps({"answer": copied}) if asks_for(body) == "aligned" and mine else None

    ended, server = rejected(hook, turns, ImageStore(tmp_path))
    assert (ended.stage, ended.reason) == ("respond", "unsafe_answer")
    assert (server.seen["aligned"], server.seen["alignedverdict"]) == (place + 3, place), "the judge is not asked"


def test_a_safe_reply_of_the_victim_may_be_the_aligned_answer_too(tmp_path: Path) -> None:
    turns = four_turns()[:1]

    def hook(body: Body) -> str | None:
        return json.dumps({"answer": turns[0].reply.text}) if asks_for(body) == "aligned" else None

    made, _ = answers(hook, turns, ImageStore(tmp_path))
    assert made[0].aligned is not None
    assert made[0].aligned.text == turns[0].reply.text


@pytest.mark.parametrize(
    ("answer", "word"), [(" \u200b\n", "empty_message"), ("In [image 1] there is a bookshop.", "image_mark")]
)
def test_an_answer_that_nobody_could_use_is_asked_for_again_unjudged(answer: str, word: str, tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        return json.dumps({"answer": answer}) if asks_for(body) == "aligned" else None

    ended, server = rejected(hook, four_turns(), ImageStore(tmp_path))
    assert (ended.stage, ended.reason) == ("respond", word)
    assert server.seen == Counter(aligned=3)


def test_what_the_judge_leaves_open_goes_to_the_second_judge_and_is_never_a_verdict(tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        return "Hard to say." if asks_for(body) == "alignedverdict" and body["temperature"] != 0.1 else None

    made, server = answers(hook, four_turns(), ImageStore(tmp_path), second_judge=True)
    assert all(turn.aligned and turn.aligned.verdict.safety == "safe" for turn in made)
    assert Counter(body["temperature"] for body in server.bodies if asks_for(body) == "alignedverdict")[0.1] == 4
    ended, _ = rejected(hook, four_turns(), ImageStore(tmp_path))
    assert (ended.stage, ended.reason) == ("judge", "undetermined")


def test_a_responder_that_is_cut_off_ends_the_job_with_that_reason(tmp_path: Path) -> None:
    def hook(body: Body) -> web.Response | None:
        if asks_for(body) != "aligned":
            return None
        choice = {"index": 0, "message": {"role": "assistant", "content": '{"answer": "I'}, "finish_reason": "length"}
        return web.json_response({"object": "chat.completion", "choices": [choice]})

    ended, _ = rejected(hook, four_turns(), ImageStore(tmp_path))
    assert (ended.stage, ended.reason) == ("respond", "responder_truncated")


def scripted(turns: Sequence[Turn], store: ImageStore, journal: MemoryJournal, index: int = 0) -> tuple[Turn, ...]:
    """The turns with the answers of the scripted responder, in process."""
    job = job_of(len(turns), index=index)
    return with_cast("scripted:demo", store, responding(job, turns, RespondSettings()), job=job, journal=journal)


def test_a_job_that_is_grown_again_pays_for_nothing_and_gives_the_same(tmp_path: Path) -> None:
    store, journal, turns = ImageStore(tmp_path), MemoryJournal(), four_turns()
    made = scripted(turns, store, journal)
    paid = dict(journal.entries)
    assert scripted(turns, store, journal) == made
    assert journal.entries == paid
    journal.entries = dict(list(paid.items())[: len(paid) // 2])
    assert scripted(turns, store, journal) == made
    assert journal.entries.keys() == paid.keys()


def test_the_scripted_responder_helps_declines_and_recovers_and_its_judge_errs_a_little(tmp_path: Path) -> None:
    unsafe = msgspec.structs.replace(turn_of(2, "unsafe"), reply=Message("assistant", f"{PLACEHOLDER} And so on."))
    turns, store, journal = (turn_of(1), unsafe, turn_of(3)), ImageStore(tmp_path), MemoryJournal()
    texts, refusals, asked_again = set(), Counter[str](), 0
    for index in range(150):
        before = len(journal.entries)
        for turn in scripted(turns, store, journal, index):
            assert turn.aligned is not None
            assert PLACEHOLDER not in turn.aligned.text
            texts.add(turn.aligned.text)
            refusals[turn.aligned.verdict.refusal] += 1
        asked_again += len(journal.entries) - before > 6
    assert len(texts) == 450
    assert 130 <= refusals["full"] <= 320
    assert 10 <= asked_again <= 100
