"""Checks what a chat server can do: a dozen small requests, each built as a run builds its own.

A finding says what an answer shows. It holds no text of a model and no key, only the server's own error message.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from intersafe.doctor.client import SEED, ChatProbeClient, ProbeClient, colour_part, user_message
from intersafe.doctor.findings import Finding, Status
from intersafe.errors import CallFailed
from intersafe.models.base import Reply
from intersafe.models.http.faults import UNREADABLE, Away, Fault, Overloaded, TooSlow, Transient, remedy_for
from intersafe.records import Message
from intersafe.replies import Answer
from intersafe.wording import nearest

COLOURS = ("red", "blue", "green", "black")
_WHICH = "Which colour is the picture? Answer with one word."
_CHECK_NAME = "correct the model's name"


@dataclass(frozen=True)
class ServerNeeds:
    """What the recipe needs of a server."""

    images: int
    """Most images of a dialogue; 0 if neither its seeds nor a painter have any."""
    schema: bool
    """True if a role asks the server for JSON by schema."""
    usage: bool
    """True if a budget or a quota counts the server's tokens."""


class OddAnswer(Answer, frozen=True, forbid_unknown_fields=True):
    """An answer that nobody gives to a question about the weather unless a schema enforces it."""

    word: Literal["quillwort", "zephyrine", "ombrometer"]
    number: Annotated[int, Meta(ge=7310, le=7319)]


class _Listed(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Listed]


class _Choices(msgspec.Struct):
    choices: list[msgspec.Raw]


async def probe_chat(client: ChatProbeClient, needs: ServerNeeds) -> list[Finding]:
    """The findings of all checks of a chat server; a single finding if it does not answer the first request."""
    names, first = await asyncio.gather(listed_models(client), _first_answer(client))
    if not isinstance(first, tuple):
        return [no_answer(client, first, names)]
    reply, seconds = first
    images_needed: Status = "FAIL" if needs.images else "warn"
    several_needed: Status = "FAIL" if needs.images > 1 else "info"
    limit = f"vllm: --limit-mm-per-prompt '{{\"image\": {needs.images}}}'; or lower `images.max`"
    checks = [
        _tried("finish", _finish(client), "info", ""),
        _tried("images", _images(client), images_needed, "serve a vision-language model, or name one"),
        _tried("several", _several(client, max(2, min(needs.images, 16))), several_needed, limit),
        _tried("earlier", _earlier(client), images_needed, "use a chat template that accepts images in every turn"),
        _tried("schema", _schema(client, needs), "FAIL" if needs.schema else "info", "set `json_schema: false`"),
        _tried("n", _n(client), "info", ""),
        _tried("seed", _seed(client), "info", ""),
    ]
    if client.member.send_images == "uuid":
        checks.append(_tried("uuid", _uuid(client), "warn", "set `send_images: data`"))
    return [_answers(reply, seconds), _model(client, names), _usage(reply, needs), *await asyncio.gather(*checks)]


async def _tried(what: str, check: Awaitable[Finding], status: Status, remedy: str) -> Finding:
    """The finding of a check; one with this status and remedy if the server fails or refuses the request."""
    try:
        return await check
    except Overloaded as error:
        return Finding(
            "warn", what, f"cannot tell, the server is too busy: {error}", "run doctor again when it is idle"
        )
    except TooSlow as error:
        return Finding(status, what, str(error), "allow more time: --timeout")
    except CallFailed as error:
        return Finding(status, what, f"refused: {error.detail}", "" if status == "info" else remedy)
    except Fault as error:
        if error.status:
            return Finding(status, what, f"fails: {error}", "" if status == "info" else remedy)
        return Finding(status, what, str(error), "see the server's log, and run doctor again")


# --- does it answer? -------------------------------------------------------------------------------------------------


async def listed_models(client: ProbeClient) -> list[str] | str:
    """The names of the models that the server lists, or why it lists none."""
    try:
        listed = msgspec.json.decode(await client.send("/models"), type=_Models)
    except (CallFailed, Fault) as error:
        return error.detail if isinstance(error, CallFailed) else str(error)
    except UNREADABLE:
        return "unreadable list"
    return [client.clean(model.id) for model in listed.data]


