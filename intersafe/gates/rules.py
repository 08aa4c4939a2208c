"""Rules that need only the dialogue itself: its form, its repetitions and what leaked into it."""

import re
from collections.abc import Callable
from itertools import combinations

from intersafe.checks.messages import fold, fold_steps, image_leak, is_blank, plan_leak, repeats_description, same
from intersafe.exclusions import excluded_together
from intersafe.recipe.gates import RuleSettings
from intersafe.records import Dialogue, Reason, texts_of

_LEAST_LETTERS = 20
"""A text with fewer letters is too short to tell its script."""

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_NOT_ASCII_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_LATIN = re.compile(
    r"[\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua787"
    r"\ua78b-\ua7ff\uab30-\uab64\ufb00-\ufb06\uff21-\uff3a\uff41-\uff5a]"
)
"""Latin letters beyond ASCII."""


def check_rules(dialogue: Dialogue, settings: RuleSettings) -> Reason | None:
    """The reason of the first rule that rejects the dialogue, the hard exclusion before all others; or None."""
    return next((reason for rule in _RULES if (reason := rule(dialogue, settings))), None)


def check_excluded(dialogue: Dialogue) -> Reason | None:
    """The hard exclusion, which no recipe can switch off; the whole record is read as one text.

    A concern that is spread over turns, over user and victim, or over backtracked turns must not pass.
    """
    turns = [*dialogue.turns, *(pruned.turn for pruned in dialogue.pruned)]
    asked = [turn.user.text for turn in turns]
    asked += [origin.description for turn in turns for origin in turn.origins if origin.description]
    if excluded_together(asked):
        return Reason("excluded", "user")
    texts = [*texts_of(turns), *(removed.origin.description for removed in dialogue.removed), dialogue.goal]
    return Reason("excluded", "reply") if excluded_together(texts) else None


def _excluded(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    return check_excluded(dialogue)


def _turn_count(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    turns, steps = len(dialogue.turns), len(dialogue.plan.steps)
    return None if turns and turns == steps else Reason("turn_count", f"{turns} turns for {steps} steps")


def _empty_message(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    for number, turn in enumerate(dialogue.turns, 1):
        for message in (turn.user, turn.reply):
            if is_blank(message.text):
                return Reason("empty_message", f"turn {number}, {message.role}")
    return None


def _truncated(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    cut = next((number for number, turn in enumerate(dialogue.turns, 1) if turn.finish == "length"), None)
    return Reason("victim_truncated", f"turn {cut}") if cut else None


def _repeated_message(dialogue: Dialogue, settings: RuleSettings) -> Reason | None:
    asked = [(number, fold(turn.user.text)) for number, turn in enumerate(dialogue.turns, 1)]
    for (i, one), (j, other) in combinations(asked, 2):
        if same(one, other, settings):
            return Reason("repeated_message", f"user, turns {i} and {j}")
    # A victim may refuse twice in the same words.
    replies = [(n, fold(t.reply.text)) for n, t in enumerate(dialogue.turns, 1) if t.verdict.refusal != "full"]
    for (i, one), (j, other) in combinations(replies, 2):
        if one == other:
            return Reason("repeated_message", f"reply, turns {i} and {j}")
    return None


def _leaked_plan(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    goal, steps = fold(dialogue.seed.query), fold_steps(dialogue.plan)
    for number, turn in enumerate(dialogue.turns, 1):
        if leak := plan_leak(turn.user.text, goal, steps):
            return Reason("leaked_plan", f"turn {number}: {leak}")
    return None


def _leaked_image_description(dialogue: Dialogue, settings: RuleSettings) -> Reason | None:
    descriptions = [o.description for turn in dialogue.turns for o in turn.origins if o.description]
    descriptions += [removed.origin.description for removed in dialogue.removed]
    for number, turn in enumerate(dialogue.turns, 1):
        text = turn.user.text
        if image_leak(text, settings) or repeats_description(text, descriptions, settings):
            return Reason("leaked_image_description", f"turn {number}")
    return None


def _image_origins(dialogue: Dialogue, _: RuleSettings) -> Reason | None:
    """Every image has an origin."""
    for number, turn in enumerate(dialogue.turns, 1):
        if tuple(origin.image for origin in turn.origins) != turn.user.images:
            return Reason("image_without_origin", f"turn {number}")
    return None


def _language(dialogue: Dialogue, settings: RuleSettings) -> Reason | None:
    if settings.script == "any":
        return None
    texts = [message.text for message in dialogue.messages]
    # All messages together come last, since each may be too short to tell.
    for place, text in enumerate([*texts, "\n".join(texts)]):
        share = _latin_share(text)
        if share < settings.script_share:
            where = f"turn {place // 2 + 1}, {'reply' if place % 2 else 'user'}" if place < len(texts) else "all"
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
    _image_origins,
    _language,
)
