"""The provider's side of the batch lane: files and batches over HTTP, in the form of OpenAI's Batch API.

| what comes back                                          | what is done                                          |
|----------------------------------------------------------|-------------------------------------------------------|
| 2xx                                                      | used                                                  |
| 400 413 415 422, other 4xx, a full queue (`QUEUE_FULL`)  | `Refused`: the batch is at fault, or its size         |
| 408 409 425 429, 5xx, time-out, reset, unreadable        | again after a growing pause, or after `Retry-After`   |
| no connection, 3xx, 401 402 403 404 405 407              | the service is away: the same, and the user is told   |

Patience counts while one and the same request gets no answer that can be used, and not while a batch is worked on. A
batch is created twice by no fault: after an attempt whose outcome is unknown the provider is asked first.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import aiohttp
import msgspec
from aiohttp.helpers import get_env_proxy_for_url
from yarl import URL

from intersafe.errors import InputError, ServiceGone, StorageError
from intersafe.models.base import Hooks
from intersafe.models.http.faults import UNREADABLE, error_of, is_refusal
from intersafe.models.http.quirks import AWAY, QUEUE_FULL
from intersafe.models.http.throttling import seconds_of
from intersafe.recipe.sections import Limits, Member
from intersafe.wording import printable

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
"""Seconds between two looks at a batch, and between two tries of a request; both grow from the one to the other."""
LOOK_AGAIN = 5.0
"""Seconds until a list of batches surely names one that was created before."""
TELL_AFTER = 5.0
"""Seconds without a usable answer from which on the user is told."""
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


class Refused(Exception):
    """The provider does not take a file or a batch; `status` 0 where it said so after it had taken it."""

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
    """How far a batch is."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Remote(msgspec.Struct, frozen=True):
    """A batch as the provider tells of it."""

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
        """Where its results are: the answers first, then the errors; some providers write "" for none."""
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


