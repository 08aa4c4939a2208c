"""HTTP to one model: a POST whose every failure is a `Fault`, and the API key, which never leaves this module.

aiohttp speaks HTTP; docs/performance.md says what the openai SDK would cost.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp.helpers import get_env_proxy_for_url
from yarl import URL

from intersafe.errors import InputError
from intersafe.models.http.faults import Away, Fault, TooSlow, Transient, message_in, raise_for
from intersafe.models.http.request import A, Request
from intersafe.recipe.sections import Model
from intersafe.wording import printable

CONNECT_SECONDS = 30.0
"""Until a connection must be open."""
LARGE = 2**20
"""Bytes from which on a body is sent in pieces and let go of."""
UPLOADS = 8
"""Bodies on their way to one replica at once: a call that waits for its answer holds no images in memory."""


class Account:
    """The API key of a model, read once from the environment variable that the recipe names."""

    def __init__(self, model: Model) -> None:
        self._key = os.environ.get(model.key, "").strip() if model.key else ""

    @property
    def headers(self) -> dict[str, str]:
        """The header with the key; empty where the model needs none."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def clean(self, text: str, most: int = 300) -> str:
        """One printable line of at most `most` characters, without the key."""
        return printable(text, secret=self._key)[:most]


@dataclass(eq=False)
class Address:
    """Where one replica is reached."""

    url: str
    """The base URL, as in the recipe."""
    target: URL
    """The base URL and the route."""
    proxy: dict[str, Any]
    """Arguments of aiohttp's request: the proxy that the environment names for the URL."""
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UPLOADS))

    @classmethod
    def of(cls, url: str, route: str = "") -> "Address":
        """The address `<url><route>`; `InputError` if that is not a URL."""
        try:
            target = URL(f"{url}{route}")
        except ValueError as error:
            raise InputError(f"{url!r} is not a URL: {error}", remedy="correct it in the recipe") from None
        proxy: dict[str, Any] = {}
        # Once here: `trust_env` would ask the environment and .netrc again for each request, in a thread.
        with contextlib.suppress(LookupError):
            proxy["proxy"], proxy["proxy_auth"] = get_env_proxy_for_url(target)
        return cls(url, target, proxy)


class Transport:
    """Connections to the replicas of one model."""

    def __init__(self, model: Model, timeout: float) -> None:
        """`timeout`: seconds for one answer. Needs a running event loop."""
        self._account, self._timeout = Account(model), timeout
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Content-Type": "application/json"} | self._account.headers,
            timeout=aiohttp.ClientTimeout(total=timeout, connect=min(CONNECT_SECONDS, timeout)),
        )
        self.clean = self._account.clean

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._session.close()

    async def post(self, address: Address, request: Request[A]) -> A:
        """The outcome of the request; `Fault` if it may be sent again, `CallFailed` if it was refused for good."""
        await address.uploads.acquire()
        uploaded = _Once(address.uploads.release)
        try:
            headers, body = _upload(request.body(address.url), uploaded)
            async with self._session.post(
                address.target, data=body, headers=headers, allow_redirects=False, **address.proxy
            ) as response:
                answer = await read_body(response, request.max_body)
                if response.status != 200:
                    return request.blocked(self._filter_message(response.status, response.headers, answer, request))
        except (aiohttp.ClientError, OSError) as error:
            raise fault_of(error, self._account, self._timeout) from None
        finally:
            uploaded()
        return request.too_long() if answer is None else request.read(answer)

    def _filter_message(
        self, status: int, headers: Mapping[str, str], answer: bytes | None, request: Request[Any]
    ) -> str:
        """The message of a filter that blocked the call; any other answer but a 200 raises what it means."""
        if answer is None:
            raise Transient(f"answer over {request.max_body // 2**20} MiB")
        what, code = refusal_in(status, headers, answer, self._account)
        raise_for(status, headers, answer, what, code)
        return what


def refusal_in(status: int, headers: Mapping[str, str], answer: bytes, account: Account) -> tuple[str, str]:
    """An answer with a status other than 200 in one line for the user, without the key, and the server's own code."""
    message, code = message_in(status, answer)
    if 300 <= status < 400:
        message = f"redirects to {headers.get('Location', 'nowhere')}"
    return account.clean(f"HTTP {status} {message}".strip()), code


def fault_of(error: Exception, account: Account, timeout: float) -> Fault:
    """What an exception of aiohttp or of the socket means; `timeout` is the one of the request, in seconds."""
    if isinstance(error, aiohttp.ClientConnectorError):
        why = error.os_error.strerror or str(error.os_error) or "unknown host"
        return Away(f"no connection ({account.clean(why)})")
    if isinstance(error, TimeoutError):
        return TooSlow(str(error) or f"no answer within {timeout:g} s")
    return Transient(account.clean(f"{type(error).__name__} {error}".strip()))


async def read_body(response: aiohttp.ClientResponse, most: int) -> bytes | None:
    """The body; None where it has more than `most` bytes."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            return None
    return b"".join(chunks)


class _Once:
    """Calls a function the first time that it is called itself."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act

    def __call__(self) -> None:
        act, self._act = self._act, None
        if act:
            act()


def _upload(body: bytes, uploaded: _Once) -> tuple[dict[str, str], bytes | AsyncIterator[bytes]]:
    """Headers and data of a body; a large one goes piece by piece, and `uploaded` is called when it is sent."""
    if len(body) > LARGE:
        return {"Content-Length": str(len(body))}, _pieces(body, uploaded)
    uploaded()
    return {}, body


async def _pieces(body: bytes, uploaded: _Once) -> AsyncIterator[bytes]:
    """Nothing holds the body once it is sent, since most of a request's time is the server's."""
    for start in range(0, len(body), LARGE):
        yield body[start : start + LARGE]
    uploaded()
