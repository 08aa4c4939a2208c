"""The cost of a call on our side: CPU time and share of a server's ceiling, as ratios to a bare aiohttp loop.

    python bench/client.py [--calls 4000] [--rounds 5] [--profile]

The server is a process of its own on another core (`bench/server.py`). All paths take turns in one run, so a load on
the machine affects all of them; the tables show medians. The rows of the openai SDK and of uvloop need the extra
`bench`.
"""

import argparse
import asyncio
import contextlib
import cProfile
import functools
import importlib.metadata
import importlib.util
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
from server import LATENCY, SLOTS, serving
from work import CORES, demo_recipe

from intersafe.generation.generate import generate_dialogues
from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Hooks, Sampling
from intersafe.models.cast import JobCast, SharedCast
from intersafe.models.http.chat import EndpointModel
from intersafe.recipe.load import load_recipe
from intersafe.recipe.sections import Cast, Limits, Member
from intersafe.records import Job, Message, Seed
from intersafe.run.journal import Journal
from intersafe.storage.bundled import bundled
from intersafe.storage.jsonl import GroupWriter
from intersafe.templates.load import load_prompts

AT_ONCE = (64, 96)
MESSAGES = tuple(
    Message("user" if i % 2 else "system" if i == 0 else "assistant", f"{i} " + "word " * 204) for i in range(6)
)

Ask = Callable[[int], Awaitable[object]]
"""One call, given its number."""
Path_ = Callable[[str], contextlib.AbstractAsyncContextManager[Ask]]
"""A way to make calls to the server at a base URL."""


# --- the paths -------------------------------------------------------------------------------------------------------


def _body(number: int) -> dict[str, Any]:
    messages = [{"role": message.role, "content": message.text} for message in MESSAGES]
    return {"model": "fixed", "messages": messages, "temperature": 0.7, "max_tokens": 512, "seed": number}


@contextlib.asynccontextmanager
async def bare(url: str) -> AsyncIterator[Ask]:
    """The minimum: encode, POST, decode."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int) -> object:
            body = msgspec.json.encode(_body(number))
            async with session.post(f"{url}/chat/completions", data=body) as response:
                return msgspec.json.decode(await response.read())["choices"][0]["message"]["content"]

        yield ask


@contextlib.asynccontextmanager
async def endpoint(url: str) -> AsyncIterator[Ask]:
    """`EndpointModel.answer`: limiter, retries, typed decoding."""
    model = EndpointModel(Member(model=f"openai:fixed@{url}"), Limits(), ImageStore(Path("none")), Hooks(print))
    try:
        yield lambda number: model.answer(
            Call("judge", "", MESSAGES, Sampling(0.7, 1.0, 512, number), None, f"job-{number}", 0)
        )
    finally:
        await model.aclose()


@contextlib.asynccontextmanager
async def cast(url: str) -> AsyncIterator[Ask]:
    """`JobCast.ask`: the same with the call's key, the journal and its fsync."""
    member = Member(model=f"openai:fixed@{url}")
    members = Cast(attacker=member, victims=(member,), judge=member)
    model = EndpointModel(member, Limits(), ImageStore(Path("none")), Hooks(print))
    prompts = load_prompts(bundled("prompts"), ["decomposition"])
    seed = Seed("s", "query", "privacy", "bench", "CC0-1.0")
    with tempfile.TemporaryDirectory() as folder:
        writer = GroupWriter(Path(folder))
        models = dict.fromkeys(members.members, model)
        shared = SharedCast(cast=members, models=models, prompts=prompts, journal=Journal(writer))

        async def ask(number: int) -> object:
            job = Job(number, f"job-{number}", seed, "decomposition", 0, 0, 4, 0, number)
            return await JobCast(shared, job).ask("judge", "judge/turn", MESSAGES)

        try:
            yield ask
        finally:
            await model.aclose()
            await writer.close()


@contextlib.asynccontextmanager
async def openai_post(url: str) -> AsyncIterator[Ask]:
    """The openai SDK's `client.post`, without its typed layer."""
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=openai.DefaultAioHttpClient())
    async with client:
        yield lambda number: client.post("/chat/completions", body=_body(number), cast_to=object)


