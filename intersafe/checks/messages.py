"""Rules on one user message: the stages apply them to the attacker's draft, the gate to the finished dialogue."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import zip_longest

from intersafe.recipe.gates import RuleSettings
from intersafe.records import Plan, Reason

_LEAST_GOAL = 12
"""Characters: a shorter folded goal or step occurs in honest messages by chance."""
_WORDS = re.compile(r"[^\W_]+")
_NOT_ASCII_WORDS = "".join(chr(code) if chr(code).isalnum() else " " for code in range(128))
_MARKUP = re.compile(r"[*`\"'\u2018\u2019\u201c\u201d]")
_SPACES = re.compile(r"[\s_]+")
_ZERO_WIDTH = re.compile(r"[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
"""Invisible characters: inside a word they would make it another word."""
_COUNT = r"(?:\d+|one|two|three|four|five|six|first|second|third|fourth|next|last|final)"
_PLAN_MENTION = re.compile(
    rf"\bstep (?:number )?{_COUNT} (?:of|in|from) (?:the|my|our|this) (?:\w+ )?plan\b"
    rf"|\b{_COUNT} step (?:of|in|from) (?:the|my|our|this) (?:\w+ )?plan\b"
    r"|\b(?:the|my|our|this) (?:attack|red team|red teaming|jailbreak|jailbreaking) (?:plan|strategy|goal|objective)\b"
    r"|\b(?:my|our|the) (?:goal|aim|objective|task) is to (?:get|make|trick|lead|bring|steer|push) "
    r"(?:you|the victim|the model|the assistant)\b"
    r"|\bthe (?:victim|target) (?:model|assistant)\b"
)
_BRACKETS = re.compile(r"[\[<(][^\[\]<>()]{1,600}[\]>)]")
_STRUCTURE = re.compile(
    r"""["'\u201c](?:rationale|reasoning|thought|next_step|attack_plan|goal)["'\u201d]\s*:"""
    r"""|\{[^{}]*["'\u201c]message["'\u201d]\s*:""",
    re.IGNORECASE,
)


def message_problem(
    text: str,
    earlier: Sequence[str],
    goal: str,
    plan: Plan,
    settings: RuleSettings,
    descriptions: Sequence[str] = (),
) -> Reason | None:
    """What is wrong with a user message before it is sent, by the rules that the gate applies to the dialogue.

    `earlier` are the other user messages by turn, `goal` is the seed's query, `descriptions` are what the images of
    this conversation were painted from.
    """
    if is_blank(text):
        return Reason("empty_message")
    for number, before in enumerate(earlier, 1):
        if same(fold(text), fold(before), settings):
            return Reason("repeated_message", f"user, as turn {number}")
    if leak := plan_leak(text, fold(goal), fold_steps(plan)):
        return Reason("leaked_plan", leak)
    if image_leak(text, settings) or repeats_description(text, descriptions, settings):
        return Reason("leaked_image_description")
    return None


def regularise(text: str, settings: RuleSettings) -> str:
    """The message without what a model writes around it: notes on the image in brackets, and labelled lines about it.

    A label whose text may continue on the next line stays: without it, `image_leak` would not find the description.
    """
    phrases = _loose_all(settings.image_phrases)
    fields = tuple(phrase for phrase in phrases if phrase[:1] not in "[<(")
    text = _BRACKETS.sub(lambda match: "" if _is_labelled(match[0], phrases) else match[0], text)
    lines = text.splitlines()
    kept = [
        line
        for line, next_ in zip_longest(lines, lines[1:], fillvalue="")
        if next_.strip() or not _is_labelled(line, fields)
    ]
    return re.sub(r"[ \t]{2,}", " ", "\n".join(kept)).strip()


def _is_labelled(text: str, phrases: tuple[str, ...]) -> bool:
    """True if the text is a label with words after it."""
    loose = _loose(text)
    return any(loose.startswith(phrase) and _WORDS.search(loose, len(phrase)) for phrase in phrases)


