"""An OpenAI-compatible chat server on 127.0.0.1 that misbehaves on demand, with real HTTP and real sockets.

A *script* is a function from a request to an `Answer`; `in_turn(...)` makes one from a list. The server runs in a
thread, remembers every request, and can be stopped and started again on the same port.
"""

import asyncio
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import web

How = Literal["whole", "reset", "stall", "cut", "last", "trickle"]


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    number: int
    """Place in the order of arrival, from 0."""
    path: str
    body: dict[str, Any]
    headers: Mapping[str, str]
    at: float
    """`time.monotonic()` of its arrival."""
    in_flight: int
    """Requests that the server was at work on, this one included."""

    @property
    def text(self) -> str:
        """The text of the last message."""
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    @property
    def is_probe(self) -> bool:
        """True for the client's health probe."""
        return self.text == "Say hello."


@dataclass(frozen=True)
class Answer:
    """What the server does with a request."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds of work before it answers."""
    how: How = "whole"
    """`reset` sends a TCP reset, `stall` nothing until the server stops, `cut` half of the body and a reset, `trickle`
    a byte every 20 ms; `last` answers and refuses every connection from then on."""


Script = Callable[[Request], Answer]


def reply(content: Any = "ok", finish: str | None = "stop", *, delay: float = 0.0, **message: Any) -> Answer:
    """A completion; `message` adds fields to the message, for example `refusal`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 11, "completion_tokens": 7}
    return raw(json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode(), delay=delay)


def raw(body: bytes, *, how: How = "whole", delay: float = 0.0) -> Answer:
    """A 200 with these bytes."""
    return Answer(200, body, {"Content-Type": "application/json"}, delay, how)


def error(status: int, message: str = "no", *, code: str | None = None, **headers: str) -> Answer:
    """An error as OpenAI writes it; `Retry_After="1"` becomes the header `Retry-After: 1`."""
    body = json.dumps({"error": {"message": message, "type": "test", "code": code}}).encode()
    return Answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


RESET, STALL = Answer(how="reset"), Answer(how="stall")
CUT = raw(reply("a" * 4000).body, how="cut")


def in_turn(*answers: Answer) -> Script:
    """The answers by request number, the last one from then on."""
    return lambda request: answers[min(request.number, len(answers) - 1)]


class FaultServer:
    """`with FaultServer(script) as server:` serves at `server.url` until the block ends."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        capacity: int | None = None,
        slots: int = 100_000,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """More than `capacity` requests at once are answered with 429; those over `slots` wait until one is free."""
        self.script: Script = script or (lambda _: reply())
        self.capacity, self.slots = capacity, slots
        self.requests: list[Request] = []
        self.served: list[Request] = []
        """The requests that were answered with 200."""
        self.most_in_flight = 0
        self.port = 0
        self._tls, self._in_flight = tls, 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._site: web.TCPSite | None = None
        self._thread: threading.Thread | None = None
        self._arrival = threading.Condition()

    @property
    def url(self) -> str:
        """The base URL with `/v1`."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"

    @property
    def asked(self) -> list[Request]:
        """The requests without the client's health probes."""
        return [request for request in self.requests if not request.is_probe]

    async def have_come(self, count: int) -> None:
        """Returns when there were `count` requests; to be awaited in the test's own event loop."""

        def wait() -> bool:
            with self._arrival:
                return self._arrival.wait_for(lambda: len(self.requests) >= count, 30)

        assert await asyncio.to_thread(wait), f"{len(self.requests)} requests came, {count} were awaited"

    def start(self) -> None:
        """Listens; after a `stop`, on the port that it had before."""
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(ready),), daemon=True)
        self._thread.start()
        assert ready.wait(10), "the fault server did not start"

    def stop(self) -> None:
        """Resets every connection and refuses new ones."""
        if self._thread is None or self._loop is None or self._stopping is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        self._loop.close()
        self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    async def _serve(self, ready: threading.Event) -> None:
        self._stopping, self._in_flight = asyncio.Event(), 0
        self._working = asyncio.Semaphore(self.slots)
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        self._site = site = web.TCPSite(
            runner, "127.0.0.1", self.port, backlog=1024, reuse_address=True, ssl_context=self._tls
        )
        await site.start()
        self.port = runner.addresses[0][1]
        ready.set()
        await self._stopping.wait()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        self._in_flight += 1
        try:
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            body = json.loads(data or b"{}")
            number, at, headers = len(self.requests), time.monotonic(), dict(request.headers)
            seen = Request(number, request.path, body, headers, at, self._in_flight)
            with self._arrival:
                self.requests.append(seen)
                self._arrival.notify_all()
            if self.capacity is not None and self._in_flight > self.capacity:
                return _whole(error(429, "too many at once"))
            answer = self.script(seen)
            if answer.status == 200 and answer.how == "whole":
                self.served.append(seen)
            return await self._carry_out(answer, request)
        finally:
            self._in_flight -= 1

    async def _carry_out(self, answer: Answer, request: web.Request) -> web.StreamResponse:
        if answer.delay:
            async with self._working:
                await asyncio.sleep(answer.delay)
        if answer.how == "last":
            assert self._site is not None
            await self._site.stop()
            return _whole(answer, close=True)
        if answer.how == "stall":
            assert self._stopping is not None
            await self._stopping.wait()
        if answer.how == "trickle":
            return await self._trickle(answer, request)
        if answer.how == "cut":
            response = web.StreamResponse(headers={"Content-Length": str(len(answer.body))})
            await response.prepare(request)
            await response.write(answer.body[: len(answer.body) // 2])
        if answer.how != "whole" and request.transport is not None:
            # With a linger time of zero, closing sends RST in place of FIN.
            sock: socket.socket = request.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.transport.abort()
        return _whole(answer)

    async def _trickle(self, answer: Answer, request: web.Request) -> web.StreamResponse:
        assert self._stopping is not None
        response = web.StreamResponse(headers={"Content-Length": str(len(answer.body))})
        await response.prepare(request)
        for i in range(len(answer.body)):
            if self._stopping.is_set():
                break
            await response.write(answer.body[i : i + 1])
            await asyncio.sleep(0.02)
        return response


def _whole(answer: Answer, *, close: bool = False) -> web.Response:
    response = web.Response(status=answer.status, body=answer.body, headers=dict(answer.headers))
    if close:
        response.force_close()
    return response
