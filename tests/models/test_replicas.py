"""Several replicas over real HTTP: the lost and the slow are taken out, answered for by the others, and come back."""

import asyncio
import contextlib
import logging
import re
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from intersafe.errors import CallFailed, ServiceGone
from intersafe.images.store import ImageStore, normalise
from intersafe.models.base import Hooks
from intersafe.models.http.faults import Away
from intersafe.models.http.incidents import IncidentLog
from intersafe.models.http.replicas import REMEMBERED_JOBS, Replicas
from intersafe.recipe.sections import Limits
from intersafe.run.incidents import Incidents
from tests.support.endpoints import OpenedChat, opened, picture
from tests.support.jumping_time import run
from tests.support.servers.fault_server import RESET, STALL, Answer, FaultServer, Request, error, reply

pytestmark = pytest.mark.alone

OFTEN = Limits(timeout=10, patience=30, retries=2)


async def told(said: asyncio.Queue[str], what: str) -> str:
    """The next thing said that holds these words; a busy machine may make a replica look slow in between."""
    while what not in (text := await asyncio.wait_for(said.get(), 30)):
        pass
    return text


async def ask_all(ask: OpenedChat, jobs: Sequence[str], text: str = "") -> None:
    """One call for each job, all at once."""
    replies = await asyncio.gather(*(ask(text or job, job) for job in jobs))
    assert {reply.text for reply in replies} == {"ok"}


JOBS = [f"job {i}" for i in range(60)]


def texts(server: FaultServer) -> list[str]:
    """What was asked and answered, without health probes."""
    return [request.text for request in server.served if not request.is_probe]


@pytest.mark.parametrize(
    "fault", [error(500), error(502), error(401), error(404), error(429, Retry_After="20"), RESET, STALL],
    ids=["500", "502", "401", "404", "429", "reset", "stall"],
)  # fmt: skip
def test_a_replica_that_answers_no_call_is_taken_out_and_the_others_answer_for_it(fault: Answer) -> None:
    async def main() -> None:
        async with opened(well, ill, other, limits=Limits(timeout=0.5, patience=1e6, retries=2), concurrency=12) as ask:
            await ask_all(ask, JOBS)
            tried = len(ill.asked)
            assert [text.partition(ill.url)[2].rpartition("; ")[2] for text in ask.said] == [
                "its dialogues continue on the other replicas until it is back"
            ]
            await ask_all(ask, JOBS)
            assert len(ill.asked) == tried, "no call is sent there any more"
            assert len(ask.said) == 1
            assert [state.is_in for state in ask.model.states()] == [True, False, True]

    with FaultServer() as well, FaultServer(lambda _: fault) as ill, FaultServer() as other:
        asyncio.run(main())
        assert Counter(texts(well) + texts(other)) == dict.fromkeys(JOBS, 2), "every call is answered once"
        assert min(len(texts(well)), len(texts(other))) > 20


def test_a_replica_that_dies_in_the_middle_loses_no_call_and_is_preferred_by_new_jobs_when_it_is_back() -> None:
    async def main() -> None:
        said: asyncio.Queue[str] = asyncio.Queue()
        async with opened(one, two, say=said.put_nowait, limits=Limits(retries=1)) as ask:
            await ask_all(ask, JOBS)
            homes = set(texts(two))
            under_way = asyncio.gather(*(ask(job, job) for job in JOBS * 10))
            await two.have_come(len(homes) + 3)
            await asyncio.to_thread(two.stop)
            await told(said, "its dialogues continue")
            await under_way
            await ask_all(ask, JOBS)
            before = len(two.asked)
            await asyncio.to_thread(two.start)
            await told(said, "is back after")
            await ask_all(ask, JOBS)
            assert {request.text for request in two.asked[before:]}.isdisjoint(homes), "their prefix is elsewhere now"
            for number in range(200):  # a busy machine may find it slow for a moment, and new jobs leave it alone
                new = [f"new {number} {i}" for i in range(40)]
                await ask_all(ask, new)
                if 5 < len([text for text in texts(two) if text in new]) < 35:
                    return
            pytest.fail("no new job went to it")

    with FaultServer(lambda _: reply(delay=0.01)) as one, FaultServer(lambda _: reply(delay=0.01)) as two:
        asyncio.run(main())


