"""One policy for all that can go wrong between us and a model behind a URL: tries, overload, outages, replicas.

| what comes back                                          | what is done                                            |
|----------------------------------------------------------|---------------------------------------------------------|
| 200                                                      | what the question's reader makes of it                  |
| 400 with a filter's code                                 | blocked: an outcome too                                 |
| 400 413 415 422 and other 4xx                            | this call failed for good                               |
| 429 503 529                                              | the limiter slows down; it is not counted as a try      |
| 408 409 425, other 5xx, time-out, cut or unreadable body | tried again, `limits.retries` times in all, at least 2  |
| no connection, 3xx 401 402 403 404 405 407, unpaid bills | the service is away                                     |

Before a call's last try, and whenever the service is away, one small question scouts for all calls that wait. If it is
answered at once the fault lies with the call, which gets its last try and then failed for good. If not, the replica is
out (`models/http/replicas.py`): its calls begin anew at another one, or wait where there is none, until one is back or
`ServiceGone` ends the run when the patience is used up.

aiohttp speaks HTTP; what the openai SDK would cost is in docs/performance.md. Keys never enter a message.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from intersafe.errors import CallFailed, InputError
from intersafe.models.base import Hooks
from intersafe.models.http.faults import (
    Away,
    Fault,
    Moved,
    Overloaded,
    TooSlow,
    Transient,
    error_of,
    raise_for,
    remedy_for,
)
from intersafe.models.http.limits import QueueCleared
from intersafe.models.http.pending import PendingCalls
from intersafe.models.http.quotas import Quota
from intersafe.models.http.replicas import Replica, Replicas
from intersafe.recipe.sections import Limits, Model
from intersafe.wording import printable

_LARGE = 2**20  # bytes from which on a body is sent in pieces and let go of

A = TypeVar("A")


@dataclass(frozen=True)
class Question(Generic[A]):
    """What one call sends, and what becomes of what comes back."""

    body: Callable[[], bytes]
    """Made when it is sent and not earlier: only calls in flight hold their images in memory."""
    read: Callable[[bytes], A]
    """The outcome of a 200; raises `Transient` where it cannot be read."""
    blocked: Callable[[str], A]
    """The outcome where a filter stopped it, from the server's words."""
    too_long: Callable[[], A] | None = None
    """The outcome of a body over the cap; a passing fault where there is none."""
    amend: Callable[[Exception], bool] = lambda _: False
    """Asked after an answer of 4xx or 5xx, given what it means: True if the body is now another one, to be sent at
    once; it says so a few times at most."""
    at: Callable[[str], None] | None = None
    """Told the replica's URL before each body is made."""
    tokens: Callable[[], int] = lambda: 0
    """About how many tokens it will cost; asked where a quota of them holds."""
    used: Callable[[A], int] = lambda _: 0
    """The tokens that an outcome cost; 0 where the server does not say."""


class ReplicaState(NamedTuple):
    """One replica, for who looks on."""

    url: str
    is_in: bool
    limit: int
    in_flight: int


