"""The images endpoint: what the Images API is sent and what is made of every answer, over real HTTP."""

import asyncio
import base64
import io
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from intersafe.errors import CallFailed, InputError, ServiceGone
from intersafe.models.base import Hooks, Painted
from intersafe.models.http.images import MAX_BODY, SMALL_PICTURE
from intersafe.models.open import check_cast, open_painter
from intersafe.recipe.sections import Cast, Limits, Member, Painter
from tests.support.endpoints import once, opened_painter
from tests.support.servers.fault_server import RESET, STALL, Answer, FaultServer, Request, Script, error, in_turn, raw

KEY_NAME, KEY = "INTERSAFE_TEST_KEY", "sk-test-0123456789-abcdefghij-0123456789"


def png(colour: str = "teal") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, "PNG")
    return data.getvalue()


PNG = png()
ENCODED = base64.b64encode(PNG).decode()


def drawn(**image: Any) -> Answer:
    """An answer with one image that has these fields."""
    return raw(json.dumps({"created": 1, "data": [image]}).encode())


PICTURE = drawn(b64_json=ENCODED, url=None, revised_prompt=None)
CUT = raw(PICTURE.body * 50, how="cut")


def paint_once(server: FaultServer, description: str = "a lamp", **changes: Any) -> Painted:
    """One picture, in an event loop of its own."""

    return once(opened_painter(server, **changes), description)


def painting(answer: Script | None = None) -> FaultServer:
    """A server that draws, or does what the script says."""
    return FaultServer(answer or (lambda _: PICTURE))


def asked(server: FaultServer) -> list[str]:
    """The descriptions that came, without the small pictures of the health probes."""
    return [prompt for request in server.requests if (prompt := request.body["prompt"]) != SMALL_PICTURE]


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_the_body_holds_what_is_set_and_nothing_else() -> None:
    with painting() as server:
        assert paint_once(server, "a red house, é") == Painted(PNG)
    (request,) = server.requests
    assert request.path == "/v1/images/generations"
    assert "Authorization" not in request.headers
    assert request.body == {
        "model": "some/model",
        "prompt": "a red house, é",
        "n": 1,
        "size": "1024x1024",
        "response_format": "b64_json",
        "seed": 4567,
    }


def test_every_setting_has_its_field_and_extra_fields_win() -> None:
    with painting() as server:
        settings: dict[str, Any] = {"size": "512x768", "steps": 20, "guidance": 4.0, "negative_prompt": "blurry"}
        paint_once(server, **settings, extra={"quality": "low", "n": 2, "response_format": None, "seed": None})
    assert server.requests[0].body == {
        "model": "some/model",
        "prompt": "a lamp",
        "n": 2,
        "size": "512x768",
        "num_inference_steps": 20,
        "true_cfg_scale": 4.0,
        "negative_prompt": "blurry",
        "quality": "low",
    }


def test_a_guidance_of_zero_is_set() -> None:
    with painting() as server:
        paint_once(server, guidance=0.0)
    assert server.requests[0].body["true_cfg_scale"] == 0.0


# --- what comes back -------------------------------------------------------------------------------------------------