def test_when_all_are_out_every_call_waits_for_the_first_that_is_back() -> None:
    async def main() -> None:
        said: asyncio.Queue[str] = asyncio.Queue()
        async with opened(one, two, say=said.put_nowait, limits=OFTEN) as ask:
            await ask_all(ask, JOBS)
            for server in (one, two):
                await asyncio.to_thread(server.stop)
            tasks = asyncio.gather(*(ask(job, job) for job in JOBS))
            await told(said, "its dialogues continue")
            await told(said, "waiting up to 30 s")
            await asyncio.to_thread(one.start)
            await told(said, f"{one.url} is back after")
            assert {reply.text for reply in await tasks} == {"ok"}

    with FaultServer() as one, FaultServer() as two:
        asyncio.run(main())
        assert len(texts(one)) + len(texts(two)) == 2 * len(JOBS)


@pytest.mark.parametrize("faults", [(error(401), error(401)), (error(502), STALL), (error(429), error(404))])
def test_patience_counts_when_all_are_out_and_ends_with_all_of_them_named(faults: tuple[Answer, Answer]) -> None:
    async def main() -> None:
        async with opened(one, two, limits=Limits(timeout=0.5, patience=0.8, retries=2)) as ask:
            results = await asyncio.gather(*(ask(job, job) for job in JOBS), return_exceptions=True)
            assert {type(result) for result in results} == {ServiceGone}
            assert f"{one.url}, {two.url} stayed away" in str(results[0])
            assert len(ask.said) in (1, 2), "overload is not told of so soon"
            with pytest.raises(ServiceGone):
                await ask("one more")

    with FaultServer(lambda _: faults[0]) as one, FaultServer(lambda _: faults[1]) as two:
        asyncio.run(main())
        assert len(one.asked) + len(two.asked) < 4 * len(JOBS)


def test_a_replica_that_goes_and_comes_back_is_logged_and_counted_for_the_role_that_lost_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> dict[str, Incidents]:
        said: asyncio.Queue[str] = asyncio.Queue()
        async with opened(one, two, say=said.put_nowait, limits=OFTEN) as ask:
            await asyncio.to_thread(two.stop)
            await asyncio.gather(*(ask(job, job, role="attacker") for job in JOBS))
            await told(said, "its dialogues continue")
            await asyncio.to_thread(two.start)
            await told(said, "is back after")
            return ask.hooks.incidents

    caplog.set_level(logging.INFO, "intersafe.models.http")
    with FaultServer() as one, FaultServer() as two:
        counts = asyncio.run(main())
        url = two.url
    assert counts == {"attacker": Incidents(replicas_out=1)}
    out, back = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "intersafe.models.http"]
    assert out[0] == back[0] == "WARNING"
    assert out[1].startswith(f"attacker: openai:some/model: replica {url} is taken out (no connection")
    assert re.fullmatch(rf"openai:some/model: replica {url} is back after \d+ s", back[1])


