"""The replicas of one model: which of them answers a job, which are out, and how they come back.

A job stays where its prefix is cached. New jobs are spread over the replicas that are in, by rendezvous hash, so that
the loss of one moves no job of the others. A replica that answers no call, or far slower than the others, is taken out
and gets health probes until it answers again. The last one that is in is never out for overload or slowness. While none
is in, all calls wait, and the patience counts from the moment since which none has answered.
"""

import asyncio
import contextlib
import hashlib
import math
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from intersafe.errors import ServiceGone
from intersafe.models.http.faults import Fault, Overloaded
from intersafe.models.http.incidents import IncidentLog
from intersafe.models.http.limits import LONGEST_PAUSE, Limiter, Outage
from intersafe.models.http.transport import Address

LONG_PAUSE = 5.0
"""Seconds of overload from which on the user is told, and other replicas take over."""
REMEMBERED_JOBS = 4096
"""Jobs whose replica is remembered; fewer dialogues grow at once."""
ANSWERS = 16
"""Answers over which the speed of a replica is averaged."""
SLOW, SLOW_BY = 4.0, 0.2
"""A replica is slow if it takes more than `SLOW` times the median of the others, and `SLOW_BY` seconds more."""
SLOW_NOTICES = 3
"""How often the user is told about the same slow replica."""
QUICK = 2.0
"""A slow replica is quick again if a health probe takes at most that many times as long as on another one."""


