"""The scripted cast behind real HTTP in a process of its own, with faults that depend on seed and request alone.

    python -m tests.support.servers.chaos_server --seed 7 --faults 0.2        prints `ready <url>/v1 <control url>`

A reply depends on the body of the request, and the fault of the k-th arrival of a body on (seed, body, k): two runs
meet comparable faults and must come to the same end. A body meets at most `MOST` of them and is then answered well. An
outage (`AWAY`) concerns everybody for a while; a body that was turned away by one meets no further fault. What is an
outcome by design (`--outcomes`: cut off by length, stopped by a filter) is given to the same bodies every time.
"""

import argparse
import asyncio
import contextlib
import email.utils
import hashlib
import json
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from intersafe.models.base import Call, Sampling
from intersafe.models.scripted.chat import ScriptedModel
from intersafe.records import Message
from intersafe.replies import Schema
from tests.support.paths import REPOSITORY
from tests.support.servers.scripted_server import Body, text_of

MOST = 3
"""Faults that one body meets; below `limits.retries`, which is 5 unless the recipe says otherwise."""
OUTAGE = 0.25
"""Seconds that an outage lasts."""
LARGE = 5 * 2**20
"""Bytes of the large reply."""
TRICKLE = 0.3
"""Seconds that the slow reply takes which still arrives in time."""

OVERLOAD = {"429 seconds": 0.6, "429 date": 0.1, "429 bare": 0.4, "429 in the body": 0.4, "503": 0.6}
PASSING = {"500": 2.0, "502": 2.0, "reset": 2.0, "cut": 2.0, "not JSON": 2.0, "no choices": 2.0, "stall": 0.3}
PASSING |= {"endless trickle": 0.3}
AWAY = {"refused": 0.1, "401": 0.1, "404": 0.1}
HARMLESS = {"large": 0.3, "trickle": 0.5}
"""A good answer all the same, in an odd way."""
FAULTS = OVERLOAD | PASSING | AWAY | HARMLESS
OUTCOMES = ("length", "content_filter", "400 filtered")
_STATUS = {"500": 500, "502": 502, "503": 503}
_ERROR = {
    "401": "Incorrect API key provided",
    "404": "The model `scripted` does not exist",
    "429 in the body": "Rate limit reached for requests per min: Limit 900000, Used 900000. Please try again in 40ms.",
}


@dataclass
class State:
    """What the server does, and what it saw since the last reset."""

    faults: float = 0.0
    """Share of the arrivals that meet a fault."""
    outcomes: float = 0.0
    """Share of the bodies that always get one of `OUTCOMES`."""
    latency: float = 0.0
    """Seconds for an answer."""
    salt: int = 0
    """Another number gives other replies to the same bodies."""
    down: bool = False
    """Refuses every connection."""
    hold: int = 0
    """The request that comes at this place (from 1) waits for its answer until this is set to another number."""
    requests: int = 0
    arrivals: Counter[str] = field(default_factory=Counter)
    """By body."""
    good: dict[str, list[Any]] = field(default_factory=dict)
    """By body: how often it was answered well, the seed that it names, the text of the answer."""
    kinds: Counter[str] = field(default_factory=Counter)
    turned_away: set[str] = field(default_factory=set)
    in_flight: int = 0
    most_in_flight: int = 0
    course: list[tuple[float, int]] = field(default_factory=list)
    """At every arrival and answer: the time in seconds, and how many were in flight from then on."""


SETTINGS = ("faults", "outcomes", "latency", "salt", "down", "hold")


