"""One policy for all that can go wrong between us and a model behind a URL: tries, overload, outages, replicas.

| what comes back                                          | what is done                                            |
|----------------------------------------------------------|---------------------------------------------------------|
| 200                                                      | what the request's `read` makes of it                   |
| 400 with a filter's code                                 | blocked: an outcome too                                 |
| 400 413 415 422 and other 4xx                            | this call failed for good                               |
| 429 503 529                                              | the limiter slows down; it is not counted as a try      |
| 408 409 425, other 5xx, time-out, cut or unreadable body | tried again, `limits.retries` times in all, at least 2  |
| no connection, 3xx 401 402 403 404 405 407, unpaid bills | the service is away                                     |

A *health probe* is one small request on behalf of all calls that wait. It is sent before a call's last try, and
whenever the service seems to be away. If it is answered, the call itself is at fault: it gets its last try and then
has failed for good. If not, the replica is out (`replicas.py`). Its calls start anew on another one, or wait for one to
come back. When the patience is used up, `ServiceGone` ends the run.

`request.py` says what is sent, `transport.py` sends it, `quirks.py` lists the codes and words of single servers.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from intersafe.errors import CallFailed, InputError
from intersafe.models.base import Hooks
from intersafe.models.http.faults import Fault, Moved, Overloaded, TooSlow, Transient, remedy_for
from intersafe.models.http.incidents import IncidentLog
from intersafe.models.http.limits import QueueCleared
from intersafe.models.http.pending import PendingCalls
from intersafe.models.http.quotas import RateQuota
from intersafe.models.http.replicas import Replica, Replicas
from intersafe.models.http.request import A, Request
from intersafe.models.http.transport import Transport
from intersafe.recipe.sections import Limits, Model

ProbeFor = Callable[[str], Request[Any]]
"""Makes a health probe on behalf of a role."""


class ReplicaState(NamedTuple):
    """Snapshot of one replica, for monitoring."""

    url: str
    is_in: bool
    limit: int
    """Requests that may be in flight now."""
    in_flight: int


class Service:
    """One route of one model behind one or several URLs; a job stays on one replica."""

    def __init__(self, model: Model, route: str, limits: Limits, hooks: Hooks, *, probe: ProbeFor) -> None:
        """POSTs to `<url><route>`; `probe` makes a health probe. Needs a running event loop."""
        self._model, self._limits, self._hooks, self._probe = model, limits, hooks, probe
        self._transport = Transport(model, limits.timeout)
        self.clean = self._transport.clean
        self._pending = PendingCalls(hooks.may_send)
        self._quota = RateQuota(model.rpm, model.tpm)
        self._is_told = False
        self._incidents = IncidentLog(model.identity, hooks, self.clean)
        self._replicas = Replicas(
            model.spec.urls,
            route,
            model.concurrency,
            limits.patience,
            self._probe_once,
            incidents=self._incidents,
            remedy=lambda fault: remedy_for(fault, model),
        )
        self._retrying = AsyncRetrying(
            stop=self._only_last_try_left,
            wait=wait_random_exponential(multiplier=0.4, max=20.0),
            retry=retry_if_exception_type(Transient),
            before_sleep=self._log_retry,
            reraise=True,
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._pending.aclose()
        await self._replicas.aclose()
        await self._transport.aclose()

    def states(self) -> list[ReplicaState]:
        """How each replica does now."""
        return [ReplicaState(r.url, not r.out, r.limiter.limit, r.limiter.in_flight) for r in self._replicas.all]

    async def ask(self, job: str, request: Request[A]) -> A:
        """The outcome; waits out overload and outages, tries again after transient faults.

        `CallFailed` if the call failed for good, `ServiceGone` if the service did, `BudgetReached` at a limit.
        """
        async with self._pending.ended_at_limit():
            return await self._until_answered(job, request)

    async def _until_answered(self, job: str, request: Request[A]) -> A:
        # The replica that answered a health probe right after a fault of this call, so that the call is at fault.
        # Transient faults and others count apart: after a lapse of the key, a 500 is still the first of its tries.
        cleared: dict[bool, Replica] = {}
        moves = 0
        while True:
            replica = self._replicas.replica_for(job)
            if replica is None:
                await self._replicas.wait()
                moves = 0
                continue
            # A call may be what makes one replica after the other hang.
            stays = replica in cleared.values() or moves >= len(self._replicas)
            try:
                if replica is cleared.get(True):
                    return await self._try(replica, request, stays)
                outcome: A = await self._retrying(self._try, replica, request, stays)
                return outcome
            except Moved:
                moves += 1
            except Fault as error:
                transient = isinstance(error, Transient)
                if replica is cleared.get(transient) and not replica.out and (error.status or transient):
                    reason = "server_error" if transient else "bad_request"
                    raise CallFailed("endpoint", reason, str(error)) from None
                if await self._answers_probe(replica, error, request.role):
                    cleared[transient] = replica
                else:
                    cleared = {}
                    moves += 1
                if transient or cleared:
                    self._incidents.retried(request.role, replica.url, request.tries, error)

    def _only_last_try_left(self, state: RetryCallState) -> bool:
        replica: Replica = state.args[0]
        return state.attempt_number >= self._limits.retries - 1 or replica.outage.seconds >= self._limits.patience

    def _log_retry(self, state: RetryCallState) -> None:
        replica, request, _ = state.args
        self._incidents.retried(request.role, replica.url, request.tries, state.outcome and state.outcome.exception())

    # --- one try -----------------------------------------------------------------------------------------------------

    async def _try(self, replica: Replica, request: Request[A], stays: bool) -> A:
        """One try; overload and a request that falls back do not count. `Moved` if the replica goes out."""
        while True:
            if replica.out and not stays:
                raise Moved
            try:
                sent = await replica.limiter.acquire()
            except QueueCleared:
                await self._replicas.wait()
                continue
            counted = 0.0
            try:
                if self._quota.is_bound:
                    counted = await self._within_quota(request.tokens())
                    sent = asyncio.get_running_loop().time()
                    if replica.limiter.is_held or (replica.out and not stays):
                        self._quota.give_back(counted)
                        continue
                self._pending.check()
                with self._pending.in_flight():
                    outcome = await self._transport.post(replica.address, request)
            except Overloaded as error:
                self._quota.settle(counted, 0, 0)
                self._slow_down(replica, request, error, sent)
                continue
            except Fault as error:
                if error.status and request.fall_back(error):
                    continue
                self._note_fault(replica, request, error, sent, stays)
                raise
            except CallFailed as error:
                self._replicas.answered(replica, sent, request.role)
                if request.fall_back(error):
                    continue
                raise
            finally:
                replica.limiter.release()
            self._replicas.answered(replica, sent, request.role)
            if counted and (used := request.used(outcome)):
                self._quota.settle(counted, used, request.tokens())
            return outcome

    def _slow_down(self, replica: Replica, request: Request[Any], fault: Overloaded, sent: float) -> None:
        """Fewer requests from now on, and none for a while; adopts the limits that the server names."""
        fault.sent = sent
        self._incidents.throttled(request.role, replica.url, fault)
        rpm, tpm = fault.throttle.rpm, fault.throttle.tpm
        if self._quota.narrow(rpm, tpm):
            named = [f"{most:,} {what} a minute" for most, what in ((rpm, "requests"), (tpm, "tokens")) if most]
            fields = " and ".join(f"`{name}`" for most, name in ((rpm, "rpm"), (tpm, "tpm")) if most)
            where = f"{self._model.identity} at {replica.url}"
            self._hooks.notify(
                f"{where} allows {' and '.join(named)}, which holds from now on; {fields} in the recipe sets it"
            )
        self._replicas.overloaded(replica, fault, request.role)

    def _note_fault(self, replica: Replica, request: Request[Any], fault: Fault, sent: float, stays: bool) -> None:
        """Starts the clock of an outage; `Moved` if the replica hangs and another one can answer."""
        fault.sent = sent
        request.tries += 1
        replica.outage.begin()
        if isinstance(fault, TooSlow):
            replica.limiter.overloaded(sent, is_late=True)
            if not stays and self._replicas.is_hanging(replica, fault, request.role):
                self._incidents.retried(request.role, replica.url, request.tries, fault)
                raise Moved from None

    async def _within_quota(self, tokens: int) -> float:
        """Waits until the quota has room, and shows that it does; returns the tokens that were counted."""
        quota, name = self._quota, f"the quota of {self._model.identity}"
        if not self._is_told and quota.is_exceeded_by(tokens):
            self._is_told = True
            self._hooks.notify(
                f"{self._model.identity}: a request of about {tokens:,} tokens is more than its `tpm` allows "
                f"({quota.limits}); such requests go one at a time, with long pauses"
            )
        if quota.may_go(tokens):
            return await quota.acquire(tokens)
        self._hooks.outages[name] = f"calls are held back by {quota.limits}"
        try:
            return await quota.acquire(tokens)
        finally:
            if not quota.waiting:
                self._hooks.outages.pop(name, None)

    # --- health probes -----------------------------------------------------------------------------------------------

    async def _answers_probe(self, replica: Replica, fault: Fault, role: str) -> bool:
        """True if the replica answers other requests right after the fault; otherwise it is out, or was meanwhile."""
        async with replica.probing:
            if replica.outage.answered <= fault.sent and not replica.out:
                try:
                    await self._probe_through_overload(replica, role)
                except Fault as error:
                    replica.unanswered = error.sent
                    self._replicas.lost(replica, error, role)
            return not replica.out and replica.unanswered < fault.sent

    async def _probe_through_overload(self, replica: Replica, role: str) -> None:
        try:
            await self._probe_once(replica, role)
        except Overloaded:
            with contextlib.suppress(CallFailed, Moved):  # an answer all the same; or the replica is out by now
                await self._try(replica, self._probe(role), False)

    async def _probe_once(self, replica: Replica, role: str) -> None:
        """A health probe past the limiter, whose slots may be those of requests that hang; `Fault` without answer."""
        sent = asyncio.get_running_loop().time()
        try:
            await self._transport.post(replica.address, self._probe(role))
        except (CallFailed, InputError):
            pass
        except Fault as error:
            error.sent = sent
            raise
        self._replicas.answered(replica, sent, role)
