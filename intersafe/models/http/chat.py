"""Any OpenAI-compatible chat server: one POST to `/chat/completions`; errors are the matter of `http/service.py`.

Images go before the text of their message, as the member's `send_images` has it: as data URIs; as `file://` URLs of the
run's own store, for a server on the same disk; or by vLLM's `uuid`, whose bytes travel only once to a replica, and once
more where it does not know them any longer.
"""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Hooks, Reply
from intersafe.models.http.faults import UNREADABLE, Transient, refused_field
from intersafe.models.http.quirks import BROKEN_OFF, FINISH_REASONS
from intersafe.models.http.service import Question, ReplicaState, Service
from intersafe.recipe.sections import Limits, Member
from intersafe.records import Message

MAX_BODY = 16 * 2**20
REMEMBERED = 1024
"""Images that a replica is taken to remember; a dialogue needs its own few for as long as it is talked."""
IMAGE_TOKENS = 800
"""An image, until usage tells: about a square of 800 pixels to Qwen2.5-VL."""


class _Message(msgspec.Struct):
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: msgspec.Raw = msgspec.Raw(b"")


_DECODER = msgspec.json.Decoder(_Completion)
_USAGE = msgspec.json.Decoder(_Usage)
_MOST_TOKENS = 10**8  # of one call; a server that reports more reports nonsense

Part = dict[str, Any]


