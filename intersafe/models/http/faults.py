"""What can come back in place of a reply, as exceptions of few kinds, and what the user can do about each.

The kinds are a policy and stay few; which code or wording of which server means which kind is data in `quirks.py`.
"""

from collections.abc import Mapping

import msgspec

from intersafe.errors import CallFailed
from intersafe.models.http import quirks
from intersafe.models.http.throttling import Throttle, throttle_of
from intersafe.recipe.sections import Model

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises; `RecursionError` for thousands of nested brackets."""
_READ = 20_000  # bytes of an error body that are looked at where it is not JSON


class Fault(Exception):
    """No reply came, and the call may be tried again."""

    def __init__(self, what: str, status: int = 0, pause: float = 0.0) -> None:
        """`what` is for the user. `status` is 0 without an HTTP answer, `pause` the seconds that the server asks for.

        `sent`, set by the sender, is when the request started, by the event loop's clock.
        """
        super().__init__(what)
        self.status, self.pause, self.sent = status, pause, 0.0


class Transient(Fault):
    """Worth another try at once; a reader raises it where a 200 cannot be read."""


class TooSlow(Transient):
    """No answer in time. It is a sign of overload, as a lost packet is."""


class Away(Fault):
    """The service cannot be reached, or answers no call of ours."""


class Overloaded(Fault):
    """Too many requests; `throttle` is what the server says about when and how many."""

    def __init__(self, what: str, status: int, throttle: Throttle) -> None:
        super().__init__(what, status, throttle.pause)
        self.throttle = throttle


class Moved(Exception):
    """The replica was taken out before the call was answered; another one may answer it."""


def raise_for(status: int, headers: Mapping[str, str], data: bytes, what: str, code: str) -> None:
    """Raises what an answer with a status other than 200 means; returns where a filter blocked the call.

    `what` is the message for the user, `code` the server's own (`error_of`).
    """
    if status == 400 and code in quirks.FILTER_CODES:
        return
    if code in quirks.UNPAID_CODES and status in (400, 403, 429):
        raise Away(what, 402)
    if status in quirks.OVERLOADED:
        throttle = throttle_of(headers, data[:_READ].decode("utf-8", "replace"))
        if throttle.too_large:
            raise CallFailed("endpoint", "bad_request", what)
        raise Overloaded(what, status, throttle)
    if status in quirks.AWAY or status < 400:
        raise Away(what, status)
    if status in quirks.TRANSIENT or status >= 500:
        raise Transient(what, status)
    raise refusal_of(what, code)


def error_of(data: bytes) -> tuple[str, str]:
    """The server's own message and code, from the usual places of an error body."""
    try:
        body = msgspec.json.decode(data)
    except UNREADABLE:
        return data[:_READ].decode("utf-8", "replace"), ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error), ""
    return str(error.get("message", error)), str(error.get("code") or error.get("type") or "")


def message_in(status: int, data: bytes) -> tuple[str, str]:
    """As `error_of`, without the message of a 401 or 403: some servers repeat part of the key in it."""
    message, code = error_of(data)
    return "" if status in (401, 403) else message, code


def is_refusal(status: int) -> bool:
    """True if the status refuses this one request for good; False where another moment or key may help."""
    others = (*quirks.AWAY, *quirks.TRANSIENT, *quirks.OVERLOADED)
    return 400 <= status < 500 and status not in others


def refusal_of(message: str, code: str = "") -> CallFailed:
    """A call that a server or a library refuses for good: `too_long` by its words, or else `bad_request`."""
    is_long = quirks.TOO_LONG.search(f"{code} {message}") and not quirks.TOO_ROOMY.search(message)
    return CallFailed("endpoint", "too_long" if is_long else "bad_request", message)


def refused_field(error: Exception, fields: frozenset[str] | set[str]) -> quirks.OptionalField | None:
    """The one of the sent optional `fields` that a refusal is about, by the server's words."""
    if not isinstance(error, CallFailed) or error.reason != "bad_request":
        return None
    optional = (field for field in quirks.OPTIONAL_FIELDS if field.name in fields)
    return next((field for field in optional if field.refusal.search(error.detail)), None)


# --- what the user can do --------------------------------------------------------------------------------------------


def remedy_for(fault: Fault, model: Model) -> str:
    """What the user can do about a service that is away or overloaded."""
    if fault.status in (401, 403):
        return key_remedy(model)
    if isinstance(fault, Overloaded):
        return "lower the member's `concurrency`"
    if isinstance(fault, TooSlow):
        return "bring it back, or lower `concurrency` or raise `timeout`"
    if fault.status in (402, 407):
        return "settle that with the account or the proxy"
    name = model.spec.model
    return f"check the URL and the model's name {name!r}" if 0 < fault.status < 500 else "bring it back"


def key_remedy(model: Model) -> str:
    """What the user can do about a 401 or 403."""
    return f"is the key in {model.key} right?" if model.key else "name the variable of the key (`key:` in the recipe)"


def hint_for(message: str) -> str:
    """What the user can do about a refusal; empty where nothing is known."""
    if quirks.TOO_ROOMY.search(message):
        return "lower the member's `max_tokens`, or raise `max_model_len` in `serve`"
    if quirks.TOO_LONG.search(message):
        return "raise `max_model_len` in `serve`, or lower `turns.max` or `images.max`"
    if found := quirks.NO_IMAGES.search(message):
        if found[1] not in (None, "0"):
            return "raise `images` in `serve` (vllm: --limit-mm-per-prompt), or lower `images.max`"
        return "name a vision-language model, or seeds without images and no painter"
    return ""
