"""One policy for all that can go wrong between us and a model behind a URL: tries, overload, outages, replicas.

| what comes back                                          | what is done                                            |
|----------------------------------------------------------|---------------------------------------------------------|
| 200                                                      | what the question's reader makes of it                  |
| 400 with a filter's code                                 | blocked: an outcome too                                 |
| 400 413 415 422 and other 4xx                            | this call failed for good                               |
| 429 503 529                                              | the limiter slows down; it is not counted as a try      |
| 408 409 425, other 5xx, time-out, cut or unreadable body | tried again, `limits.retries` times in all, at least 2  |
| no connection, 3xx 401 402 403 404 405 407               | the service is away                                     |

Before a call's last try, and whenever the service is away, one small question scouts for all calls that wait. If it is
answered at once the fault lies with the call, which gets its last try and then failed for good. If not, the run says so
and waits; the tries begin anew when the service is back, or `ServiceGone` ends the run when the patience is used up.

aiohttp speaks HTTP; what the openai SDK would cost is in docs/performance.md. Keys never enter a message.
"""

import asyncio
import contextlib
import hashlib
import math
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import aiohttp
import msgspec
from aiohttp.helpers import get_env_proxy_for_url
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential
from yarl import URL

from intersafe.errors import CallFailed, InputError, ServiceGone
from intersafe.models.limits import Absence, Limiter, seconds_of
from intersafe.settings import Limits, Model

LONG_PAUSE = 5.0
"""Seconds of overload from which on the user is told."""

_FILTERED = ("content_filter", "content_policy_violation", "data_inspection_failed", "moderation_blocked")
_OVERLOADED = (429, 503, 529)
_PASSING = (408, 409, 425)
_AWAY = (401, 402, 403, 404, 405, 407)
UPLOADS = 8
"""Large bodies on their way to one service at once: what waits for an answer holds no images in memory."""
_LARGE = 2**20  # bytes from which on a body is sent in pieces and let go of


class _Fault(Exception):
    """No reply came, and the call may be tried again; `status` is 0 where no HTTP answer came."""

    def __init__(self, what: str, status: int = 0) -> None:
        super().__init__(what)
        self.status, self.sent = status, 0.0


class Passing(_Fault):
    """Worth another try at once; a reader raises it where a 200 cannot be read."""


class _TooSlow(Passing):
    """No answer in time: like a packet that is lost, it speaks of overload."""


class _Away(_Fault):
    """Nobody there, or nobody who answers to us."""


class _Overloaded(_Fault):
    """Too many requests; `retry_after` in seconds, 0 where the server does not say."""

    def __init__(self, what: str, status: int, retry_after: float) -> None:
        super().__init__(what, status)
        self.retry_after = retry_after


A = TypeVar("A")


@dataclass(frozen=True)
class Question(Generic[A]):
    """What one call sends, and what becomes of what comes back."""

    body: Callable[[], bytes]
    """Made when it is sent and not earlier: only calls in flight hold their images in memory."""
    read: Callable[[bytes], A]
    """The outcome of a 200; raises `Passing` where it cannot be read."""
    blocked: Callable[[str], A]
    """The outcome where a filter stopped it, from the server's words."""
    too_long: Callable[[], A] | None = None
    """The outcome of a body over the cap; a passing fault where there is none."""
    amend: Callable[[], bool] = lambda: False
    """Asked after an answer of 4xx or 5xx: True if the body is now another one, to be sent at once, once."""


@dataclass
class _Replica:
    """One URL: how many calls it takes, and whether it is there."""

    url: str
    address: URL
    proxy: dict[str, Any]
    limiter: Limiter
    absence: Absence
    scouting: asyncio.Lock = field(default_factory=asyncio.Lock)
    unanswered: float = float("-inf")
    """When the last scout that got no answer was sent."""
    said: bool = False
    """True if the user was told of its absence."""
    gone: str = ""
    """Why it was given up."""


