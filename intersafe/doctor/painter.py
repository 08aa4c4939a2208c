"""Checks whether an image server returns a picture."""

import asyncio
import base64

import msgspec

from intersafe.doctor.chat import listed_models, no_answer
from intersafe.doctor.client import ProbeClient
from intersafe.doctor.findings import Finding
from intersafe.errors import CallFailed, InputError
from intersafe.images.store import normalise
from intersafe.models.http.faults import UNREADABLE, Fault
from intersafe.models.http.images import SMALL_PICTURE
from intersafe.recipe.sections import Painter

PICTURE_TIMEOUTS = 6
"""A picture gets this many times the time-out of a chat request."""


class _Image(msgspec.Struct):
    b64_json: str | None = None
    url: str | None = None


class _Images(msgspec.Struct):
    data: list[_Image]


async def probe_painter(client: ProbeClient, painter: Painter) -> list[Finding]:
    """Asks for a small picture of one step; for one of the recipe's size if the server refuses the small one."""
    drawn = await _drawn(client, painter, "256x256")
    if isinstance(drawn, CallFailed):
        drawn = await _drawn(client, painter, painter.size)
    if not isinstance(drawn, tuple):
        return [no_answer(client, drawn, await listed_models(client))]
    data, seconds = drawn
    try:
        image = (msgspec.json.decode(data, type=_Images).data or [_Image()])[0]
    except UNREADABLE:
        image = _Image()
    if not image.b64_json:
        says = "it sends a link, not the picture" if image.url else "HTTP 200 without a picture"
        return [Finding("FAIL", "picture", says, "use a server that supports `response_format: b64_json`")]
    try:
        found = normalise(base64.b64decode(image.b64_json), at="the picture")
    except (InputError, ValueError):
        return [Finding("FAIL", "picture", "its data is no picture", "check that it is a text-to-image server")]
    return [Finding("ok", "picture", f"{found.width}x{found.height} in {seconds:.2f} s")]


async def _drawn(client: ProbeClient, painter: Painter, size: str) -> tuple[bytes, float] | Fault | CallFailed:
    """The body of the answer and the seconds that it took, or what came instead."""
    clock = asyncio.get_running_loop().time
    began = clock()
    try:
        return await client.send("/images/generations", _body(painter, size)), clock() - began
    except (CallFailed, Fault) as error:
        return error


def _body(painter: Painter, size: str) -> bytes:
    body = {
        "model": painter.spec.model,
        "prompt": SMALL_PICTURE,
        "n": 1,
        "size": size,
        "response_format": "b64_json",
        "seed": 0,
        "num_inference_steps": None if painter.steps is None else 1,
    } | painter.extra
    return msgspec.json.encode({name: value for name, value in body.items() if value is not None})
