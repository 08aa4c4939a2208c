"""Any OpenAI-compatible server: one POST to `/chat/completions`, and one policy for all that can go wrong with it.

    200                                  the reply; `finish_reason` is kept, a refusal or a block is an outcome 400
    404(route) 413 415 422           this call failed for good 408 409 425 500 502 504, time-out, cut or unreadable
    body      tried again, `limits.retries` times in all (tenacity) 429 503                              the limiter
    slows down; not counted as a try refused connection, 401, 403, 404 (model), and passing faults that never pass
    the service is gone: the run waits and
                                         says so, and ends with `ServiceGone` when the patience is used up

aiohttp speaks HTTP; the openai SDK would cost four times its CPU (docs/performance.md). Keys never enter a message.
"""

import asyncio
import email.utils
import hashlib
import os
import random
import time
from collections.abc import Callable
from typing import Any, NoReturn

import aiohttp
import msgspec
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from intersafe.errors import CallFailed, ServiceGone
from intersafe.images import ImageStore
from intersafe.models import Call, Reply
from intersafe.models.limits import Limiter
from intersafe.recipe import Limits, Member
from intersafe.records import Finish, Message

MAX_BODY = 16 * 1024 * 1024
LONGEST_HOLD = 30.0

_FINISH: dict[str, Finish] = {"length": "length", "content_filter": "blocked"}
_OVERLOADED = (429, 503)
_PASSING = (408, 409, 425, 500, 502, 504)
_AWAY = (401, 403, 404, 407)


class _PassingFault(Exception):
    """Worth another try."""


class _Overloaded(Exception):
    def __init__(self, retry_after: float | None, what: str) -> None:
        self.retry_after, self.what = retry_after, what


class _Away(Exception):
    """The service does not answer at all, or not to us."""


class _Function(msgspec.Struct):
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Function
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_DECODER = msgspec.json.Decoder(_Completion)


