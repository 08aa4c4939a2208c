"""The provider's side of the batch lane: files and batches over HTTP, in the form of OpenAI's Batch API.

| what comes back                                          | what is done                                          |
|----------------------------------------------------------|-------------------------------------------------------|
| 2xx                                                      | used                                                  |
| 400 413 415 422, other 4xx, a full queue (`QUEUE_FULL`)  | `Refused`: the batch is at fault, or its size         |
| 408 409 425 429, 5xx, time-out, reset, unreadable        | again after a growing pause, or after `Retry-After`   |
| no connection, 3xx, 401 402 403 404 405 407              | the service is away: the same, and the user is told   |

Patience counts while one and the same request gets no usable answer, and not while the provider works on a batch. No
fault creates a batch twice: after an attempt whose outcome is unknown the provider is asked first.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import aiohttp
import msgspec

from intersafe.errors import ServiceGone, StorageError
from intersafe.models.base import Hooks
from intersafe.models.http.faults import UNREADABLE, Away, Fault, Transient, is_refusal, key_remedy
from intersafe.models.http.incidents import IncidentLog
from intersafe.models.http.quirks import AWAY, OVERLOADED, QUEUE_FULL
from intersafe.models.http.throttling import seconds_of
from intersafe.models.http.transport import CONNECT_SECONDS, Account, Address, fault_of, read_body, refusal_in
from intersafe.recipe.sections import Limits, Member

UPLOAD_SECONDS = 3600.0
"""For one file to the provider or from it."""
ROUTE = "/v1/chat/completions"
"""What a batch asks, in the provider's own notation, whatever the path of its URL."""
MAX_ANSWER = 4 * 2**20  # bytes of anything but a file
PAGES = 1_000  # of a list, 100 batches each
SLACK = 86_400  # seconds that our clock and the provider's may differ by
CHUNK = 2**20
TERMINAL = ("completed", "failed", "expired", "cancelled")

T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """How long the batch lane waits, in seconds, and how many calls it puts into one batch."""

    quiet: float = 5.0
    """Without a new call, after which a collection is sent; providers allow some 2,000 batches an hour."""
    first_pause: float = 1.0
    """Between the first two looks at a batch, and the first two tries of a request; later ones grow."""
    longest_pause: float = 60.0
    """What those pauses grow to."""
    list_lag: float = 5.0
    """After which a list of batches surely names one that was created before."""
    tell_after: float = 5.0
    """Without a usable answer, after which the user is told."""
    most_requests: int = 50_000
    """Calls in one batch: the provider's limit."""


class Refused(Exception):
    """The provider does not take a file or a batch; `status` is 0 where it said so later."""

    def __init__(self, what: str, status: int = 0, code: str = "", lines: tuple[int, ...] = ()) -> None:
        """`lines` of the input file that the provider names, from 1."""
        super().__init__(what)
        self.status, self.code, self.lines = status, code, lines


class Problem(msgspec.Struct, frozen=True):
    """Why a batch failed, in the provider's words."""

    code: str | None = None
    message: str | None = None
    line: int | None = None


class _Problems(msgspec.Struct, frozen=True):
    data: list[Problem] | None = None


