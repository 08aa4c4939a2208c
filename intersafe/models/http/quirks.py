"""What single servers do in their own way, as data: status codes, error codes, words, field names, headers.

How to add a quirk of a server: find its row here. Add a line to the table, with the server's name in a comment, and a
case to the test. The code that reads the tables need not change.

| a server ...                                         | table                                | test                   |
|------------------------------------------------------|--------------------------------------|------------------------|
| uses a status in its own way                         | `OVERLOADED`, `TRANSIENT`, `AWAY`    | `test_endpoint.py`     |
| names its content filter by another error code       | `FILTER_CODES`                       | `test_painter.py`      |
| names an unpaid bill by another error code           | `UNPAID_CODES`                       | `test_endpoint.py`     |
| turns a prompt, images or `max_tokens` down in words | `TOO_LONG`, `NO_IMAGES`, `TOO_ROOMY` | `test_capabilities.py` |
| refuses a field that a call can do without           | `OPTIONAL_FIELDS`                    | `test_capabilities.py` |
| ends an answer with a finish reason of its own       | `FINISH_REASONS`, `BROKEN_OFF`       | `test_endpoint.py`     |
| says in a header how long to wait                    | `PAUSE_MS_HEADERS`, `RESET_HEADERS`  | `test_quotas.py`       |
| says in words how long to wait, or its limits        | `PAUSES`, `LIMITS`, `REQUESTED`      | `test_quotas.py`       |

Patterns are searched in the server's error code and message, and ignore case.
"""

import re
from typing import NamedTuple

from intersafe.records import Finish


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


# --- status codes ----------------------------------------------------------------------------------------------------

OVERLOADED = (429, 503, 529)
"""Too many requests. 529 is Anthropic's."""
TRANSIENT = (408, 409, 425)
"""Worth another try, as every 5xx that is not in `OVERLOADED`."""
AWAY = (401, 402, 403, 404, 405, 407)
"""Key, account, path or proxy: no call is answered until somebody repairs it."""

# --- error codes, from the `code` or `type` of the error body --------------------------------------------------------

FILTER_CODES = (
    "content_filter",  # Azure OpenAI
    "content_policy_violation",  # OpenAI images
    "data_inspection_failed",  # Alibaba DashScope
    "moderation_blocked",  # OpenAI gpt-image-1
)
"""A 400 with one of these is an outcome: the call was blocked."""
UNPAID_CODES = (
    "insufficient_quota",  # OpenAI, as a 429
    "billing_hard_limit_reached",
    "billing_not_active",
)
"""With status 400, 403 or 429 these mean an unpaid bill: the service is away until it is paid."""
QUEUE_FULL = "token_limit_exceeded"
"""A batch endpoint with this code holds as many tokens as the account may have there (OpenAI)."""

# --- words of a refusal ----------------------------------------------------------------------------------------------

TOO_LONG = _any_of(
    "context_length_exceeded",  # OpenAI, a code
    "string_above_max_length",  # OpenAI, a code
    r"maximum (?:context|model|sequence) length",  # OpenAI, vLLM
    r"context window",
    r"exceeds? (?:the )?(?:model's )?(?:max(?:imum)? )?(?:context|sequence) (?:length|size)",
    r"input is too long",
    r"prompt is too long",  # Anthropic
    r"longer than the (?:maximum )?(?:model|context)",  # vLLM
)
"""The prompt does not fit into the model's context."""
TOO_ROOMY = _any_of(r"max_(completion_)?tokens.{0,40}too (large|many)")
"""`max_tokens` is too large: a setting is wrong and not the prompt. It counts before `TOO_LONG`."""
NO_IMAGES = _any_of(
    r"at most (\d+) image",  # vLLM; group 1 is the limit
    r"not a multimodal model",  # vLLM
    r"image input",
    r"(?:support|accept|process)\w* image",
    r"image_url.{0,40}support",
)
"""The model takes no images, or fewer."""

# --- fields that an answer can do without ----------------------------------------------------------------------------


class OptionalField(NamedTuple):
    """A field of the request body that some servers refuse: the call is then sent again without it."""

    name: str
    refusal: re.Pattern[str]
    """Words of the 4xx by which a server refuses the field."""
    notice: str
    """What the user is told once; `{model}` and `{why}` are filled in."""


OPTIONAL_FIELDS = (
    OptionalField(
        "response_format",
        _any_of("response_format", "schema", "structured.?output", "guided", "grammar"),
        "{model} refuses JSON schemas ({why}): the prompt alone asks for JSON from now on; "
        "`json_schema: false` in the recipe says so from the start",
    ),
)

# --- finish reasons --------------------------------------------------------------------------------------------------

FINISH_REASONS: dict[str, Finish] = {
    **dict.fromkeys(
        ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "tool_calls", "function_call", ""), "stop"
    ),
    **dict.fromkeys(("length", "max_tokens", "model_length", "max_length"), "length"),
}
"""In lower case. Any other reason is a block (`content_filter`, `safety`, `recitation`)."""
BROKEN_OFF = ("abort", "error")
"""The server broke off: the call is tried again (vLLM)."""

# --- rate limits -----------------------------------------------------------------------------------------------------

PAUSE_MS_HEADERS = ("retry-after-ms",)
"""Milliseconds until the next request. They count before `Retry-After`."""
RESET_HEADERS = (
    ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
)
"""What is left of a limit, and the time until it is whole again (`6m0s`): it counts where nothing is left (OpenAI)."""
PAUSES = (
    re.compile(r'"retry_?delay"\s*:\s*"(\d+(?:\.\d+)?s)"', re.IGNORECASE),  # Google
    re.compile(  # OpenAI, Azure, Groq
        r"\b(?:try again|retry)\b[\w ]{0,20}?\b(?:in|after)\s+(\d[\d.]*\s*[a-z][\da-z.]*)", re.IGNORECASE
    ),
)
"""Words with a span of time in group 1; they count where no header names one."""
LIMITS = re.compile(  # OpenAI: "on tokens per min (TPM): Limit 30000"
    r"\b(requests|tokens) per min(?:ute)?\b\s*(?:\((?:RPM|TPM)\))?[.:,]?\s*Limit:?\s*(\d[\d,]*)", re.IGNORECASE
)
"""What is limited (group 1), and how many of it a minute (group 2)."""
REQUESTED = re.compile(  # OpenAI: "Limit 30000, Requested 45000"
    r"\btokens per min\b.{0,40}?Limit:?\s*(\d+),\s*(?:Used:?\s*\d+,\s*)?Requested:?\s*(\d+)", re.IGNORECASE
)
"""Tokens a minute (group 1) and those that this one request asks for (group 2)."""
