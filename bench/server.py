"""The model server of the measurements: a process on another core, with latency, slots, faults and counters.

    python bench/server.py [--latency 0.1] [--slots 64] [--faults 0.2] [--seed 0]

`model: fixed` gets the same bytes each time; the scripted models answer `demo`, `careful` and `eager`. Images are
accepted and ignored. Faults are 429, 500, 503 and cut connections. The seed, the body and the number of earlier tries
decide whether a request fails, so a call fails at most twice. `/seen` returns how many calls were answered, how many of
them twice, and how many are in progress.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from intersafe.models.base import Call, Sampling
from intersafe.models.scripted.chat import ScriptedModel
from intersafe.records import Message
from intersafe.replies import Schema

SLOTS = 64
LATENCY = 0.1
TEXT = "A reply of some length. " * 40
CORES = sorted(os.sched_getaffinity(0))
_STATUS = (429, 500, 503, 0)
"""The faults; 0 is a connection cut after half of the answer."""


class Seen(msgspec.Struct):
    """The counters of a server."""

    answered: int
    """Calls whose whole answer was written to the connection, whether it arrived or not."""
    again: int
    """Of these, calls whose body was answered before: paid twice."""
    working: int
    """Calls in progress."""
    faults: int
    began: float
    """When the first call came and the last one was answered, in seconds of the server's clock; 0 if there is none."""
    ended: float
    inner: tuple[float, float]
    """When 5 % and when 95 % of the calls so far were answered, which leaves out start and tail."""

    @property
    def steady(self) -> float:
        """Calls per second between these two moments."""
        began, ended = self.inner
        return 0.9 * self.answered / (ended - began) if ended > began else 0.0

    @property
    def whole(self) -> float:
        """Calls per second from the first call to the last answer."""
        return self.answered / (self.ended - self.began) if self.ended > self.began else 0.0


class _Server:
    """One server's models and counters."""

    def __init__(self, latency: float, slots: int, faults: float, seed: int) -> None:
        self._latency, self._faults, self._seed = latency, faults, seed
        self._slots = asyncio.Semaphore(slots)
        self._models = {name: ScriptedModel(name) for name in ("demo", "careful", "eager")}
        self._fixed = completion(TEXT, "stop")
        self._working = 0
        self._forget()

    def _forget(self) -> None:
        self._answered: Counter[bytes] = Counter()
        self._tries: Counter[bytes] = Counter()
        self._times: list[float] = []
        self._broken = 0
        self._began = 0.0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answers one call."""
        data = await request.read()
        self._began = self._began or asyncio.get_running_loop().time()
        answered, times = self._answered, self._times  # the current ones: a killed client's calls end after `forget`
        self._working += 1
        try:
            name = hashlib.blake2b(data, digest_size=8).digest()
            if self._latency:
                async with self._slots:
                    await asyncio.sleep(self._latency)
            if self._faults and (status := self._fault(name)) is not None:
                self._broken += 1
                return await self._break(request, status)
            body = json.loads(data)
            fixed = body["model"].endswith("fixed")
            answer = self._fixed if fixed else await _scripted(self._models[body["model"]], body)
        finally:
            self._working -= 1
        answered[name] += 1
        times.append(asyncio.get_running_loop().time())
        return web.Response(body=answer, content_type="application/json")

    def _fault(self, name: bytes) -> int | None:
        """The fault of this try of a body; None for a good answer."""
        tried = self._tries[name]
        self._tries[name] += 1
        dice = random.Random(f"{self._seed} {tried} {name.hex()}")
        return dice.choice(_STATUS) if tried < 2 and dice.random() < self._faults else None

    async def _break(self, request: web.Request, status: int) -> web.StreamResponse:
        if status:
            return web.Response(status=status, text="not now", headers={"Retry-After": "0"} if status == 429 else {})
        response = web.StreamResponse(headers={"Content-Length": str(len(self._fixed))})
        await response.prepare(request)
        await response.write(self._fixed[: len(self._fixed) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    async def seen(self, request: web.Request) -> web.Response:
        """Returns the counters; `?forget=1` resets them afterwards."""
        times = self._times
        answered = len(times)
        again = answered - len(self._answered)
        inner = (times[answered // 20], times[answered * 19 // 20 - 1]) if answered >= 20 else (0.0, 0.0)
        ended = times[-1] if times else 0.0
        seen = Seen(answered, again, self._working, self._broken, self._began, ended, inner)
        if request.query.get("forget"):
            self._forget()
        return web.Response(body=msgspec.json.encode(seen), content_type="application/json")

    async def models(self, _: web.Request) -> web.Response:
        """Returns the list of models, which some clients ask for first."""
        return web.json_response({"object": "list", "data": [{"id": "fixed", "object": "model"}]})


async def _scripted(model: ScriptedModel, body: dict[str, Any]) -> bytes:
    form = body.get("response_format")
    schema = Schema(form["json_schema"]["name"], form["json_schema"]["schema"]) if form else None
    messages = []
    for message in body["messages"]:
        parts = message["content"]
        text = parts if isinstance(parts, str) else "".join(part.get("text", "") for part in parts)
        messages.append(Message(message["role"], text))
    sampling = Sampling(body["temperature"], body["top_p"], body["max_tokens"], body["seed"])
    reply = await model.answer(Call("http", "", tuple(messages), sampling, schema, "", 0))
    return completion(reply.text, reply.finish)


def completion(text: str, finish: str) -> bytes:
    """The body of an answer in the OpenAI format."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    usage = {"prompt_tokens": 1500, "completion_tokens": 200, "total_tokens": 1700}
    fields = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "fixed"}
    return msgspec.json.encode({**fields, "choices": [choice], "usage": usage})


async def _serve(options: argparse.Namespace) -> None:
    server = _Server(options.latency, options.slots, options.faults, options.seed)
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/v1/seen", server.seen)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


# --- the client's side -----------------------------------------------------------------------------------------------


class Server(NamedTuple):
    """A running server."""

    url: str
    """Base URL, with `/v1`."""

    def seen(self, *, forget: bool = False) -> Seen:
        """Reads the counters; `forget` resets them afterwards."""
        with urllib.request.urlopen(f"{self.url}/seen{'?forget=1' if forget else ''}", timeout=60) as answer:
            return msgspec.json.decode(answer.read(), type=Seen)


@contextlib.contextmanager
def serving(latency: float = 0.0, slots: int = SLOTS, faults: float = 0.0, seed: int = 0) -> Iterator[Server]:
    """Starts a server in a process of its own; `latency` in seconds, for `slots` calls at once."""
    options = {"--latency": latency, "--slots": slots, "--faults": faults, "--seed": seed}
    command = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Server(process.stdout.readline().strip())
        finally:
            process.kill()


def main() -> None:
    """Prints the base URL and serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds for one answer (0)")
    parser.add_argument("--slots", type=int, default=SLOTS, help="calls answered at once, with a latency (64)")
    parser.add_argument("--faults", type=float, default=0.0, help="share of first and second tries that fail (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (0)")
    options = parser.parse_args()
    # The highest core that we may use; the measuring process uses the lowest one.
    os.sched_setaffinity(0, {CORES[-1]})
    asyncio.run(_serve(options))


if __name__ == "__main__":
    main()