class Counts(msgspec.Struct, frozen=True):
    """How many requests of a batch are done."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Remote(msgspec.Struct, frozen=True):
    """A batch as the provider describes it."""

    id: str
    status: str = ""
    output_file_id: str | None = None
    error_file_id: str | None = None
    metadata: dict[str, Any] | None = None
    errors: _Problems | None = None
    request_counts: Counts | None = None
    created_at: float | None = None

    @property
    def problems(self) -> list[Problem]:
        """Why it failed."""
        return (self.errors.data if self.errors else None) or []

    @property
    def files(self) -> list[str]:
        """Ids of the files with its results: the answers first, then the errors; some providers write "" for none."""
        return [name for name in (self.output_file_id, self.error_file_id) if name]

    @property
    def answered(self) -> int:
        """How many requests it has answered well, as the provider counts them."""
        return self.request_counts.completed if self.request_counts else 0


class _File(msgspec.Struct, frozen=True):
    id: str


class _Page(msgspec.Struct, frozen=True):
    data: list[Remote]
    has_more: bool | None = None


@dataclass
class _Failing:
    """A request without a usable answer so far."""

    since: float
    pause: float
    tries: int = 0
    is_told: bool = False
    """True if the user was told because of this request."""


class BatchApi:
    """The files and batches of one account."""

    def __init__(self, member: Member, limits: Limits, hooks: Hooks, pace: Pace, role: str) -> None:
        """Incidents count for `role`. Needs a running event loop."""
        self.url, self.identity = member.spec.urls[0], member.identity
        self._member, self._limits, self._hooks, self._pace, self._role = member, limits, hooks, pace, role
        self._name, self._is_told = f"batches of {member.identity}", False
        self._account, self._proxy = Account(member), Address.of(self.url).proxy
        self.clean = self._account.clean
        self.incidents = IncidentLog(member.identity, hooks, self.clean, logging.getLogger("intersafe.models.batch"))
        self._short = aiohttp.ClientTimeout(total=limits.timeout, connect=min(CONNECT_SECONDS, limits.timeout))
        self._long = aiohttp.ClientTimeout(total=UPLOAD_SECONDS, connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), headers=self._account.headers)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._session.close()

    def _check_limits(self) -> None:
        """`BudgetReached` once no batch may be sent."""
        if self._hooks.may_send:
            self._hooks.may_send()

    # --- what a batch needs ------------------------------------------------------------------------------------------

    async def upload(self, path: Path) -> str:
        """The id of the file at the provider, read from the disk by pieces; `Refused` or `BudgetReached` if not."""

        async def attempt() -> str:
            self._check_limits()
            with path.open("rb") as file:
                form = aiohttp.FormData({"purpose": "batch"})
                form.add_field("file", file, filename=path.name, content_type="application/jsonl")
                return (await self._json("POST", "/files", _File, data=form, timeout=self._long)).id

        return await self._until_answered(attempt)

    async def create(self, file: str, nonce: str, made: float) -> Remote:
        """The batch over that file, created once; `Refused` or `BudgetReached` if not.

        `made` is when its nonce was, in Unix time.
        """
        body = {
            "input_file_id": file,
            "endpoint": ROUTE,
            "completion_window": "24h",
            "metadata": {"intersafe": nonce},
        }
        unsure = False

        async def attempt() -> Remote:
            nonlocal unsure
            if unsure and (found := await self._find_twice(nonce, made)):
                return found
            self._check_limits()
            unsure = True
            return await self._json("POST", "/batches", Remote, json=body)

        return await self._until_answered(attempt)

    async def find(self, nonce: str, made: float) -> Remote | None:
        """The batch with that nonce, if there is one."""
        return await self._until_answered(lambda: self._find_twice(nonce, made))

    async def look(self, batch: str) -> Remote:
        """The state of that batch."""
        return await self._until_answered(lambda: self._json("GET", f"/batches/{batch}", Remote))

    async def download(self, files: list[str], path: Path) -> None:
        """Appends the files one after the other to the path; after a broken connection a file starts anew."""
        with path.open("ab") as target:
            for name in files:
                start = target.seek(0, os.SEEK_END)
                await self._until_answered(partial(self._fetch, name, target, start))
            await asyncio.to_thread(_sync, target)

    async def _fetch(self, name: str, target: BinaryIO, start: int) -> None:
        target.seek(start)
        target.truncate()
        last = b"\n"
        try:
            async with self._request("GET", f"/files/{name}/content", timeout=self._long) as response:
                if response.status != 200:
                    self._check_status(response, await read_body(response, MAX_ANSWER))
                async for chunk in response.content.iter_chunked(CHUNK):
                    last = chunk
                    _write(target, chunk)
        except (aiohttp.ClientError, OSError) as error:
            raise fault_of(error, self._account, UPLOAD_SECONDS) from None
        if not last.endswith(b"\n"):
            _write(target, b"\n")

    async def _find_twice(self, nonce: str, made: float) -> Remote | None:
        """Lists twice, since a list may lag behind."""
        if (found := await self._find_once(nonce, made)) is None:
            await asyncio.sleep(self._pace.list_lag)
            found = await self._find_once(nonce, made)
        return found

    async def _find_once(self, nonce: str, made: float) -> Remote | None:
        """Newest first, as the provider lists them, until they are older than the nonce."""
        after = ""
        for _ in range(PAGES):
            page = await self._json("GET", f"/batches?limit=100{after}", _Page)
            for remote in page.data:
                if (remote.metadata or {}).get("intersafe") == nonce:
                    return remote
            last = page.data[-1] if page.data else None
            if last is None or not page.has_more or (last.created_at or made) < made - SLACK:
                return None
            after = f"&after={last.id}"
        return None

    # --- one request -------------------------------------------------------------------------------------------------

    def _request(self, method: str, route: str, **sent: Any) -> Any:
        return self._session.request(method, f"{self.url}{route}", allow_redirects=False, **self._proxy, **sent)

    async def _json(self, method: str, route: str, kind: type[T], **sent: Any) -> T:
        """The answer to one request; `Fault` if it may be sent again, `Refused` if not."""
        timeout: aiohttp.ClientTimeout = sent.setdefault("timeout", self._short)
        try:
            async with self._request(method, route, **sent) as response:
                body = await read_body(response, MAX_ANSWER)
        except (aiohttp.ClientError, OSError) as error:
            raise fault_of(error, self._account, timeout.total or 0.0) from None
        self._check_status(response, body)
        try:
            return msgspec.json.decode(body or b"", type=kind)
        except UNREADABLE as error:
            raise Transient(f"unreadable answer: {error}", response.status) from None

    def _check_status(self, response: aiohttp.ClientResponse, body: bytes | None) -> None:
        """Returns for a 2xx alone."""
        if body is None:
            raise Transient(f"answer over {MAX_ANSWER // 2**20} MiB")
        status, headers = response.status, response.headers
        if 200 <= status < 300:
            return
        what, code = refusal_in(status, headers, body, self._account)
        if code == QUEUE_FULL or is_refusal(status):
            raise Refused(what, status, code)
        kind = Away if status in AWAY or status < 400 else Transient
        raise kind(what, status, seconds_of(headers.get("Retry-After", "")))

    # --- outages -----------------------------------------------------------------------------------------------------

    async def _until_answered(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The outcome of the attempt, tried until the patience is used up: then `ServiceGone`."""
        failing: _Failing | None = None
        while True:
            try:
                outcome = await attempt()
            except Fault as fault:
                now = asyncio.get_running_loop().time()
                failing = failing or _Failing(now, self._pace.first_pause)
                await self._wait(fault, failing, now - failing.since)
            except Refused:
                self._end(failing)
                raise
            else:
                self._end(failing)
                return outcome

    async def _wait(self, fault: Fault, failing: _Failing, away: float) -> None:
        """The pause before the next try; `ServiceGone` if the `away` seconds are more than the patience."""
        where, patience = f"{self.identity} at {self.url}", self._limits.patience
        if away >= patience:
            raise ServiceGone(
                f"{where}: no use of its batch endpoint for {away:.0f} s ({fault}); "
                f"{self._remedy(fault)}, then run the same command again: nothing is lost"
            ) from None
        pause = min(max(failing.pause, fault.pause), patience - away)
        why = f"{fault}; {self._remedy(fault)}"
        failing.tries += 1
        if fault.status in OVERLOADED:
            self.incidents.throttled(self._role, self.url, fault)
        elif not isinstance(fault, Away):
            self.incidents.retried(self._role, self.url, failing.tries, fault)
        if not self._is_told and (fault.status in AWAY or away + pause >= self._pace.tell_after):
            self._is_told = failing.is_told = True
            self.incidents.outage_began(self._role, why, shown=True)
            self._hooks.tell(f"{where}: {why}; waiting up to {patience:.0f} s", logged=True)
        if failing.is_told:
            self._hooks.outages[self._name] = why
        await asyncio.sleep(pause)
        failing.pause = min(self._pace.longest_pause, failing.pause * 2)

    def _end(self, failing: _Failing | None) -> None:
        """The request got a usable answer: the user is told so, if it was this request that told of the outage."""
        if failing and failing.is_told:
            seconds = asyncio.get_running_loop().time() - failing.since
            self._is_told = False
            self._hooks.outages.pop(self._name, None)
            self.incidents.outage_ended(seconds, shown=True)
            self._hooks.tell(f"{self.identity} at {self.url} is back after {seconds:.0f} s", logged=True)

    def _remedy(self, fault: Fault) -> str:
        if fault.status in (401, 403):
            return key_remedy(self._member)
        if fault.status == 404:
            return "check that the URL has a batch endpoint and that the key is of the account that made the batch"
        return "settle that with the account" if fault.status in (402, 429) else "bring it back"


def _write(target: BinaryIO, data: bytes) -> None:
    try:
        target.write(data)
    except OSError as error:
        raise StorageError(f"{target.name}: cannot be written ({error.strerror}); free the disk") from None


def _sync(target: BinaryIO) -> None:
    target.flush()
    os.fsync(target.fileno())