LINK = "https://pictures.example/a.png?sig=signed-secret"
OUTCOMES: dict[str, tuple[Answer, Painted]] = {
    "bytes": (PICTURE, Painted(PNG)),
    "bytes and a link": (drawn(b64_json=ENCODED, url=LINK), Painted(PNG)),
    "data URI": (drawn(b64_json=f"data:image/png;base64,{ENCODED}"), Painted(PNG)),
    "data URI as a link": (drawn(url=f"data:image/png;base64,{ENCODED}"), Painted(PNG)),
    "lines": (drawn(b64_json="\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76))), Painted(PNG)),
    "no data": (raw(b"{}"), Painted(problem="no_image")),
    "null data": (raw(b'{"data": null}'), Painted(problem="no_image")),
    "empty data": (raw(b'{"data": []}'), Painted(problem="no_image")),
    "empty image": (drawn(), Painted(problem="no_image")),
    "empty base64": (drawn(b64_json=""), Painted(problem="no_image")),
    "empty data URI": (drawn(b64_json="data:image/png;base64,"), Painted(problem="no_image")),
    "link": (drawn(url=LINK), Painted(problem="image_url")),
    "letters": (drawn(b64_json="no base64 at all!"), Painted(problem="bad_image")),
    "cut base64": (drawn(b64_json=ENCODED[:-3]), Painted(problem="bad_image")),
    "text URI": (drawn(b64_json="data:image/svg+xml,<svg/>"), Painted(problem="bad_image")),
    "not ASCII": (drawn(b64_json="éééé"), Painted(problem="bad_image")),
    "moderation_blocked": (error(400, "no", code="moderation_blocked"), Painted(problem="blocked")),
    "content_policy_violation": (error(400, "no", code="content_policy_violation"), Painted(problem="blocked")),
    "content_filter": (error(400, "no", code="content_filter"), Painted(problem="blocked")),
}


@pytest.mark.parametrize(("answer", "expected"), OUTCOMES.values(), ids=OUTCOMES.keys())
def test_every_answer_has_its_problem_and_is_asked_for_once(answer: Answer, expected: Painted) -> None:
    with painting(lambda _: answer) as server:
        painted = paint_once(server)
    assert (painted.data, painted.problem) == (expected.data, expected.problem)
    assert len(server.requests) == 1


def test_a_link_is_not_fetched_and_the_hint_names_the_way_out_but_not_the_address() -> None:
    def script(request: Request) -> Answer:
        return drawn(url=f"{server.url}/picture.png?sig=signed-secret")

    with painting(script) as server:
        painted = paint_once(server)
    assert [request.path for request in server.requests] == ["/v1/images/generations"]
    assert "b64_json" in painted.detail
    assert "signed-secret" not in painted.detail


def test_the_words_of_a_filter_and_of_an_error_with_200_are_kept() -> None:
    with painting(lambda _: error(400, "not\nallowed", code="moderation_blocked")) as server:
        assert paint_once(server).detail == "HTTP 400 not allowed"
    with painting(lambda _: raw(b'{"error": {"message": "out of paint"}}')) as server:
        assert "out of paint" in paint_once(server).detail


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_bad_request_fails_for_good(status: int) -> None:
    with painting(lambda _: error(status, "Unknown parameter: 'seed'")) as server:
        with pytest.raises(CallFailed, match="Unknown parameter: 'seed'"):
            paint_once(server)
        assert len(server.requests) == 1


def test_a_large_image_is_taken_and_a_huge_body_is_a_bad_image_that_is_not_asked_for_again() -> None:
    large = base64.b64encode(bytes(20 * 2**20)).decode()
    with painting(lambda _: drawn(b64_json=large)) as server:
        assert len(paint_once(server).data) == 20 * 2**20
    with painting(lambda _: raw(b" " * (MAX_BODY + 1))) as server:
        painted = paint_once(server)
    assert (painted.data, painted.problem) == (b"", "bad_image")
    assert "48 MiB" in painted.detail
    assert len(server.requests) == 1


# --- faults ----------------------------------------------------------------------------------------------------------

PASSING = {
    "500": error(500),
    "502": Answer(502, b"<html>Bad Gateway</html>"),
    "reset": RESET,
    "cut": CUT,
    "half": raw(PICTURE.body[:-20]),
    "not json": raw(b"<html>"),
    "not an object": raw(b"[]"),
    "data is no list": raw(b'{"data": "x"}'),
    "huge bad request": Answer(400, b" " * (MAX_BODY + 1)),
    "429": error(429),
    "503": error(503),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_a_transient_fault_is_tried_again_and_not_told_to_the_user(fault: Answer) -> None:
    said: list[str] = []
    with painting(in_turn(fault, PICTURE)) as server:
        assert paint_once(server, said=said) == Painted(PNG)
    assert asked(server) == ["a lamp"] * 2
    assert said == []


@pytest.mark.alone
def test_a_stalled_answer_is_tried_again() -> None:
    with painting(in_turn(STALL, PICTURE)) as server:
        assert paint_once(server, timeout=0.3) == Painted(PNG)
    assert len(server.requests) == 2


@pytest.mark.parametrize("poison", [error(500, "engine"), error(403, "engine"), CUT], ids=["500", "403", "cut"])
def test_a_description_that_always_fails_is_given_up_and_the_others_are_drawn(poison: Answer) -> None:
    async def main() -> None:
        async with opened_painter(server) as ask:
            with pytest.raises(CallFailed):
                await ask("poison")
            assert await ask("next") == Painted(PNG)
            assert ask.said == []

    with painting(lambda request: poison if request.body["prompt"] == "poison" else PICTURE) as server:
        asyncio.run(main())
    assert len(server.requests) - len(asked(server)) == 1, "one small picture showed that the server is well"


@pytest.mark.parametrize(("steps", "sent"), [(40, 1), (None, None)])
def test_the_small_picture_costs_as_little_as_the_service_is_known_to_allow(
    steps: int | None, sent: int | None
) -> None:
    with painting(lambda request: error(500) if request.body["prompt"] == "a lamp" else PICTURE) as server:
        with pytest.raises(CallFailed):
            paint_once(server, steps=steps)
        (small,) = [request.body for request in server.requests if request.body["prompt"] == SMALL_PICTURE]
    assert small.get("num_inference_steps") == sent


@pytest.mark.parametrize("fault", [error(401), error(404, "no model x"), error(500)], ids=["401", "404", "500"])
def test_a_server_that_lists_its_models_but_draws_nothing_is_waited_for(fault: Answer) -> None:
    """It would fail every dialogue of a run otherwise. From the first `say` on it draws."""
    said: list[str] = []

    def script(request: Request) -> Answer:
        return fault if request.path.endswith("/images/generations") else raw(b'{"data": []}')

    def say(text: str) -> None:
        said.append(text)
        server.script = lambda _: PICTURE

    async def main() -> None:
        async with opened_painter(server, say=say, limits=Limits(retries=2, patience=30)) as ask:
            assert await asyncio.gather(*(ask(str(i)) for i in range(8))) == [Painted(PNG)] * 8

    with painting(script) as server:
        asyncio.run(main())
    assert len(said) == 2


def test_a_refused_connection_waits_and_continues_when_the_server_comes() -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            server.start()

    async def main() -> None:
        async with opened_painter(server, say=say) as ask:
            assert await asyncio.gather(*(ask(str(i)) for i in range(8))) == [Painted(PNG)] * 8

    with painting() as server:
        server.stop()
        asyncio.run(main())
    assert "no connection" in said[0]
    assert sorted(asked(server)) == [str(i) for i in range(8)]


def test_patience_ends_in_service_gone() -> None:
    with painting() as server:
        server.stop()
        with pytest.raises(ServiceGone, match=r"openai:some/model at .* stayed away"):
            paint_once(server, limits=Limits(patience=0.3))


ECHOES: dict[str, Callable[[str], Answer]] = {
    "401": lambda key: error(401, f"Incorrect API key provided: {key}"),
    "400": lambda key: error(400, f"{'x' * 280}{key}"),
    "blocked": lambda key: error(400, key, code="moderation_blocked"),
    "500": lambda key: error(500, key),
    "200": lambda key: raw(json.dumps({"error": {"message": key}}).encode()),
    "200 at the edge": lambda key: raw(json.dumps({"error": f"{'x' * 190}{key}{'x' * 200}"}).encode()),
    "wrong type": lambda key: raw(json.dumps({"data": key}).encode()),
    "bad base64": lambda key: drawn(b64_json=key),
    "link": lambda key: drawn(url=f"https://pictures.example/?{key}"),
    "307": lambda key: Answer(307, headers={"Location": f"/login?{key}"}),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES.keys())
def test_the_keys_value_is_told_nowhere_even_if_the_server_echoes_it(
    echo: Callable[[str], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_NAME, f"{KEY}\n")
    texts: list[str] = []
    with painting(lambda request: echo(request.headers["Authorization"])) as server:
        try:
            limits = Limits(patience=0.2, retries=2)
            texts.append(paint_once(server, key=KEY_NAME, said=texts, limits=limits).detail)
        except (ServiceGone, CallFailed) as failed:
            texts += [repr(failed), repr(vars(failed)), *traceback.format_exception(failed)]
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    for start in range(len(KEY) - 8):
        assert not [text for text in texts if KEY[start : start + 8] in text]


# --- opening ---------------------------------------------------------------------------------------------------------


def cast(painter: Painter) -> Cast:
    member = Member(model="scripted:demo")
    return Cast(attacker=member, victims=(member,), judge=member, painter=painter)


def test_an_unknown_scripted_painter_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'flawless'"):
        check_cast(cast(Painter(model="scripted:flawles")))
    check_cast(cast(Painter(model="scripted:demo")))


def test_a_painter_whose_key_is_not_set_is_bad_input_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_NAME, raising=False)
    with pytest.raises(InputError, match=rf"cast\.painter: .*{KEY_NAME}"):
        check_cast(cast(Painter(model="openai:m@http://127.0.0.1:9/v1", key=KEY_NAME)))


@pytest.mark.parametrize("missing", ["diffusers", "torch"])
def test_without_the_library_the_diffusers_backend_names_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    painter = Painter(model="diffusers:/models/qwen-image")
    for step in (lambda: check_cast(cast(painter)), lambda: open_painter(painter, Limits(), Hooks())):
        with pytest.raises(InputError, match=rf"{missing}.*pip install 'intersafe\[diffusers\]'"):
            step()
