import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image

from intersafe.errors import CallFailed, SeedsExhausted, ServiceGone
from intersafe.generation.generate import generate_dialogues
from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Hooks, Sampling
from intersafe.models.http import quirks
from intersafe.models.http.chat import EndpointModel
from intersafe.models.http.quirks import OptionalField
from intersafe.recipe.sections import Limits, Member
from intersafe.records import Message
from intersafe.replies import MessageAnswer, schema_of
from intersafe.run.directory import Run
from tests.support.jobs import stored
from tests.support.runs import demo, digest, rows
from tests.support.servers.fault_server import Answer, FaultServer, Request, error, reply
from tests.support.servers.scripted_server import Body, asks_for, scripted_server

"""What a server cannot do is detected and handled: no schemas, a context that is too short, no vision support."""


SCHEMA = schema_of(MessageAnswer)
JSON = '{"message": "Hello there.", "rationale": ""}'


def call(number: int = 0, images: tuple[str, ...] = ()) -> Call:
    messages = (Message("user", f"Question {number}.", images),)
    return Call("attacker", "", messages, Sampling(0.0, 1.0, 99, 1), SCHEMA, f"job {number}", 0)


@contextlib.asynccontextmanager
async def opened(
    server: FaultServer, store: ImageStore, said: list[str], **changes: Any
) -> AsyncIterator[EndpointModel]:
    member = Member(model=f"openai:toy@{server.url}", **changes)
    model = EndpointModel(member, Limits(timeout=10, patience=5, retries=3), store, Hooks(said.append))
    try:
        yield model
    finally:
        await model.aclose()


def refusing(words: str, status: int = 400) -> Any:
    """A server that refuses every request with a schema, in these words."""

    def script(request: Request) -> Answer:
        return error(status, words) if "response_format" in request.body else reply(JSON)

    return script


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "response_format is not supported by this model"),
        (422, '[{"type":"extra_forbidden","loc":["body","response_format"]}]'),
        (400, "This model does not support json_schema"),
        (400, "structured outputs are disabled"),
    ],
)
@pytest.mark.parametrize("send_images", ["data", "uuid"])
def test_a_server_that_refuses_schemas_is_asked_by_prompt_from_then_on(
    status: int, words: str, send_images: str, tmp_path: Path
) -> None:
    said: list[str] = []
    store, refs = stored(tmp_path, 1)

    async def main() -> list[str]:
        async with opened(server, store, said, send_images=send_images) as model:
            return [(await model.answer(call(number, (refs[0],)))).text for number in range(4)]

    with FaultServer(refusing(words, status)) as server:
        assert asyncio.run(main()) == [JSON] * 4
    formats = ["response_format" in request.body for request in server.requests]
    assert formats[:2] == [True, False]
    assert not any(formats[2:])
    assert len(said) == 1
    assert "refuses JSON schemas" in said[0]
    assert "json_schema: false" in said[0]