class EndpointModel:
    """One chat model behind one or several URLs."""

    def __init__(
        self,
        member: Member,
        limits: Limits,
        images: ImageStore,
        hooks: Hooks,
    ) -> None:
        self.identity = member.identity
        self._member, self._images, self._hooks = member, images, hooks
        self._is_counting = False
        self._refused_schemas: set[str] = set()
        self._known: dict[str, dict[str, None]] = {url: {} for url in member.spec.urls}
        hello = {"model": member.spec.model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
        small = msgspec.json.encode(hello | member.extra)
        self._service = Service(
            member,
            "/chat/completions",
            limits,
            hooks,
            scout=Question(lambda: small, read_reply, _blocked),
            max_body=MAX_BODY,
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._service.aclose()

    def states(self) -> list[ReplicaState]:
        """How each replica does now."""
        return self._service.states()

    async def answer(self, call: Call) -> Reply:
        """The reply; waits out overload and outages, tries again what passes."""
        schema = call.schema
        if schema and (schema.name in self._refused_schemas or not self._member.json_schema):
            call = msgspec.structs.replace(call, schema=None)
        with_schema, refused = call, ""

        def amend(error: Exception) -> bool:
            """The same without its schema, where the server may not know what that is."""
            nonlocal call, refused
            if call.schema is None or refused_field(error, {"response_format"}) is None:
                return False
            call, refused = msgspec.structs.replace(call, schema=None), str(error)
            return True

        def body(part: Callable[[str], Part]) -> bytes:
            return chat_body(self._member, call, part)

        if self._member.send_images == "uuid":
            reply = await self._answer_by_uuid(with_schema, body, amend)
        else:
            part = self._as_file if self._member.send_images == "file" else self._as_data
            reply = await self._service.ask(
                call.job,
                Question(
                    lambda: body(part),
                    lambda data: self._counted(with_schema, read_reply(data)),
                    _blocked,
                    amend=amend,
                    tokens=lambda: _about(with_schema),
                    used=lambda reply: _used(with_schema, reply),
                ),
            )
        if refused and schema and schema.name not in self._refused_schemas:
            # Each by itself, so that it does not depend on the order of the calls which of them had a schema.
            self._refused_schemas.add(schema.name)
            if len(self._refused_schemas) == 1:
                self._hooks.notify(
                    f"{self.identity} refuses JSON schemas ({refused}): then the prompt alone asks for JSON; "
                    "`json_schema: false` in the recipe says so from the start"
                )
        return reply

    async def _answer_by_uuid(
        self, call: Call, body: Callable[[Callable[[str], Part]], bytes], schemaless: Callable[[Exception], bool]
    ) -> Reply:
        known: dict[str, None] = {}
        refs = dict.fromkeys(ref for message in call.messages for ref in message.images)
        whole, omitted = False, False

        def at(url: str) -> None:
            nonlocal known, omitted
            known, omitted = self._known[url], False

        def part(ref: str) -> Part:
            nonlocal omitted
            if whole or ref not in known:
                return {**self._as_data(ref), "uuid": ref.partition(".")[0]}
            omitted = True
            return {"type": "image_url", "image_url": None, "uuid": ref.partition(".")[0]}

        def read(data: bytes) -> Reply:
            reply = self._counted(call, read_reply(data))
            remember(known, refs)
            return reply

        def amend(error: Exception) -> bool:
            """Whatever the answer was about: where bytes were left out, it may have been about them."""
            nonlocal whole
            if whole or not omitted:
                return schemaless(error)
            whole = True
            for ref in refs:
                known.pop(ref, None)
            return True

        return await self._service.ask(
            call.job,
            Question(
                lambda: body(part),
                read,
                _blocked,
                amend=amend,
                at=at,
                tokens=lambda: _about(call),
                used=lambda reply: _used(call, reply),
            ),
        )

    def _counted(self, call: Call, reply: Reply) -> Reply:
        """The reply with its tokens, by estimate where the server reports none: limits have to hold all the same."""
        if reply.tokens[0]:
            return reply
        if not self._is_counting:
            self._is_counting = True
            self._hooks.notify(
                f"{self.identity} reports no tokens: they are counted by estimate, four characters a token"
            )
        return msgspec.structs.replace(reply, tokens=estimated(call, reply))

    # --- what is sent ------------------------------------------------------------------------------------------------

    def _as_data(self, ref: str) -> Part:
        return as_data(self._images, ref)

    def _as_file(self, ref: str) -> Part:
        return {"type": "image_url", "image_url": {"url": self._images.path(ref).absolute().as_uri()}}


def chat_body(member: Member, call: Call, part: Callable[[str], Part]) -> bytes:
    """The body of a request; `part` makes the part of a message out of an image's reference."""
    sampling = call.sampling
    body: dict[str, Any] = {
        "model": member.spec.model,
        "messages": [message_body(message, part) for message in call.messages],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
    }
    if call.schema and member.json_schema:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": call.schema.name, "schema": call.schema.schema},
        }
    return msgspec.json.encode(body | member.extra)


def remember(known: dict[str, None], refs: Iterable[str]) -> None:
    """Puts the images last among those that are known, and forgets the longest unused."""
    for ref in refs:
        known.pop(ref, None)
        known[ref] = None
    while len(known) > REMEMBERED:
        del known[next(iter(known))]


def as_data(images: ImageStore, ref: str) -> Part:
    """An image as a data URI."""
    return {"type": "image_url", "image_url": {"url": images.data_uri(ref)}}


def message_body(message: Message, part: Callable[[str], Part]) -> dict[str, Any]:
    """A message as the API has it, its images before its text."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    return {
        "role": message.role,
        "content": [*(part(ref) for ref in message.images), {"type": "text", "text": message.text}],
    }


def _about(call: Call) -> int:
    """Tokens that a call may cost: an answer takes half of its room."""
    return _prompt_tokens(call) + call.sampling.max_tokens // 2


def _prompt_tokens(call: Call) -> int:
    """By estimate: four characters make one."""
    characters = sum(len(message.text) for message in call.messages)
    images = sum(len(message.images) for message in call.messages)
    return characters // 4 + IMAGE_TOKENS * images


def estimated(call: Call, reply: Reply) -> tuple[int, int]:
    """Prompt and completion tokens of a call whose answer does not say them."""
    return max(1, _prompt_tokens(call)), len(reply.text) // 4


def _used(call: Call, reply: Reply) -> int:
    """What a quota is set right by: an estimate is no better than the one that it was counted for."""
    return 0 if reply.tokens == estimated(call, reply) else sum(reply.tokens)


# --- what comes back -------------------------------------------------------------------------------------------------


def _blocked(_: str) -> Reply:
    return Reply("", "blocked")


def read_reply(data: bytes) -> Reply:
    """The reply in the body of a 200, with tokens of 0 and 0 if it says none; `Transient` where there is none."""
    try:
        completion = _DECODER.decode(data)
    except UNREADABLE as error:
        raise Transient(f"unreadable answer: {error}") from None
    if not completion.choices:
        raise Transient("answer without choices")
    choice = completion.choices[0]
    if choice.finish_reason in BROKEN_OFF:
        raise Transient(f"the server broke the answer off ({choice.finish_reason})")
    content = choice.message.content
    text = content if isinstance(content, str) else "".join(str(p.get("text") or "") for p in content or ())
    finish = FINISH_REASONS.get((choice.finish_reason or "").lower(), "blocked")
    if choice.message.refusal:
        text, finish = text or choice.message.refusal, "refused"
    return Reply(text, finish, _tokens_in(completion.usage))


def _tokens_in(usage: msgspec.Raw) -> tuple[int, int]:
    """What a server says about tokens is no part of the answer: what cannot be a count is as good as nothing."""
    try:
        found = _USAGE.decode(usage)
    except UNREADABLE:
        return 0, 0
    prompt, completion = found.prompt_tokens, found.completion_tokens
    return (prompt, completion) if 0 < prompt <= _MOST_TOKENS and 0 <= completion <= _MOST_TOKENS else (0, 0)