@dataclass(eq=False)
class Replica:
    """One URL of a model: how many calls it takes, and whether it answers."""

    address: Address
    limiter: Limiter
    outage: Outage
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)
    unanswered: float = float("-inf")
    """When the latest health probe without an answer was sent."""
    out: bool = False
    is_slow: bool = False
    """True if it is out for its slowness alone."""
    out_since: float = 0.0
    """When it was taken out, by the event loop's clock."""
    told: bool = False
    """True if the user was told that it is away."""
    seconds: float = 0.0
    """Moving mean of an answer's time, queueing included. The mix of roles is the same on all, so it compares."""
    answers: int = 0
    """Answers in that mean."""
    slow_times: int = 0
    return_task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The base URL, as in the recipe."""
        return self.address.url


Probe = Callable[[Replica, str], Awaitable[None]]
"""Sends a health probe past the limiter on behalf of a role; raises `Fault` without an answer."""


class Replicas:
    """One or several replicas of a model."""

    def __init__(
        self,
        urls: Sequence[str],
        route: str,
        concurrency: int,
        patience: float,
        probe: Probe,
        *,
        incidents: IncidentLog,
        remedy: Callable[[Fault], str],
    ) -> None:
        """`concurrency`: calls in flight at all of them together; `patience` is in seconds.

        The user is told what `remedy` says about a fault.
        """
        self._concurrency, self._patience, self._probe = concurrency, patience, probe
        self._incidents, self._name, self._hooks, self._remedy = incidents, incidents.name, incidents.hooks, remedy
        most = math.ceil(concurrency / len(urls))
        self.all = [Replica(Address.of(url, route), Limiter(most), Outage(patience)) for url in urls]
        self._assigned: dict[str, Replica] = {}
        self._is_any_in = asyncio.Event()
        self._is_any_in.set()
        self._away_since: float | None = None
        self._gone = ""

    def __len__(self) -> int:
        return len(self.all)

    async def aclose(self) -> None:
        """Stops the health probes."""
        tasks = [replica.return_task for replica in self.all if replica.return_task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- who answers -------------------------------------------------------------------------------------------------

    def replica_for(self, job: str) -> Replica | None:
        """The replica of a job: the one that it was on, or else by rendezvous hash; None while none is in."""
        if self._gone:
            return None
        if len(self.all) == 1:
            return None if self.all[0].out else self.all[0]
        replica = self._assigned.pop(job, None)
        if replica is None or replica.out:
            ins = [replica for replica in self.all if not replica.out]
            if not ins:
                return None
            replica = max(ins, key=lambda r: hashlib.blake2b(f"{r.url} {job}".encode(), digest_size=8).digest())
        self._assigned[job] = replica
        if len(self._assigned) > REMEMBERED_JOBS:
            del self._assigned[next(iter(self._assigned))]
        return replica

    async def wait(self) -> None:
        """Returns when one is in; `ServiceGone` when the patience is used up."""
        await self._is_any_in.wait()
        if self._gone:
            raise ServiceGone(self._gone)

    def _others(self, replica: Replica) -> list[Replica]:
        return [other for other in self.all if other is not replica and not other.out]

    # --- what came of a request --------------------------------------------------------------------------------------

    def answered(self, replica: Replica, sent: float, role: str) -> None:
        """A request of that role, sent at `sent`, was answered, even if by a refusal."""
        replica.limiter.succeeded()
        lasted = replica.outage.end(sent)
        if replica.told and not replica.out:
            self._tell_back(replica, lasted, logged=self._end_outage(shown=True))
        if len(self.all) > 1:
            replica.answers += 1
            took = asyncio.get_running_loop().time() - sent
            replica.seconds += (took - replica.seconds) / min(replica.answers, ANSWERS)
            if replica.answers % ANSWERS == 0 and not replica.out:
                self._judge_speed(replica, role)

    def _judge_speed(self, replica: Replica, role: str) -> None:
        others = [other.seconds for other in self._others(replica) if other.answers >= ANSWERS]
        usual = statistics.median(others) if others else math.inf
        if replica.seconds > max(SLOW * usual, usual + SLOW_BY):
            took = f"it takes {replica.seconds:.1f} s for an answer and the others {usual:.1f} s"
            pause = min(LONGEST_PAUSE, 2.0 ** min(replica.slow_times, 16))
            self._take_out(replica, took, pause, role, is_slow=True)
            replica.slow_times += 1

    def is_hanging(self, replica: Replica, fault: Fault, role: str) -> bool:
        """Takes the replica out if it has answered nothing that was sent after this request, and another one is in."""
        is_hanging = replica.outage.answered <= fault.sent and bool(self._others(replica))
        if is_hanging:
            self.lost(replica, fault, role)
        return is_hanging

    def overloaded(self, replica: Replica, fault: Overloaded, role: str) -> None:
        """Holds new calls; others take over where that lasts long. `ServiceGone` when the patience is used up."""
        outage = replica.outage
        replica.limiter.overloaded(fault.sent)
        outage.begin()
        self._check_patience(fault)
        pause = outage.pause(fault.sent, fault.pause, self._patience_left())
        replica.limiter.hold(pause)
        if outage.seconds + pause < LONG_PAUSE or replica.out:
            return
        if self._others(replica):
            self._take_out(replica, self._cause(fault), pause, role)
        else:
            logged = self._begin_outage(self._cause(fault), role, shown=not replica.told)
            if not replica.told:
                self._tell_away(replica, self._cause(fault), logged=logged)

    def lost(self, replica: Replica, fault: Fault, role: str) -> None:
        """Takes a replica out that answers no call."""
        replica.outage.begin()
        if not replica.out:
            pause = replica.outage.pause(fault.sent, left=self._patience_left())
            self._take_out(replica, self._cause(fault), pause, role)

    def _cause(self, fault: Fault) -> str:
        return f"{fault}; {self._remedy(fault)}"

    # --- out and in --------------------------------------------------------------------------------------------------

    def _take_out(self, replica: Replica, why: str, pause: float, role: str, *, is_slow: bool = False) -> None:
        loop = asyncio.get_running_loop()
        replica.out, replica.is_slow, replica.out_since = True, is_slow, loop.time()
        shown, logged = not replica.told and (replica.slow_times < SLOW_NOTICES or not is_slow), len(self.all) > 1
        if logged:
            self._incidents.taken_out(role, replica.url, why, shown=shown)
        if not self._others(replica):
            for other in self.all:
                if other.is_slow and other is not replica:  # better than none
                    self._bring_in(other, loop.time() - other.out_since)
        if not self._others(replica):
            self._is_any_in.clear()
            logged = self._begin_outage(why, role, shown=shown) or logged
        self._share_concurrency()
        if shown:
            self._tell_away(replica, why, logged=logged)
        replica.limiter.clear_queue()
        if replica.return_task:
            replica.return_task.cancel()
        replica.return_task = loop.create_task(self._probe_until_back(replica, pause, role))

    def _bring_in(self, replica: Replica, lasted: float) -> None:
        """`lasted`: seconds for which it was away, as the user is told."""
        shown, logged = replica.told, len(self.all) > 1
        if logged:
            out = asyncio.get_running_loop().time() - replica.out_since
            self._incidents.brought_in(replica.url, out, shown=shown)
        replica.out = replica.is_slow = False
        replica.answers, replica.seconds = 0, 0.0
        replica.limiter.resume()
        self._share_concurrency()
        self._is_any_in.set()
        logged = self._end_outage(shown=shown) or logged
        if shown:
            self._tell_back(replica, lasted, logged=logged)

    def _share_concurrency(self) -> None:
        """Gives the concurrency of the lost replicas to those that are in."""
        ins = [replica for replica in self.all if not replica.out]
        for replica in ins:
            replica.limiter.resize(math.ceil(self._concurrency / len(ins)))

    async def _probe_until_back(self, replica: Replica, pause: float, role: str) -> None:
        loop = asyncio.get_running_loop()
        since = loop.time() - replica.outage.seconds
        while True:
            await asyncio.sleep(pause)
            if not replica.out:
                return
            began = loop.time()
            try:
                is_back = await self._is_back(replica, role)
            except Fault as fault:
                replica.unanswered, replica.is_slow = fault.sent, False
                replica.outage.begin()
                try:
                    self._check_patience(fault)
                except ServiceGone:
                    return
                pause = replica.outage.pause(fault.sent, fault.pause, self._patience_left())
                continue
            if is_back:
                break
            # A health probe may be a picture, drawn on two servers: the longer it takes the rarer it is sent.
            pause = max(min(LONGEST_PAUSE, 2 * max(pause, 1.0)), 4 * (loop.time() - began))
        self._bring_in(replica, loop.time() - since)

    async def _is_back(self, replica: Replica, role: str) -> bool:
        """True if it answers, and one that was slow is quick; `Fault` if it does not answer."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._probe(replica, role)
        took = loop.time() - began
        if not replica.is_slow or not (others := self._others(replica)):
            return True
        began = loop.time()
        with contextlib.suppress(Fault):
            await self._probe(others[0], role)
        return took <= max(QUICK * (loop.time() - began), SLOW_BY)

    # --- patience ----------------------------------------------------------------------------------------------------

    def _patience_left(self) -> float:
        """Seconds that all may still be away; a pause for one that is away alone is bounded too."""
        away = self._seconds_away()
        return max(0.0, self._patience - away) if away else max(LONGEST_PAUSE, self._patience)

    def _seconds_away(self) -> float:
        return min(replica.outage.seconds for replica in self.all)

    def _check_patience(self, fault: Fault) -> None:
        """`ServiceGone` if none of them answered a request that was sent after all had gone away."""
        if all(other.outage.is_over_patience(fault.sent) for other in self.all):
            where = f"{self._name} at {', '.join(other.url for other in self.all)}"
            self._gone = (
                f"{where} stayed away for {self._seconds_away():.0f} s ({fault}); "
                f"{self._remedy(fault)}, then run the same command again: nothing is lost"
            )
            self._is_any_in.set()
            for other in self.all:
                other.limiter.clear_queue()
            raise ServiceGone(self._gone)

    # --- what the user is told ---------------------------------------------------------------------------------------

    def _begin_outage(self, why: str, role: str, *, shown: bool) -> bool:
        """Shows that no replica answers, until `_end_outage`; `why` is the first cause. True if it begins now.

        `shown`: the user is told so in other words.
        """
        if self._away_since is not None:
            return False
        self._away_since = asyncio.get_running_loop().time()
        self._hooks.outages[self._name] = why
        self._incidents.outage_began(role, why, shown=shown)
        return True

    def _end_outage(self, *, shown: bool) -> bool:
        """True if there was one; `shown`: the user is told of its end in other words."""
        if self._away_since is None:
            return False
        self._hooks.outages.pop(self._name, None)
        self._incidents.outage_ended(asyncio.get_running_loop().time() - self._away_since, shown=shown)
        self._away_since = None
        return True

    def _tell_away(self, replica: Replica, why: str, *, logged: bool) -> None:
        replica.told = True
        if self._others(replica):
            then = "its dialogues continue on the other replicas until it is back"
        else:
            then = f"waiting up to {self._patience:.0f} s, Ctrl-C stops and keeps everything"
        self._hooks.tell(f"{self._name} at {replica.url}: {why}; {then}", logged=logged)

    def _tell_back(self, replica: Replica, lasted: float, *, logged: bool) -> None:
        replica.told = False
        self._hooks.tell(f"{self._name} at {replica.url} is back after {lasted:.0f} s", logged=logged)