class Chaos:
    """The server."""

    def __init__(self, seed: int, profile: str, state: State) -> None:
        self.state, self._seed, self._model = state, seed, ScriptedModel(profile)
        self._runner = web.AppRunner(web.Application(client_max_size=64 * 2**20), access_log=None, shutdown_timeout=0.1)
        self._site: web.TCPSite | None = None
        self._port = 0
        self._away, self._away_until = "", 0.0
        self._changed = asyncio.Event()

    async def serve(self) -> None:
        """Listens on two free ports, one for control, until the process ends."""
        self._runner.app.router.add_post("/v1/chat/completions", self._chat)
        await self._runner.setup()
        await self._listen()
        control = web.Application(client_max_size=64 * 2**20)
        control.router.add_get("/log", self._log)
        control.router.add_post("/set", self._set)
        runner = web.AppRunner(control, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(f"ready http://127.0.0.1:{self._port}/v1 http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()

    async def _listen(self) -> None:
        if self._site is None:
            self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, backlog=1024, reuse_address=True)
            await self._site.start()
            self._port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        site, self._site = self._site, None
        if site is not None:
            await site.stop()

    # --- control -----------------------------------------------------------------------------------------------------

    async def _log(self, request: web.Request) -> web.Response:
        names = ["requests", "kinds", "in_flight", "most_in_flight"]
        names += ["arrivals", "good", "course"] if request.query else []
        return web.json_response({name: getattr(self.state, name) for name in names})

    async def _set(self, request: web.Request) -> web.Response:
        """Takes settings; `reset` forgets what was seen."""
        wishes: dict[str, Any] = json.loads(await request.read())
        if wishes.pop("reset", False):
            self.state = State(**{name: getattr(self.state, name) for name in SETTINGS})
        for name, value in wishes.items():
            assert name in SETTINGS, name
            setattr(self.state, name, value)
        await (self._close() if self.state.down else self._listen())
        self._changed.set()
        self._changed = asyncio.Event()
        return web.Response()

    # --- chat --------------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        data, state = await request.read(), self.state
        state.in_flight += 1
        state.most_in_flight = max(state.most_in_flight, state.in_flight)
        state.course.append((time.monotonic(), state.in_flight))
        try:
            return await self._answer(request, data)
        finally:
            state.in_flight -= 1
            state.course.append((time.monotonic(), state.in_flight))

    async def _answer(self, request: web.Request, data: bytes) -> web.StreamResponse:
        body: Body = json.loads(data)
        if "seed" not in body:  # the client's own small question whether anybody is there
            return _reset(request) if self.state.down else self._away_answer(request) or _json(_completion("hello"))
        name, state = hashlib.blake2b(data, digest_size=12).hexdigest(), self.state
        state.requests += 1
        state.arrivals[name] += 1
        place, arrival = state.requests, state.arrivals[name]
        if state.latency:
            await asyncio.sleep(state.latency)
        while state.hold == place:
            await self._changed.wait()
        if state.down:
            return _reset(request)
        kind = self._fault(name, arrival)
        if (away := self._away_answer(request)) and name not in state.turned_away:
            state.turned_away.add(name)
            state.kinds[f"turned away by {self._away}"] += 1
            return away
        if kind:
            state.kinds[kind] += 1
        if kind in AWAY:
            state.turned_away.add(name)
            await self._begin_outage(kind)
            return self._away_answer(request) or _reset(request)
        return await self._carry_out(kind, name, body, request)

    def _fault(self, name: str, arrival: int) -> str:
        """The fault of that arrival (from 1) of the body, or nothing."""
        if arrival > MOST or name in self.state.turned_away:
            return ""
        return drawn(f"{self._seed} {name} {arrival}", self.state.faults, FAULTS)

    def _away_answer(self, request: web.Request) -> web.StreamResponse | None:
        if time.monotonic() >= self._away_until:
            return None
        if self._away == "refused":
            return _reset(request)
        return _json({"error": {"message": _ERROR[self._away]}}, status=int(self._away))

    async def _begin_outage(self, kind: str) -> None:
        if time.monotonic() < self._away_until:
            return
        self._away, self._away_until = kind, time.monotonic() + OUTAGE
        if kind == "refused":
            await self._close()
            loop = asyncio.get_running_loop()
            self._reopening = loop.call_later(OUTAGE, lambda: setattr(self, "_opened", loop.create_task(self._back())))

    async def _back(self) -> None:
        if not self.state.down:
            await self._listen()

    async def _carry_out(self, kind: str, name: str, body: Body, request: web.Request) -> web.StreamResponse:
        if kind in OVERLOAD or kind in _STATUS:
            return _refusal(kind)
        if kind == "reset":
            return _reset(request)
        if kind == "stall":
            await asyncio.sleep(60)
            return _reset(request)  # nobody waits any more: that is no answer
        if kind == "not JSON":
            return web.Response(body=b'<html>{"choices": [', content_type="application/json")
        if kind == "no choices":
            return _json({"choices": [], "usage": None})
        answer = json.dumps(await self._completion(name, body)).encode()
        if kind == "endless trickle":
            return await _slowly(request, answer, 60)
        if kind == "cut":
            return await _cut(request, answer)
        if drawn(name, self.state.outcomes, dict.fromkeys(OUTCOMES, 1.0)) == "400 filtered":
            return _json({"error": {"message": "stopped by the filter", "code": "content_filter"}}, status=400)
        count = self.state.good.setdefault(name, [0, body["seed"], json.loads(answer)["choices"][0]["message"]])
        count[0] += 1
        if kind == "trickle":
            return await _slowly(request, answer, TRICKLE)
        padding = b'"padding": "' + b"x" * LARGE + b'", ' if kind == "large" else b""
        return web.Response(body=b"{" + padding + answer[1:], content_type="application/json")

    async def _completion(self, name: str, body: Body) -> dict[str, Any]:
        form = body.get("response_format")
        schema = Schema(form["json_schema"]["name"], form["json_schema"]["schema"]) if form else None
        messages = tuple(Message(message["role"], text_of(message)) for message in body["messages"])
        sampling = Sampling(1, 1, body["max_tokens"], body["seed"] + self.state.salt)
        reply = await self._model.answer(Call("http", "", messages, sampling, schema, "", 0))
        kind = drawn(name, self.state.outcomes, dict.fromkeys(OUTCOMES, 1.0))
        if kind == "length":
            return _completion(reply.text[: len(reply.text) // 2], "length", reply.tokens)
        if kind == "content_filter":
            return _completion("", "content_filter", reply.tokens)
        return _completion(reply.text, reply.finish, reply.tokens)


def drawn(noise: str, rate: float, weights: dict[str, float]) -> str:
    """One of the kinds by weight, at this rate, else nothing: a pure function."""
    digest = hashlib.blake2b(noise.encode(), digest_size=16).digest()
    if int.from_bytes(digest[:8], "big") >= rate * 2**64:
        return ""
    left = int.from_bytes(digest[8:], "big") / 2**64 * sum(weights.values())
    for kind, weight in weights.items():
        left -= weight
        if left < 0:
            return kind
    return next(iter(weights))


# --- ways to answer --------------------------------------------------------------------------------------------------


def _completion(text: str, finish: str = "stop", tokens: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}}


def _json(data: dict[str, Any], status: int = 200) -> web.Response:
    return web.json_response(data, status=status)


def _refusal(kind: str) -> web.Response:
    headers = {}
    if kind == "429 seconds":
        headers["Retry-After"] = "0.05"
    elif kind == "429 date":
        headers["Retry-After"] = email.utils.formatdate(time.time() + 1, usegmt=True)
    response = _json({"error": {"message": _ERROR.get(kind, "no")}}, status=_STATUS.get(kind, 429))
    response.headers.update(headers)
    return response


def _reset(request: web.Request) -> web.Response:
    """Closes the connection with RST in place of FIN: that is what a linger time of zero does."""
    if request.transport is not None:
        sock: socket.socket = request.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()


async def _cut(request: web.Request, answer: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(answer))})
    await response.prepare(request)
    await response.write(answer[: len(answer) // 2])
    return _reset(request)


async def _slowly(request: web.Request, answer: bytes, seconds: float) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(answer))})
    await response.prepare(request)
    pieces = 8
    with contextlib.suppress(ConnectionError):
        for piece in range(pieces):
            await response.write(answer[len(answer) * piece // pieces : len(answer) * (piece + 1) // pieces])
            await asyncio.sleep(seconds / pieces)
    return response


# --- from outside ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A server that runs in a process of its own."""

    url: str
    control: str

    def set(self, **wishes: Any) -> None:
        """Changes `SETTINGS`; `reset=True` forgets what was seen."""
        order = urllib.request.Request(f"{self.control}/set", json.dumps(wishes).encode(), method="POST")
        urllib.request.urlopen(order, timeout=30).close()

    def log(self, *, whole: bool = False) -> dict[str, Any]:
        """`requests, kinds, in_flight, most_in_flight`; the whole has `arrivals`, `good` and `course` too."""
        with urllib.request.urlopen(f"{self.control}/log" + ("?whole=1" if whole else ""), timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


@contextlib.contextmanager
def running_chaos(**options: object) -> Iterator[Running]:
    """Starts the server with the options of its command line, and ends it."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tests.support.servers.chaos_server", *words]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready, url, control = process.stdout.readline().split()
            assert ready == "ready"
            yield Running(url, control)
        finally:
            process.kill()


def main() -> None:
    """Serves until it is killed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--profile", default="demo")
    for name in ("faults", "outcomes", "latency"):
        options.add_argument(f"--{name}", type=float, default=0.0)
    options.add_argument("--hold", type=int, default=0)
    given = options.parse_args()
    state = State(given.faults, given.outcomes, given.latency, hold=given.hold)

    async def serve() -> None:
        await Chaos(given.seed, given.profile, state).serve()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