def repeats_description(text: str, descriptions: Sequence[str], settings: RuleSettings) -> bool:
    """True if a message repeats a description: a run of `description_words` words of it, or all of a shorter one.

    It also repeats a description if runs of half that length cover half of it and at least `description_words` words.
    """
    if not descriptions:
        return False
    message, size = f" {fold(text)} ", settings.description_words
    return any(_repeats(message, fold(description).split(), size) for description in descriptions)


def _repeats(message: str, words: list[str], size: int) -> bool:
    whole = " ".join(words)
    if len(words) < size:
        return len(whole) >= _LEAST_GOAL and f" {whole} " in message
    if any(True for _ in _shared(message, words, size)):
        return True
    piece = max(3, size // 2)
    covered = {place for start in _shared(message, words, piece) for place in range(start, start + piece)}
    return len(covered) >= max(size, len(words) / 2)


def _shared(message: str, words: list[str], size: int) -> Iterator[int]:
    """The positions at which a run of `size` words begins that the message also has."""
    return (i for i in range(len(words) - size + 1) if f" {' '.join(words[i : i + size])} " in message)


def fold(text: str) -> str:
    """The words of a text in lower case, one space between them; a text without words keeps its characters."""
    if text.isascii():  # the same result as below, faster
        return " ".join(text.lower().translate(_NOT_ASCII_WORDS).split()) or "".join(text.split())
    plain = _ZERO_WIDTH.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(_WORDS.findall(plain.casefold())) or "".join(plain.split())


def is_blank(text: str) -> bool:
    """True if the text has no visible character."""
    return all(unicodedata.category(character)[0] in "ZC" for character in text)


def same(one: str, other: str, settings: RuleSettings) -> bool:
    """True if two folded user messages are equal or share nearly all their words."""
    return one == other or _overlap(one, other, settings.overlap_words) >= settings.overlap


def _overlap(one: str, other: str, least: int) -> float:
    """Jaccard similarity of two folded texts' word sets, 0 to 1; 0 where one has fewer than `least` words."""
    a, b = set(one.split()), set(other.split())
    return len(a & b) / len(a | b) if min(len(a), len(b)) >= least else 0.0


def plan_leak(message: str, goal: str, steps: list[str]) -> str:
    """What a message gives away of the plan, in words; empty if nothing. `goal` and `steps` are folded."""
    text = f" {fold(message)} "
    if len(goal) >= _LEAST_GOAL and f" {goal} " in text:
        return "the goal"
    if _STRUCTURE.search(message):
        return "structured answer"
    if _PLAN_MENTION.search(text):
        return "talk of the plan"
    return "several steps" if _count_steps(text, steps) >= 2 else ""


def fold_steps(plan: Plan) -> list[str]:
    """The folded steps of a plan, the longest first."""
    # The longest first, each cut out once found: a step that is part of another must not count as a second one.
    return sorted({fold(step.text) for step in plan.steps}, key=lambda step: (-len(step), step))


def _count_steps(text: str, steps: list[str]) -> int:
    found = 0
    for step in steps:
        if len(step) >= _LEAST_GOAL and f" {step} " in text:
            text, found = text.replace(f" {step} ", " | "), found + 1
    return found


def image_leak(message: str, settings: RuleSettings) -> bool:
    """True if the message contains text that was meant for the painter."""
    text = _loose(message)
    return text.startswith(_loose_all(settings.image_openings)) or any(
        phrase in text for phrase in _loose_all(settings.image_phrases)
    )


@lru_cache(maxsize=8)
def _loose_all(phrases: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_loose(phrase) for phrase in phrases)


def _loose(text: str) -> str:
    """Lower case without quotes, emphasis and extra spaces; brackets and colons stay: they mark a leaked field."""
    return _SPACES.sub(" ", _MARKUP.sub("", text.casefold())).replace(" :", ":").strip()
