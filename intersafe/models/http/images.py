"""Any server with the OpenAI Images API: one POST to `/images/generations`, one image back as base64.

Steps, guidance and the negative prompt have the names that vLLM-Omni and SGLang give them, and are sent only where they
are set. A field that is null in `extra` is left out, for services that refuse unknown fields: OpenAI's gpt-image-1
takes neither `response_format` nor `seed`.

The health probe is a picture too. A server that lists its models may still be unable to draw; it would then fail every
dialogue of a run that should wait for it. A probe is paid for only where it is answered: once for each outage, and once
for a call that fails for good while no other call is answered.
"""

import base64
import binascii
from typing import Any

import msgspec
from msgspec import structs

from intersafe.models.base import Call, Hooks, Painted
from intersafe.models.http.faults import UNREADABLE, Transient
from intersafe.models.http.request import Request
from intersafe.models.http.service import Service
from intersafe.recipe.sections import Limits, Painter

MAX_BODY = 48 * 2**20
SMALL_PICTURE = "A red circle on white ground."


class _Image(msgspec.Struct):
    b64_json: str | None = None
    url: str | None = None


class _Images(msgspec.Struct):
    data: list[_Image] | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Images)


class ImagesEndpoint:
    """One text-to-image model behind one or several URLs."""

    def __init__(self, painter: Painter, limits: Limits, hooks: Hooks) -> None:
        """Needs a running event loop."""
        self.identity = painter.identity
        self._painter = painter
        limits = structs.replace(limits, timeout=painter.timeout)
        quick = painter if painter.steps is None else structs.replace(painter, steps=1)
        self._service = Service(
            painter,
            "/images/generations",
            limits,
            hooks,
            probe=lambda role: ImageRequest(role, quick, SMALL_PICTURE, 0),
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._service.aclose()

    async def paint(self, call: Call) -> Painted:
        """The image as it came; waits out overload and outages, tries again after transient faults."""
        request = ImageRequest(call.role, self._painter, call.messages[-1].text, call.sampling.seed)
        painted = await self._service.ask(call.job, request)
        return structs.replace(painted, detail=self._service.clean(painted.detail)) if painted.detail else painted


class ImageRequest(Request[Painted]):
    """One image to draw."""

    max_body = MAX_BODY

    def __init__(self, role: str, painter: Painter, description: str, seed: int) -> None:
        """`seed` has at most 31 bits."""
        super().__init__(role)
        self._body = _body(painter, description, seed)

    def body(self, url: str) -> bytes:
        """The same for every replica."""
        return self._body

    def read(self, data: bytes) -> Painted:
        """The image in a 200; a link is named without its address, which may be signed."""
        try:
            answer = _DECODER.decode(data)
        except UNREADABLE as error:
            raise Transient(f"unreadable answer: {error}") from None
        image = answer.data[0] if answer.data else _Image()
        link = image.url or ""
        encoded = image.b64_json or (link if link.startswith("data:") else "")
        if encoded:
            return _decoded(encoded)
        if link:
            detail = "the server sent a link, and links are not fetched: have it answer `response_format: b64_json`"
            return Painted(problem="image_url", detail=detail)
        return Painted(problem="no_image", detail=str(answer.error or ""))

    def blocked(self, message: str) -> Painted:
        """A problem of the description."""
        return Painted(problem="blocked", detail=message)

    def too_long(self) -> Painted:
        """A problem of the image."""
        return Painted(problem="bad_image", detail=f"the answer has more than {MAX_BODY // 2**20} MiB")


def _body(painter: Painter, description: str, seed: int) -> bytes:
    body = {
        "model": painter.spec.model,
        "prompt": description,
        "n": 1,
        "size": painter.size,
        "response_format": "b64_json",
        "seed": seed & 0x7FFFFFFF,
        "num_inference_steps": painter.steps,
        "negative_prompt": painter.negative_prompt or None,
        "true_cfg_scale": painter.guidance,
    } | painter.extra
    return msgspec.json.encode({name: value for name, value in body.items() if value is not None})


def _decoded(encoded: str) -> Painted:
    if encoded.startswith("data:"):
        head, _, encoded = encoded.partition(",")
        if not head.endswith(";base64"):
            return Painted(problem="bad_image", detail="a data URI that is not base64")
    try:
        image = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return Painted(problem="bad_image", detail=f"not base64: {error}")
    return Painted(image) if image else Painted(problem="no_image")