async def _first_answer(client: ChatProbeClient) -> tuple[Reply, float] | Fault | CallFailed:
    """The first answer and the seconds that it took, or what came instead."""
    clock = asyncio.get_running_loop().time
    began = clock()
    try:
        return await client.ask(user_message("Say hello."), max_tokens=16), clock() - began
    except (CallFailed, Fault) as error:
        return error


def no_answer(client: ProbeClient, error: Fault | CallFailed, names: list[str] | str) -> Finding:
    """Why the server does not answer, and what to do; `names` comes from `listed_models`."""
    words = client.clean(error.detail if isinstance(error, CallFailed) else str(error))
    status = 0 if isinstance(error, CallFailed) else error.status
    name = client.model.spec.model
    if isinstance(names, list) and name not in names and (status == 404 or isinstance(error, CallFailed)):
        return Finding("FAIL", "model", f"no model {name!r} there{nearest(name, names)} ({words})", _CHECK_NAME)
    if status in (401, 403):
        return Finding("FAIL", "key", f"not accepted ({words})", remedy_for(Fault("", status), client.model))
    if isinstance(error, CallFailed):
        says = f"the simplest request is refused: {words}"
        return Finding("FAIL", "answers", says, "change what is sent by `extra`")
    if isinstance(error, Overloaded):
        says = f"cannot tell, the server is too busy: {words}"
        return Finding("warn", "answers", says, "run doctor again when it is idle")
    if isinstance(error, TooSlow):
        remedy = "if it is still loading, allow more time with --timeout; else restart it"
    elif isinstance(error, Away) and not status:
        remedy = "start the server, or correct its URL"
    elif isinstance(error, Transient) and not status:
        remedy = "check that an OpenAI-compatible server answers at this URL"
    else:
        remedy = remedy_for(error, client.model)
    return Finding("FAIL", "answers", words, remedy)


def _answers(reply: Reply, seconds: float) -> Finding:
    says = f"a small question in {seconds:.2f} s"
    if reply.finish == "blocked":
        return Finding("warn", "answers", f"{says}, but a filter stopped the answer", "see its finish_reason")
    if not reply.text.strip():
        remedy = (
            "for a reasoning model: extra: {chat_template_kwargs: {enable_thinking: false}}, or a larger max_tokens"
        )
        return Finding("warn", "answers", f"{says}, but without text in 16 tokens", remedy)
    return Finding("ok", "answers", says)


def _model(client: ProbeClient, names: list[str] | str) -> Finding:
    name = client.model.spec.model
    if isinstance(names, str):
        return Finding("info", "model", f"the server lists no models ({names})")
    if name in names:
        return Finding("ok", "model", f"{name!r} is listed")
    says = f"{name!r} answers but is not listed{nearest(name, names)}"
    return Finding("warn", "model", says, "check that the right model answers")


def _usage(reply: Reply, needs: ServerNeeds) -> Finding:
    if all(reply.tokens):
        return Finding("ok", "usage", "token counts are reported")
    says = "no token counts are reported: budgets, quotas and `stats` assume four characters a token"
    if needs.usage:
        return Finding("warn", "usage", says, "limit the run by `max_time`")
    return Finding("info", "usage", says)


# --- what can it do? -------------------------------------------------------------------------------------------------


async def _finish(client: ChatProbeClient) -> Finding:
    reply = await client.ask(user_message("Count from one to one hundred."), max_tokens=1)
    if reply.finish == "length":
        return Finding("ok", "finish", "a truncated answer is marked as such")
    says = f"an answer of one token ends with {reply.finish!r}, not 'length': truncated answers pass for whole ones"
    return Finding("warn", "finish", says, "keep `max_tokens` high")


