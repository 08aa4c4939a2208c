"""The HTTP client of `doctor` for one replica of a model: short time-outs, one retry, no waiting through an outage."""

import asyncio
import base64
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
from msgspec import structs

from intersafe.errors import CallFailed
from intersafe.models.base import Call, Reply, Sampling
from intersafe.models.http.completions import Part, chat_body, read_reply
from intersafe.models.http.faults import Overloaded, TooSlow, Transient, raise_for
from intersafe.models.http.transport import Account, Address, fault_of, read_body, refusal_in
from intersafe.recipe.sections import Member, Model
from intersafe.records import Message
from intersafe.replies import Answer, schema_of

IN_FLIGHT = 4
"""Most requests in flight to one replica."""
MAX_ANSWER_BYTES = 48 * 2**20
RETRY_PAUSE = 0.5
"""Seconds before the one retry."""
SEED = 20_260_101
MOST = 200
"""Characters of a message."""


class ProbeClient:
    """Sends requests to one replica of a model."""

    def __init__(self, session: aiohttp.ClientSession, model: Model, url: str, timeout: float) -> None:
        """`timeout` is the seconds for one answer."""
        self.model, self.url, self.timeout = model, url, timeout
        self._session, self._gate = session, asyncio.Semaphore(IN_FLIGHT)
        self._account = Account(model)

    async def send(self, route: str, body: bytes | None = None) -> bytes:
        """The body of an answer with status 200; without a `body` it is a GET. A transient fault is retried once.

        `Fault` for a server that does not answer, `CallFailed` for one that refuses the request.
        """
        async with self._gate:
            try:
                return await self._once(route, body)
            except (Transient, Overloaded) as error:
                if isinstance(error, TooSlow):
                    raise
            await asyncio.sleep(RETRY_PAUSE)
            return await self._once(route, body)

    async def _once(self, route: str, body: bytes | None) -> bytes:
        address, headers = Address.of(self.url, route), self._account.headers
        try:
            async with self._session.request(
                "GET" if body is None else "POST",
                address.target,
                data=body,
                headers=headers if body is None else headers | {"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=self.timeout),
                allow_redirects=False,
                **address.proxy,
            ) as response:
                data, status, heads = await read_body(response, MAX_ANSWER_BYTES), response.status, response.headers
        except (aiohttp.ClientError, OSError) as error:
            raise fault_of(error, self._account, self.timeout) from None
        if data is None:
            raise Transient(f"answer over {MAX_ANSWER_BYTES // 2**20} MiB")
        return data if status == 200 else self._refused(status, heads, data)

    def _refused(self, status: int, heads: Mapping[str, str], data: bytes) -> bytes:
        what, code = refusal_in(status, heads, data, self._account)
        what = what[:MOST]
        raise_for(status, heads, data, what, code)
        raise CallFailed("endpoint", "blocked", what)

    def clean(self, text: str) -> str:
        """The text as one printable line of at most `MOST` characters, without the key."""
        return self._account.clean(text, MOST)


class ChatProbeClient(ProbeClient):
    """Sends chat requests to one replica."""

    def __init__(self, session: aiohttp.ClientSession, member: Member, url: str, timeout: float) -> None:
        super().__init__(session, member, url, timeout)
        self.member = member

    async def ask_raw(
        self,
        *messages: Message,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = SEED,
        answer: type[Answer] | None = None,
        part: Callable[[str], Part] | None = None,
        **extra: Any,
    ) -> bytes:
        """The body of the answer to a conversation, in which an image reference is the name of a colour.

        `part` makes the content part of an image; `extra` adds fields to the request. Raises as `send` does.
        """
        member = structs.replace(self.member, json_schema=True, extra=self.member.extra | extra)
        sampling = Sampling(temperature, member.top_p, max_tokens, seed)
        schema = schema_of(answer) if answer else None
        call = Call(
            role="doctor", prompt="", messages=messages, sampling=sampling, schema=schema, job="doctor", ordinal=0
        )
        return await self.send("/chat/completions", chat_body(member, call, part or colour_part))

    async def ask(self, *messages: Message, **options: Any) -> Reply:
        """The answer, parsed as a run parses it; arguments and errors are those of `ask_raw`."""
        return read_reply(await self.ask_raw(*messages, **options))


@functools.cache
def _uri(colour: str) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (112, 112), colour).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def colour_part(colour: str) -> Part:
    """The content part of an image of one colour, as a data URI."""
    return {"type": "image_url", "image_url": {"url": _uri(colour)}}


def user_message(text: str, *colours: str) -> Message:
    """A user message with images of these colours before its text."""
    return Message("user", text, colours)
