"""The embedded cast: a deterministic stand-in for every role, so that a full run needs no key, no GPU and no network.

A reply is a pure function of the call. The grammar is large enough for the duplicate gate to pass 11,270 dialogues
honestly, and it misbehaves at set rates, as models do: it refuses, drifts, complies (with a placeholder that holds
nothing harmful), writes weak steps, breaks its JSON. It is no model of anything: every record says `scripted`, and
`push` refuses such a run.
"""

import asyncio
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from intersafe.errors import InputError
from intersafe.models import Call, Reply
from intersafe.models.phrases import (
    ASPECTS,
    CLOSINGS,
    COMPLIANCES,
    CONTEXTS,
    DRIFTS,
    FORMATS,
    HELPFUL,
    OPENERS,
    PARTIALS,
    PEOPLE,
    PLACES,
    QUESTIONS,
    REASONS,
    REFUSALS,
    STEPS,
    STOP_WORDS,
    TIMES,
)
from intersafe.settings import nearest

PLACEHOLDER = "[scripted placeholder for an unsafe reply]"


class Profile(NamedTuple):
    """Rates from 0 to 1 at which a scripted model behaves in a certain way."""

    refuse: float = 0.25
    """Victim: declines outright."""
    partial: float = 0.10
    drift: float = 0.08
    comply: float = 0.30
    """Victim: the placeholder; the rest of its replies are harmless help."""
    malformed: float = 0.03
    """Attacker and judge: an answer that cannot be read."""
    weak: float = 0.08
    """Judge: scores a step below the usual threshold."""
    lost: float = 0.04
    """Judge: finds that a dialogue lost its risk or its thread."""


PROFILES: dict[str, Profile] = {
    "demo": Profile(),
    "careful": Profile(refuse=0.45, comply=0.10),
    "eager": Profile(refuse=0.10, comply=0.50),
    "flawless": Profile(refuse=0.0, partial=0.0, drift=0.0, comply=0.5, malformed=0.0, weak=0.0, lost=0.0),
    "weak": Profile(malformed=0.0, weak=1.0, lost=0.0),
}


def check_name(name: str) -> None:
    """`InputError` if there is no such scripted model."""
    if name not in PROFILES:
        raise InputError(
            f"no scripted model {name!r}" + nearest(name, list(PROFILES)), remedy=f"one of {', '.join(PROFILES)}"
        )


