"""The limiter and the clock of an outage, on an event loop whose time jumps: exact, and without waiting."""

import asyncio
import itertools
import random

import pytest

from intersafe.models.http.limits import Limiter, Outage
from tests.support.jumping_time import run


class Capacity:
    """A server that takes `most` requests at once for about a second each, and turns the others down at once."""

    def __init__(self, most: int, retry_after: float = 0.0, *, varied: bool = False) -> None:
        self.most, self.retry_after, self.busy = most, retry_after, 0
        self.served, self.refused = 0, 0
        self.loads: list[int] = []
        self._random = random.Random(7) if varied else None

    async def request(self) -> bool:
        if self.busy >= self.most:
            self.refused += 1
            return False
        self.busy += 1
        self.loads.append(self.busy)
        await asyncio.sleep(self._random.expovariate(1) if self._random else 1)
        self.busy -= 1
        self.served += 1
        return True


async def call(limiter: Limiter, server: Capacity, outage: Outage) -> None:
    """One call as the endpoint makes it."""
    while True:
        started = await limiter.acquire()
        try:
            if await server.request():
                limiter.succeeded()
                outage.end(started)
                return
            limiter.overloaded(started)
            outage.begin()
            limiter.hold(outage.pause(started, server.retry_after))
        finally:
            limiter.release()


class Load:
    """Concurrent callers that call a server again and again; `over` tells how it did in a stretch of time."""

    def __init__(self, limiter: Limiter, server: Capacity, callers: int = 200) -> None:
        self.limiter, self.server = limiter, server
        outage = Outage(1e9)

        async def caller() -> None:
            while True:
                await call(limiter, server, outage)

        self._tasks = [asyncio.create_task(caller()) for _ in range(callers)]

    async def over(self, seconds: float) -> tuple[float, float]:
        """Answers as a share of what the server can do, and refusals as a share of all requests."""
        served, refused = self.server.served, self.server.refused
        await asyncio.sleep(seconds)
        served, refused = self.server.served - served, self.server.refused - refused
        return served / (seconds * self.server.most), refused / (served + refused)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert self.limiter.in_flight == 0


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("capacity", [1, 2, 5, 64])
@pytest.mark.parametrize("most", [100, 1000])
def test_the_limit_finds_the_capacity_of_the_server_and_holds_it(capacity: int, most: int, varied: bool) -> None:
    async def main() -> tuple[tuple[float, float], tuple[float, float]]:
        load = Load(Limiter(most), Capacity(capacity, varied=varied), 110)
        first = await load.over(60)
        later = await load.over(400)
        await load.stop()
        return first, later

    (early, _), (share, refused) = run(main())
    assert early > 0.75
    assert share > 0.9
    assert refused < 0.03


@pytest.mark.parametrize(("before", "after"), [(32, 64), (64, 32), (8, 80), (80, 8)])
def test_the_limit_follows_a_capacity_that_changes(before: int, after: int) -> None:
    async def main() -> tuple[float, float]:
        server = Capacity(before)
        load = Load(Limiter(256), server)
        await load.over(300)
        server.most = after
        await load.over(60)
        result = await load.over(200)
        await load.stop()
        return result

    share, refused = run(main())
    assert share > 0.9
    assert refused < 0.02


def test_a_server_that_was_out_is_soon_given_again_what_it_took_before() -> None:
    """Refusals of everything, as of a server that starts again, say nothing about its capacity."""

    async def main() -> tuple[float, int]:
        server = Capacity(64)
        load = Load(Limiter(256), server)
        await load.over(100)
        server.most = 0
        await asyncio.sleep(120)
        lowest, server.most = load.limiter.limit, 64
        await asyncio.sleep(31)  # the longest pause
        share, _ = await load.over(20)
        await load.stop()
        return share, lowest

    share, lowest = run(main())
    assert lowest < 8
    assert share > 0.85


def test_a_burst_of_rejections_lowers_the_limit_once_and_pauses_once() -> None:
    async def main() -> tuple[int, float]:
        limiter, outage = Limiter(64), Outage(1e9)
        starts = [await limiter.acquire() for _ in range(64)]
        await asyncio.sleep(1)
        pauses = []
        for started in starts:
            limiter.overloaded(started)
            outage.begin()
            pauses.append(outage.pause(started))
            limiter.release()
        return limiter.limit, max(pauses)

    limit, longest = run(main())
    assert limit == 48
    assert longest < 0.1


