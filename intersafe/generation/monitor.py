"""A look at vLLM's engines every few seconds while a run goes on, so that its user sees whether the GPUs have work.

Engines of this process are asked directly, servers by their `/metrics`. Whoever does not answer is not waited for.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from intersafe.engines.metrics import Figures, Sample, parse_metrics
from intersafe.models.base import ChatModel
from intersafe.models.http.transport import read_body
from intersafe.recipe.sections import Recipe

if TYPE_CHECKING:
    import aiohttp

PERIOD = 2.0
"""Seconds between two looks."""
PATIENCE = 2.0
"""Seconds that a server may take to say how it is."""
MOST = 4 * 2**20
"""Bytes of a server's metrics that are read."""


class Watch:
    """The engines of a run; an async context manager around its work. `figures` is the same object all along."""

    def __init__(self, recipe: Recipe, models: Mapping[str, ChatModel]) -> None:
        """`models` are those of this process, by role."""
        self.figures: dict[str, Figures] = {}
        self._urls: dict[str, str] = {}
        for model in recipe.cast.members.values():
            spec = model.spec
            if spec.backend == "vllm" or spec.model in recipe.serve:
                self._urls |= {f"{model.identity} at {url}": url for url in spec.urls}
        self._engines: dict[str, Any] = {
            thread.name: thread for model in models.values() if (thread := getattr(model, "thread", None)) is not None
        }
        self._looking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Watch":
        if self._urls or self._engines:
            self._looking = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._looking:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            try:
                while True:
                    await self._look_once(session)
                    await asyncio.sleep(PERIOD)
            finally:
                # What the last answers found in the cache; a server that is gone is no reason to wait.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self._look_once(session, is_last=True)

    async def _look_once(self, session: "aiohttp.ClientSession", *, is_last: bool = False) -> None:
        samples = await asyncio.gather(*(ask_gauges(session, url) for url in self._urls.values()))
        found = dict(zip(self._urls, samples, strict=True))
        found |= {name: thread.sample() for name, thread in self._engines.items()}
        for name, sample in found.items():
            if sample:
                # An engine of this process counts from nothing; a server may have worked before.
                begun = Figures(latest=Sample() if name in self._engines else None)
                self.figures.setdefault(name, begun).add(sample, is_last=is_last)


def _metrics(url: str) -> str:
    return f"{url.removesuffix('/v1')}/metrics"


async def ask_gauges(session: "aiohttp.ClientSession", url: str) -> Sample | None:
    """What the vLLM server with that base URL says about itself; None where none answers in time."""
    import aiohttp

    limit = aiohttp.ClientTimeout(total=PATIENCE)
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
        async with session.get(_metrics(url), timeout=limit, allow_redirects=False) as response:
            if response.status == 200 and (text := await read_body(response, MOST)):
                return parse_metrics(text.decode("utf-8", "replace"))
    return None
