"""The batch endpoint of a hosted API behind a real HTTP server on 127.0.0.1: OpenAI's Batch API, scripted.

Files, batches, statuses and result lines are as that API has them. Answers depend on the body of a request alone, so a
run through batches has the bytes of a direct one. Hooks say what shall go wrong, at which step and for which line.
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

from intersafe.models.scripted.chat import ScriptedModel
from tests.support.servers.scripted_server import Body, completion

KEY = "sk-batch-0123456789"
LOOKS = 2
"""How often a batch is seen on its way before it has ended."""
Line = dict[str, Any] | bytes | None
StepHook = Callable[[str, "Provider"], web.Response | None]
"""Told of each step (`upload`, `uploaded`, `create`, `created`, `list`, `look`, `content`, `served`): what to answer
instead; None continues. The steps in the past tense come when the provider has done it and before it says so."""
LineHook = Callable[[Body, int], Line | str]
"""Given a body and how often it came before: the whole line instead of the answer, `missing`, `twice` or `answer`."""


@dataclass
class Provider:
    """A running provider: what it has and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    """How often each body came in a batch that was worked on."""
    answered: Counter[str] = field(default_factory=Counter)
    """How often each body was answered well."""
    steps: Counter[str] = field(default_factory=Counter)
    looks: Counter[str] = field(default_factory=Counter)
    end: dict[int, str] = field(default_factory=dict)
    """How a batch ends, by its number from 0; else `completed`. `expired` and `cancelled` answer half."""
    most: int = 50_000
    """Requests that may wait at once; a batch above that fails for the queue."""
    largest: int = 200 * 2**20
    """Bytes of a file; a larger one is refused with 413."""
    problems: list[dict[str, Any]] = field(default_factory=list)
    """Why a batch that `end` has as `failed` did."""

    @property
    def orphans(self) -> list[str]:
        """Batches whose results nobody fetched."""
        return [name for name, batch in self.batches.items() if batch["output_file_id"] and not batch["fetched"]]

    def requests_of(self, name: str) -> list[dict[str, Any]]:
        """The lines of a batch's input file."""
        return [json.loads(line) for line in self.files[self.batches[name]["input_file_id"]].splitlines()]


def fingerprint(body: Body) -> str:
    """What makes two bodies the same."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def batch_server(step: StepHook | None = None, line: LineHook | None = None, port: int = 0) -> Iterator[Provider]:
    """Serves `scripted:demo` through batches in a thread until the block ends; on a free port unless one is given."""
    provider = Provider()
    desk = _Desk(provider, step or (lambda *_: None), line or (lambda *_: "answer"))
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def serve() -> None:
        app = web.Application(client_max_size=256 * 2**20, middlewares=[_with_key])
        app.router.add_post("/v1/files", desk.upload)
        app.router.add_get("/v1/files/{id}/content", desk.content)
        app.router.add_post("/v1/batches", desk.create)
        app.router.add_get("/v1/batches", desk.listed)
        app.router.add_get("/v1/batches/{id}", desk.look)
        app.router.add_post("/v1/batches/{id}/cancel", desk.cancel)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=512)
        await site.start()
        provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        started.set()
        await stop.wait()
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}  # of clients that were killed
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(10)
    try:
        yield provider
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def problem(status: int, message: str, code: str | None = None) -> web.Response:
    """An error as the API words it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status)


@web.middleware
async def _with_key(request: web.Request, handler: Any) -> web.StreamResponse:
    if request.headers.get("Authorization") != f"Bearer {KEY}":
        return problem(401, "Incorrect API key provided")
    try:
        answer: web.StreamResponse = await handler(request)
    except ConnectionResetError:
        return problem(499, "the client was killed")
    return answer