def test_the_limit_falls_below_what_is_in_flight_and_not_below_a_ceiling_that_is_never_reached() -> None:
    async def main() -> int:
        limiter = Limiter(1000)
        starts = [await limiter.acquire() for _ in range(8)]
        await asyncio.sleep(1)
        limiter.overloaded(starts[0])
        return limiter.limit

    assert run(main()) == 6


def test_a_ceiling_that_is_refused_twice_is_kept_to_for_a_while_and_then_tried_again() -> None:
    async def main() -> tuple[list[int], list[int]]:
        limiter = Limiter(100)
        starts = [await limiter.acquire() for _ in range(41)]
        histories: list[list[int]] = []
        for _ in range(2):
            await asyncio.sleep(1)
            limiter.overloaded(asyncio.get_running_loop().time())
            limits = []
            for _ in range(40 * (4 if not histories else 60)):
                limiter.succeeded()
                limits.append(limiter.limit)
            histories.append(limits)
        assert len(starts) == limiter.in_flight
        return histories[0], histories[1]

    first, second = run(main())
    assert 30 <= first[0] < 33
    assert first[60] >= 40, "back at once, since nothing is known but one refusal"
    assert first[-1] > 41
    assert second[250:400] == [40] * 150
    assert 80 < second[-1] < 85, "twice what is in flight: the rest would be a guess"
    for history in (first, second):
        assert all(a <= b for a, b in itertools.pairwise(history))


