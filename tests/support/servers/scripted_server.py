"""The scripted cast behind a real OpenAI-compatible HTTP server on 127.0.0.1, with hooks for what shall go wrong.

Replies depend on the body of the request alone, so a run over HTTP is as deterministic as one in process.
"""

import asyncio
import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from intersafe.models.base import Call, Sampling
from intersafe.models.scripted.chat import ScriptedModel
from intersafe.records import Message
from intersafe.replies import Schema

Body = dict[str, Any]
Hook = Callable[[Body], "str | web.Response | None"]
"""Given the body of a request: the text to answer with, a whole response, or None for the scripted reply."""


@dataclass
class Server:
    """A running server: where it is and what it was asked."""

    url: str = ""
    delay: float = 0.0
    """Seconds until an answer."""
    bodies: list[Body] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    """How often each body came."""
    in_flight: int = 0
    most_in_flight: int = 0
    metrics: Callable[[], str] | None = None
    """What `/metrics` answers; None: nothing is there."""

    @property
    def requests(self) -> int:
        """Requests in all."""
        return sum(self.seen.values())


def asks_for(body: Body) -> str:
    """What a request is for: plan, step, stepscore, message, verdict, check, or `victim`."""
    form = body.get("response_format")
    return str(form["json_schema"]["name"]) if form else "victim"


def text_of(message: dict[str, Any]) -> str:
    """The text of a message in either notation."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def images_of(message: dict[str, Any]) -> list[str]:
    """The image URLs of a message."""
    content = message["content"]
    return [] if isinstance(content, str) else [p["image_url"]["url"] for p in content if p["type"] == "image_url"]


@contextlib.contextmanager
def scripted_server(hook: Hook | None = None, *, profile: str = "demo", delay: float = 0.0) -> Iterator[Server]:
    """Serves `scripted:<profile>` on a free port in a thread until the block ends."""
    server, model = Server(delay=delay), ScriptedModel(profile)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def chat(request: web.Request) -> web.Response:
        body: Body = json.loads(await request.read())
        server.seen[hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()] += 1
        server.bodies.append(body)
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            if server.delay:
                await asyncio.sleep(server.delay)
            hooked = hook(body) if hook else None
            if isinstance(hooked, web.Response):
                return hooked
            return await completion(model, body, hooked)
        finally:
            server.in_flight -= 1

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=server.metrics()) if server.metrics else web.Response(status=404)

    async def serve() -> None:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/chat/completions", chat)
        app.router.add_get("/metrics", metrics)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=512)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        started.set()
        await stop.wait()
        await runner.cleanup()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


async def completion(model: ScriptedModel, body: Body, text: str | None = None) -> web.Response:
    """The scripted reply to a request, or the text, as a chat completion."""
    finish, tokens = "stop", (1, 1)
    if text is None:
        form = body.get("response_format")
        schema = Schema(form["json_schema"]["name"], form["json_schema"]["schema"]) if form else None
        messages = tuple(Message(message["role"], text_of(message)) for message in body["messages"])
        sampling = Sampling(body.get("temperature", 1), body.get("top_p", 1), body["max_tokens"], body.get("seed", 0))
        reply = await model.answer(Call("http", "", messages, sampling, schema, "", 0))
        text, finish, tokens = reply.text, reply.finish, reply.tokens
    return web.json_response(
        {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]},
        }
    )
