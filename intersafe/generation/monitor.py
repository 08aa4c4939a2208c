"""Monitors vLLM's engines during a run, so that its user sees whether the GPUs are busy.

Engines of this process are asked directly, servers by their `/metrics`. A server that does not answer is skipped.
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
"""Seconds between two samples."""
TIMEOUT = 2.0
"""Seconds that a server may take to answer."""
MOST = 4 * 2**20
"""Bytes of a server's metrics that are read."""


class Monitor:
    """Samples the engines of a run inside an `async with` block. `figures` is always the same object."""

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
        self._polling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Monitor":
        if self._urls or self._engines:
            self._polling = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._polling:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)

    async def _poll(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            try:
                while True:
                    await self._sample(session)
                    await asyncio.sleep(PERIOD)
            finally:
                # The cache hits of the last answers; do not wait for a server that is gone.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self._sample(session, is_last=True)

    async def _sample(self, session: "aiohttp.ClientSession", *, is_last: bool = False) -> None:
        samples = await asyncio.gather(*(sample_server(session, url) for url in self._urls.values()))
        found = dict(zip(self._urls, samples, strict=True))
        found |= {name: thread.sample() for name, thread in self._engines.items()}
        for name, sample in found.items():
            if sample:
                # An engine of this process counts from 0; a server may have answered other clients before.
                begun = Figures(latest=Sample() if name in self._engines else None)
                self.figures.setdefault(name, begun).add(sample, is_last=is_last)


def _metrics(url: str) -> str:
    return f"{url.removesuffix('/v1')}/metrics"


async def sample_server(session: "aiohttp.ClientSession", url: str) -> Sample | None:
    """The metrics of the vLLM server with that base URL; None if it does not answer in time."""
    import aiohttp

    limit = aiohttp.ClientTimeout(total=TIMEOUT)
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
        async with session.get(_metrics(url), timeout=limit, allow_redirects=False) as response:
            if response.status == 200 and (text := await read_body(response, MOST)):
                return parse_metrics(text.decode("utf-8", "replace"))
    return None