@contextlib.asynccontextmanager
async def openai_create(url: str) -> AsyncIterator[Ask]:
    """The openai SDK as its manual shows it, over aiohttp."""
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=openai.DefaultAioHttpClient())
    async with client:
        create: Any = client.chat.completions.create
        yield lambda number: create(**_body(number))


BARE = "bare aiohttp loop"
PATHS: dict[str, Path_] = {BARE: bare, "`EndpointModel.answer`": endpoint, "`JobCast.ask`": cast}
SDK: dict[str, Path_] = {"openai `client.post`": openai_post, "openai `chat.completions.create`": openai_create}
GENERATE = "`generate`, everything"


# --- measuring -------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """The cost of one round of one path; CPU and wall time in seconds."""

    calls: int
    cpu: float
    wall: float

    @property
    def ms(self) -> float:
        """CPU milliseconds per call."""
        return self.cpu / self.calls * 1000

    @property
    def rate(self) -> float:
        """Calls per second."""
        return self.calls / self.wall


async def _many(ask: Ask, calls: int, at_once: int) -> None:
    numbers = iter(range(calls))

    async def worker() -> None:
        for number in numbers:
            await ask(number)

    await asyncio.gather(*(worker() for _ in range(at_once)))


def measure(path: Path_, url: str, calls: int, at_once: int = SLOTS) -> Cost:
    """One round. Connections are open and the code is warm before the clock starts."""

    async def main() -> Cost:
        async with path(url) as ask:
            await _many(ask, 4 * at_once, at_once)
            cpu, wall = time.process_time(), time.perf_counter()
            await _many(ask, calls, at_once)
            return Cost(calls, time.process_time() - cpu, time.perf_counter() - wall)

    return asyncio.run(main())


def measure_generate(url: str, n: int, at_once: int = SLOTS) -> Cost:
    """A whole run of `n` dialogues without painter; the scripted models answer over HTTP."""
    with tempfile.TemporaryDirectory() as folder:
        cpu, wall = time.process_time(), time.perf_counter()
        recipe = load_recipe(demo_recipe(Path(folder) / "bench.yaml", url=url))
        limits = msgspec.structs.replace(recipe.limits, concurrency=at_once)
        run = generate_dialogues(msgspec.structs.replace(recipe, limits=limits), run=Path(folder) / "run", n=n)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return Cost(sum(tally.calls for tally in run.roles().values()), cpu, wall)


def on_uvloop(once: Callable[[], Cost]) -> Cost:
    """The same on uvloop's event loop."""
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        return once()
    finally:
        asyncio.set_event_loop_policy(None)


def rounds(measures: Mapping[str, Callable[[], Cost]], count: int) -> dict[str, list[Cost]]:
    """All measures in turn, `count` times."""
    costs: dict[str, list[Cost]] = {name: [] for name in measures}
    for number in range(count):
        for name, once in measures.items():
            costs[name].append(once())
        print(f"round {number + 1} of {count}", file=sys.stderr)
    return costs


def _median(costs: Sequence[Cost], what: str) -> float:
    return float(statistics.median(getattr(cost, what) for cost in costs))


def print_costs(paths: dict[str, Path_], options: argparse.Namespace) -> None:
    """Prints the first table: without latency, so CPU is the limit."""
    with serving() as server:
        url = server.url
        measures = {name: functools.partial(measure, path, url, options.calls) for name, path in paths.items()}
        measures[GENERATE] = functools.partial(measure_generate, url, options.dialogues)
        if importlib.util.find_spec("uvloop"):
            for name in (BARE, GENERATE):
                measures[f"{name}, on uvloop"] = functools.partial(on_uvloop, measures[name])
        costs = rounds(measures, options.rounds)
    base = _median(costs[BARE], "ms")
    print("| path | CPU ms per call (median, range) | ratio to bare | calls/s |")
    print("|---|---|---|---|")
    for name, row in sorted(costs.items(), key=lambda item: _median(item[1], "ms")):
        ms = _median(row, "ms")
        spread = f"{min(cost.ms for cost in row):.3f}-{max(cost.ms for cost in row):.3f}"
        print(f"| {name} | {ms:.3f} ({spread}) | {ms / base:.1f} | {_median(row, 'rate'):,.0f} |")


