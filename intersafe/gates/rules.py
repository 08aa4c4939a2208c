"""The rules that need nothing but the dialogue itself: its form, its repetitions and what leaked into it."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import combinations

from intersafe.gates import Reason
from intersafe.recipe import RuleSettings
from intersafe.records import Dialogue, Plan
from intersafe.taxonomy import excluded_together

_LEAST_LETTERS = 20
"""A text with fewer letters says too little about its script."""
_LEAST_GOAL = 12
"""A goal or step that folds to fewer characters is found in honest messages by chance."""

_WORDS = re.compile(r"[^\W_]+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_NOT_ASCII_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_NOT_ASCII_WORDS = "".join(chr(code) if chr(code).isalnum() else " " for code in range(128))
_LATIN = re.compile(
    r"[\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua787"
    r"\ua78b-\ua7ff\uab30-\uab64\ufb00-\ufb06\uff21-\uff3a\uff41-\uff5a]"
)
"""Latin letters beyond ASCII."""
_DECORATION = re.compile(r"[*`\"'\u2018\u2019\u201c\u201d]")
_SPACES = re.compile(r"[\s_]+")

_COUNT = r"(?:\d+|one|two|three|four|five|six|first|second|third|fourth|next|last|final)"
_PLAN_TALK = re.compile(
    rf"\bstep (?:number )?{_COUNT} (?:of|in|from) (?:the|my|our|this) (?:\w+ )?plan\b"
    rf"|\b{_COUNT} step (?:of|in|from) (?:the|my|our|this) (?:\w+ )?plan\b"
    r"|\b(?:the|my|our|this) (?:attack|red team|red teaming|jailbreak|jailbreaking) (?:plan|strategy|goal|objective)\b"
    r"|\b(?:my|our|the) (?:goal|aim|objective|task) is to (?:get|make|trick|lead|bring|steer|push) "
    r"(?:you|the victim|the model|the assistant)\b"
    r"|\bthe (?:victim|target) (?:model|assistant)\b"
)
_STRUCTURE = re.compile(
    r"""["'\u201c](?:rationale|reasoning|thought|next_step|attack_plan|goal)["'\u201d]\s*:"""
    r"""|\{[^{}]*["'\u201c]message["'\u201d]\s*:""",
    re.IGNORECASE,
)


def check_rules(dialogue: Dialogue, settings: RuleSettings) -> Reason | None:
    """The first rule that turns the dialogue down, the hard exclusion before all others, or None."""
    return next((reason for rule in _RULES if (reason := rule(dialogue, settings))), None)


def message_problem(text: str, earlier: Sequence[str], goal: str, plan: Plan, settings: RuleSettings) -> Reason | None:
    """What is wrong with a user message before it is sent, by the rules that will decide on the finished dialogue."""
    if _is_blank(text):
        return Reason("empty_message")
    for place, before in enumerate(earlier, 1):
        if _same(fold(text), fold(before), settings):
            return Reason("repeated_message", f"user, as turn {place}")
    if leak := _plan_leak(text, fold(goal), _fold_steps(plan)):
        return Reason("leaked_plan", leak)
    return Reason("leaked_image_description") if _image_leak(text, settings) else None


def _is_blank(text: str) -> bool:
    return all(unicodedata.category(character)[0] in "ZC" for character in text)


def _same(one: str, other: str, settings: RuleSettings) -> bool:
    """True if two folded user messages are equal or share nearly all their words."""
    return one == other or _overlap(one, other, settings.overlap_words) >= settings.overlap


def fold(text: str) -> str:
    """The words of a text in lower case with one space between them; a text without words keeps its characters."""
    if text.isascii():  # the same answer as below, only sooner
        return " ".join(text.lower().translate(_NOT_ASCII_WORDS).split()) or "".join(text.split())
    plain = unicodedata.normalize("NFKC", text)
    return " ".join(_WORDS.findall(plain.casefold())) or "".join(plain.split())


def check_excluded(dialogue: Dialogue) -> Reason | None:
    """The hard exclusion, which no recipe switches off: the whole record is read as one text.

    A concern that is spread over turns, over user and victim, or over turns that were taken back must not pass.
    """
    turns = [*dialogue.turns, *(pruned.turn for pruned in dialogue.pruned)]
    asked = [turn.user.text for turn in turns]
    if excluded_together(asked):
        return Reason("excluded", "user")
    told = [turn.reply.text for turn in turns]
    return Reason("excluded", "reply") if excluded_together([*asked, *told]) else None


