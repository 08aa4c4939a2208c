"""What `doctor` asks a server, and what its answers show: a dozen small questions, each built as a run builds its own.

Nothing that a model wrote and no key goes into a finding, only what they show and the server's own words of refusal.
"""

import asyncio
import base64
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from intersafe.doctor.client import SEED, ChatLine, Line, as_colour, user
from intersafe.errors import CallFailed, InputError
from intersafe.images.store import normalise
from intersafe.models.base import Reply
from intersafe.models.http.faults import UNREADABLE, Away, Fault, Overloaded, TooSlow, Transient, remedy_for
from intersafe.models.http.images import SMALL_PICTURE
from intersafe.recipe.sections import Painter
from intersafe.records import Message
from intersafe.replies import Answer
from intersafe.wording import nearest

PICTURE_TIMEOUTS = 6
"""A picture may take so many time-outs of a question."""
COLOURS = ("red", "blue", "green", "black")
_WHICH = "Which colour is the picture? Answer with one word."

Status = Literal["ok", "info", "warn", "FAIL"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at; `remedy` is empty where nothing is to be done."""

    status: Status
    what: str
    says: str
    remedy: str = ""


@dataclass(frozen=True)
class Wants:
    """What the recipe needs of a server."""

    images: int
    """Most images of a dialogue; 0 where neither its seeds nor a painter have any."""
    schema: bool
    """True if a role asks it for JSON by schema."""
    usage: bool
    """True if a budget or a quota counts its tokens."""


class OddAnswer(Answer, frozen=True, forbid_unknown_fields=True):
    """What nobody answers to a question about the weather unless a schema holds."""

    word: Literal["quillwort", "zephyrine", "ombrometer"]
    number: Annotated[int, Meta(ge=7310, le=7319)]


class _Listed(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Listed]


class _Choices(msgspec.Struct):
    choices: list[msgspec.Raw]


class _Image(msgspec.Struct):
    b64_json: str | None = None
    url: str | None = None


class _Images(msgspec.Struct):
    data: list[_Image]


# --- the questions ---------------------------------------------------------------------------------------------------


async def probe_chat(line: ChatLine, wants: Wants) -> list[Finding]:
    """What a chat server does with each kind of question; one finding alone where it does not answer the first."""
    names, hello = await asyncio.gather(_names(line), _hello(line))
    if not isinstance(hello, tuple):
        return [_no_answer(line, hello, names)]
    reply, seconds = hello
    needed: Status = "FAIL" if wants.images else "warn"
    several: Status = "FAIL" if wants.images > 1 else "info"
    shared = f"vllm: --limit-mm-per-prompt '{{\"image\": {wants.images}}}'; or lower `images.max`"
    checks = [
        _tried("finish", _finish(line), "info", ""),
        _tried("images", _images(line), needed, "serve a vision-language model, or name one"),
        _tried("several", _several(line, max(2, min(wants.images, 16))), several, shared),
        _tried("earlier", _earlier(line), needed, "a chat template that takes images in every turn"),
        _tried("schema", _schema(line, wants), "FAIL" if wants.schema else "info", "set `json_schema: false`"),
        _tried("n", _n(line), "info", ""),
        _tried("seed", _seed(line), "info", ""),
    ]
    if line.member.send_images == "uuid":
        checks.append(_tried("uuid", _uuid(line), "warn", "set `send_images: data`"))
    first = [_answers(reply, seconds), _named(line, names), _usage(reply, wants)]
    return first + list(await asyncio.gather(*checks))


async def _tried(what: str, check: Awaitable[Finding], status: Status, remedy: str) -> Finding:
    """The finding of a check; of this status and with this remedy where the server does not do what it asks."""
    try:
        return await check
    except Overloaded as error:
        return Finding("warn", what, f"no telling, it is too busy: {error}", "run doctor again when it is idle")
    except TooSlow as error:
        return Finding(status, what, str(error), "give it longer: --timeout")
    except CallFailed as error:
        return Finding(status, what, f"refused: {error.detail}", "" if status == "info" else remedy)
    except Fault as error:
        if error.status:
            return Finding(status, what, f"fails: {error}", "" if status == "info" else remedy)
        return Finding(status, what, str(error), "see the server's log, and run doctor again")


async def _names(line: Line) -> list[str] | str:
    """The models that the server lists, or why it lists none."""
    try:
        listed = msgspec.json.decode(await line.send("/models"), type=_Models)
    except (CallFailed, Fault) as error:
        return error.detail if isinstance(error, CallFailed) else str(error)
    except UNREADABLE:
        return "unreadable list"
    return [line.clean(model.id) for model in listed.data]


async def _hello(line: ChatLine) -> tuple[Reply, float] | Fault | CallFailed:
    """The first answer and the seconds that it took, or what came instead."""
    clock = asyncio.get_running_loop().time
    began = clock()
    try:
        return await line.ask(user("Say hello."), most=16), clock() - began
    except (CallFailed, Fault) as error:
        return error


def _no_answer(line: Line, error: Fault | CallFailed, names: list[str] | str) -> Finding:
    """Why nobody answers, and what can be done."""
    words = line.clean(error.detail if isinstance(error, CallFailed) else str(error))
    status = 0 if isinstance(error, CallFailed) else error.status
    name = line.model.spec.model
    if isinstance(names, list) and name not in names and (status == 404 or isinstance(error, CallFailed)):
        return Finding("FAIL", "model", f"no {name!r} there{nearest(name, names)} ({words})", "mend the model's name")
    if status in (401, 403):
        return Finding("FAIL", "key", f"not accepted ({words})", remedy_for(Fault("", status), line.model))
    if isinstance(error, CallFailed):
        return Finding(
            "FAIL", "answers", f"the simplest request is refused: {words}", "`extra` can change what is sent"
        )
    if isinstance(error, Overloaded):
        return Finding("warn", "answers", f"no telling, it is too busy: {words}", "run doctor again when it is idle")
    if isinstance(error, TooSlow):
        remedy = "is it still loading? give it longer with --timeout; if not, start it again"
    elif isinstance(error, Away) and not status:
        remedy = "start the server, or mend its URL"
    elif isinstance(error, Transient) and not status:
        remedy = "is an OpenAI-compatible server behind this URL, and nothing else?"
    else:
        remedy = remedy_for(error, line.model)
    return Finding("FAIL", "answers", words, remedy)


def _answers(reply: Reply, seconds: float) -> Finding:
    says = f"a small question in {seconds:.2f} s"
    if reply.finish == "blocked":
        return Finding("warn", "answers", f"{says}, but it says that a filter stopped it", "see its finish_reason")
    if not reply.text.strip():
        remedy = "if it thinks first: extra: {chat_template_kwargs: {enable_thinking: false}}, or a larger max_tokens"
        return Finding("warn", "answers", f"{says}, but without a word in 16 tokens", remedy)
    return Finding("ok", "answers", says)


def _named(line: Line, names: list[str] | str) -> Finding:
    name = line.model.spec.model
    if isinstance(names, str):
        return Finding("info", "model", f"the server lists no models ({names})")
    if name in names:
        return Finding("ok", "model", f"{name!r} is listed")
    says = f"{name!r} is answered for but not listed{nearest(name, names)}"
    return Finding("warn", "model", says, "check that the right model answers")


def _usage(reply: Reply, wants: Wants) -> Finding:
    if all(reply.tokens):
        return Finding("ok", "usage", "tokens are reported")
    says = "no tokens are reported: budgets, quotas and `stats` go by an estimate of four characters a token"
    return (
        Finding("warn", "usage", says, "bound the run by `max_time`") if wants.usage else Finding("info", "usage", says)
    )


async def _finish(line: ChatLine) -> Finding:
    reply = await line.ask(user("Count from one to one hundred."), most=1)
    if reply.finish == "length":
        return Finding("ok", "finish", "an answer that is cut says so")
    says = f"an answer of one token ends with {reply.finish!r}, not 'length'"
    return Finding("warn", "finish", f"{says}: cut answers are taken for whole ones", "keep `max_tokens` high")


def _compared(what: str, red: Reply, blue: Reply, where: str) -> Finding:
    """What two answers show that differ in nothing but the colour of an image."""
    texts = [reply.text.strip().lower() for reply in (red, blue)]
    if not any(texts):
        return Finding("warn", what, "no telling: no text within 64 tokens", "see what `answers` says")
    if texts[0] == texts[1]:
        says = f"{where} seem to be ignored: red and blue get the same answer at temperature 0"
        return Finding("warn", what, says, "is it a vision-language model, with the chat template that came with it?")
    if "red" in texts[0] and "blue" in texts[1]:
        return Finding("ok", what, f"{where} are seen: red and blue are told apart")
    says = f"{where}: red and blue get different answers, which name neither"
    return Finding("warn", what, says, "look at a few talks before a long run")


async def _images(line: ChatLine) -> Finding:
    red, blue = await asyncio.gather(*(line.ask(user(_WHICH, colour)) for colour in COLOURS[:2]))
    return _compared("images", red, blue, "images")


async def _several(line: ChatLine, count: int) -> Finding:
    colours = [COLOURS[i % len(COLOURS)] for i in range(count)]
    await line.ask(user("Which colours are the pictures?", *colours))
    return Finding("ok", "several", f"{count} images in one message are taken")


async def _earlier(line: ChatLine) -> Finding:
    def talk(colour: str) -> tuple[Message, ...]:
        later = "Which colour was the picture? Answer with one word."
        return user("Here is a picture.", colour), Message("assistant", "I see it."), user(later)

    red, blue = await asyncio.gather(*(line.ask(*talk(colour)) for colour in COLOURS[:2]))
    return _compared("earlier", red, blue, "images in an earlier turn")


async def _schema(line: ChatLine, wants: Wants) -> Finding:
    reply = await line.ask(user("What is the weather like? Answer in a sentence."), most=128, answer=OddAnswer)
    try:
        msgspec.json.decode(reply.text, type=OddAnswer)
    except UNREADABLE:
        pass
    else:
        return Finding("ok", "schema", "a JSON schema is kept to")
    if reply.finish == "length":
        says = "the answer ran past 128 tokens within the schema"
        return Finding("warn" if wants.schema else "info", "schema", says, "vllm: disable_any_whitespace")
    if not wants.schema:
        return Finding("info", "schema", "schema ignored with HTTP 200; no role that is asked here sends one")
    remedy = "set `json_schema: false`: answers are then asked by prompt and repaired"
    return Finding("warn", "schema", "schema ignored with HTTP 200", remedy)


async def _n(line: ChatLine) -> Finding:
    data = await line.raw(user("Name an animal."), temperature=1.0, most=16, n=2)
    try:
        count = len(msgspec.json.decode(data, type=_Choices).choices)
    except UNREADABLE as error:
        raise Transient(f"unreadable answer: {error}") from None
    if count == 2:
        return Finding("info", "n", "n=2 gives two answers; intersafe asks for one at a time")
    return Finding("info", "n", f"n ignored: n=2 gives {count}; intersafe asks for one at a time")


async def _seed(line: ChatLine) -> Finding:
    question = user("Name an animal, a tool and a city, each one that few would name.")
    one, same, other = await asyncio.gather(
        *(line.ask(question, temperature=1.0, seed=seed, most=32) for seed in (SEED, SEED, SEED + 1))
    )
    if one.text != same.text:
        return Finding("info", "seed", "one seed gave two texts: a second run differs from the first")
    if one.text == other.text:
        return Finding("info", "seed", "no telling: another seed gives the same text too")
    return Finding("info", "seed", "the same seed gives the same text")


async def _uuid(line: ChatLine) -> Finding:
    name = "intersafe-doctor-red"
    await line.ask(user(_WHICH, "red"), part=lambda colour: {**as_colour(colour), "uuid": name})
    await line.ask(user(_WHICH, "red"), part=lambda _: {"type": "image_url", "image_url": None, "uuid": name})
    return Finding("ok", "uuid", "an image is remembered by its uuid")


# --- the painter -----------------------------------------------------------------------------------------------------


async def probe_painter(line: Line, painter: Painter) -> list[Finding]:
    """Whether one picture comes back; a small one of one step, or of the recipe's size where that is refused."""
    drawn = await _drawn(line, painter, "256x256")
    if isinstance(drawn, CallFailed):
        drawn = await _drawn(line, painter, painter.size)
    if not isinstance(drawn, tuple):
        return [_no_answer(line, drawn, await _names(line))]
    data, seconds = drawn
    try:
        image = (msgspec.json.decode(data, type=_Images).data or [_Image()])[0]
    except UNREADABLE:
        image = _Image()
    if not image.b64_json:
        says = "it sends a link, not the picture" if image.url else "HTTP 200 without a picture"
        return [Finding("FAIL", "picture", says, "have it answer `response_format: b64_json`")]
    try:
        found = normalise(base64.b64decode(image.b64_json), at="the picture")
    except (InputError, ValueError):
        return [Finding("FAIL", "picture", "what it sends is no picture", "is it a text-to-image server?")]
    return [Finding("ok", "picture", f"{found.width}x{found.height} in {seconds:.2f} s")]


async def _drawn(line: Line, painter: Painter, size: str) -> tuple[bytes, float] | Fault | CallFailed:
    """The body of the answer and the seconds that it took, or what came instead."""
    clock = asyncio.get_running_loop().time
    began = clock()
    try:
        return await line.send("/images/generations", _picture(painter, size)), clock() - began
    except (CallFailed, Fault) as error:
        return error


def _picture(painter: Painter, size: str) -> bytes:
    body = {
        "model": painter.spec.model,
        "prompt": SMALL_PICTURE,
        "n": 1,
        "size": size,
        "response_format": "b64_json",
        "seed": 0,
        "num_inference_steps": None if painter.steps is None else 1,
    } | painter.extra
    return msgspec.json.encode({name: value for name, value in body.items() if value is not None})