class Service:
    """One route of one model behind one or several URLs; a job stays on one replica, chosen by rendezvous hash."""

    def __init__(
        self,
        model: Model,
        route: str,
        limits: Limits,
        say: Callable[[str], None],
        *,
        scout: Question[Any],
        max_body: int,
    ) -> None:
        """POSTs to `<url><route>`; `say` is told when it goes away or comes back, `max_body` is in bytes."""
        self._model, self._limits, self._say, self._scout, self._max_body = model, limits, say, scout, max_body
        urls = model.spec.urls
        share = math.ceil(model.concurrency / len(urls))
        self._replicas = [_open_replica(url, route, share, limits.patience) for url in urls]
        self._key = os.environ.get(model.key, "").strip() if model.key else ""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=limits.timeout, connect=min(30.0, limits.timeout)),
        )
        self._uploads = asyncio.Semaphore(UPLOADS)
        self._retrying = AsyncRetrying(
            stop=self._only_last_try_left,
            wait=wait_random_exponential(multiplier=0.4, max=20.0),
            retry=retry_if_exception_type(Passing),
            reraise=True,
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._session.close()

    def url_of(self, job: str) -> str:
        """The replica that answers this job."""
        return self._replica(job).url

    async def ask(self, job: str, question: Question[A]) -> A:
        """The outcome; waits out overload and outages, tries again what passes."""
        replica = self._replica(job)
        last = False
        while True:
            try:
                if last:
                    return await self._ask(replica, question)
                outcome: A = await self._retrying(self._ask, replica, question)
                return outcome
            except _Fault as error:
                if last and (error.status or isinstance(error, Passing)):
                    word = "server_error" if isinstance(error, Passing) else "bad_request"
                    raise CallFailed("endpoint", word, str(error)) from None
                last = await self._answers_others(replica, error)

    def _replica(self, job: str) -> _Replica:
        if len(self._replicas) == 1:
            return self._replicas[0]
        return max(self._replicas, key=lambda r: hashlib.blake2b(f"{r.url} {job}".encode(), digest_size=8).digest())

    def _only_last_try_left(self, state: RetryCallState) -> bool:
        replica: _Replica = state.args[0]
        return state.attempt_number >= self._limits.retries - 1 or replica.absence.seconds >= self._limits.patience

    async def _ask(self, replica: _Replica, question: Question[A]) -> A:
        """One try, in which neither overload counts nor what the question amends."""
        while True:
            sent = await replica.limiter.acquire()
            try:
                outcome = await self._post(replica, question)
            except _Overloaded as error:
                error.sent = sent
                replica.limiter.overloaded(sent)
                self._pause(replica, error, error.retry_after)
                continue
            except _Fault as error:
                if error.status and question.amend():
                    continue
                error.sent = sent
                replica.absence.begin()
                if isinstance(error, _TooSlow):
                    replica.limiter.overloaded(sent)
                raise
            except CallFailed:
                self._note_answer(replica, sent)
                if question.amend():
                    continue
                raise
            finally:
                replica.limiter.release()
            self._note_answer(replica, sent)
            return outcome

    # --- one request -------------------------------------------------------------------------------------------------

    async def _post(self, replica: _Replica, question: Question[A]) -> A:
        await self._uploads.acquire()
        uploaded = _Once(self._uploads.release)
        try:
            headers, body = _upload(question.body(), uploaded)
            async with self._session.post(
                replica.address, data=body, headers=headers, allow_redirects=False, **replica.proxy
            ) as response:
                answer = await _read(response, self._max_body)
                if answer is None and (response.status != 200 or question.too_long is None):
                    raise Passing(f"answer over {self._max_body // 2**20} MiB")
                if response.status != 200:
                    return question.blocked(self._filtered(response.status, response.headers, answer or b""))
        except aiohttp.ClientConnectorError as error:
            why = self.clean(error.os_error.strerror or str(error.os_error) or "unknown host")
            raise _Away(f"no connection ({why})") from None
        except TimeoutError as error:
            raise _TooSlow(str(error) or f"no answer within {self._limits.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Passing(self.clean(f"{type(error).__name__} {error}".strip())) from None
        finally:
            uploaded()
        if answer is None:
            assert question.too_long is not None
            return question.too_long()
        return question.read(answer)

    def _filtered(self, status: int, headers: Mapping[str, str], data: bytes) -> str:
        """The words of a filter that stopped the call; any other answer but 200 is an exception of the table."""
        message, code = _error_of(data)
        if 300 <= status < 400:
            message = f"redirects to {headers.get('Location', 'nowhere')}"
        what = self.clean(f"HTTP {status} {message}".strip())
        if status == 400 and code in _FILTERED:
            return what
        if status in _OVERLOADED:
            raise _Overloaded(what, status, seconds_of(headers.get("Retry-After", "")))
        if status in _AWAY or status < 400:
            raise _Away(what, status)
        if status in _PASSING or status >= 500:
            raise Passing(what, status)
        raise CallFailed("endpoint", "bad_request", what)

    def clean(self, text: str) -> str:
        """One printable line of at most 300 characters, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        return "".join(c if c.isprintable() else " " for c in text[:300])

    # --- outages -----------------------------------------------------------------------------------------------------

    async def _answers_others(self, replica: _Replica, fault: _Fault) -> bool:
        """True if the replica answers right after the fault, False if that took a wait; or `ServiceGone`."""
        async with replica.scouting:
            while replica.absence.answered <= fault.sent:
                if replica.gone:
                    raise ServiceGone(replica.gone)
                try:
                    await self._ask(replica, self._scout)
                except CallFailed:
                    continue  # an answer all the same, and noted as one
                except _Fault as error:
                    replica.unanswered = error.sent
                    self._pause(replica, error)
            return replica.unanswered < fault.sent

    def _pause(self, replica: _Replica, fault: _Fault, least: float = 0.0) -> None:
        """Holds all new calls to the replica back for a while, at least so many seconds; or `ServiceGone`."""
        absence = replica.absence
        absence.begin()
        where, remedy = f"{self._model.identity} at {replica.url}", self._remedy(fault)
        if absence.is_over_patience(fault.sent):
            replica.gone = (
                f"{where} stayed away for {absence.seconds:.0f} s ({fault}); "
                f"{remedy}, then run the same command again: nothing is lost"
            )
            raise ServiceGone(replica.gone)
        pause = absence.pause(fault.sent, least)
        replica.limiter.hold(pause)
        if not replica.said and (not isinstance(fault, _Overloaded) or absence.seconds + pause >= LONG_PAUSE):
            replica.said = True
            self._say(
                f"{where}: {fault}; {remedy}; "
                f"waiting up to {self._limits.patience:.0f} s, Ctrl-C stops and keeps everything"
            )

    def _note_answer(self, replica: _Replica, sent: float) -> None:
        replica.limiter.succeeded()
        lasted = replica.absence.end(sent)
        if replica.said:
            replica.said = False
            self._say(f"{self._model.identity} at {replica.url} is back after {lasted:.0f} s")

    def _remedy(self, fault: _Fault) -> str:
        if fault.status in (401, 403):
            key = self._model.key
            return f"is the key in {key} right?" if key else "name the variable of the key (`key:` in the recipe)"
        if isinstance(fault, _Overloaded):
            return "lower the member's `concurrency`"
        if isinstance(fault, _TooSlow):
            return "bring it back, or lower `concurrency` or raise `timeout`"
        if fault.status in (402, 407):
            return "settle that with the account or the proxy"
        name = self._model.spec.model
        return f"check the URL and the model's name {name!r}" if 0 < fault.status < 500 else "bring it back"


def _open_replica(url: str, route: str, most: int, patience: float) -> _Replica:
    try:
        address = URL(f"{url}{route}")
    except ValueError as error:
        raise InputError(f"{url!r} is not a URL: {error}", remedy="mend it in the recipe") from None
    proxy: dict[str, Any] = {}
    # Once here: `trust_env` would ask the environment and .netrc again for each request, in a thread.
    with contextlib.suppress(LookupError):
        proxy["proxy"], proxy["proxy_auth"] = get_env_proxy_for_url(address)
    return _Replica(url, address, proxy, Limiter(most), Absence(patience))


class _Once:
    """Does something the first time it is called."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act

    def __call__(self) -> None:
        act, self._act = self._act, None
        if act:
            act()


def _upload(body: bytes, uploaded: _Once) -> tuple[dict[str, str], bytes | AsyncIterator[bytes]]:
    """Headers and data of a body; a large one goes piece by piece, and `uploaded` is called when it is sent."""
    if len(body) > _LARGE:
        return {"Content-Length": str(len(body))}, _pieces(body, uploaded)
    uploaded()
    return {}, body


async def _pieces(body: bytes, uploaded: _Once) -> AsyncIterator[bytes]:
    """Nobody holds the body once it is sent, since most of a request's time is the server's."""
    for start in range(0, len(body), _LARGE):
        yield body[start : start + _LARGE]
    uploaded()


# --- what comes back -------------------------------------------------------------------------------------------------


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes | None:
    """The body; None where it has more than so many bytes."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            return None
    return b"".join(chunks)


def _error_of(data: bytes) -> tuple[str, str]:
    """The server's own words and code, from the usual places of an error body."""
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return data[:20_000].decode("utf-8", "replace"), ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error), ""
    return str(error.get("message", error)), str(error.get("code", ""))