def _excluded(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    return check_excluded(dialogue)


def _turn_count(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    turns, steps = len(dialogue.turns), len(dialogue.plan.steps)
    return None if turns and turns == steps else Reason("turn_count", f"{turns} turns for {steps} steps")


def _empty_message(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    for place, turn in enumerate(dialogue.turns, 1):
        for message in (turn.user, turn.reply):
            if _is_blank(message.text):
                return Reason("empty_message", f"turn {place}, {message.role}")
    return None


def _truncated(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    cut = next((place for place, turn in enumerate(dialogue.turns, 1) if turn.finish == "length"), None)
    return Reason("truncated", f"turn {cut}") if cut else None


def _repeated_message(dialogue: Dialogue, settings: RuleSettings) -> Reason | None:
    asked = [(place, fold(turn.user.text)) for place, turn in enumerate(dialogue.turns, 1)]
    for (i, one), (j, other) in combinations(asked, 2):
        if _same(one, other, settings):
            return Reason("repeated_message", f"user, turns {i} and {j}")
    # A victim that refuses in the same words twice does what it should.
    answers = [(p, fold(t.reply.text)) for p, t in enumerate(dialogue.turns, 1) if t.verdict.refusal != "full"]
    for (i, one), (j, other) in combinations(answers, 2):
        if one == other:
            return Reason("repeated_message", f"reply, turns {i} and {j}")
    return None


def _overlap(one: str, other: str, least: int) -> float:
    """Jaccard similarity of two folded texts' word sets, 0 to 1; 0 where one has fewer than `least` words."""
    a, b = set(one.split()), set(other.split())
    return len(a & b) / len(a | b) if min(len(a), len(b)) >= least else 0.0


def _leaked_plan(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    goal, steps = fold(dialogue.seed.query), _fold_steps(dialogue.plan)
    for place, turn in enumerate(dialogue.turns, 1):
        if leak := _plan_leak(turn.user.text, goal, steps):
            return Reason("leaked_plan", f"turn {place}: {leak}")
    return None


def _plan_leak(message: str, goal: str, steps: list[str]) -> str:
    """What of the plan a message gives away, in words; empty if nothing. `goal` and `steps` are folded."""
    text = f" {fold(message)} "
    if len(goal) >= _LEAST_GOAL and f" {goal} " in text:
        return "the goal"
    if _STRUCTURE.search(message):
        return "structured answer"
    if _PLAN_TALK.search(text):
        return "talk of the plan"
    return "several steps" if _count_steps(text, steps) >= 2 else ""


def _fold_steps(plan: Plan) -> list[str]:
    # The longest first, and each cut out once found: a step that lies inside another must not count as a second one.
    return sorted({fold(step.text) for step in plan.steps}, key=lambda step: (-len(step), step))


def _count_steps(text: str, steps: list[str]) -> int:
    found = 0
    for step in steps:
        if len(step) >= _LEAST_GOAL and f" {step} " in text:
            text, found = text.replace(f" {step} ", " | "), found + 1
    return found


def _leaked_image_description(dialogue: Dialogue, settings: RuleSettings) -> Reason | None:
    leaks = (place for place, turn in enumerate(dialogue.turns, 1) if _image_leak(turn.user.text, settings))
    place = next(leaks, None)
    return Reason("leaked_image_description", f"turn {place}") if place else None


def _image_leak(message: str, settings: RuleSettings) -> bool:
    text = _loose(message)
    return text.startswith(_loose_all(settings.image_openings)) or any(
        phrase in text for phrase in _loose_all(settings.image_phrases)
    )


@lru_cache(maxsize=8)
def _loose_all(phrases: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_loose(phrase) for phrase in phrases)


def _loose(text: str) -> str:
    """Lower case without quotes, emphasis and loose spacing; brackets and colons stay, they mark a leaked field."""
    return _SPACES.sub(" ", _DECORATION.sub("", text.casefold())).replace(" :", ":").strip()


@cache
def _all_loose(phrases: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_loose(phrase) for phrase in phrases)


def _language(dialogue: Dialogue, settings: RuleSettings) -> Reason | None:
    if settings.script == "any":
        return None
    texts = [message.text for message in dialogue.messages]
    # The talk as a whole comes last, for messages that are each too short to tell.
    for number, text in enumerate([*texts, "\n".join(texts)]):
        share = _latin_share(text)
        if share < settings.script_share:
            where = f"turn {number // 2 + 1}, {'reply' if number % 2 else 'user'}" if number < len(texts) else "all"
            return Reason("language", f"{where}: {share:.2f} {settings.script}")
    return None


def _latin_share(text: str) -> float:
    """Share of the letters that are Latin, 0 to 1; 1 where there are too few letters to tell."""
    if text.isascii():
        return 1.0
    latin = len(text.encode("ascii", "ignore").translate(None, _NOT_ASCII_LETTERS))
    others = [character for character in _NOT_ASCII.findall(text) if character.isalpha()]
    letters = latin + len(others)
    latin += sum(1 for character in others if _LATIN.match(character))
    return latin / letters if letters >= _LEAST_LETTERS else 1.0


_RULES: tuple[Callable[[Dialogue, RuleSettings], Reason | None], ...] = (
    _excluded,
    _turn_count,
    _empty_message,
    _truncated,
    _repeated_message,
    _leaked_plan,
    _leaked_image_description,
    _language,
)