class Service:
    """One route of one model behind one or several URLs; a job stays on one replica, chosen by rendezvous hash."""

    def __init__(
        self,
        model: Model,
        route: str,
        limits: Limits,
        hooks: Hooks,
        *,
        scout: Question[Any],
        max_body: int,
    ) -> None:
        """POSTs to `<url><route>`; `max_body` is the most bytes of an answer."""
        self._pending = PendingCalls(hooks.may_send)
        self._hooks = hooks
        self._is_told = False
        self._model, self._limits, self._scout, self._max_body = model, limits, scout, max_body
        self._group = Replicas(
            model.spec.urls,
            route,
            model.concurrency,
            limits.patience,
            self._scout_at,
            name=model.identity,
            hooks=hooks,
            remedy=lambda fault: remedy_for(fault, model),
        )
        self._quota = Quota(model.rpm, model.tpm)
        self._key = os.environ.get(model.key, "").strip() if model.key else ""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=limits.timeout, connect=min(30.0, limits.timeout)),
        )
        self._retrying = AsyncRetrying(
            stop=self._only_last_try_left,
            wait=wait_random_exponential(multiplier=0.4, max=20.0),
            retry=retry_if_exception_type(Transient),
            reraise=True,
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._pending.aclose()
        await self._group.aclose()
        await self._session.close()

    def states(self) -> list[ReplicaState]:
        """How each replica does now."""
        return [ReplicaState(r.url, not r.out, r.limiter.limit, r.limiter.in_flight) for r in self._group.all]

    async def ask(self, job: str, question: Question[A]) -> A:
        """The outcome; waits out overload and outages, tries again what passes; `BudgetReached` at a limit."""
        async with self._pending.ended_at_limit():
            return await self._ask_until_answered(job, question)

    async def _ask_until_answered(self, job: str, question: Question[A]) -> A:
        # By whether it was a passing fault: the replica that answered others right after one. A fault of the other sort
        # says nothing about this one: after a lapse of the key a single 500 is still the first of its tries.
        suspected: dict[bool, Replica] = {}
        moves = 0
        while True:
            replica = self._group.place(job)
            if replica is None:
                await self._group.wait()
                moves = 0
                continue
            last = replica is suspected.get(True)
            # A call may be what makes one replica after the other hang.
            stays = replica in suspected.values() or moves >= len(self._group)
            try:
                if last:
                    return await self._ask(replica, question, stays)
                outcome: A = await self._retrying(self._ask, replica, question, stays)
                return outcome
            except Moved:
                moves += 1
            except Fault as error:
                passing = isinstance(error, Transient)
                if replica is suspected.get(passing) and not replica.out and (error.status or passing):
                    word = "server_error" if passing else "bad_request"
                    raise CallFailed("endpoint", word, str(error)) from None
                if await self._answers_others(replica, error):
                    suspected[passing] = replica
                else:
                    suspected = {}
                    moves += 1

    def _only_last_try_left(self, state: RetryCallState) -> bool:
        replica: Replica = state.args[0]
        return state.attempt_number >= self._limits.retries - 1 or replica.outage.seconds >= self._limits.patience

    async def _ask(self, replica: Replica, question: Question[A], stays: bool) -> A:
        """One try, in which neither overload counts nor what the question amends; `Moved` if the replica goes out."""
        while True:
            if replica.out and not stays:
                raise Moved
            try:
                sent = await replica.limiter.acquire()
            except QueueCleared:
                await self._group.wait()
                continue
            counted = 0.0
            try:
                if self._quota.is_bound:
                    counted = await self._within_quota(question.tokens())
                    sent = asyncio.get_running_loop().time()
                    if replica.limiter.is_held or (replica.out and not stays):
                        self._quota.give_back(counted)
                        continue
                self._pending.check()
                with self._pending.in_flight():
                    outcome = await self._post(replica, question)
            except Overloaded as error:
                error.sent = sent
                self._quota.settle(counted, 0, 0)
                self._adopt(replica, error)
                self._group.overloaded(replica, error)
                continue
            except Fault as error:
                if error.status and question.amend(error):
                    continue
                error.sent = sent
                replica.outage.begin()
                if isinstance(error, TooSlow):
                    replica.limiter.overloaded(sent, is_late=True)
                    if not stays and self._group.is_hanging(replica, error):
                        raise Moved from None
                raise
            except CallFailed as error:
                self._group.answered(replica, sent)
                if question.amend(error):
                    continue
                raise
            finally:
                replica.limiter.release()
            self._group.answered(replica, sent)
            if counted and (used := question.used(outcome)):
                self._quota.settle(counted, used, question.tokens())
            return outcome

    async def _within_quota(self, tokens: int) -> float:
        """Waits until the quota has room, and shows that it does; returns what was counted."""
        quota, name = self._quota, f"the quota of {self._model.identity}"
        if not self._is_told and quota.is_exceeded_by(tokens):
            self._is_told = True
            self._hooks.notify(
                f"{self._model.identity}: a request of about {tokens:,} tokens is more than its `tpm` allows "
                f"({quota.words}); such requests go one at a time, with long pauses"
            )
        if quota.may_go(tokens):
            return await quota.acquire(tokens)
        self._hooks.outages[name] = f"calls are held back by {quota.words}"
        try:
            return await quota.acquire(tokens)
        finally:
            if not quota.waiting:
                self._hooks.outages.pop(name, None)

    def _adopt(self, replica: Replica, fault: Overloaded) -> None:
        """Keeps to the limits that a 429 names from then on."""
        rpm, tpm = fault.throttle.rpm, fault.throttle.tpm
        if self._quota.narrow(rpm, tpm):
            named = [f"{most:,} {what} a minute" for most, what in ((rpm, "requests"), (tpm, "tokens")) if most]
            fields = " and ".join(f"`{name}`" for most, name in ((rpm, "rpm"), (tpm, "tpm")) if most)
            where = f"{self._model.identity} at {replica.url}"
            self._hooks.notify(
                f"{where} allows {' and '.join(named)}, which holds from now on; {fields} in the recipe sets it"
            )

    # --- one request -------------------------------------------------------------------------------------------------

    async def _post(self, replica: Replica, question: Question[A]) -> A:
        await replica.uploads.acquire()
        uploaded = _Once(replica.uploads.release)
        try:
            if question.at:
                question.at(replica.url)
            headers, body = _upload(question.body(), uploaded)
            async with self._session.post(
                replica.address, data=body, headers=headers, allow_redirects=False, **replica.proxy
            ) as response:
                answer = await read_body(response, self._max_body)
                if answer is None and (response.status != 200 or question.too_long is None):
                    raise Transient(f"answer over {self._max_body // 2**20} MiB")
                if response.status != 200:
                    return question.blocked(self._filtered(response.status, response.headers, answer or b""))
        except aiohttp.ClientConnectorError as error:
            why = self.clean(error.os_error.strerror or str(error.os_error) or "unknown host")
            raise Away(f"no connection ({why})") from None
        except TimeoutError as error:
            raise TooSlow(str(error) or f"no answer within {self._limits.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Transient(self.clean(f"{type(error).__name__} {error}".strip())) from None
        finally:
            uploaded()
        if answer is None:
            assert question.too_long is not None
            return question.too_long()
        return question.read(answer)

    def _filtered(self, status: int, headers: Mapping[str, str], data: bytes) -> str:
        """The words of a filter that stopped the call; any other answer but 200 is an exception of the table."""
        message, code = error_of(data)
        if 300 <= status < 400:
            message = f"redirects to {headers.get('Location', 'nowhere')}"
        what = self.clean(f"HTTP {status} {message}".strip())
        raise_for(status, headers, data, what, code)
        return what

    def clean(self, text: str) -> str:
        """One printable line of at most 300 characters, without the key."""
        return printable(text, secret=self._key)[:300]

    # --- outages -----------------------------------------------------------------------------------------------------

    async def _answers_others(self, replica: Replica, fault: Fault) -> bool:
        """True if the replica answers right after the fault; it is out, or has been, where it does not."""
        async with replica.scouting:
            if replica.outage.answered <= fault.sent and not replica.out:
                try:
                    await self._scout_through_overload(replica)
                except Fault as error:
                    replica.unanswered = error.sent
                    self._group.lost(replica, error)
            return not replica.out and replica.unanswered < fault.sent

    async def _scout_through_overload(self, replica: Replica) -> None:
        try:
            await self._scout_at(replica)
        except Overloaded:
            with contextlib.suppress(CallFailed, Moved):  # an answer all the same; or the replica is out by now
                await self._ask(replica, self._scout, False)

    async def _scout_at(self, replica: Replica) -> None:
        """The small question past the limiter, whose places may be those of requests that hang."""
        sent = asyncio.get_running_loop().time()
        try:
            await self._post(replica, self._scout)
        except (CallFailed, InputError):
            pass
        except Fault as error:
            error.sent = sent
            raise
        self._group.answered(replica, sent)


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


async def read_body(response: aiohttp.ClientResponse, most: int) -> bytes | None:
    """The body; None where it has more than so many bytes."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            return None
    return b"".join(chunks)