def test_when_every_replica_is_lost_the_outage_is_counted_once_beside_the_replicas(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> dict[str, Incidents]:
        async with opened(one, two, limits=Limits(timeout=0.5, patience=0.8, retries=2)) as ask:
            results = await asyncio.gather(*(ask(job, job) for job in JOBS), return_exceptions=True)
            assert {type(result) for result in results} == {ServiceGone}
            return ask.hooks.incidents

    caplog.set_level(logging.WARNING, "intersafe.models.http")
    with FaultServer(lambda _: error(401)) as one, FaultServer(lambda _: error(404)) as two:
        counts = asyncio.run(main())
    assert counts == {"judge": Incidents(outages=1, replicas_out=2)}
    assert len([r for r in caplog.records if "is away" in r.getMessage()]) == 1


def test_patience_does_not_count_while_another_replica_answers() -> None:
    """Every call is answered (`ask_all`), none ends with `ServiceGone`."""

    async def main() -> None:
        async with opened(well, ill, limits=Limits(patience=0, retries=2)) as ask:
            for _ in range(30):
                await ask_all(ask, JOBS[:10])

    with FaultServer(lambda _: reply(delay=0.02)) as well, FaultServer(lambda _: error(502)) as ill:
        asyncio.run(main())


@pytest.mark.parametrize("fault", [error(403, "flagged"), error(500), RESET])
def test_a_poisoned_call_takes_no_replica_out(fault: Answer) -> None:
    async def main() -> None:
        async with opened(one, two, limits=Limits(retries=3)) as ask:
            with pytest.raises(CallFailed):
                await ask("poison")
            assert ask.said == []
            assert [state.is_in for state in ask.model.states()] == [True, True]

    def script(request: Request) -> Answer:
        return fault if request.text == "poison" else reply()

    with FaultServer(script) as one, FaultServer(script) as two:
        asyncio.run(main())
        assert len(one.asked) + len(two.asked) in (2, 3)


def test_a_call_that_makes_one_replica_after_the_other_hang_fails_in_the_end() -> None:
    async def main() -> None:
        async with opened(one, two, limits=Limits(timeout=0.3, retries=3)) as ask:
            with pytest.raises(CallFailed, match="no answer within"):
                await ask("poison")
            await ask_all(ask, JOBS)

    def script(request: Request) -> Answer:
        return STALL if request.text == "poison" else reply()

    with FaultServer(script) as one, FaultServer(script) as two:
        asyncio.run(main())
        assert len([request for request in one.asked + two.asked if request.text == "poison"]) == 2 + 3


def test_a_slow_replica_is_taken_out_until_it_is_quick_again() -> None:
    pause = [0.02]

    async def main() -> None:
        said: asyncio.Queue[str] = asyncio.Queue()
        async with opened(well, other, slow, say=said.put_nowait, concurrency=48) as ask:
            await ask_all(ask, JOBS)
            pause[0] = 0.5
            rounds = 0
            while said.empty():
                rounds += 1
                assert rounds < 12
                await ask_all(ask, [f"round {rounds} {job}" for job in JOBS], "slow?")
            assert re.search(
                r"it takes [\d.]+ s for an answer and the others [\d.]+ s; its dialogues continue", said.get_nowait()
            )
            count = len(slow.asked)
            await ask_all(ask, JOBS)
            await ask_all(ask, [f"new {job}" for job in JOBS])
            assert len(slow.asked) == count
            pause[0] = 0.0
            await told(said, "is back after")
            await ask_all(ask, [f"newer {job}" for job in JOBS])
            assert len(slow.asked) > count

    with FaultServer() as well, FaultServer() as other, FaultServer(lambda _: reply(delay=pause[0])) as slow:
        asyncio.run(main())


def test_a_slow_replica_is_better_than_none() -> None:
    """Every call is answered (`ask_all`), although only the slow replica is left."""

    async def main() -> None:
        said: asyncio.Queue[str] = asyncio.Queue()
        async with opened(well, slow, say=said.put_nowait, concurrency=60, limits=OFTEN) as ask:
            while said.empty():
                await ask_all(ask, JOBS)
            await told(said, "for an answer and the others")
            await asyncio.to_thread(well.stop)
            await ask_all(ask, JOBS)

    with FaultServer() as well, FaultServer(lambda _: reply(delay=0.4)) as slow:
        asyncio.run(main())


def test_those_that_are_in_share_the_whole_concurrency() -> None:
    async def main() -> None:
        said: asyncio.Queue[str] = asyncio.Queue()
        async with opened(one, two, say=said.put_nowait, concurrency=10, limits=OFTEN) as ask:
            await ask_all(ask, JOBS)
            assert (one.most_in_flight, two.most_in_flight) == (5, 5)
            await asyncio.to_thread(two.stop)
            await ask_all(ask, JOBS)
            assert one.most_in_flight == 10
            assert ask.model.states()[0].limit == 10
            await asyncio.to_thread(two.start)
            await told(said, "its dialogues continue")
            await told(said, "is back")
            assert [state.limit for state in ask.model.states()] == [5, 5]

    with FaultServer(lambda _: reply(delay=0.02)) as one, FaultServer(lambda _: reply(delay=0.02)) as two:
        asyncio.run(main())


def test_calls_that_wait_for_a_slot_of_a_lost_replica_do_not_wait_for_its_hanging_requests() -> None:
    """Two slots there, taken by requests that hang: the third one would otherwise hang too, and a hundred after it."""

    async def main() -> None:
        async with opened(well, ill, concurrency=4, limits=Limits(timeout=1, retries=2)) as ask:
            await ask_all(ask, JOBS)

    with FaultServer() as well, FaultServer(lambda _: STALL) as ill:
        asyncio.run(main())
        assert len(ill.asked) <= 4
        assert len(texts(well)) == len(JOBS)


def test_images_known_by_uuid_to_a_lost_replica_travel_again_to_the_next(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    ref = store.put(normalise(picture(20, 30), at="test"))

    async def main() -> None:
        async with opened(one, two, images=store, send_images="uuid", limits=OFTEN) as ask:
            for _ in range(2):
                await ask("look", "job", images=[ref])
            home = one if one.served else two
            await asyncio.to_thread(home.stop)
            for _ in range(2):
                await ask("look", "job", images=[ref])

    with FaultServer() as one, FaultServer() as two:
        asyncio.run(main())
        for server in (one, two):
            parts = [request.body["messages"][1]["content"][0] for request in server.served]
            assert [part["image_url"] is not None for part in parts] == [True, False]


def group_of(*urls: str) -> Replicas:
    """Replicas whose health probes are all answered."""

    async def probe(*_: object) -> None:
        pass

    return Replicas(urls, "", 8, 600.0, probe, incidents=IncidentLog("m", Hooks()), remedy=str)


@pytest.mark.parametrize("told", [False, True])
def test_a_record_is_marked_as_shown_only_if_the_user_is_told(told: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        group = group_of("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
        one, _ = group.all
        one.told = told
        group.lost(one, Away("no connection"), "judge")
        await group.aclose()

    run(main())
    (record,) = [record for record in caplog.records if "is taken out" in record.getMessage()]
    assert getattr(record, "shown", False) is not told


def test_the_replica_of_a_job_is_remembered_within_bounds() -> None:
    """Jobs that began while one replica was out stay where they are; those that are forgotten go by hash again."""
    jobs = [f"job {i}" for i in range(3 * REMEMBERED_JOBS)]

    async def main() -> None:
        group = group_of("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
        one, two = group.all
        by_hash = [group.replica_for(job) for job in jobs]
        assert by_hash == [group.replica_for(job) for job in jobs]
        group.lost(one, Away("no connection"), "judge")
        assert {group.replica_for(job) for job in jobs} == {two}
        await asyncio.sleep(60)
        assert not one.out
        assert {group.replica_for(job) for job in jobs[-REMEMBERED_JOBS:]} == {two}
        forgotten = jobs[:REMEMBERED_JOBS]
        assert [group.replica_for(job) for job in forgotten] == by_hash[:REMEMBERED_JOBS]
        await group.aclose()

    run(main())


def test_a_replica_may_be_slow_and_quick_again_for_days() -> None:
    async def main() -> None:
        loop, group = asyncio.get_running_loop(), group_of("http://127.0.0.1:1", "http://127.0.0.1:2")
        quick, slow = group.all
        for _ in range(1100):
            for _ in range(16):
                group.answered(quick, loop.time() - 0.1, "judge")
                group.answered(slow, loop.time() - 9.0, "judge")
            assert slow.out
            await asyncio.sleep(60)
            assert not slow.out
        await group.aclose()

    run(main())


def test_images_that_a_replica_does_not_read_block_no_call_to_the_other(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    ref = store.put(normalise(picture(900, 900, noise=True), at="test"))

    async def main() -> None:
        async with opened(deaf, well, images=store, limits=Limits(timeout=1000), concurrency=200) as ask:  # type: ignore[arg-type]
            group = group_of(deaf.url, well.url)
            at_deaf = [job for job in JOBS if group.replica_for(job) is group.all[0]]
            at_well = [job for job in JOBS if job not in at_deaf]
            calls = [asyncio.create_task(ask(job, job, images=[ref, ref])) for job in at_deaf[:9]]
            while len(deaf.arrived) < 8:
                deaf.accept()
                await asyncio.sleep(0.001)
            try:
                await asyncio.wait_for(ask_all(ask, at_well), 10)
            finally:
                deaf.close()
                assert {reply.text for reply in await asyncio.gather(*calls)} == {"ok"}

    deaf = Deaf()
    with FaultServer() as well:
        asyncio.run(main())


class Deaf:
    """A server that takes connections and reads nothing."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._socket.setblocking(False)
        self.arrived: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"

    def accept(self) -> None:
        """Accepts a connection if there is one."""
        with contextlib.suppress(BlockingIOError):
            self.arrived.append(self._socket.accept()[0])

    def close(self) -> None:
        """Hangs up on all."""
        for one in (*self.arrived, self._socket):
            one.close()
