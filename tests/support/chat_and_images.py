"""A chat server and an images server side by side, a recipe that uses both, and pictures with a hash that is known."""

import base64
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from intersafe.models.scripted.painter import PAINTER_PROFILES, draw
from intersafe.recipe.gates import Gates
from intersafe.recipe.sections import Images, Recipe, Turns
from tests.support.runs import demo
from tests.support.servers.fault_server import Answer, FaultServer, Request, raw
from tests.support.servers.scripted_server import Hook, Server, scripted_server

Paint = Callable[[Request], "Answer | bytes | None"]
"""Given a request: an answer, the bytes to send as an image, or None for a picture of its own."""


@dataclass(frozen=True)
class BothServers:
    """The chat server and the images server, running."""

    chat: Server
    images: FaultServer

    @property
    def drawn(self) -> list[tuple[str, int]]:
        """Description and seed of every request for an image, in the order of arrival."""
        return [(request.body["prompt"], request.body.get("seed", 0)) for request in self.images.requests]

    def recipe(self, seeds: Path | None = None, **changes: Any) -> Recipe:
        """The demo's dialogues over both servers; of `seeds` every job has one image, in three turns."""
        spec = f"openai:scripted@{self.chat.url}"
        cast: dict[str, Any] = {
            "attacker": spec,
            "judge": spec,
            "victims": [spec],
            "painter": f"openai:painter@{self.images.url}",
        }
        if seeds:
            cast |= {"seeds": (str(seeds),), "images": few(1), "turns": Turns(min=3, mean=3, max=3), "samples": 3}
            cast |= {"gates": Gates(coverage=None, duplicates=None)}
        return demo(**(cast | changes))


@contextlib.contextmanager
def both_servers(
    hook: Hook | None = None, paint: Paint | None = None, *, profile: str = "flawless"
) -> Iterator[BothServers]:
    """Starts both; the painter draws another picture for every description and seed unless `paint` knows better."""

    def script(request: Request) -> Answer:
        answer = paint(request) if paint else None
        if answer is None:
            answer = picture(request.body["prompt"], request.body.get("seed", 0))
        return as_image(answer) if isinstance(answer, bytes) else answer

    with scripted_server(hook, profile=profile) as chat, FaultServer(script) as images:
        yield BothServers(chat, images)


def few(number: int) -> Images:
    """That number of images in every dialogue."""
    return Images(min=number, mean=number, max=number)


def picture(description: str, seed: int) -> bytes:
    """A PNG of its own for every description and seed."""
    return draw(description, seed, (64, 48), PAINTER_PROFILES["flawless"]).data


def as_image(data: bytes) -> Answer:
    """The answer of an images server that holds these bytes."""
    return raw(json.dumps({"data": [{"b64_json": base64.b64encode(data).decode()}]}).encode())


def uri(data: bytes) -> str:
    """The data URI under which a model gets these bytes of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def hashed(bits: int, kind: str = "PNG", **options: Any) -> bytes:
    """A picture whose perceptual hash is `bits`."""
    pixels = bytearray()
    for row in range(8):
        shades = [128]
        for column in range(8):
            shades.append(shades[-1] + (12 if bits >> (8 * row + column) & 1 else -12))
        pixels += bytes(shades)
    data = io.BytesIO()
    grey = Image.frombytes("L", (9, 8), bytes(pixels)).resize((144, 128), Image.Resampling.NEAREST)
    grey.save(data, kind, **options)
    return data.getvalue()