class EndpointModel:
    """One model behind one or several URLs; a job stays on one replica, chosen by rendezvous hash."""

    def __init__(self, member: Member, limits: Limits, images: ImageStore, say: Callable[[str], None]) -> None:
        """`say` is told when the service goes away or comes back."""
        spec = member.spec
        self.identity = member.identity
        self._model, self._urls, self._member = spec.model, spec.urls, member
        self._limits, self._images, self._say = limits, images, say
        self._limiter = Limiter(member.concurrency)
        self._key = os.environ.get(member.key, "") if member.key else ""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=limits.timeout, connect=min(30.0, limits.timeout)),
            trust_env=True,
        )
        self._retrying = AsyncRetrying(
            stop=stop_after_attempt(limits.retries),
            wait=wait_exponential_jitter(initial=0.2, max=20.0),
            retry=retry_if_exception_type(_PassingFault),
            reraise=True,
        )
        self._down_since: float | None = None
        self._last_success = float("-inf")
        self._holds = 0

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._session.close()

    async def answer(self, call: Call) -> Reply:
        """The reply; waits out overload and outages, tries again what passes."""
        body = msgspec.json.encode(self._body(call))
        url = f"{self._replica(call.job)}/chat/completions"
        began = asyncio.get_running_loop().time()
        while True:
            try:
                reply: Reply = await self._retrying(self._past_limits, url, body)
            except _Away as error:
                self._wait_for_service(str(error))
            except _PassingFault as error:
                if self._last_success >= began:
                    raise CallFailed("endpoint", "server_error", str(error)) from None
                self._wait_for_service(str(error))
            else:
                return reply

    async def _past_limits(self, url: str, body: bytes) -> Reply:
        """One try, in which overload does not count."""
        while True:
            started = await self._limiter.acquire()
            try:
                reply = await self._post(url, body)
            except _Overloaded as error:
                self._limiter.overloaded(started)
                self._note_trouble(error.what)
                self._limiter.hold(self._next_hold() if error.retry_after is None else error.retry_after)
                continue
            finally:
                self._limiter.release()
            self._limiter.succeeded()
            self._note_success()
            return reply

    async def _post(self, url: str, body: bytes) -> Reply:
        try:
            async with self._session.post(url, data=body, allow_redirects=False) as response:
                data = await _read(response)
                if response.status == 400 and b"content_filter" in data:
                    return Reply("", "blocked")  # hosted services block with an error; a block is an outcome
                if response.status != 200:
                    self._raise_for(response.status, response.headers.get("Retry-After"), data)
        except aiohttp.ClientConnectorError as error:
            raise _Away(f"no connection ({error.os_error.strerror or 'unknown host'})") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _PassingFault(self._clean(f"{type(error).__name__} {error}".strip())) from None
        return self._reply(data)

    def _reply(self, data: bytes) -> Reply:
        try:
            completion = _DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _PassingFault(f"unreadable answer: {error}") from None
        if not completion.choices:
            raise _PassingFault("answer without choices")
        choice = completion.choices[0]
        content = choice.message.content
        text = content if isinstance(content, str) else "".join(str(p.get("text", "")) for p in content or ())
        usage = completion.usage or _Usage()
        finish = _FINISH.get(choice.finish_reason or "stop", "stop")
        if choice.message.refusal:
            text, finish = text or choice.message.refusal, "refused"
        return Reply(text, finish, (usage.prompt_tokens, usage.completion_tokens))

    def _raise_for(self, status: int, retry_after: str | None, data: bytes) -> NoReturn:
        what = self._clean(f"HTTP {status} {_message_of(data)}".strip())
        if status in _OVERLOADED:
            raise _Overloaded(_seconds(retry_after), what)
        if status in _PASSING:
            raise _PassingFault(what)
        if status in _AWAY:
            raise _Away(what)
        raise CallFailed("endpoint", "bad_request", what)

    def _clean(self, text: str) -> str:
        """At most 300 characters, without the key."""
        return (text.replace(self._key, "***") if self._key else text)[:300]

    # --- outages ---------------------------------------------------------------------------------------------------

    def _note_success(self) -> None:
        self._last_success = asyncio.get_running_loop().time()
        self._holds = 0
        if self._down_since is not None:
            away = self._last_success - self._down_since
            self._down_since = None
            if away >= 5:
                self._say(f"{self.identity} is back after {away:.0f} s")

    def _note_trouble(self, what: str) -> None:
        now = asyncio.get_running_loop().time()
        if self._down_since is None:
            self._down_since = now
        elif now - self._down_since > self._limits.patience:
            raise ServiceGone(
                f"{self.identity} at {', '.join(self._urls)} stayed away for {now - self._down_since:.0f} s ({what}); "
                "bring it back, then run the same command again: nothing is lost"
            )

    def _wait_for_service(self, what: str) -> None:
        if self._down_since is None:
            hint = f"; is {self._member.key or 'a key'} right?" if "HTTP 40" in what else ""
            self._say(
                f"{self.identity} at {', '.join(self._urls)}: {what}{hint}; "
                f"waiting up to {self._limits.patience:.0f} s, Ctrl-C stops and keeps everything"
            )
        self._note_trouble(what)
        self._limiter.hold(self._next_hold())

    def _next_hold(self) -> float:
        """0.25, 0.5, 1 ... 30 seconds, never beyond what is left of the patience."""
        self._holds += 1
        return float(min(LONGEST_HOLD, 0.125 * 2 ** min(self._holds, 10), self._limits.patience / 4 + 0.1)) * (
            0.75 + random.random() / 2
        )

    # --- what is sent ----------------------------------------------------------------------------------------------

    def _replica(self, job: str) -> str:
        if len(self._urls) == 1:
            return self._urls[0]
        return max(self._urls, key=lambda url: hashlib.blake2b(f"{url} {job}".encode(), digest_size=8).digest())

    def _body(self, call: Call) -> dict[str, Any]:
        sampling = call.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [self._message(message) for message in call.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.seed,
        }
        if call.schema and self._member.json_schema:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": call.schema.name, "schema": call.schema.schema},
            }
        return body | self._member.extra

    def _message(self, message: Message) -> dict[str, Any]:
        if not message.images:
            return {"role": message.role, "content": message.text}
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": self._images.data_uri(ref)}} for ref in message.images
        ]
        return {"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]}


async def _read(response: aiohttp.ClientResponse) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_BODY:
            raise _PassingFault(f"answer over {MAX_BODY // 1024 // 1024} MiB")
    return b"".join(chunks)


def _message_of(data: bytes) -> str:
    """The server's own words, from the usual places of an error body."""
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return data[:200].decode("utf-8", "replace").replace("\n", " ")
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message).replace("\n", " ")


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds or as a date, at most ten minutes."""
    if retry_after is None:
        return None
    try:
        return min(600.0, max(0.0, float(retry_after)))
    except ValueError:
        pass
    try:
        return min(600.0, max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()))
    except ValueError:
        return None
