"""Structured answers out of model text: the shapes, their JSON schemas, parsing and mild repair.

The last JSON object in the text that fits the shape counts, so an echo of the asked-for format or thinking aloud
before the answer does no harm. What was cut off is never completed: that is `ReplyError`, and the caller asks again.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from intersafe.records import Refusal

Text = Annotated[str, Meta(min_length=1, max_length=1200)]
Reason = Annotated[str, Meta(max_length=2400)]
Score10 = Annotated[int, Meta(ge=0, le=10)]
Score5 = Annotated[int, Meta(ge=1, le=5)]


class Answer(msgspec.Struct, frozen=True):
    """A structured answer."""


class PlanAnswer(Answer, frozen=True, forbid_unknown_fields=True):
    """planner/decompose."""

    steps: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=16)]


class StepAnswer(Answer, frozen=True, forbid_unknown_fields=True):
    """planner/rewrite."""

    step: Text


class StepScoreAnswer(Answer, frozen=True):
    """judge/step."""

    relevance: Score10
    association: Score10
    harmless: Score10
    reason: Reason = ""


class MessageAnswer(Answer, frozen=True):
    """attacker/*."""

    message: Annotated[str, Meta(min_length=1, max_length=4000)]
    rationale: Reason = ""


class VerdictAnswer(Answer, frozen=True):
    """judge/turn. A model may not answer `undetermined`: that is what we call an answer that is none."""

    safety: Literal["safe", "unsafe"]
    refusal: Refusal
    harmless: Score5
    helpful: Score5
    reason: Reason = ""


class CheckAnswer(Answer, frozen=True):
    """judge/dialogue."""

    risk: bool
    coherent: bool
    reason: Reason = ""


class Schema(NamedTuple):
    """A named JSON schema, as `response_format` wants it."""

    name: str
    schema: dict[str, Any]


class ReplyError(ValueError):
    """The text holds no answer of the asked-for shape."""


A = TypeVar("A", bound=Answer)


def schema_of(kind: type[Answer], items: int | None = None) -> Schema:
    """The JSON schema of an answer: all fields required, bounded, no others; `items` fixes a list's length."""
    (_, parts) = msgspec.json.schema_components([kind])
    schema = dict(next(iter(parts.values())))
    schema.pop("title", None)
    schema.pop("description", None)
    properties = {name: {k: v for k, v in p.items() if k != "default"} for name, p in schema["properties"].items()}
    if items is not None:
        for prop in properties.values():
            if prop.get("type") == "array":
                prop.update(minItems=items, maxItems=items)
    name = kind.__name__.removesuffix("Answer").lower()
    return Schema(
        name, {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    )


def parse(text: str, kind: type[A]) -> A:
    """The last answer of that shape in the text; `ReplyError` says what is wrong with it."""
    problem = "no JSON object in the answer"
    for candidate in _objects(text):
        for attempt in (candidate, _repaired(candidate)):
            try:
                return msgspec.json.decode(attempt, type=kind)
            except msgspec.ValidationError as error:
                problem = str(error)
                break
            except (msgspec.DecodeError, UnicodeError) as error:
                problem = f"not JSON: {error}"
    if problem.startswith("no JSON") and "{" in text:
        problem = "the JSON object is not closed"
    raise ReplyError(problem)


def _objects(text: str) -> Iterator[str]:
    """The outermost `{...}` spans, last first; quotes are respected, and a brace that never closes is passed over."""
    stripped = text.strip()
    if stripped.startswith("{") and stripped.endswith("}") and stripped.find("{", 1) < 0:
        yield stripped
        return
    spans: list[str] = []
    at = 0
    while (start := text.find("{", at)) >= 0:
        end = _closing(text, start)
        if end < 0:
            at = start + 1
        else:
            spans.append(text[start:end])
            at = end
        if len(spans) > 64:
            spans = spans[-32:]
    yield from reversed(spans)


_MARK = re.compile(r'["{}\\]')
_LONGEST = 65_536


def _closing(text: str, start: int) -> int:
    """The place behind the brace that closes the one at `start`, or -1; looks at most 64 KiB ahead."""
    depth, quoted, at = 0, False, start
    while (mark := _MARK.search(text, at, start + _LONGEST)) is not None:
        at = mark.end()
        match mark[0]:
            case "\\":
                at += 1 if quoted else 0
            case '"':
                quoted = not quoted
            case "{" if not quoted:
                depth += 1
            case "}" if not quoted:
                depth -= 1
                if depth == 0:
                    return at
    return -1


_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_PYTHON_WORD = re.compile(r"(?<=[:\[,\s])(True|False|None)(?=\s*[,}\]])")
_IN_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _repaired(text: str) -> str:
    """Small slips put right: raw line breaks in strings, trailing commas, Python's True, False and None."""
    text = _IN_STRING.sub(lambda m: m[0].replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t"), text)
    text = _TRAILING_COMMA.sub(r"\1", text)
    return _PYTHON_WORD.sub(lambda m: {"True": "true", "False": "false", "None": "null"}[m[1]], text)