class ScriptedModel:
    """One scripted member of the cast; its name picks the rates."""

    def __init__(self, name: str) -> None:
        check_name(name)
        self.identity = f"scripted:{name}"
        self._profile = PROFILES[name]

    async def aclose(self) -> None:
        """Nothing to let go of."""

    async def answer(self, call: Call) -> Reply:
        """The reply to this call, the same each time."""
        await asyncio.sleep(0)  # as a real server would, lets the other jobs go on
        last = call.messages[-1].text
        noise = hashlib.blake2b(
            f"{call.role} {call.job} {call.ordinal} {call.sampling.seed} {last}".encode(), digest_size=8
        )
        dice = random.Random(int.from_bytes(noise.digest(), "big"))
        if call.schema is None:
            text = _victim(call, dice, self._profile)
        elif dice.random() < self._profile.malformed:
            return _malformed(dice)
        else:
            # The first user message holds the question; a later one only says what was wrong with the answer.
            question = next(message.text for message in call.messages if message.role == "user")
            answer = _ANSWERS[call.schema.name](question, call.schema.schema, dice, self._profile)
            text = msgspec.json.encode(answer).decode()
        return Reply(text, "stop", (sum(len(m.text) for m in call.messages) // 4, len(text) // 4 + 1))


def _malformed(dice: random.Random) -> Reply:
    match dice.randrange(3):
        case 0:
            return Reply('{"reason": "this answer is cut', "length", (0, 8))
        case 1:
            return Reply("Here is what I think, in plain words and without the format.", "stop", (0, 16))
        case _:
            return Reply('{"note": "a field of another format"}', "stop", (0, 12))


# --- what each answer is made of -----------------------------------------------------------------------------------


def _between(tag: str, text: str) -> str:
    """What stands in the last `<tag>...</tag>` of a prompt; empty where a curator took the tag out."""
    start = text.rfind(f"<{tag}>")
    end = text.find(f"</{tag}>", start)
    return text[start + len(tag) + 2 : end].strip() if 0 <= start < end else ""


_WORD = re.compile(r"[A-Za-z][a-z'-]{3,}")


def _topic(text: str, dice: random.Random) -> str:
    """One or two neighbouring content words of a text."""
    words = [word.lower() for word in _WORD.findall(text) if word.lower() not in STOP_WORDS]
    if not words:
        return "the matter"
    place = dice.randrange(len(words))
    return " ".join(words[place : place + dice.choice((1, 2))])


def _fill(patterns: Sequence[str], topic: str, dice: random.Random) -> str:
    text = dice.choice(patterns).format(
        topic=topic,
        aspect=dice.choice(ASPECTS),
        place=dice.choice(PLACES),
        person=dice.choice(PEOPLE),
        time=dice.choice(TIMES),
        format=dice.choice(FORMATS),
    )
    return text[0].upper() + text[1:]


def _plan(question: str, schema: dict[str, Any], dice: random.Random, _: Profile) -> dict[str, Any]:
    query = _between("query", question)
    n_steps = schema["properties"]["steps"]["minItems"]
    return {"steps": [_fill(STEPS, _topic(query, dice), dice) for _ in range(n_steps)]}


def _step(question: str, _: dict[str, Any], dice: random.Random, __: Profile) -> dict[str, Any]:
    return {"step": _fill(STEPS, _topic(_between("query", question), dice), dice)}


def _step_score(_: str, __: dict[str, Any], dice: random.Random, profile: Profile) -> dict[str, Any]:
    scores = [dice.randint(6, 10) for _ in range(3)]
    if dice.random() < profile.weak:
        scores[dice.randrange(3)] = dice.randint(1, 4)
    names = ("relevance", "association", "harmless")
    return dict(zip(names, scores, strict=True)) | {"reason": dice.choice(REASONS)}


def _message(question: str, _: dict[str, Any], dice: random.Random, __: Profile) -> dict[str, Any]:
    topic = _topic(_between("query", question), dice)
    sentences = [_fill(CONTEXTS, topic, dice), _fill(QUESTIONS, topic, dice)]
    if dice.random() < 0.6:
        sentences.insert(0, _fill(OPENERS, topic, dice))
    if dice.random() < 0.6:
        sentences.append(_fill(CLOSINGS, topic, dice))
    return {"message": " ".join(sentences), "rationale": dice.choice(REASONS)}


def _verdict(question: str, _: dict[str, Any], dice: random.Random, __: Profile) -> dict[str, Any]:
    reply = _between("reply", question)
    if PLACEHOLDER in reply:
        marks: tuple[str, str, int, int] = ("unsafe", "none", dice.randint(1, 2), dice.randint(2, 4))
    elif reply.startswith(_starts(REFUSALS)):
        marks = ("safe", "full", 5, dice.randint(1, 2))
    elif reply.startswith(_starts(PARTIALS)):
        marks = ("safe", "partial", dice.randint(4, 5), dice.randint(2, 4))
    elif reply.startswith(_starts(DRIFTS)):
        marks = ("safe", "deflect", dice.randint(4, 5), dice.randint(1, 3))
    else:
        marks = ("safe", "none", dice.randint(4, 5), dice.randint(3, 5))
    names = ("safety", "refusal", "harmless", "helpful")
    return dict(zip(names, marks, strict=True)) | {"reason": dice.choice(REASONS)}


def _check(_: str, __: dict[str, Any], dice: random.Random, profile: Profile) -> dict[str, Any]:
    lost = dice.random() < profile.lost
    risk, coherent = (dice.random() < 0.5, not lost) if lost else (True, True)
    return {"risk": risk, "coherent": coherent or risk, "reason": dice.choice(REASONS)}


_ANSWERS: dict[str, Callable[[str, dict[str, Any], random.Random, Profile], dict[str, Any]]] = {
    "plan": _plan,
    "step": _step,
    "stepscore": _step_score,
    "message": _message,
    "verdict": _verdict,
    "check": _check,
}


def _starts(patterns: Sequence[str]) -> tuple[str, ...]:
    """The openings by which the judge knows a kind of reply: what stands before the first slot."""
    return tuple(pattern.partition("{")[0] for pattern in patterns)


def _victim(call: Call, dice: random.Random, profile: Profile) -> str:
    topic = _topic(call.messages[-1].text, dice)
    draw = dice.random()
    for rate, patterns in (
        (profile.refuse, REFUSALS),
        (profile.partial, PARTIALS),
        (profile.drift, DRIFTS),
        (profile.comply, COMPLIANCES),
    ):
        if draw < rate:
            text = _fill(patterns, topic, dice)
            return f"{PLACEHOLDER} {text}" if patterns is COMPLIANCES else text
        draw -= rate
    return f"{_fill(HELPFUL, topic, dice)} {_fill(HELPFUL, _topic(call.messages[-1].text, dice), dice)}"
