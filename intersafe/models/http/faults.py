"""What can come back in place of a reply, as exceptions of few kinds, and what the user can do about each."""

import re
from collections.abc import Mapping

import msgspec

from intersafe.errors import CallFailed
from intersafe.models.http.quotas import Words, words_of
from intersafe.recipe.sections import Model

FILTERED = ("content_filter", "content_policy_violation", "data_inspection_failed", "moderation_blocked")
_UNPAID = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_OVERLOADED = (429, 503, 529)
_PASSING = (408, 409, 425)
_AWAY = (401, 402, 403, 404, 405, 407)
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises; the last one for thousands of brackets in one another."""
_READ = 20_000  # bytes of an error body that are looked at where it is no JSON


class Fault(Exception):
    """No reply came, and the call may be tried again; `status` is 0 where no HTTP answer came."""

    def __init__(self, what: str, status: int = 0) -> None:
        """`sent`, set by who sent it, is the moment of the loop's clock at which the request started."""
        super().__init__(what)
        self.status, self.sent = status, 0.0


class Passing(Fault):
    """Worth another try at once; a reader raises it where a 200 cannot be read."""


class TooSlow(Passing):
    """No answer in time: like a packet that is lost, it speaks of overload."""


class Away(Fault):
    """Nobody there, or nobody who answers to us."""


class Overloaded(Fault):
    """Too many requests; `words` is what the server says about when and how many."""

    def __init__(self, what: str, status: int, words: Words) -> None:
        super().__init__(what, status)
        self.words = words


class Moved(Exception):
    """The replica was taken out before the call was answered."""


def raise_for(status: int, headers: Mapping[str, str], data: bytes, what: str, code: str) -> None:
    """Raises what an answer with a status other than 200 means; returns where a filter stopped the call.

    `what` are the words for the user, `code` the server's own (`error_of`).
    """
    if status == 400 and code in FILTERED:
        return
    if code in _UNPAID and status in (400, 403, 429):
        raise Away(what, 402)
    if status in _OVERLOADED:
        words = words_of(headers, data[:_READ].decode("utf-8", "replace"))
        if words.too_large:
            raise CallFailed("endpoint", "bad_request", what)
        raise Overloaded(what, status, words)
    if status in _AWAY or status < 400:
        raise Away(what, status)
    if status in _PASSING or status >= 500:
        raise Passing(what, status)
    raise refusal_of(what, code)


def error_of(data: bytes) -> tuple[str, str]:
    """The server's own words and code, from the usual places of an error body."""
    try:
        body = msgspec.json.decode(data)
    except UNREADABLE:
        return data[:_READ].decode("utf-8", "replace"), ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error), ""
    return str(error.get("message", error)), str(error.get("code") or error.get("type") or "")


def remedy_for(fault: Fault, model: Model) -> str:
    """What the user can do."""
    if fault.status in (401, 403):
        return (
            f"is the key in {model.key} right?" if model.key else "name the variable of the key (`key:` in the recipe)"
        )
    if isinstance(fault, Overloaded):
        return "lower the member's `concurrency`"
    if isinstance(fault, TooSlow):
        return "bring it back, or lower `concurrency` or raise `timeout`"
    if fault.status in (402, 407):
        return "settle that with the account or the proxy"
    name = model.spec.model
    return f"check the URL and the model's name {name!r}" if 0 < fault.status < 500 else "bring it back"


_TOO_LONG = re.compile(
    r"context_length_exceeded|string_above_max_length|maximum (?:context|model|sequence) length"
    r"|context window|exceeds? (?:the )?(?:model's )?(?:max(?:imum)? )?(?:context|sequence) (?:length|size)"
    r"|input is too long|prompt is too long|longer than the (?:maximum )?(?:model|context)",
    re.IGNORECASE,
)


_TOO_MANY_WANTED = re.compile(r"max_(completion_)?tokens.{0,40}too (large|many)", re.IGNORECASE)
"""The answer's room and not the prompt: a setting, and no fault of the talk."""


def refusal_of(words: str, code: str = "") -> CallFailed:
    """What the words mean, and the server's code, by which a server or a library turns one call down for good."""
    is_long = _TOO_LONG.search(f"{code} {words}") and not _TOO_MANY_WANTED.search(words)
    return CallFailed("endpoint", "too_long" if is_long else "bad_request", words)


_SIGHT = re.compile(
    r"at most (\d+) image|not a multimodal model|image input|(?:support|accept|process)\w* image"
    r"|image_url.{0,40}support",
    re.IGNORECASE,
)


_SCHEMA = re.compile(r"response_format|schema|structured.?output|guided|grammar", re.IGNORECASE)


def is_about_schema(error: Exception) -> bool:
    """True if a call was turned down for its JSON schema, by the server's words."""
    return isinstance(error, CallFailed) and error.reason == "bad_request" and bool(_SCHEMA.search(error.detail))


def hint_for(words: str) -> str:
    """What helps against a refusal that the user can do something about; empty where nothing is known."""
    if _TOO_MANY_WANTED.search(words):
        return "lower the member's `max_tokens`, or raise `max_model_len` in `serve`"
    if _TOO_LONG.search(words):
        return "raise `max_model_len` in `serve`, or lower `turns.max` or `images.max`"
    if found := _SIGHT.search(words):
        if found[1] not in (None, "0"):
            return "raise `images` in `serve` (vllm: --limit-mm-per-prompt), or lower `images.max`"
        return "name a vision-language model, or seeds without images and no painter"
    return ""
