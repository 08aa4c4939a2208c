"""The share of prompt tokens in the prefix caches of two replicas: dialogues that stay on one, and calls at random.

    make .venv-vllm/ready && .venv-vllm/bin/python bench/prefix_cache.py [--n 40] [--rounds 3]

Two real vLLM servers on the CPU, started as `intersafe serve` starts them, answer every role with the tiny models of
the tests. The same run is made in two ways, in turn. With both URLs in the recipe a dialogue stays on one replica. A
proxy sends each call to either at random, as a load balancer that knows nothing of dialogues. The caches are cleared
before each run; the figures are the servers' own (`/metrics`).
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import aiohttp
from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkpoint and the recipe are the tests'

from intersafe.engines.metrics import Sample, parse_metrics
from intersafe.generation.generate import generate_dialogues
from intersafe.recipe.load import load_recipe
from intersafe.serving.plan import servers_of
from intersafe.serving.supervisor import serving_in_background
from tests.support.paths import FIXTURES
from tests.support.tiny_engines import serve_entry, write_recipe

BLOCK = 32
"""Tokens of a block of the KV cache: the minimum on a CPU. The default of 128 is longer than many turns here."""
JSON = {"Content-Type": "application/json"}
ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(FIXTURES.parent / "servers" / "torchvision_shim"),
    "VLLM_SERVER_DEV_MODE": "1",
}
"""The environment of a server on a CPU, with the route that clears its cache."""


def recipe_at(folder: Path, name: str, urls: Sequence[str], n: int) -> Path:
    """A recipe with the whole cast at these URLs and long conversations."""
    return write_recipe(
        folder / f"{name}.json",
        f"vllm:tiny-cast@{','.join(urls)}",
        serve_entry(args={"skip_mm_profiling": True, "block_size": BLOCK}, env=ENGINE),
        samples=max(2, n // 8),
        turns={"min": 4, "mean": 5, "max": 6},
        limits={"concurrency": 8, "patience": 120},
    )


@contextlib.contextmanager
def at_random(urls: Sequence[str], seed: int) -> Iterator[str]:
    """A proxy that sends each call to a random replica."""
    rng, loop, begun, over = random.Random(seed), asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    address: list[str] = []

    async def serve() -> None:
        # A new connection for each call: the servers close idle ones.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:

            async def forward(request: web.Request) -> web.Response:
                body, url = await request.read(), rng.choice(urls)
                async with session.post(f"{url}/chat/completions", data=body, headers=JSON) as answer:
                    return web.Response(status=answer.status, body=await answer.read(), headers=JSON)

            app = web.Application(client_max_size=64 * 2**20)
            app.router.add_post("/v1/chat/completions", forward)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            address.append(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
            begun.set()
            await over.wait()
            await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    begun.wait()
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


def sample(url: str) -> Sample:
    """The metrics of the server."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        found = parse_metrics(answer.read().decode())
    assert found
    return found


def clear_cache(url: str) -> None:
    """Clears the prefix cache of the server."""
    request = urllib.request.Request(url.removesuffix("/v1") + "/reset_prefix_cache", method="POST")
    urllib.request.urlopen(request).close()


def measured(recipe: Path, run: Path, replicas: Sequence[str], n: int) -> tuple[float, float]:
    """The share of prompt tokens found in the caches, 0 to 1, and how many were looked up."""
    for url in replicas:
        clear_cache(url)
    before = [sample(url) for url in replicas]
    generate_dialogues(load_recipe(recipe), run=run, n=n)
    after = [sample(url) for url in replicas]
    queries = sum(now.queries - then.queries for then, now in zip(before, after, strict=True))
    hits = sum(now.hits - then.hits for then, now in zip(before, after, strict=True))
    return hits / queries, queries


def main() -> None:
    """Makes the runs in turn and prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8461)
    options = parser.parse_args()
    urls = [f"http://127.0.0.1:{options.port + number}/v1" for number in range(2)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sticky = recipe_at(folder, "sticky", urls, options.n)
        shares: dict[str, list[float]] = {"stays": [], "at random": []}
        tokens: dict[str, float] = {}
        with serving_in_background(
            servers_of(load_recipe(sticky)), folder / "logs", lambda text: print(text, file=sys.stderr)
        ):
            for round_ in range(options.rounds):
                with at_random(urls, round_) as proxy:
                    spread = recipe_at(folder, "spread", [proxy], options.n)
                    pairs = [("stays", sticky), ("at random", spread)]
                    for kind, recipe in pairs if round_ % 2 == 0 else reversed(pairs):
                        run = folder / f"{kind}-{round_}"
                        share, tokens[kind] = measured(recipe, run, urls, options.n)
                        shares[kind].append(share)
    print(f"{options.n} dialogues, 4 to 6 turns, every role; 2 replicas, {options.rounds} rounds in changing order")
    for kind, found in shares.items():
        low, middle, high = min(found), statistics.median(found), max(found)
        print(f"{kind:<10} {middle:.1%} of {tokens[kind]:,.0f} prompt tokens in the cache ({low:.1%}-{high:.1%})")
    print(f"ratio      {statistics.median(shares['stays']) / statistics.median(shares['at random']):.2f}")


if __name__ == "__main__":
    main()