def test_a_field_that_the_quirks_list_is_left_out_where_a_server_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer adds one line to the table, and no code."""
    line = OptionalField("seed", re.compile("unknown field.*seed"), "{model} takes no seed ({why})")
    monkeypatch.setattr(quirks, "OPTIONAL_FIELDS", (*quirks.OPTIONAL_FIELDS, line))
    said: list[str] = []

    async def main() -> list[str]:
        async with opened(server, ImageStore(tmp_path), said) as model:
            return [(await model.answer(call(number))).text for number in range(3)]

    def script(request: Request) -> Answer:
        if "response_format" in request.body:
            return error(400, "no schema")
        return error(400, "unknown field: seed") if "seed" in request.body else reply(JSON)

    with FaultServer(script) as server:
        assert asyncio.run(main()) == [JSON] * 3
    sent = [tuple(field in request.body for field in ("response_format", "seed")) for request in server.requests]
    assert sent == [(True, True), (False, True), (False, False), (False, False), (False, False)]
    assert [text.partition(" (")[0] for text in said] == ["openai:toy refuses JSON schemas", "openai:toy takes no seed"]


def test_a_fault_of_another_kind_does_not_cost_the_schema(tmp_path: Path) -> None:
    """Only what a server refuses for good, and accepts without its schema, says that it knows no schemas."""
    answers = {
        0: error(500, "schema cache is cold"),
        2: error(400, "the image is too large"),
        3: error(400, "no schema"),
    }
    said: list[str] = []

    def script(request: Request) -> Answer:
        found = answers.get(request.number)
        if request.number == 4:
            return error(400, "no schema and no reply either")
        return found or reply(JSON)

    async def main() -> list[str]:
        found = []
        async with opened(server, ImageStore(tmp_path), said) as model:
            for number in range(4):
                try:
                    found.append((await model.answer(call(number))).text)
                except CallFailed as failed:
                    found.append(failed.reason)
        return found

    with FaultServer(script) as server:
        assert asyncio.run(main()) == [JSON, "bad_request", "bad_request", JSON]
    assert not said
    assert "response_format" in server.requests[-1].body


TOO_LONG = [
    "This model's maximum context length is 4096 tokens. However, your prompt contains at least 4097 input tokens",
    "Input length (9000) exceeds model's maximum context length (8192).",
    "This model's maximum context length is 128000 tokens. However, your messages resulted in 130000 tokens.",
    "prompt is too long: 210000 tokens > 200000 maximum",
    "Requested tokens (5000) exceed context window of 4096",
]


@pytest.mark.parametrize("words", TOO_LONG)
def test_a_prompt_that_does_not_fit_says_so(words: str, tmp_path: Path) -> None:
    async def main() -> CallFailed:
        async with opened(server, ImageStore(tmp_path), []) as model:
            with pytest.raises(CallFailed) as caught:
                await model.answer(call())
            return caught.value

    with FaultServer(lambda _: error(400, words)) as server:
        assert asyncio.run(main()).reason == "too_long"
    assert len(server.requests) == 1


def test_a_dialogue_that_does_not_fit_is_rejected_with_that_reason_and_not_asked_again(tmp_path: Path) -> None:
    def hook(body: Body) -> web.Response | None:
        if asks_for(body) == "victim" and len(body["messages"]) > 4:
            return web.json_response({"error": {"message": TOO_LONG[0]}}, status=400)
        return None

    with scripted_server(hook, profile="flawless") as server:
        recipe = demo(victims=[f"openai:toy@{server.url}"], attacker="scripted:flawless", judge="scripted:flawless")
        run = generate_dialogues(recipe, run=tmp_path / "run", n=12)
        rejected = rows(tmp_path / "run" / "rejected.jsonl")
        long = [row for row in rejected if row["reason"] == "too_long"]
        assert long
        assert {row["stage"] for row in long} == {"victim"}
        assert all(len(dialogue.turns) == 2 for dialogue in run.dialogues())
        assert not rows(tmp_path / "run" / "failed.jsonl")
        before, asked = digest(tmp_path / "run"), server.requests
        generate_dialogues(recipe, run=tmp_path / "run", n=12)
        assert (digest(tmp_path / "run"), server.requests) == (before, asked)


def test_where_nothing_fits_the_run_says_what_to_raise(tmp_path: Path) -> None:
    def hook(body: Body) -> web.Response | None:
        return (
            web.json_response({"error": {"message": TOO_LONG[1]}}, status=400) if asks_for(body) == "victim" else None
        )

    seeds = tmp_path / "seeds.jsonl"
    line = {"id": "one", "query": "A worry", "category": "fraud", "source": "own", "license": "CC0-1.0"}
    seeds.write_text(json.dumps(line) + "\n")
    with scripted_server(hook, profile="flawless") as server:
        recipe = demo(victims=[f"openai:toy@{server.url}"], seeds=(str(seeds),))
        with pytest.raises(SeedsExhausted, match="max_model_len"):
            generate_dialogues(recipe, run=tmp_path / "run", n=5)
    assert not Run(tmp_path / "run").funnel().accepted


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("At most 1 image(s) may be provided in one prompt. (parameter=image)", "raise `images`"),
        ("At most 0 image(s) may be provided in one prompt.", "vision-language model"),
        ("tiny-llama is not a multimodal model", "vision-language model"),
        ("This model does not support image input", "vision-language model"),
    ],
)
def test_a_server_without_vision_support_ends_the_run_in_one_line_with_the_remedy(
    words: str, remedy: str, tmp_path: Path
) -> None:
    def hook(body: Body) -> web.Response | None:
        pictured = any(not isinstance(message["content"], str) for message in body["messages"])
        return web.json_response({"error": {"message": words}}, status=400) if pictured else None

    lines = []
    for number in range(40):
        Image.new("RGB", (40, 40), (5 * number, 0, 9)).save(tmp_path / f"{number}.png")
        common = {"category": "fraud", "source": "own", "license": "CC0-1.0", "image": f"{number}.png"}
        lines.append(json.dumps({"id": f"s{number}", "query": "A worry"} | common))
    (tmp_path / "seeds.jsonl").write_text("\n".join(lines))
    with scripted_server(hook, profile="flawless") as server:
        recipe = demo(victims=[f"openai:toy@{server.url}"], seeds=(str(tmp_path / "seeds.jsonl"),))
        with pytest.raises(ServiceGone) as caught:
            generate_dialogues(recipe, run=tmp_path / "run", n=5)
    assert remedy in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