def _compared(what: str, red: Reply, blue: Reply, where: str) -> Finding:
    """What two answers show whose requests differ only in the colour of an image."""
    texts = [reply.text.strip().lower() for reply in (red, blue)]
    if not any(texts):
        return Finding("warn", what, "cannot tell: no text within 64 tokens", "see what `answers` says")
    if texts[0] == texts[1]:
        says = f"{where} seem to be ignored: red and blue get the same answer at temperature 0"
        return Finding("warn", what, says, "check that it is a vision-language model with its own chat template")
    if "red" in texts[0] and "blue" in texts[1]:
        return Finding("ok", what, f"{where} are seen: red and blue are told apart")
    says = f"{where}: red and blue get different answers, which name neither"
    return Finding("warn", what, says, "read a few dialogues before a long run")


async def _images(client: ChatProbeClient) -> Finding:
    red, blue = await asyncio.gather(*(client.ask(user_message(_WHICH, colour)) for colour in COLOURS[:2]))
    return _compared("images", red, blue, "images")


async def _several(client: ChatProbeClient, count: int) -> Finding:
    colours = [COLOURS[i % len(COLOURS)] for i in range(count)]
    await client.ask(user_message("Which colours are the pictures?", *colours))
    return Finding("ok", "several", f"{count} images in one message are accepted")


async def _earlier(client: ChatProbeClient) -> Finding:
    def conversation(colour: str) -> tuple[Message, ...]:
        later = "Which colour was the picture? Answer with one word."
        return user_message("Here is a picture.", colour), Message("assistant", "I see it."), user_message(later)

    red, blue = await asyncio.gather(*(client.ask(*conversation(colour)) for colour in COLOURS[:2]))
    return _compared("earlier", red, blue, "images in an earlier turn")


async def _schema(client: ChatProbeClient, needs: ServerNeeds) -> Finding:
    question = user_message("What is the weather like? Answer in a sentence.")
    reply = await client.ask(question, max_tokens=128, answer=OddAnswer)
    try:
        msgspec.json.decode(reply.text, type=OddAnswer)
    except UNREADABLE:
        pass
    else:
        return Finding("ok", "schema", "answers follow a JSON schema")
    if reply.finish == "length":
        says = "the answer did not end within 128 tokens of the schema"
        return Finding("warn" if needs.schema else "info", "schema", says, "vllm: disable_any_whitespace")
    if not needs.schema:
        return Finding("info", "schema", "schema ignored with HTTP 200; no role at this server sends one")
    remedy = "set `json_schema: false`: prompts then ask for JSON, and answers are repaired"
    return Finding("warn", "schema", "schema ignored with HTTP 200", remedy)


async def _n(client: ChatProbeClient) -> Finding:
    data = await client.ask_raw(user_message("Name an animal."), temperature=1.0, max_tokens=16, n=2)
    try:
        count = len(msgspec.json.decode(data, type=_Choices).choices)
    except UNREADABLE as error:
        raise Transient(f"unreadable answer: {error}") from None
    if count == 2:
        return Finding("info", "n", "n=2 gives two answers; intersafe asks for one at a time")
    return Finding("info", "n", f"n ignored: n=2 gives {count}; intersafe asks for one at a time")


async def _seed(client: ChatProbeClient) -> Finding:
    question = user_message("Name an animal, a tool and a city, each one that few would name.")
    one, same, other = await asyncio.gather(
        *(client.ask(question, temperature=1.0, seed=seed, max_tokens=32) for seed in (SEED, SEED, SEED + 1))
    )
    if one.text != same.text:
        return Finding("info", "seed", "one seed gave two texts: a second run differs from the first")
    if one.text == other.text:
        return Finding("info", "seed", "cannot tell: another seed gives the same text too")
    return Finding("info", "seed", "the same seed gives the same text")


async def _uuid(client: ChatProbeClient) -> Finding:
    name = "intersafe-doctor-red"
    await client.ask(user_message(_WHICH, "red"), part=lambda colour: {**colour_part(colour), "uuid": name})
    await client.ask(user_message(_WHICH, "red"), part=lambda _: {"type": "image_url", "image_url": None, "uuid": name})
    return Finding("ok", "uuid", "the server keeps an image by its uuid")
