"""Chat models and painters in front of test servers: opened, called, closed."""

import asyncio
import contextlib
import io
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
from PIL import Image

from intersafe.errors import CallFailed
from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Hooks, Painted, PaintModel, Reply, Sampling
from intersafe.models.http.chat import EndpointModel
from intersafe.models.open import open_painter
from intersafe.recipe.sections import Limits, Member, Painter
from intersafe.records import Message
from intersafe.replies import Schema
from tests.support.servers.fault_server import FaultServer

Model = TypeVar("Model")
Answer = TypeVar("Answer")
LIMITS = Limits(timeout=10, patience=30, retries=3)


class Opened(Generic[Model, Answer]):
    """A model, what it told the user and what it counted; to call it is to send one request."""

    def __init__(
        self,
        model: Model,
        said: list[str],
        hooks: Hooks,
        call: Callable[..., Call],
        send: Callable[[Call], Coroutine[Any, Any, Answer]],
    ) -> None:
        self.model, self.said, self.hooks = model, said, hooks
        self._call, self._send = call, send

    async def __call__(self, *words: str, **changes: Any) -> Answer:
        return await self._send(self._call(*words, **changes))


OpenedChat = Opened[EndpointModel, Reply]
OpenedPainter = Opened[PaintModel, Painted]


def call(
    text: str = "hi", job: str = "job", *, images: Sequence[str] = (), schema: Schema | None = None, role: str = "judge"
) -> Call:
    """A call of a chat model."""
    messages = (Message("system", "be brief"), Message("user", text, tuple(images)))
    return Call(role, "prompt", messages, Sampling(0.3, 0.9, 123, 4567), schema, job, 0)


def paint_call(description: str = "a lamp", job: str = "job", seed: int = 4567) -> Call:
    """A call of a painter."""
    sampling = Sampling(1.0, 1.0, 1, seed)
    return Call("painter", "painter/describe", (Message("user", description),), sampling, None, job, 0)


@contextlib.asynccontextmanager
async def opened(
    *servers: FaultServer,
    limits: Limits = LIMITS,
    images: ImageStore | None = None,
    said: list[str] | None = None,
    say: Callable[[str], None] | None = None,
    **changes: Any,
) -> AsyncIterator[OpenedChat]:
    """A chat model whose replicas are the servers."""
    said = [] if said is None else said
    member = Member(model=spec_of(servers), **changes)
    hooks = Hooks(say or said.append)
    model = EndpointModel(member, limits, images or ImageStore(Path("nowhere")), hooks)
    async with contextlib.aclosing(model):
        yield Opened(model, said, hooks, call, model.answer)


@contextlib.asynccontextmanager
async def opened_painter(
    *servers: FaultServer,
    limits: Limits = LIMITS,
    said: list[str] | None = None,
    say: Callable[[str], None] | None = None,
    **changes: Any,
) -> AsyncIterator[OpenedPainter]:
    """A painter whose replicas are the servers."""
    said = [] if said is None else said
    hooks = Hooks(say or said.append)
    async with contextlib.aclosing(open_painter(Painter(model=spec_of(servers), **changes), limits, hooks)) as model:
        yield Opened(model, said, hooks, paint_call, model.paint)


def spec_of(servers: Sequence[FaultServer]) -> str:
    """The `model` of a recipe for these replicas."""
    return f"openai:some/model@{','.join(server.url for server in servers)}"


def once(opening: AbstractAsyncContextManager[Opened[Model, Answer]], *words: str) -> Answer:
    """One call in an event loop of its own."""

    async def main() -> Answer:
        async with opening as ask:
            return await ask(*words)

    return asyncio.run(main())


async def failure(answer: Coroutine[Any, Any, object]) -> CallFailed:
    """The exception that a call ends with."""
    with pytest.raises(CallFailed) as caught:
        await answer
    return caught.value


def picture(width: int, height: int, noise: bool = False) -> bytes:
    """A PNG of one colour, or of noise that does not compress."""
    image = Image.frombytes("RGB", (width, height), os.urandom(3 * width * height)) if noise else None
    data = io.BytesIO()
    (image or Image.new("RGB", (width, height), "teal")).save(data, "PNG")
    return data.getvalue()