@pytest.mark.parametrize(("share", "least"), [(0.01, 40), (0.08, 15)])
def test_refusals_by_chance_do_not_bring_the_limit_down_to_nothing(share: float, least: int) -> None:
    async def main() -> float:
        chance, limiter, outage = random.Random(3), Limiter(64), Outage(1e9)
        server, loads = Capacity(1000), list[int]()

        async def caller() -> None:
            while True:
                server.most = 0 if chance.random() < share else 1000
                loads.append(server.busy)
                await call(limiter, server, outage)

        tasks = [asyncio.create_task(caller()) for _ in range(64)]
        await asyncio.sleep(400)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return sum(loads[len(loads) // 2 :]) / (len(loads) - len(loads) // 2)

    average = run(main())
    assert average > least


def test_successes_of_a_server_that_is_hardly_asked_raise_nothing() -> None:
    async def main() -> int:
        limiter = Limiter(100)
        starts = [await limiter.acquire() for _ in range(40)]
        await asyncio.sleep(1)
        limiter.overloaded(starts[0])
        for _ in range(38):
            limiter.release()
        for _ in range(1000):
            limiter.succeeded()
        return limiter.limit

    assert run(main()) == 30


def test_slots_are_given_first_come_first_served() -> None:
    async def main() -> list[int]:
        limiter = Limiter(2)
        order: list[int] = []

        async def one(number: int) -> None:
            await limiter.acquire()
            order.append(number)
            await asyncio.sleep(1)
            limiter.release()
            if number < 4:  # comes again in the very moment in which the slot is free
                await one(number + 10)

        await asyncio.gather(*(one(number) for number in range(6)))
        return order

    assert run(main()) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13]


def test_cancelled_callers_leak_no_slot_wherever_the_cancellation_meets_them() -> None:
    async def main() -> None:
        for tick in range(40):
            limiter = Limiter(2)

            async def caller(limiter: Limiter = limiter) -> None:
                await limiter.acquire()
                try:
                    await asyncio.sleep(1)
                finally:
                    limiter.release()

            tasks = [asyncio.create_task(caller()) for _ in range(8)]
            if tick % 2:
                limiter.hold(2.5)
            await asyncio.sleep(tick * 0.25)
            for task in tasks[tick % 3 :: 2]:
                task.cancel()
            await asyncio.wait_for(asyncio.wait(tasks), 100)
            assert limiter.in_flight == 0
            for task in tasks:  # an InvalidStateError in here would be a slot given to a cancelled caller
                assert task.cancelled() or task.exception() is None

    run(main())


def test_a_slot_that_was_handed_over_in_the_moment_of_the_cancellation_passes_to_the_next() -> None:
    async def main() -> list[str]:
        limiter, got = Limiter(1), list[str]()

        async def caller(name: str) -> None:
            await limiter.acquire()
            got.append(name)

        await limiter.acquire()
        first, second = asyncio.create_task(caller("first")), asyncio.create_task(caller("second"))
        await asyncio.sleep(0)
        limiter.release()  # gives the slot to `first`, which has not run yet
        first.cancel()
        await asyncio.wait([first, second], timeout=10)
        return got

    assert run(main()) == ["second"]


def test_cancelling_everybody_at_once_raises_nothing_but_cancellations() -> None:
    async def main() -> list[BaseException | None]:
        limiter = Limiter(1)

        async def caller() -> None:
            await limiter.acquire()
            try:
                await asyncio.sleep(1)
            finally:
                limiter.release()

        tasks = [asyncio.create_task(caller()) for _ in range(5)]
        await asyncio.sleep(0.5)
        for task in reversed(tasks):  # those who wait first: their turn is cancelled when the holder releases
            task.cancel()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    assert [type(result) for result in run(main())] == [asyncio.CancelledError] * 5


def test_a_hold_keeps_back_everybody_and_a_longer_one_wins() -> None:
    async def main() -> list[float]:
        limiter, loop = Limiter(4), asyncio.get_running_loop()
        began = loop.time()
        limiter.hold(3)
        limiter.hold(1)

        async def caller() -> float:
            started = await limiter.acquire()
            limiter.release()
            return started - began

        async def lengthen() -> None:
            await asyncio.sleep(2)
            limiter.hold(5)

        *starts, _ = await asyncio.gather(*(caller() for _ in range(6)), lengthen())
        return [start for start in starts if start is not None]

    assert all(start >= 7 for start in run(main()))


def test_pauses_double_up_to_half_a_minute_and_begin_small_after_an_answer() -> None:
    async def main() -> tuple[list[float], float]:
        outage, loop = Outage(1e9), asyncio.get_running_loop()
        outage.begin()
        pauses = []
        for _ in range(16):
            started = loop.time()
            pauses.append(outage.pause(started))
            await asyncio.sleep(1)
        outage.end(loop.time())
        return pauses, outage.pause(loop.time())

    pauses, after = run(main())
    assert pauses[0] < 0.1
    assert after < 0.1
    assert all(a < b for a, b in itertools.pairwise(pauses[:9]))
    assert all(22 <= pause <= 38 for pause in pauses[11:])


def test_no_pause_is_longer_than_the_patience_that_is_left() -> None:
    async def main() -> tuple[float, float, bool, bool]:
        outage, loop = Outage(60), asyncio.get_running_loop()
        outage.begin()
        whole = outage.pause(loop.time(), 3600)
        await asyncio.sleep(50)
        rest, sent = outage.pause(loop.time(), 3600), loop.time()
        early = outage.is_over_patience(sent)
        await asyncio.sleep(rest)
        return whole, rest, early, outage.is_over_patience(loop.time())

    assert run(main()) == (60, 10, False, True)


def test_an_outage_is_counted_from_the_first_fault_without_an_answer_since() -> None:
    async def main() -> list[float]:
        outage, seen = Outage(60), list[float]()
        loop = asyncio.get_running_loop()
        for _ in range(3):
            outage.begin()
            await asyncio.sleep(50)
            outage.begin()
            seen.append(outage.seconds)
            outage.end(loop.time())
            seen.append(outage.seconds)
        return seen

    assert run(main()) == [50, 0, 50, 0, 50, 0]


def test_one_request_that_hung_past_the_patience_is_not_yet_a_service_that_is_gone() -> None:
    async def main() -> bool:
        outage, loop = Outage(60), asyncio.get_running_loop()
        sent = loop.time()
        await asyncio.sleep(300)
        outage.begin()
        await asyncio.sleep(100)
        return outage.is_over_patience(sent)

    assert not run(main())
