"""The three ways in which images go to a chat server (`Member.send_images`), over real HTTP."""

import asyncio
import base64
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from intersafe.errors import CallFailed
from intersafe.images.store import ImageStore, normalise
from intersafe.models.base import Hooks
from intersafe.models.http.completions import REMEMBERED
from intersafe.models.open import open_models
from intersafe.recipe.sections import Cast, Limits, Member
from tests.support.endpoints import call, failure, opened, picture
from tests.support.servers.fault_server import CUT, Answer, FaultServer, Request, error, reply


def stored(store: ImageStore, count: int) -> list[str]:
    """References of `count` different images."""
    return [store.put(normalise(picture(20 + i % 50, 30 + i // 50), at="test")) for i in range(count)]


def parts_of(request: Request) -> list[dict[str, Any]]:
    """The image parts of a request, in their order."""
    contents = [message["content"] for message in request.body["messages"]]
    return [part for content in contents if isinstance(content, list) for part in content if part["type"] != "text"]


def whole_or_not(request: Request) -> list[bool]:
    """For each image of a request: True if its bytes came along."""
    return [part["image_url"] is not None for part in parts_of(request)]


class Remembering:
    """A script that takes bytes with a `uuid` and afterwards the `uuid` alone, as vLLM does; `forgets` is the answer
    to one it does not know."""

    def __init__(self, forgets: Answer) -> None:
        self.forgets = forgets
        self.seen: dict[str, str] = {}

    def __call__(self, request: Request) -> Answer:
        for part in parts_of(request):
            if part["image_url"] is not None:
                self.seen[part["uuid"]] = part["image_url"]["url"]
            elif part["uuid"] not in self.seen:
                return self.forgets
        return reply(" ".join(self.seen[part["uuid"]] for part in parts_of(request)) or "ok")


# --- file ------------------------------------------------------------------------------------------------------------


def test_a_file_url_leads_to_the_bytes_even_through_odd_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a run #1, 50% é?").mkdir()
    monkeypatch.chdir(tmp_path / "a run #1, 50% é?")
    store = ImageStore(Path("images"))
    refs = stored(store, 2)

    async def main() -> None:
        async with opened(server, images=store, send_images="file") as ask:
            await ask("what is this", images=refs)

    with FaultServer() as server:
        asyncio.run(main())
    monkeypatch.chdir(tmp_path)
    for part, ref in zip(parts_of(server.requests[0]), refs, strict=True):
        url = urlsplit(part["image_url"]["url"])
        assert (url.scheme, url.netloc, url.query, url.fragment) == ("file", "", "", "")
        assert url.path.isascii()
        path = Path(url2pathname(url.path))
        assert path.is_absolute()
        assert normalise(path.read_bytes(), at=path).ref == ref


# --- uuid ------------------------------------------------------------------------------------------------------------


def test_bytes_travel_once_and_then_the_uuid_alone(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    a, b = stored(store, 2)

    async def main() -> list[str]:
        async with opened(server, images=store, send_images="uuid") as ask:
            return [(await ask(images=images)).text for images in ([a], [a, b], [b, a])]

    with FaultServer(Remembering(error(400))) as server:
        texts = asyncio.run(main())
    assert [whole_or_not(request) for request in server.requests] == [[True], [False, True], [False, False]]
    assert [part["uuid"] for part in parts_of(server.requests[2])] == [b[:64], a[:64]]
    bytes_of = {ref: base64.b64encode(store.read(ref)).decode() for ref in (a, b)}
    for text, refs in zip(texts, ([a], [a, b], [b, a]), strict=True):
        assert text == " ".join(f"data:image/png;base64,{bytes_of[ref]}" for ref in refs)


@pytest.mark.parametrize("forgets", [error(400, "unknown uuid"), error(500), error(422), error(404)])
def test_a_server_that_forgot_gets_the_bytes_again_and_the_user_is_not_told(forgets: Answer, tmp_path: Path) -> None:
    """As after a restart: what every dialogue has sent is unknown at once."""
    store, script = ImageStore(tmp_path), Remembering(forgets)
    refs = stored(store, 8)

    async def main() -> None:
        # Two tries in all: one that the fallback used up would leave too few.
        async with opened(server, images=store, send_images="uuid", limits=Limits(retries=2, patience=30)) as ask:
            await asyncio.gather(*(ask(images=[ref]) for ref in refs))
            script.seen.clear()
            replies = await asyncio.gather(*(ask(images=[ref, refs[0]]) for ref in refs))
            assert all(reply.text.startswith("data:") for reply in replies)
            assert ask.said == []

    with FaultServer(script) as server:
        asyncio.run(main())
    assert len(server.asked) == len(server.requests), "no health probe was needed"
    assert len(server.requests) <= 8 + 2 * 8
    assert whole_or_not(server.requests[-1]) == [True, True]


@pytest.mark.parametrize("status", [400, 500])
def test_a_call_that_fails_for_another_reason_is_sent_once_more_and_no_oftener(status: int, tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    (ref,) = stored(store, 1)

    def script(request: Request) -> Answer:
        return error(status, "poison") if "poison" in request.text else reply()

    async def main() -> CallFailed:
        async with opened(server, images=store, send_images="uuid", limits=Limits(retries=2)) as ask:
            await ask("hi", images=[ref])
            return await failure(ask("poison", images=[ref]))

    with FaultServer(script) as server:
        failed = asyncio.run(main())
    assert failed.detail == f"HTTP {status} poison"
    tries = [whole_or_not(request) for request in server.asked if "poison" in request.text]
    assert tries == [[False], [True]] + ([[True]] if status == 500 else [])


@pytest.mark.parametrize("fault", [error(400), error(500), error(429), CUT, Answer(200, b"<html>")])
def test_an_image_counts_as_sent_only_after_an_answer_that_was_read(fault: Answer, tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    (ref,) = stored(store, 1)

    async def main() -> None:
        async with opened(server, images=store, send_images="uuid") as ask:
            if fault.status == 400:
                await failure(ask(images=[ref]))
            await ask(images=[ref])
            await ask(images=[ref])

    with FaultServer(lambda request: fault if request.number == 0 else reply()) as server:
        asyncio.run(main())
    assert [whole_or_not(request) for request in server.asked] == [[True], [True], [False]]


def test_each_replica_is_sent_the_bytes_of_its_own(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    (ref,) = stored(store, 1)

    async def main() -> None:
        async with opened(one, other, images=store, send_images="uuid") as ask:
            for number in range(12):
                await ask(job=f"job {number}", images=[ref])

    with FaultServer(Remembering(error(400))) as one, FaultServer(Remembering(error(400))) as other:
        asyncio.run(main())
    for server in (one, other):
        assert [whole_or_not(request) for request in server.requests] == [[True]] + [[False]] * (
            len(server.requests) - 1
        )
        assert len(server.requests) > 1


def test_what_was_sent_is_remembered_within_bounds_the_latest_used_longest(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    refs = stored(store, REMEMBERED + 1)

    async def main() -> None:
        async with opened(server, images=store, send_images="uuid") as ask:
            await ask(images=refs[:-1])
            await ask(images=[refs[0]])  # used again, so refs[1] is the one that goes
            await ask(images=[refs[-1]])
            await ask(images=[refs[0], refs[1], refs[-1]])

    with FaultServer() as server:
        asyncio.run(main())
    assert whole_or_not(server.requests[1]) == [False]
    assert whole_or_not(server.requests[-1]) == [False, True, False]


def test_members_that_send_images_in_different_ways_do_not_share_a_model(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    refs = stored(store, 1)

    async def main() -> None:
        data = Member(model=f"openai:m@{server.url}")
        cast = Cast(attacker=data, victims=(Member(model=data.model, send_images="file"),), judge=data)
        models = open_models(cast, Limits(), store, Hooks())
        for role in ("attacker", "victim:0"):
            await models[role].answer(call("hi", images=refs))
        await asyncio.gather(*(model.aclose() for model in set(models.values())))

    with FaultServer() as server:
        asyncio.run(main())
    schemes = [parts_of(request)[0]["image_url"]["url"].partition(":")[0] for request in server.requests]
    assert schemes == ["data", "file"]
