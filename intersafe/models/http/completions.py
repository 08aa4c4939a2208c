"""Chat completions as JSON: the body of a request and the reply in an answer, as any OpenAI-compatible server has them.

An image is a *part* of a message and comes before its text. How it travels is up to the caller: the functions here take
a function from its reference to the part.
"""

from collections.abc import Callable, Collection, Container, Iterable
from typing import Any

import msgspec

from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Reply
from intersafe.models.http.faults import UNREADABLE, Transient
from intersafe.models.http.quirks import BROKEN_OFF, FINISH_REASONS
from intersafe.recipe.sections import Member
from intersafe.records import Message

IMAGE_TOKENS = 800
"""Tokens of an image where usage does not tell: about a square of 800 pixels to Qwen2.5-VL."""
REMEMBERED = 1024
"""Images that a receiver is taken to remember by their `uuid`; a dialogue needs its own few until it ends."""
_MOST_TOKENS = 10**8  # of one call; a server that reports more reports nonsense

Part = dict[str, Any]


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


# --- what is sent ----------------------------------------------------------------------------------------------------


def chat_body(member: Member, call: Call, part: Callable[[str], Part], without: Collection[str] = ()) -> bytes:
    """The body of a request, without the fields named in `without`; the member's `extra` counts last."""
    body: dict[str, Any] = {
        "model": member.spec.model,
        "messages": [message_body(message, part) for message in call.messages],
    }
    body.update(chat_fields(member, call))
    for name in without:
        body.pop(name, None)
    return msgspec.json.encode(body | member.extra)


def chat_fields(member: Member, call: Call) -> dict[str, Any]:
    """The fields that say how the reply is drawn, without the member's `extra`."""
    sampling = call.sampling
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
    }
    if call.schema and member.json_schema:
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": call.schema.name, "schema": call.schema.schema},
        }
    return fields


def message_body(message: Message, part: Callable[[str], Part]) -> dict[str, Any]:
    """A message as the API has it, its images before its text."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    return {
        "role": message.role,
        "content": [*(part(ref) for ref in message.images), {"type": "text", "text": message.text}],
    }


def as_data(images: ImageStore, ref: str) -> Part:
    """An image as a data URI."""
    return {"type": "image_url", "image_url": {"url": images.data_uri(ref)}}


# --- images by vLLM's uuid -------------------------------------------------------------------------------------------


class UuidParts:
    """Makes parts with vLLM's `uuid`, without the bytes where the receiver knows the image."""

    def __init__(self, part: Callable[[str], Part], known: Container[str]) -> None:
        """`part` makes the part with its bytes; `known` are the references that go without."""
        self._part, self._known = part, known
        self.has_omitted = False
        """True if the bytes of an image were left out."""

    def __call__(self, ref: str) -> Part:
        """The part of the image with that reference."""
        uuid = ref.partition(".")[0]
        if ref not in self._known:
            return {**self._part(ref), "uuid": uuid}
        self.has_omitted = True
        return {"type": "image_url", "image_url": None, "uuid": uuid}


def remember(known: dict[str, None], refs: Iterable[str]) -> None:
    """Puts the images last among those that are known, and forgets the least recently used."""
    for ref in refs:
        known.pop(ref, None)
        known[ref] = None
    while len(known) > REMEMBERED:
        del known[next(iter(known))]


# --- what comes back -------------------------------------------------------------------------------------------------


def read_reply(data: bytes) -> Reply:
    """The reply in the body of a 200, with tokens of 0 and 0 if it says none; `Transient` where there is no reply."""
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
    """Prompt and completion tokens; 0 and 0 for nonsense, since usage is not what the call was sent for."""
    try:
        found = _USAGE.decode(usage)
    except UNREADABLE:
        return 0, 0
    prompt, completion = found.prompt_tokens, found.completion_tokens
    return (prompt, completion) if 0 < prompt <= _MOST_TOKENS and 0 <= completion <= _MOST_TOKENS else (0, 0)


# --- tokens by estimate ----------------------------------------------------------------------------------------------


def tokens_ahead(call: Call) -> int:
    """About how many tokens a call will cost: its prompt and half of `max_tokens`."""
    return _prompt_tokens(call) + call.sampling.max_tokens // 2


def estimated(call: Call, reply: Reply) -> tuple[int, int]:
    """Prompt and completion tokens where the server reports none, four characters a token."""
    return max(1, _prompt_tokens(call)), len(reply.text) // 4


def _prompt_tokens(call: Call) -> int:
    characters = sum(len(message.text) for message in call.messages)
    images = sum(len(message.images) for message in call.messages)
    return characters // 4 + IMAGE_TOKENS * images