def print_shares(paths: dict[str, Path_], options: argparse.Namespace) -> None:
    """The second table: a slow server, so waiting decides."""
    ceiling = SLOTS / LATENCY
    shares: dict[str, list[float]] = {name: [] for name in (*paths, GENERATE)}
    for at_once in AT_ONCE:
        with serving(LATENCY) as server:
            url = server.url
            measures = {
                name: functools.partial(measure, path, url, options.calls, at_once) for name, path in paths.items()
            }
            measures[GENERATE] = functools.partial(measure_generate, url, 6 * options.dialogues, at_once)
            for name, row in rounds(measures, min(3, options.rounds)).items():
                shares[name].append(_median(row, "rate") / ceiling)
    print(f"\n| share of {ceiling:.0f} calls/s | " + " | ".join(f"{at_once} at once" for at_once in AT_ONCE) + " |")
    print("|---|" + "---|" * len(AT_ONCE))
    for name, values in shares.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")


def print_profile(calls: int, dialogues: int) -> None:
    """Prints where a whole run spends its time, by module and by function, without the cost of the profiler."""
    with serving() as server:
        plain = measure_generate(server.url, dialogues)
        profile = cProfile.Profile(time.process_time)
        profile.runcall(measure_generate, server.url, dialogues)
        stats = pstats.Stats(profile)
        modules = _by_module(stats)
        scale = plain.ms / sum(modules.values())
        print(f"`generate`, {plain.calls:,} calls, {plain.ms:.3f} ms of CPU per call\n\n| module | ms |\n|---|---|")
        for module, seconds in sorted(modules.items(), key=lambda item: -item[1])[:16]:
            print(f"| {module} | {seconds * scale:.3f} |")
        print()
        stats.sort_stats("tottime").print_stats(25)
        profile = cProfile.Profile(time.process_time)
        profile.runcall(measure, cast, server.url, calls)
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)


def _by_module(stats: pstats.Stats) -> dict[str, float]:
    """Own seconds by library or by module of ours; functions in C count for their callers."""
    seconds: dict[str, float] = {}
    entries: Any = vars(stats)["stats"]
    for (file, _, _), (_, _, own, _, callers) in entries.items():
        if file != "~":
            seconds[_module(file)] = seconds.get(_module(file), 0.0) + own
            continue
        for (caller, _, _), (_, _, part, _) in callers.items():
            seconds[_module(caller)] = seconds.get(_module(caller), 0.0) + part
    return seconds


def _module(file: str) -> str:
    parts = Path(file).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    if "intersafe" in parts[:-1]:
        return "/".join(parts[len(parts) - parts[::-1].index("intersafe") - 1 :])
    return "asyncio" if "asyncio" in parts else parts[-1]


def main() -> None:
    """Parses the options and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=4000, help="calls per round and path (4000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds without latency; at most 3 with latency (5)")
    parser.add_argument("--dialogues", type=int, default=200, help="dialogues of a run of generate (200)")
    parser.add_argument("--profile", action="store_true", help="profile `generate` and `JobCast.ask` instead")
    options = parser.parse_args()
    os.sched_setaffinity(0, {CORES[0]})
    if options.profile:
        return print_profile(options.calls, options.dialogues)
    has_sdk = importlib.util.find_spec("openai") is not None
    paths = PATHS | (SDK if has_sdk else {})
    names = ("aiohttp", "msgspec", "tenacity", *(("openai",) if has_sdk else ()))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"Python {sys.version.split()[0]}, {versions}, {len(CORES)} cores; {options.calls} calls, 64 at once\n")
    print_costs(paths, options)
    print_shares(PATHS, options)
    return None


if __name__ == "__main__":
    main()