class _Fault(Exception):
    """No answer that can be used; the same request may be sent again."""

    def __init__(self, what: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(what)
        self.status, self.retry_after = status, retry_after


class BatchApi:
    """The files and batches of one account."""

    def __init__(self, member: Member, limits: Limits, hooks: Hooks) -> None:
        """Needs a running event loop."""
        self._may_send = hooks.may_send or (lambda: None)
        self.url, self.identity = member.spec.urls[0], member.identity
        self._place = f"batches of {member.identity}"
        self._member, self._limits, self._hooks = member, limits, hooks
        self._key = os.environ.get(member.key, "").strip() if member.key else ""
        self._told = False
        self._proxy: dict[str, Any] = {}
        try:
            address = URL(self.url)
        except ValueError as error:
            raise InputError(f"{self.url!r} is not a URL: {error}", remedy="mend it in the recipe") from None
        with contextlib.suppress(LookupError):
            self._proxy["proxy"], self._proxy["proxy_auth"] = get_env_proxy_for_url(address)
        self._short = aiohttp.ClientTimeout(total=limits.timeout, connect=min(30.0, limits.timeout))
        self._long = aiohttp.ClientTimeout(total=UPLOAD_SECONDS, connect=30.0)
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._session.close()

    # --- what a batch needs ------------------------------------------------------------------------------------------

    async def upload(self, path: Path) -> str:
        """The id of the file at the provider, sent from the disk by pieces; `Refused` or `BudgetReached` if not."""

        async def attempt() -> str:
            self._may_send()
            with path.open("rb") as file:
                form = aiohttp.FormData({"purpose": "batch"})
                form.add_field("file", file, filename=path.name, content_type="application/jsonl")
                return (await self._json("POST", "/files", _File, data=form, timeout=self._long)).id

        return await self._again(attempt)

    async def create(self, file: str, nonce: str, made: float) -> Remote:
        """The batch over that file, created once; `Refused` or `BudgetReached` if not. `made`: when its nonce was."""
        body = {
            "input_file_id": file,
            "endpoint": ROUTE,
            "completion_window": "24h",
            "metadata": {"intersafe": nonce},
        }
        unsure = False

        async def attempt() -> Remote:
            nonlocal unsure
            if unsure and (found := await self._find_late(nonce, made)):
                return found
            self._may_send()
            unsure = True
            return await self._json("POST", "/batches", Remote, json=body)

        return await self._again(attempt)

    async def find(self, nonce: str, made: float) -> Remote | None:
        """The batch with that nonce, if there is one."""
        return await self._again(lambda: self._find_late(nonce, made))

    async def look(self, batch: str) -> Remote:
        """How that batch is."""
        return await self._again(lambda: self._json("GET", f"/batches/{batch}", Remote))

    async def download(self, files: list[str], path: Path) -> None:
        """Appends the files one after the other to the path; a broken connection begins that file anew."""
        with path.open("ab") as target:
            for name in files:
                start = target.seek(0, os.SEEK_END)
                await self._again(partial(self._fetch, name, target, start))
            await asyncio.to_thread(_sync, target)

    async def _fetch(self, name: str, target: BinaryIO, start: int) -> None:
        target.seek(start)
        target.truncate()
        last = b"\n"
        try:
            async with self._request("GET", f"/files/{name}/content", timeout=self._long) as response:
                if response.status != 200:
                    self._judge(response.status, response.headers.get("Retry-After", ""), await _read(response))
                async for chunk in response.content.iter_chunked(CHUNK):
                    last = chunk
                    _write(target, chunk)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise _Fault(self._why(error)) from None
        if not last.endswith(b"\n"):
            _write(target, b"\n")

    async def _find_late(self, nonce: str, made: float) -> Remote | None:
        """Looks twice, since a list may lag behind."""
        if (found := await self._find(nonce, made)) is None:
            await asyncio.sleep(LOOK_AGAIN)
            found = await self._find(nonce, made)
        return found

    async def _find(self, nonce: str, made: float) -> Remote | None:
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
        """The answer to one request; `_Fault` if it may be sent again, `Refused` if not."""
        sent.setdefault("timeout", self._short)
        try:
            async with self._request(method, route, **sent) as response:
                status, retry_after = response.status, response.headers.get("Retry-After", "")
                body = await _read(response)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise _Fault(self._why(error)) from None
        self._judge(status, retry_after, body)
        try:
            return msgspec.json.decode(body, type=kind)
        except UNREADABLE as error:
            raise _Fault(f"unreadable answer: {error}", status) from None

    def _judge(self, status: int, retry_after: str, body: bytes) -> None:
        """Returns for a 2xx alone."""
        if 200 <= status < 300:
            return
        message, code = error_of(body)
        what = self.clean(f"HTTP {status} {message}".strip())
        if code == QUEUE_FULL or is_refusal(status):
            raise Refused(what, status, code)
        raise _Fault(what, status, seconds_of(retry_after))

    def _why(self, error: Exception) -> str:
        if isinstance(error, aiohttp.ClientConnectorError):
            return self.clean(f"no connection ({error.os_error.strerror or error.os_error or 'unknown host'})")
        if isinstance(error, TimeoutError):
            return "no answer in time"
        return self.clean(f"{type(error).__name__} {error}".strip())

    def clean(self, text: str) -> str:
        """One printable line of at most 300 characters, without the key."""
        return printable(text, secret=self._key)[:300]

    # --- outages -----------------------------------------------------------------------------------------------------

    async def _again(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What the attempt gives, tried until the patience is used up: then `ServiceGone`."""
        clock, since, pause, telling = asyncio.get_running_loop().time, None, FIRST_PAUSE, False
        where, patience = f"{self.identity} at {self.url}", self._limits.patience
        while True:
            try:
                outcome = await attempt()
            except _Fault as fault:
                since = clock() if since is None else since
                away = clock() - since
                if away >= patience:
                    raise ServiceGone(
                        f"{where}: no use of its batch endpoint for {away:.0f} s ({fault}); "
                        f"{self._remedy(fault)}, then run the same command again: nothing is lost"
                    ) from None
                wait = min(max(pause, fault.retry_after), patience - away)
                why = f"{fault}; {self._remedy(fault)}"
                if not self._told and (fault.status in AWAY or away + wait >= TELL_AFTER):
                    self._told = telling = True
                    self._hooks.notify(f"{where}: {why}; waiting up to {patience:.0f} s")
                if telling:
                    self._hooks.outages[self._place] = why
                await asyncio.sleep(wait)
                pause = min(LONGEST_PAUSE, pause * 2)
            except Refused:
                self._is_back(telling)
                raise
            else:
                if telling and since is not None:
                    self._is_back(telling)
                    self._hooks.notify(f"{where} is back after {clock() - since:.0f} s")
                return outcome

    def _is_back(self, telling: bool) -> None:
        """Nobody is told any longer, if it was this request that did."""
        if telling:
            self._told = False
            self._hooks.outages.pop(self._place, None)

    def _remedy(self, fault: _Fault) -> str:
        if fault.status in (401, 403):
            key = self._member.key
            return f"is the key in {key} right?" if key else "name the variable of the key (`key:` in the recipe)"
        if fault.status == 404:
            return "check that the URL has a batch endpoint and that the key is of the account that made the batch"
        return "settle that with the account" if fault.status in (402, 429) else "bring it back"


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body; one over `MAX_ANSWER` is no answer."""
    found = bytearray()
    async for chunk in response.content.iter_any():
        found += chunk
        if len(found) > MAX_ANSWER:
            raise aiohttp.ClientPayloadError(f"answer over {MAX_ANSWER // 2**20} MiB")
    return bytes(found)


def _write(target: BinaryIO, data: bytes) -> None:
    try:
        target.write(data)
    except OSError as error:
        raise StorageError(f"{target.name}: cannot be written ({error.strerror}); free the disk") from None


def _sync(target: BinaryIO) -> None:
    target.flush()
    os.fsync(target.fileno())