@dataclass
class _Desk:
    provider: Provider
    step: StepHook
    line: LineHook
    model: ScriptedModel = field(default_factory=lambda: ScriptedModel("demo"))

    def _at(self, name: str) -> web.Response | None:
        self.provider.steps[name] += 1
        return self.step(name, self.provider)

    async def upload(self, request: web.Request) -> web.Response:
        if instead := self._at("upload"):
            return instead
        purpose, data = "", b""
        async for part in await request.multipart():
            if part.name == "purpose":  # type: ignore[union-attr]
                purpose = await part.text()  # type: ignore[union-attr]
            else:
                data = bytes(await part.read())  # type: ignore[union-attr]
        if purpose != "batch":
            return problem(400, "purpose must be batch")
        if len(data) > self.provider.largest:
            return problem(413, "file too large")
        name = f"file-{len(self.provider.files)}"
        self.provider.files[name] = data
        return self._at("uploaded") or web.json_response({"id": name, "object": "file", "purpose": purpose})

    async def create(self, request: web.Request) -> web.Response:
        if instead := self._at("create"):
            return instead
        asked = await request.json()
        if asked["completion_window"] != "24h" or asked["endpoint"] != "/v1/chat/completions":
            return problem(400, "no such window or endpoint")
        if asked["input_file_id"] not in self.provider.files:
            return problem(400, "Cannot find file")
        name = f"batch_{len(self.provider.batches)}"
        self.provider.batches[name] = {
            "id": name,
            "object": "batch",
            "endpoint": asked["endpoint"],
            "input_file_id": asked["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": "",
            "errors": None,
            "created_at": 4_000_000_000 + len(self.provider.batches),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": asked.get("metadata"),
            "number": len(self.provider.batches),
            "fetched": False,
        }
        return self._at("created") or web.json_response(self.provider.batches[name])

    async def listed(self, request: web.Request) -> web.Response:
        if instead := self._at("list"):
            return instead
        newest = list(reversed(self.provider.batches.values()))
        names = [batch["id"] for batch in newest]
        start = names.index(request.query["after"]) + 1 if "after" in request.query else 0
        limit = min(3, int(request.query.get("limit", "20")))  # small pages, so that there are several
        page = newest[start : start + limit]
        return web.json_response({"object": "list", "data": page, "has_more": start + limit < len(newest)})

    async def look(self, request: web.Request) -> web.Response:
        if instead := self._at("look"):
            return instead
        batch = self.provider.batches.get(request.match_info["id"])
        if batch is None:
            return problem(404, "No batch found")
        self.provider.looks[batch["id"]] += 1
        if batch["status"] in ("validating", "in_progress", "finalizing"):
            await self._progress(batch)
        return web.json_response(batch)

    async def cancel(self, request: web.Request) -> web.Response:
        self.provider.end[self.provider.batches[request.match_info["id"]]["number"]] = "cancelled"
        return web.json_response(self.provider.batches[request.match_info["id"]])

    async def content(self, request: web.Request) -> web.Response:
        if instead := self._at("content"):
            return instead
        name = request.match_info["id"]
        for batch in self.provider.batches.values():
            if name in (batch["output_file_id"], batch["error_file_id"]):
                batch["fetched"] = True
        if name not in self.provider.files:
            return problem(404, "No such file")
        self._at("served")
        return web.Response(body=self.provider.files[name])

    # --- the work ----------------------------------------------------------------------------------------------------

    async def _progress(self, batch: dict[str, Any]) -> None:
        requests = self.provider.requests_of(batch["id"])
        end = self.provider.end.get(batch["number"], "completed")
        others = (b for b in self.provider.batches.values() if b is not batch and b["status"] == "in_progress")
        waiting = sum(len(self.provider.requests_of(other["id"])) for other in others)
        if batch["status"] == "validating" and (end == "failed" or waiting + len(requests) > self.provider.most):
            full = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached", "line": None}
            batch["status"] = "failed"
            batch["errors"] = {"object": "list", "data": self.provider.problems if end == "failed" else [full]}
        elif self.provider.looks[batch["id"]] <= LOOKS:
            batch["status"] = "in_progress"
        else:
            await self._finish(batch, requests, end)

    async def _finish(self, batch: dict[str, Any], requests: list[dict[str, Any]], end: str) -> None:
        good: list[bytes] = []
        bad: list[bytes] = []
        ends_early = {"expired": "batch_expired", "cancelled": "batch_cancelled"}.get(end)
        for number, request in enumerate(requests):
            assert request["method"] == "POST"
            assert request["url"] == batch["endpoint"]
            before = self.provider.seen[fingerprint(request["body"])]
            self.provider.seen[fingerprint(request["body"])] += 1
            if ends_early and number % 2:
                error = {"code": ends_early, "message": "This request could not be executed"}
                bad.append(_line(request["custom_id"], None, error))
                continue
            wish = self.line(request["body"], before)
            if wish == "missing":
                continue
            if isinstance(wish, (bytes, dict)):
                raw = wish if isinstance(wish, bytes) else _line(request["custom_id"], wish, None)
                (bad if isinstance(wish, dict) else good).append(raw)
                continue
            replied = await completion(self.model, request["body"], None)
            assert isinstance(replied.body, bytes)
            answer = _line(request["custom_id"], {"status_code": 200, "body": json.loads(replied.body)}, None)
            self.provider.answered[fingerprint(request["body"])] += 1
            good += [answer, answer] if wish == "twice" else [answer]
        # In any order, as the API has it.
        good.sort(key=lambda line: hashlib.sha256(line).digest())
        batch["request_counts"] = {"total": len(requests), "completed": len(good), "failed": len(bad)}
        for kind, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[kind] = f"file-{len(self.provider.files)}"
                self.provider.files[batch[kind]] = b"\n".join(lines) + b"\n"
        batch["status"] = end


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    return json.dumps({"id": "batch_req", "custom_id": custom_id, "response": response, "error": error}).encode()
