"""The thread that owns an engine, with a fake library: what comes in together, what is given up, how it ends."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from intersafe.engines.metrics import Sample
from intersafe.errors import BudgetReached, CallFailed, InputError, JobEnded, ServiceGone
from intersafe.images.store import ImageStore
from intersafe.models.base import Hooks, Reply, Sampling
from intersafe.models.local.thread import EngineCall, EngineThread
from intersafe.records import Message


def asked(text: str) -> EngineCall:
    return EngineCall((Message("user", text),), Sampling(0.0, 1.0, 9, 1), None, {}, ImageStore(Path("nowhere")))


async def until(is_so: Callable[[], bool]) -> None:
    """Returns once that is so."""
    for _ in range(1_000_000):
        if is_so():
            return
        await asyncio.sleep(0)
    pytest.fail("it never was")


class Paper:
    """Answers with the text that it is asked, after some steps; `bad` is refused, `stuck` never ends."""

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps
        self.held: dict[int, tuple[str, int]] = {}
        self.most = 0
        self.dropped: list[int] = []
        self.alive, self.closed, self.dead = True, False, threading.Event()
        self.thread = threading.current_thread()

    @property
    def is_busy(self) -> bool:
        return bool(self.held)

    def add(self, number: int, call: EngineCall) -> None:
        assert threading.current_thread() is self.thread
        text = call.messages[0].text
        if text == "bad":
            raise CallFailed("engine", "bad_request", "no such thing")
        self.held[number] = text, self.steps
        self.most = max(self.most, len(self.held))

    def step(self) -> list[tuple[int, Reply | JobEnded]]:
        assert threading.current_thread() is self.thread
        if not self.alive:
            self.dead.wait()  # as vLLM's client waits for output that never comes
        if any(text == "crash" for text, _ in self.held.values()):
            raise RuntimeError("the paper burns")
        time.sleep(0.002)
        self.held = {n: (text, left - 1) for n, (text, left) in self.held.items()}
        ended = [n for n, (text, left) in self.held.items() if left <= 0 and text != "stuck"]
        return [(n, Reply(self.held.pop(n)[0])) for n in ended]

    def drop(self, number: int) -> None:
        self.dropped.append(number)
        self.held.pop(number, None)

    def sample(self) -> Sample | None:
        return Sample(running=len(self.held))

    def is_alive(self) -> bool:
        return self.alive

    def close(self) -> None:
        self.closed = True


def opened(
    made: list[Paper],
    *,
    steps: int = 1,
    most: int = 100,
    may_send: Callable[[], None] | None = None,
) -> EngineThread:
    def load() -> Paper:
        made.append(Paper(steps))
        return made[0]

    return EngineThread("paper", load, most, Hooks(may_send=may_send))


def test_many_calls_are_worked_on_together_and_a_bad_one_fails_alone() -> None:
    made: list[Paper] = []

    async def main() -> None:
        thread = opened(made, steps=5, most=40)
        texts = [f"call {number}" for number in range(100)]
        calls = [thread.answer(asked(text)) for text in (*texts, "bad")]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [reply.text for reply in found[:-1] if isinstance(reply, Reply)] == texts
        assert isinstance(found[-1], CallFailed)
        assert thread.sample() is not None
        await thread.aclose()

    asyncio.run(main())
    assert made[0].most == 40
    assert made[0].closed


def test_a_call_that_is_given_up_is_withdrawn_and_frees_its_slot() -> None:
    made: list[Paper] = []

    async def main() -> None:
        thread = opened(made, most=1)
        stuck = asyncio.create_task(thread.answer(asked("stuck")))
        await until(lambda: bool(made and made[0].held))
        behind = asyncio.create_task(thread.answer(asked("behind")))
        stuck.cancel()
        assert (await behind).text == "behind"
        with pytest.raises(asyncio.CancelledError):
            await stuck
        await thread.aclose()

    asyncio.run(main())
    assert made[0].dropped == [1]
    assert not made[0].held


@pytest.mark.parametrize("how", ["raises", "is gone"])
def test_an_engine_that_dies_ends_every_call_and_the_closing_does_not_hang(how: str) -> None:
    made: list[Paper] = []

    async def main() -> None:
        thread = opened(made)
        calls = [asyncio.create_task(thread.answer(asked("stuck"))) for _ in range(5)]
        await until(lambda: bool(made) and len(made[0].held) == 5)
        if how == "raises":
            calls.append(asyncio.create_task(thread.answer(asked("crash"))))
        else:
            made[0].alive = False
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, ServiceGone) for error in found)
        assert "nothing is lost" in str(found[0])
        with pytest.raises(ServiceGone):
            await thread.answer(asked("too late"))
        await asyncio.wait_for(thread.aclose(), 10)

    asyncio.run(main())
    made[0].dead.set()


def test_one_that_dies_while_it_is_closed_does_not_hang_either() -> None:
    made: list[Paper] = []

    async def main() -> None:
        thread = opened(made)
        call = asyncio.create_task(thread.answer(asked("stuck")))
        await until(lambda: bool(made and made[0].held))
        made[0].alive = False
        await asyncio.wait_for(thread.aclose(), 10)
        with pytest.raises(ServiceGone):
            await call

    asyncio.run(main())
    made[0].dead.set()


def test_closing_does_not_wait_for_what_loads_and_nothing_more_is_loaded() -> None:
    begun, go, loads = threading.Event(), threading.Event(), list[str]()

    def load(name: str) -> Callable[[], Paper]:
        def slowly() -> Paper:
            loads.append(name)
            begun.set()
            go.wait()
            return Paper()

        return slowly

    async def main() -> None:
        hooks = Hooks()
        first, second = (EngineThread(name, load(name), 9, hooks) for name in ("one", "two"))
        await asyncio.to_thread(begun.wait)
        assert set(hooks.outages) == {"one", "two"}
        await asyncio.wait_for(asyncio.gather(first.aclose(), second.aclose()), 10)
        assert not hooks.outages

    asyncio.run(main())
    go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("engine"):
            thread.join(10)
    assert len(loads) == 1


def test_an_engine_that_cannot_be_loaded_is_an_input_error() -> None:
    def load() -> Paper:
        raise InputError("no such model", remedy="correct its name")

    async def main() -> None:
        hooks = Hooks()
        thread = EngineThread("paper", load, 9, hooks)
        for _ in range(2):
            with pytest.raises(InputError, match="correct its name"):
                await thread.answer(asked("hello"))
        assert not hooks.outages
        await thread.aclose()

    asyncio.run(main())


def test_at_a_limit_what_waits_ends_and_what_is_under_way_does_too() -> None:
    made: list[Paper] = []
    is_over = threading.Event()

    def may_send() -> None:
        if is_over.is_set():
            raise BudgetReached("all is spent")

    async def main() -> None:
        thread = opened(made, steps=200, most=2, may_send=may_send)
        calls = [asyncio.create_task(thread.answer(asked(f"call {number}"))) for number in range(6)]
        await until(lambda: bool(made) and len(made[0].held) == 2)
        is_over.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(one, Reply) for one in found] == [True, True, False, False, False, False]
        assert all(isinstance(one, BudgetReached) for one in found[2:])
        await thread.aclose()

    asyncio.run(main())
