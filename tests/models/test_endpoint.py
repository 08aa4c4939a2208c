"""The endpoint over real HTTP: what it sends, what it makes of every answer, and how it outlasts what goes wrong."""

import asyncio
import base64
import email.utils
import itertools
import json
import logging
import re
import shutil
import ssl
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from intersafe.errors import CallFailed, InputError, IntersafeError, ServiceGone
from intersafe.images.store import ImageStore, normalise
from intersafe.models.base import Hooks, Reply
from intersafe.models.http.transport import Account, refusal_in
from intersafe.models.open import open_models
from intersafe.recipe.sections import Cast, Limits, Member
from intersafe.replies import MessageAnswer, Schema, schema_of
from intersafe.run.incidents import Incidents
from tests.support.endpoints import call, failure, once, opened, picture
from tests.support.servers.fault_server import (
    CUT,
    RESET,
    STALL,
    Answer,
    FaultServer,
    Request,
    error,
    in_turn,
    raw,
    reply,
)

KEY_NAME, KEY = "INTERSAFE_TEST_KEY", "sk-test-0123456789-abcdefghij-0123456789"


def ask_once(server: FaultServer, text: str = "hi", **changes: Any) -> Reply:
    """One call to a server, in an event loop of its own."""

    return once(opened(server, **changes), text)


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_the_body_is_as_openai_wants_it() -> None:
    with FaultServer() as server:
        assert ask_once(server, "hello") == Reply("ok", "stop", (11, 7))
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["Content-Type"] == "application/json"
    assert "Authorization" not in request.headers
    assert request.body == {
        "model": "some/model",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "temperature": 0.3,
        "top_p": 0.9,
        "max_tokens": 123,
        "seed": 4567,
    }


def test_images_go_as_data_uris_in_their_order_before_the_text(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    made = [normalise(picture(20 + i, 30), at="test") for i in range(3)]
    refs = [store.put(image) for image in made]
    order = [refs[2], refs[0], refs[2], refs[1]]

    async def main() -> None:
        async with opened(server, images=store) as ask:
            await ask("what is this", images=order)

    with FaultServer() as server:
        asyncio.run(main())
    parts = server.requests[0].body["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["image_url"] * 4 + ["text"]
    assert parts[4] == {"type": "text", "text": "what is this"}
    by_ref = {image.ref: image.data for image in made}
    for part, ref in zip(parts[:4], order, strict=True):
        head, _, body = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(body) == by_ref[ref]


def test_a_body_of_several_megabytes_arrives_whole_and_again_on_the_next_try(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    ref = store.put(normalise(picture(900, 700, noise=True), at="test"))

    async def main() -> None:
        async with opened(server, images=store) as ask:
            assert (await ask(images=[ref, ref])).text == "ok"

    with FaultServer(in_turn(error(500), reply())) as server:
        asyncio.run(main())
    first, second = server.requests
    assert len(first.body["messages"][1]["content"][0]["image_url"]["url"]) > 2**20
    assert first.body == second.body


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("schema", [None, schema_of(MessageAnswer)])
def test_a_schema_is_sent_only_where_the_member_wants_it(wanted: bool, schema: Schema | None) -> None:
    async def main() -> None:
        async with opened(server, json_schema=wanted) as ask:
            await ask(schema=schema)

    with FaultServer() as server:
        asyncio.run(main())
    body = server.requests[0].body
    if wanted and schema:
        assert body["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "message", "schema": schema.schema},
        }
    else:
        assert "response_format" not in body


def test_extra_fields_win() -> None:
    extra = {"temperature": 1.5, "chat_template_kwargs": {"enable_thinking": False}, "seed": None}
    with FaultServer() as server:
        ask_once(server, extra=extra)
    body = server.requests[0].body
    assert {name: body[name] for name in extra} == extra
    assert body["max_tokens"] == 123


def test_the_environments_proxy_is_used_and_no_proxy_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as server, FaultServer(lambda _: reply("by proxy")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "")
        assert ask_once(server).text == "by proxy"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert ask_once(server).text == "ok"
    assert len(proxy.requests) == len(server.requests) == 1


def test_a_netrc_entry_for_the_host_does_not_clash_with_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv(KEY_NAME, KEY)
    with FaultServer() as server:
        ask_once(server, key=KEY_NAME)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_url_with_a_port_that_is_none_is_bad_input() -> None:
    with FaultServer() as server:
        server.port = "http"  # type: ignore[assignment]
        with pytest.raises(InputError, match="not a URL"):
            ask_once(server)
        server.port = 1


# --- what comes back -------------------------------------------------------------------------------------------------

PARTS = [
    {"type": "text", "text": "a "},
    {"type": "image"},
    {"type": "text", "text": None},
    {"type": "text", "text": "b"},
]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (reply("done", "stop"), Reply("done", "stop", (11, 7))),
        (reply("done", None), Reply("done", "stop", (11, 7))),
        (reply("do", "length"), Reply("do", "length", (11, 7))),
        (reply("", "content_filter"), Reply("", "blocked", (11, 7))),
        (reply(None), Reply("", "stop", (11, 7))),
        (reply(PARTS), Reply("a b", "stop", (11, 7))),
        (reply(None, refusal="I cannot"), Reply("I cannot", "refused", (11, 7))),
        (reply("text", refusal=None), Reply("text", "stop", (11, 7))),
        (raw(b'{"choices": [{"message": {"content": "x"}}]}'), Reply("x", "stop", (2, 0))),
        (
            raw(b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": null}}'),
            Reply("x", "stop", (2, 0)),
        ),
        (
            raw(b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": -9}}'),
            Reply("x", "stop", (2, 0)),
        ),
        (error(400, "filtered", code="content_filter"), Reply("", "blocked")),
    ],
)
def test_every_finish_has_its_word(answer: Answer, expected: Reply) -> None:
    with FaultServer(lambda _: answer) as server:
        assert ask_once(server) == expected
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 415, 422, 418])
def test_a_bad_request_fails_at_once_with_the_servers_words(status: int) -> None:
    async def main() -> CallFailed:
        async with opened(server) as ask:
            return await failure(ask())

    with FaultServer(lambda _: error(status, "At most 2 image(s)\nmay be \x1b[31mprovided; content_filter")) as server:
        failed = asyncio.run(main())
    assert (failed.stage, failed.reason) == ("endpoint", "bad_request")
    assert failed.detail == f"HTTP {status} At most 2 image(s) may be  [31mprovided; content_filter"
    assert len(server.requests) == 1


TOO_LONG = raw(b" " * (17 * 2**20) + reply().body)
TRANSIENT = {
    "500": error(500),
    "502": Answer(502, b"<html>Bad Gateway</html>"),
    "504": error(504),
    "524": error(524),
    "408": error(408),
    "409": error(409),
    "reset": RESET,
    "cut": CUT,
    "half": raw(reply("a" * 4000).body[:2000]),
    "not json": raw(b"<html>"),
    "not utf-8": raw(b'{"choices": [{"message": {"content": "\xff"}}]}'),
    "not an object": raw(b"[]"),
    "no choices": raw(b'{"choices": []}'),
    "no message": raw(b'{"choices": [{"text": "x"}]}'),
    "aborted": reply("half a", "abort"),
    "too long": TOO_LONG,
    "nested": raw(b'{"x": ' + b"[" * 100_000),
    "nested error": Answer(500, b"[" * 100_000),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_a_transient_fault_is_tried_again_and_not_told_to_the_user(fault: Answer) -> None:
    said: list[str] = []
    with FaultServer(in_turn(fault, reply())) as server:
        assert ask_once(server, said=said).text == "ok"
    assert len(server.requests) == 2
    assert said == []


@pytest.mark.alone
@pytest.mark.parametrize("fault", [STALL, raw(reply("a" * 4000).body, how="trickle")], ids=["stall", "trickle"])
def test_an_answer_that_stalls_or_never_ends_is_a_transient_fault(fault: Answer) -> None:
    with FaultServer(in_turn(fault, reply())) as server:
        assert ask_once(server, limits=Limits(timeout=0.3)).text == "ok"
    assert len(server.requests) == 2


def test_an_answer_of_five_megabytes_is_an_answer() -> None:
    text = "five megabytes " * 350_000
    with FaultServer(lambda _: reply(text)) as server:
        assert ask_once(server).text == text
    assert len(server.requests) == 1


def poisoned(fault: Answer) -> Callable[[Request], Answer]:
    """Everything is answered but what holds the word poison."""
    return lambda request: fault if "poison" in request.text else reply()


@pytest.mark.parametrize("retries", [2, 3, 5])
def test_a_call_that_always_gives_500_costs_its_tries_and_no_more_and_the_others_continue(retries: int) -> None:
    async def main() -> CallFailed:
        async with opened(server, limits=Limits(retries=retries)) as ask:
            failing = asyncio.create_task(failure(ask("poison")))
            others = await asyncio.gather(*(ask(str(i)) for i in range(20)))
            failed = await failing
            assert [reply.text for reply in others] == ["ok"] * 20
            assert ask.said == []
            return failed

    with FaultServer(poisoned(error(500, "engine error"))) as server:
        failed = asyncio.run(main())
    assert (failed.reason, failed.detail) == ("server_error", "HTTP 500 engine error")
    assert len([request for request in server.requests if "poison" in request.text]) == retries
    assert len(server.requests) - len(server.asked) <= 1


@pytest.mark.parametrize(
    ("fault", "reason"), [(error(403, "flagged"), "bad_request"), (CUT, "server_error"), (error(404), "bad_request")]
)
def test_a_poisoned_call_fails_even_where_it_is_the_only_one(fault: Answer, reason: str) -> None:
    async def main() -> None:
        async with opened(server) as ask:
            assert (await failure(ask("poison"))).reason == reason
            assert (await ask("next")).text == "ok"
            assert ask.said == []

    with FaultServer(poisoned(fault)) as server:
        asyncio.run(main())


def test_a_server_that_refuses_the_health_probe_answers_all_the_same() -> None:
    async def main() -> CallFailed:
        async with opened(server) as ask:
            return await failure(ask())

    with FaultServer(lambda request: error(400) if request.is_probe else error(500)) as server:
        assert asyncio.run(main()).reason == "server_error"
    assert len(server.asked) == 3


def test_a_refusal_of_one_moment_loses_no_call() -> None:
    with FaultServer(in_turn(error(401), reply(), reply("mine"))) as server:
        assert ask_once(server).text == "mine"


# --- overload --------------------------------------------------------------------------------------------------------


def test_overload_never_consumes_tries() -> None:
    faults = [error(status) for status in (429, 503, 529, 429)]
    with FaultServer(in_turn(*faults, reply())) as server:
        assert ask_once(server, limits=Limits(retries=1)).text == "ok"
    assert len(server.requests) == 5


def in_seconds() -> str:
    return "1"


def as_date() -> str:
    return email.utils.formatdate(time.time() + 2, usegmt=True)  # by the server's `Date`, to the second


@pytest.mark.parametrize("retry_after", [in_seconds, as_date])
def test_retry_after_is_honoured_for_all_new_calls(retry_after: Callable[[], str]) -> None:
    def script(request: Request) -> Answer:
        return error(429, Retry_After=retry_after()) if request.number == 0 else reply()

    async def main() -> None:
        async with opened(server, concurrency=1) as ask:
            await asyncio.gather(*(ask() for _ in range(6)))

    with FaultServer(script) as server:
        asyncio.run(main())
    assert len(server.requests) == 7
    assert server.requests[1].at - server.requests[0].at > 0.8


@pytest.mark.alone
def test_a_named_pause_holds_for_those_too_who_have_a_place_and_wait_for_their_quota() -> None:
    async def main() -> None:
        async with opened(server, concurrency=12, rpm=300) as ask:
            await asyncio.gather(*(ask(str(i)) for i in range(9)))

    with FaultServer(in_turn(error(429, Retry_After="1"), reply())) as server:
        asyncio.run(main())
    assert len(server.served) == 9
    assert server.requests[5].at - server.requests[0].at > 0.9, "five at once, and none during the pause"
    later = [request.at for request in server.requests[5:]]
    assert later[-1] - later[0] < 2, "calls that had to wait did not use the quota up"


@pytest.mark.parametrize("nonsense", ["soon", "-5", "nan", "", "Sun, 99 Foo 2020", "0"])
def test_a_retry_after_that_says_nothing_neither_fails_nor_hammers(nonsense: str) -> None:
    with FaultServer(in_turn(*[error(429, Retry_After=nonsense)] * 3, reply())) as server:
        assert ask_once(server).text == "ok"
    gaps = [b.at - a.at for a, b in itertools.pairwise(server.requests)]
    assert sum(gaps) > 0.25


SPENT = error(429, "You exceeded your current quota", code="insufficient_quota")


@pytest.mark.parametrize(
    "overload",
    [
        error(429, "Rate limit reached on tokens per min (TPM): Limit 300000. Please try again in 600ms."),
        error(429, "Please retry after 1 second"),
        error(429, retry_after_ms="600"),
        error(429, x_ratelimit_remaining_requests="0", x_ratelimit_reset_requests="600ms"),
        Answer(429, b'[{"error": {"code": 429, "details": [{"retryDelay": "0.6s"}]}}]'),
    ],
)
def test_a_pause_that_is_named_in_another_way_is_honoured_for_all_new_calls(overload: Answer) -> None:
    async def main() -> None:
        async with opened(server, concurrency=1, limits=Limits(retries=1)) as ask:
            await asyncio.gather(*(ask() for _ in range(4)))

    with FaultServer(in_turn(overload, reply())) as server:
        asyncio.run(main())
    assert len(server.requests) == 5
    assert server.requests[1].at - server.requests[0].at > 0.5


def test_an_account_that_is_used_up_is_no_overload_but_a_bill_to_settle() -> None:
    said: list[str] = []

    async def main() -> None:
        async with opened(server, said=said, limits=Limits(patience=0.3)) as ask:
            results = await asyncio.gather(*(ask(str(i)) for i in range(8)), return_exceptions=True)
            assert {type(result) for result in results} == {ServiceGone}
            assert "settle that with the account" in str(results[0])

    with FaultServer(lambda _: SPENT) as server:
        asyncio.run(main())
    assert len(said) == 1
    assert "exceeded your current quota" in said[0]
    assert len(server.asked) == 8, "one request each, and no more"


def test_a_call_that_asks_for_more_than_a_minute_has_fails_at_once_and_stops_no_other() -> None:
    large = error(429, "Request too large on tokens per min (TPM): Limit 30000, Requested 45000.", code="rate_limit")

    async def main() -> None:
        async with opened(server) as ask:
            assert (await failure(ask("poison"))).reason == "bad_request"
            assert (await ask()).text == "ok"
            assert ask.said == []

    with FaultServer(poisoned(large)) as server:
        asyncio.run(main())
    assert len(server.requests) == 2


@pytest.mark.alone
def test_a_limit_that_a_429_names_holds_from_then_on_and_is_told_once() -> None:
    named = error(429, "Rate limit reached on requests per min (RPM): Limit 120, Used 120. Please try again in 1ms.")

    async def main() -> None:
        async with opened(server) as ask:
            await asyncio.gather(*(ask(str(i)) for i in range(6)))
            assert [text.partition(" allows ")[2] for text in ask.said] == [
                "120 requests a minute, which holds from now on; `rpm` in the recipe sets it"
            ]

    with FaultServer(lambda request: named if request.number < 3 else reply()) as server:
        asyncio.run(main())
    later = [request.at for request in server.requests[6:]]
    assert len(server.served) == 6
    assert all(b - a > 0.4 for a, b in itertools.pairwise(later[2:])), "two at once, then one each half a second"


@pytest.mark.alone
def test_the_lowest_quota_of_members_that_share_a_model_holds_over_all_replicas(tmp_path: Path) -> None:
    async def main() -> None:
        url = f"openai:m@{one.url},{other.url}"
        attacker, victim = Member(model=url, rpm=120), Member(model=url, rpm=6000)
        cast = Cast(attacker=attacker, victims=(victim,), judge=Member(model=url))
        models = open_models(cast, Limits(), ImageStore(tmp_path), Hooks())
        await asyncio.gather(*(models[role].answer(call(role, str(i))) for role in models for i in range(2)))
        await asyncio.gather(*(model.aclose() for model in set(models.values())))

    with FaultServer() as one, FaultServer() as other:
        asyncio.run(main())
        sent = sorted(request.at for request in one.requests + other.requests)
    assert len(sent) == 6
    assert sent[-1] - sent[0] > 1.7, "two at once, then one each half a second"


@pytest.mark.alone
@pytest.mark.parametrize(("tokens", "calls"), [("estimated", 5), ("used", 16)])
def test_tokens_a_minute_are_kept_to(tokens: str, calls: int) -> None:
    """About 63 tokens a call by estimate, of which 100 a second may go; 18 by the usage that comes back, if it does."""
    silent = raw(b'{"choices": [{"message": {"content": "x"}}]}')

    async def main() -> None:
        async with opened(server, tpm=6000) as ask:
            await asyncio.gather(*(ask(str(i)) for i in range(calls)))

    with FaultServer(lambda _: silent if tokens == "estimated" else reply()) as server:
        asyncio.run(main())
    assert len(server.requests) == calls
    assert server.requests[-1].at - server.requests[0].at > 1.2


@pytest.mark.alone
def test_calls_settle_near_the_capacity_of_a_server_and_all_finish() -> None:
    async def main() -> None:
        async with opened(server, concurrency=64) as ask:
            replies = await asyncio.gather(*(ask(str(i)) for i in range(400)))
            assert len(replies) == 400

    with FaultServer(lambda _: reply(delay=0.02), capacity=8) as server:
        asyncio.run(main())
    assert len(server.served) == 400
    later = server.requests[len(server.requests) // 2 :]
    turned_down = [request for request in later if request.in_flight > 8]
    assert len(turned_down) < 0.3 * len(later)
    assert max(request.in_flight for request in later) <= 16
    assert sum(request.in_flight for request in later) / len(later) > 3


@pytest.mark.alone
def test_time_outs_lower_the_limit_until_a_slow_server_keeps_up() -> None:
    """Four slots of 100 ms each and 0.8 s for an answer: 32 at once are in time, a hundred are not."""

    async def main() -> None:
        async with opened(server, limits=Limits(timeout=0.8, retries=6)) as ask:

            async def worker(number: int) -> None:
                for again in range(3):
                    await ask(f"{number} {again}")

            await asyncio.gather(*(worker(number) for number in range(100)))

    with FaultServer(lambda _: reply(delay=0.1), slots=4) as server:
        asyncio.run(main())
    later = server.requests[len(server.requests) // 2 :]
    assert server.most_in_flight == 100
    assert max(request.in_flight for request in later) <= 64
    assert len(server.requests) < 2 * 300


@pytest.mark.alone
def test_the_first_burst_lowers_the_limit_once() -> None:
    def script(request: Request) -> Answer:
        return error(429) if request.number < 32 else reply(delay=0.3)

    async def main() -> None:
        async with opened(server, concurrency=32) as ask:
            await asyncio.gather(*(ask(str(i)) for i in range(32)))

    with FaultServer(script) as server:
        asyncio.run(main())
    waves = [request.in_flight for request in server.requests[32:]]
    assert 20 <= max(waves) <= 26


def test_endless_overload_is_said_and_ends_with_the_patience_even_if_retry_after_is_longer() -> None:
    async def main() -> list[str]:
        async with opened(server, limits=Limits(patience=0.5)) as ask:
            results = await asyncio.gather(*(ask(str(i)) for i in range(8)), return_exceptions=True)
            assert {type(result) for result in results} == {ServiceGone}
            return [str(result) for result in results]

    with FaultServer(lambda _: error(429, "quota used up", Retry_After="3600")) as server:
        (text, *_) = asyncio.run(main())
    assert "HTTP 429 quota used up" in text
    assert server.url in text
    assert "concurrency" in text


def test_a_long_retry_after_is_told_to_the_user() -> None:
    async def main() -> str:
        told: asyncio.Queue[str] = asyncio.Queue()
        async with opened(server, say=told.put_nowait) as ask:
            task = asyncio.create_task(ask())
            text = await told.get()
            task.cancel()
            return text

    with FaultServer(lambda _: error(503, "loading", Retry_After="20")) as server:
        text = asyncio.run(main())
    assert "HTTP 503 loading" in text


# --- outages ---------------------------------------------------------------------------------------------------------


def test_a_refused_connection_waits_says_so_once_and_continues_when_the_server_comes() -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            server.start()

    async def main() -> None:
        async with opened(server, say=say) as ask:
            replies = await asyncio.gather(*(ask(str(i)) for i in range(30)))
            assert [reply.text for reply in replies] == ["ok"] * 30

    with FaultServer() as server:
        server.stop()
        asyncio.run(main())
    assert "no connection" in said[0]
    assert server.url in said[0]
    assert [text.partition(server.url)[2][:8] for text in said[1:]] == [" is back"]
    assert sorted(request.text for request in server.asked) == sorted(str(i) for i in range(30))


@pytest.mark.parametrize("fault", [error(401), error(500), RESET])
def test_a_service_that_answers_no_call_is_waited_for_and_no_call_is_lost(fault: Answer) -> None:
    """From the first `say` on the server answers again."""
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        server.script = lambda _: reply()

    async def main() -> None:
        async with opened(server, say=say, limits=Limits(retries=2, patience=30)) as ask:
            replies = await asyncio.gather(*(ask(str(i)) for i in range(12)))
            assert [reply.text for reply in replies] == ["ok"] * 12

    with FaultServer(lambda _: fault) as server:
        asyncio.run(main())
    assert len(said) == 2


def test_a_server_that_leaves_between_the_probe_and_the_last_try_loses_no_call() -> None:
    said: list[str] = []
    last_words = replace(reply(), how="last")

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            server.stop()
            server.script = lambda _: reply("back")
            server.start()

    async def main() -> None:
        async with opened(server, say=say, limits=Limits(retries=2)) as ask:
            assert (await ask()).text == "back"

    with FaultServer(lambda request: last_words if request.is_probe else error(500)) as server:
        asyncio.run(main())
    assert "no connection" in said[0]


def test_tries_made_in_an_outage_do_not_count() -> None:
    """Out until it is said, and then every call fails again before it is answered."""
    seen: set[str] = set()

    def stumbles(request: Request) -> Answer:
        first = request.text not in seen and not request.is_probe
        seen.add(request.text)
        return error(500) if first else reply()

    def say(text: str) -> None:
        server.script = stumbles

    async def main() -> None:
        async with opened(server, say=say, limits=Limits(retries=3)) as ask:
            replies = await asyncio.gather(*(ask(str(i)) for i in range(8)))
            assert [reply.text for reply in replies] == ["ok"] * 8

    with FaultServer(lambda _: error(500)) as server:
        asyncio.run(main())


def test_in_an_outage_one_probe_is_sent_for_all_and_calls_are_not_repeated() -> None:
    async def main() -> None:
        async with opened(server, limits=Limits(retries=3, patience=1.5)) as ask:
            results = await asyncio.gather(*(ask(str(i)) for i in range(20)), return_exceptions=True)
            assert {type(result) for result in results} == {ServiceGone}

    with FaultServer(lambda _: error(500)) as server:
        asyncio.run(main())
    assert 20 <= len(server.asked) <= 20 * 2
    assert len(server.requests) - len(server.asked) < 12


@pytest.mark.parametrize("port", ["refused", "stalled", "no such model"])
def test_patience_ends_in_service_gone_with_server_and_remedy(port: str) -> None:
    async def main() -> ServiceGone:
        async with opened(server, limits=Limits(patience=0.3, timeout=0.3)) as ask:
            with pytest.raises(ServiceGone) as caught:
                await ask()
            return caught.value

    script = {"refused": reply(), "stalled": STALL, "no such model": error(404, "no model x")}[port]
    with FaultServer(lambda _: script) as server:
        if port == "refused":
            server.stop()
        gone = asyncio.run(main())
    assert gone.exit_code == 4
    assert f"openai:some/model at {server.url} stayed away" in str(gone)
    assert "run the same command again" in str(gone)
    assert "\n" not in str(gone)
    if port == "no such model":
        assert "the model's name 'some/model'" in str(gone)


@pytest.mark.parametrize("fault", [error(401), error(404), SPENT, error(500)])
def test_a_fault_in_the_middle_of_a_run_is_waited_out_and_every_call_is_answered_once(fault: Answer) -> None:
    """From the first word to the user on the server answers again."""
    said: list[str] = []

    async def main() -> None:
        async with opened(server, said=said, concurrency=4, limits=Limits(retries=2)) as ask:
            replies = await asyncio.gather(*(ask(str(i)) for i in range(60)))
            assert [reply.text for reply in replies] == ["ok"] * 60

    with FaultServer(lambda _: reply() if len(server.served) < 20 or said else fault) as server:
        asyncio.run(main())
    assert sorted(int(request.text) for request in server.served if not request.is_probe) == list(range(60))
    assert len(server.requests) <= 60 + 16, "those in flight until the first probe is back, and the probes"
    assert len(said) == 2


def test_a_redirect_is_not_followed_and_named() -> None:
    async def main() -> str:
        async with opened(server, limits=Limits(patience=0.2)) as ask:
            with pytest.raises(ServiceGone) as caught:
                await ask()
            return str(caught.value)

    def moved(request: Request) -> Answer:
        return Answer(308, headers={"Location": f"{other.url}{request.path.removeprefix('/v1')}"})

    with FaultServer() as other, FaultServer(moved) as server:
        text = asyncio.run(main())
    assert f"HTTP 308 redirects to {other.url}/chat/completions" in text
    assert other.requests == []


def test_a_server_that_was_started_again_gets_its_calls_over_new_connections() -> None:
    async def main() -> None:
        async with opened(server) as ask:
            await asyncio.gather(*(ask(str(i)) for i in range(20)))
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            replies = await asyncio.gather(*(ask(str(i)) for i in range(20)))
            assert [reply.text for reply in replies] == ["ok"] * 20
            assert ask.said == []

    with FaultServer() as server:
        asyncio.run(main())
    assert len(server.served) >= 40


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_an_unverified_certificate_is_an_outage(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("key.pem", "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", files[0], "-out", files[1]], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    with FaultServer(tls=context) as server, pytest.raises(ServiceGone, match=r"(?i)certificate"):
        ask_once(server, limits=Limits(patience=0.2))


# --- logged and counted ----------------------------------------------------------------------------------------------


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """Level and message of every line that the models have logged."""
    caplog.set_level(logging.INFO, "intersafe.models.http")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "intersafe.models.http"]


Logged = Callable[[], list[tuple[str, str]]]


def test_every_retry_is_logged_and_counted_for_the_role_that_asked(logged: Logged) -> None:
    async def main() -> dict[str, Incidents]:
        async with opened(server, limits=Limits(retries=3)) as ask:
            assert (await ask("first", role="victim:0")).text == "ok"
            assert (await ask("second", role="judge")).text == "ok"
            return ask.hooks.incidents

    faults = in_turn(error(500, "engine\nerror"), CUT, reply(), reply(), error(502), reply())
    with FaultServer(faults) as server:
        counts = asyncio.run(main())
    assert counts == {"victim:0": Incidents(retries=2), "judge": Incidents(retries=1)}
    first, second, third = logged()
    where = f"openai:some/model at {server.url}"
    assert first == ("INFO", f"victim:0: {where}: try 1 failed (HTTP 500 engine error); trying again")
    assert second[1].startswith(f"victim:0: {where}: try 2 failed (ClientPayloadError")
    assert third == ("INFO", f"judge: {where}: try 1 failed (HTTP 502 no); trying again")


def test_a_call_that_fails_for_good_logs_the_tries_that_it_was_given_again(logged: Logged) -> None:
    async def main() -> dict[str, Incidents]:
        async with opened(server, limits=Limits(retries=3)) as ask:
            await failure(ask("poison"))
            await failure(ask("bad"))
            return ask.hooks.incidents

    with FaultServer(lambda r: error(400) if r.text == "bad" else poisoned(error(500))(r)) as server:
        counts = asyncio.run(main())
    assert counts == {"judge": Incidents(retries=2)}
    assert [re.findall(r"try (\d)", text) for _, text in logged()] == [["1"], ["2"]]


def test_throttling_is_logged_and_counted_and_is_no_retry(logged: Logged) -> None:
    async def main() -> dict[str, Incidents]:
        async with opened(server) as ask:
            assert (await ask()).text == "ok"
            return ask.hooks.incidents

    with FaultServer(in_turn(error(429, "slow down"), error(503), error(529), reply())) as server:
        counts = asyncio.run(main())
    assert counts == {"judge": Incidents(throttled=3)}
    levels, texts = zip(*logged(), strict=True)
    assert levels == ("INFO",) * 3
    assert texts[0] == f"judge: openai:some/model at {server.url} throttles (HTTP 429 slow down)"


def test_an_outage_is_logged_when_it_begins_and_when_it_ends_and_counted_once(logged: Logged) -> None:
    def say(text: str) -> None:
        server.script = lambda _: reply()

    async def main() -> tuple[dict[str, Incidents], dict[str, str]]:
        async with opened(server, say=say) as ask:
            await asyncio.gather(*(ask(str(i), role="attacker") for i in range(12)))
            return ask.hooks.incidents, ask.hooks.outages

    with FaultServer(lambda _: error(401, "no such key")) as server:
        counts, outages = asyncio.run(main())
    assert counts == {"attacker": Incidents(outages=1)}
    assert not outages
    began, ended = logged()
    assert began[0] == ended[0] == "WARNING"
    assert began[1].startswith("attacker: openai:some/model is away (HTTP 401; name the variable")
    assert re.fullmatch(r"openai:some/model is back after \d+ s", ended[1])


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_not_repeated_even_in_part(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KEY", "sk-wrong-one")
    account = Account(Member("openai:m@http://h/v1", key="TOY_KEY"))
    body = b'{"error": {"message": "Incorrect API key: sk-wr*****", "code": "invalid_api_key"}}'
    assert refusal_in(status, {}, body, account) == (f"HTTP {status}", "invalid_api_key")


def test_an_answer_at_once_logs_and_counts_nothing(logged: Logged) -> None:
    async def main() -> dict[str, Incidents]:
        async with opened(server) as ask:
            await ask()
            return ask.hooks.incidents

    with FaultServer() as server:
        assert asyncio.run(main()) == {}
    assert logged() == []


def test_a_library_that_sets_no_logging_up_hears_nothing() -> None:
    code = """
import logging
from intersafe.models.base import Hooks
from intersafe.models.http.incidents import IncidentLog
IncidentLog("m", Hooks()).outage_began("judge", "down")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")


# --- keys ------------------------------------------------------------------------------------------------------------

ECHOES: dict[str, Callable[[str], Answer]] = {
    "401": lambda key: error(401, f"Incorrect API key provided: {key}"),
    "401 text": lambda key: Answer(401, json.dumps({"error": key}).encode()),
    "403 list": lambda key: Answer(403, json.dumps([key]).encode()),
    "400": lambda key: error(400, f"{'x' * 280}{key}"),
    "500": lambda key: error(500, key),
    "502 no JSON": lambda key: Answer(502, f"{'x' * 190}{key}".encode()),
    "307": lambda key: Answer(307, headers={"Location": f"/login?{key}"}),
    "429": lambda key: error(429, key, Retry_After="9"),
    "status line": lambda key: Answer(520, key.encode(), {"Content-Encoding": key}),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES.keys())
def test_the_keys_value_is_told_nowhere_even_if_the_server_echoes_it(
    echo: Callable[[str], Answer], monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    monkeypatch.setenv(KEY_NAME, f"{KEY}\n")
    said: list[str] = []

    async def main() -> IntersafeError:
        limits = Limits(patience=0.2, retries=2)
        async with opened(server, key=KEY_NAME, said=said, limits=limits) as ask:
            with pytest.raises((ServiceGone, CallFailed)) as caught:
                await ask()
            return caught.value

    with FaultServer(lambda request: echo(request.headers["Authorization"])) as server:
        failed = asyncio.run(main())
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    lines = [text for _, text in logged()]
    assert bool(lines) == (failed.exit_code == 4 or "HTTP 5" in str(failed)), "all but a 400 leave a line in the log"
    texts = [*said, *lines, repr(failed), repr(vars(failed)), *traceback.format_exception(failed)]
    for start in range(len(KEY) - 8):
        assert not [text for text in texts if KEY[start : start + 8] in text]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_named_by_its_variable(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_NAME, KEY)
    said: list[str] = []
    with FaultServer(lambda _: error(status)) as server, pytest.raises(ServiceGone, match=KEY_NAME):
        ask_once(server, key=KEY_NAME, said=said, limits=Limits(patience=0.2))
    assert KEY_NAME in said[0]
    assert f"HTTP {status}" in said[0]


# --- replicas --------------------------------------------------------------------------------------------------------


def test_a_job_stays_on_one_replica_and_jobs_spread_over_all() -> None:
    jobs = [f"seed-{i}/strategy/victim/0" for i in range(60)]

    async def main(order: Sequence[FaultServer]) -> None:
        async with opened(*order) as ask:
            await asyncio.gather(*(ask(job, job) for job in jobs for _ in range(2)))

    with FaultServer() as a, FaultServer() as b, FaultServer() as c:
        asyncio.run(main([a, b, c]))
        first = [{request.text for request in server.requests} for server in (a, b, c)]
        asyncio.run(main([c, a, b]))
        second = [{request.text for request in server.requests} for server in (a, b, c)]
    assert first == second, "the order of the URLs must not matter"
    assert sum(len(texts) for texts in first) == len(jobs)
    assert all(len(texts) > 8 for texts in first)


def test_members_with_the_same_settings_share_one_limit(tmp_path: Path) -> None:
    async def main() -> None:
        member = Member(model=f"openai:m@{server.url}", concurrency=4)
        cast = Cast(attacker=member, victims=(member,), judge=member)
        models = open_models(cast, Limits(), ImageStore(tmp_path), Hooks())
        await asyncio.gather(*(models[role].answer(call(role, str(i))) for role in models for i in range(10)))
        await asyncio.gather(*(model.aclose() for model in set(models.values())))

    with FaultServer(lambda _: reply(delay=0.02)) as server:
        asyncio.run(main())
    assert server.most_in_flight == 4


# --- stopping --------------------------------------------------------------------------------------------------------


def test_cancelled_calls_leave_no_place_taken() -> None:
    async def main() -> None:
        async with opened(server, concurrency=3) as ask:
            for picked in (0, 1, 2):
                tasks = [asyncio.create_task(ask("stall")) for _ in range(9)]
                await server.have_come(3 * picked + 3)
                for task in (*tasks[picked:], *tasks[:picked]):
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert {type(result) for result in results} == {asyncio.CancelledError}
            await asyncio.gather(*(ask("go") for _ in range(9)))

    with FaultServer(lambda request: STALL if request.text == "stall" else reply(delay=0.02)) as server:
        asyncio.run(main())
        assert max(request.in_flight for request in server.served) <= 3
        assert len(server.served) == 9


def test_a_call_can_be_cancelled_while_it_waits_for_a_service() -> None:
    async def main() -> None:
        told: asyncio.Queue[str] = asyncio.Queue()
        async with opened(server, say=told.put_nowait) as ask:
            tasks = [asyncio.create_task(ask(str(i))) for i in range(5)]
            await told.get()
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in results} == {asyncio.CancelledError}
            server.start()
            assert (await ask()).text == "ok"

    with FaultServer() as server:
        server.stop()
        asyncio.run(main())
