"""What a scripted model answers to each kind of question that has a schema.

Each function takes the question, the JSON schema, the random generator of the call, and the profile. It returns the
fields of the answer.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from intersafe.models.scripted.aligned_phrases import DECLINES, EVERYDAY, HELPS, RECOVERIES, TWIN_GOALS, UNSUITED
from intersafe.models.scripted.phrases import (
    ASPECTS,
    CLOSINGS,
    CONTEXTS,
    DRIFTS,
    FORMATS,
    FULL_REFUSALS,
    LOCATIONS,
    OPENERS,
    PARTIALS,
    PEOPLE,
    PICTURES,
    PLACEHOLDER,
    QUESTIONS,
    REASONS,
    STEPS,
    STOP_WORDS,
    TIMES,
)
from intersafe.models.scripted.profiles import Profile
from intersafe.models.scripted.refusal_phrases import (
    ALTERNATIVES,
    ASKS,
    BLUNT,
    DECLINED,
    DETAIL,
    GIVES_IN,
    HARMS,
    VAGUE,
)

Fields = dict[str, Any]
"""The fields of an answer, or a JSON schema."""


def _between(tag: str, text: str) -> str:
    """The text in the last `<tag>...</tag>` of a prompt; empty if a curator removed the tag."""
    start = text.rfind(f"<{tag}>")
    end = text.find(f"</{tag}>", start)
    return text[start + len(tag) + 2 : end].strip() if 0 <= start < end else ""


_WORD = re.compile(r"[A-Za-z][a-z'-]{3,}")


def topic_of(text: str, rng: random.Random) -> str:
    """One or two neighbouring content words of a text."""
    words = [word.lower() for word in _WORD.findall(text) if word.lower() not in STOP_WORDS]
    if not words:
        return "the matter"
    start = rng.randrange(len(words))
    return " ".join(words[start : start + rng.choice((1, 2))])


def fill(patterns: Sequence[str], topic: str, rng: random.Random) -> str:
    """One of the patterns with its slots filled at random, the first letter in upper case."""
    text = rng.choice(patterns).format(
        topic=topic,
        aspect=rng.choice(ASPECTS),
        place=rng.choice(LOCATIONS),
        person=rng.choice(PEOPLE),
        time=rng.choice(TIMES),
        format=rng.choice(FORMATS),
    )
    return text[0].upper() + text[1:]


def _plan(question: str, schema: Fields, rng: random.Random, _: Profile) -> Fields:
    query = _between("query", question)
    n_steps = schema["properties"]["steps"]["minItems"]
    return {"steps": [fill(STEPS, topic_of(query, rng), rng) for _ in range(n_steps)]}


def _picture_plan(question: str, schema: Fields, rng: random.Random, profile: Profile) -> Fields:
    steps = schema["properties"]["steps"]["minItems"]
    first = 2 if "not the first step" in question else 1
    pictures = sorted(rng.sample(range(first, steps + 1), schema["properties"]["pictures"]["minItems"]))
    return _plan(question, schema, rng, profile) | {"pictures": pictures}


def _description(question: str, _: Fields, rng: random.Random, __: Profile) -> Fields:
    topic = topic_of(_between("step", question), rng)
    return {"description": fill(PICTURES, topic, rng), "rationale": rng.choice(REASONS)}


def _same(_: str, __: Fields, rng: random.Random, ___: Profile) -> Fields:
    return {"same": rng.random() < 0.5, "reason": rng.choice(REASONS)}


def _step(question: str, _: Fields, rng: random.Random, __: Profile) -> Fields:
    return {"step": fill(STEPS, topic_of(_between("query", question), rng), rng)}


def _step_score(_: str, __: Fields, rng: random.Random, profile: Profile) -> Fields:
    scores = [rng.randint(6, 10) for _ in range(3)]
    if rng.random() < profile.weak:
        scores[rng.randrange(3)] = rng.randint(1, 4)
    names = ("relevance", "association", "harmless")
    return dict(zip(names, scores, strict=True)) | {"reason": rng.choice(REASONS)}


def _message(question: str, _: Fields, rng: random.Random, __: Profile) -> Fields:
    topic = topic_of(_between("query", question), rng)
    return {"message": _utterance(topic, rng), "rationale": rng.choice(REASONS)}


def _utterance(topic: str, rng: random.Random) -> str:
    sentences = [fill(CONTEXTS, topic, rng), fill(QUESTIONS, topic, rng)]
    if rng.random() < 0.6:
        sentences.insert(0, fill(OPENERS, topic, rng))
    if rng.random() < 0.6:
        sentences.append(fill(CLOSINGS, topic, rng))
    return " ".join(sentences)


def _verdict(question: str, _: Fields, rng: random.Random, __: Profile) -> Fields:
    reply = _between("reply", question)
    if PLACEHOLDER in reply:
        marks: tuple[str, str, int, int] = ("unsafe", "none", rng.randint(1, 2), rng.randint(2, 4))
    elif reply.startswith(_starts(FULL_REFUSALS)):
        marks = ("safe", "full", 5, rng.randint(1, 2))
    elif reply.startswith(_starts(PARTIALS)):
        marks = ("safe", "partial", rng.randint(4, 5), rng.randint(2, 4))
    elif reply.startswith(_starts(DRIFTS)):
        marks = ("safe", "deflect", rng.randint(4, 5), rng.randint(1, 3))
    else:
        marks = ("safe", "none", rng.randint(4, 5), rng.randint(3, 5))
    names = ("safety", "refusal", "harmless", "helpful")
    return dict(zip(names, marks, strict=True)) | {"reason": rng.choice(REASONS)}


def _check(question: str, _: Fields, rng: random.Random, profile: Profile) -> Fields:
    lost = rng.random() < profile.lost
    risk, coherent = (rng.random() < 0.5, not lost) if lost else (True, True)
    answer = {"risk": risk, "coherent": coherent or risk, "reason": rng.choice(REASONS)}
    asked = [line for line in _between("conversation", question).splitlines() if line.startswith("User: ")]
    if asked and all(map(is_everyday, asked)):
        answer |= {"risk": lost and risk, "coherent": not lost or risk}
    return answer


def is_everyday(text: str) -> bool:
    """True if the text is about a topic of the benign twins."""
    return any(topic in text.casefold() for topic in EVERYDAY)


def _twin(_: str, schema: Fields, rng: random.Random, __: Profile) -> Fields:
    topic = rng.choice(EVERYDAY)
    n_messages = schema["properties"]["messages"]["minItems"]
    return {"goal": fill(TWIN_GOALS, topic, rng), "messages": [_utterance(topic, rng) for _ in range(n_messages)]}


def _aligned(question: str, _: Fields, rng: random.Random, __: Profile) -> Fields:
    message = _between("message", question)
    topic = topic_of(message, rng)
    declines = rng.random() < 0.5 and not is_everyday(message)
    sentences = [fill(DECLINES, topic, rng)] if declines else [fill(HELPS, topic, rng) for _ in range(2)]
    if PLACEHOLDER in _between("conversation", question):
        sentences.insert(0, rng.choice(RECOVERIES))
    return {"answer": " ".join(sentences)}


def _aligned_verdict(question: str, _: Fields, rng: random.Random, profile: Profile) -> Fields:
    answer = _between("answer", question)
    declines = any(opening in answer for opening in _starts(DECLINES))
    unsafe, unsuited = PLACEHOLDER in answer, rng.random() < profile.unsuited
    return {
        "safety": "unsafe" if unsafe else "safe",
        "appropriate": not (unsafe or unsuited),
        "refusal": "full" if declines else "none",
        "harmless": rng.randint(1, 2) if unsafe else rng.randint(4, 5),
        "helpful": rng.randint(2, 4) if declines else rng.randint(3, 5),
        "reason": rng.choice(UNSUITED if unsuited else REASONS),
    }


def _question(prompt: str, _: Fields, rng: random.Random, profile: Profile) -> Fields:
    if rng.random() < profile.stray:
        return {"question": _utterance(rng.choice(EVERYDAY), rng)}
    topic = topic_of(_between("query", prompt), rng)
    asks = ASKS.get(_between("group", prompt), ASKS["general"])
    sentences = [fill(asks, topic, rng)]
    if rng.random() < 0.7:
        sentences.insert(0, fill(CONTEXTS, topic, rng))
    if rng.random() < 0.4:
        sentences.append(fill(CLOSINGS, topic, rng))
    return {"question": " ".join(sentences)}


def _refusal(prompt: str, _: Fields, rng: random.Random, profile: Profile) -> Fields:
    topic = topic_of(_between("question", prompt), rng)
    parts: list[Sequence[str]] = [DECLINED, HARMS, ALTERNATIVES]
    draw, slip = rng.random(), profile.careless
    if draw < slip:
        parts = [GIVES_IN]
    elif draw < 2 * slip:
        parts = [VAGUE]
    elif draw < 3 * slip:
        parts = [DECLINED, HARMS, (DETAIL,)]
    elif draw < 3 * slip + profile.blunt:
        parts[0] = BLUNT
    return {"answer": " ".join(fill(patterns, topic, rng) for patterns in parts)}


def _refusal_check(prompt: str, _: Fields, rng: random.Random, __: Profile) -> Fields:
    answer = _between("answer", prompt)
    return {
        "in_group": not is_everyday(_between("question", prompt)),
        "refuses": not answer.startswith(_starts(GIVES_IN)) and PLACEHOLDER not in answer,
        "names_harm": not answer.startswith(_starts((*VAGUE, *GIVES_IN))),
        "repeats_detail": DETAIL in answer,
        "reason": rng.choice(REASONS),
    }


ANSWER_MAKERS: dict[str, Callable[[str, Fields, random.Random, Profile], Fields]] = {
    "plan": _plan,
    "pictureplan": _picture_plan,
    "description": _description,
    "same": _same,
    "step": _step,
    "stepscore": _step_score,
    "message": _message,
    "verdict": _verdict,
    "check": _check,
    "aligned": _aligned,
    "alignedverdict": _aligned_verdict,
    "twin": _twin,
    "question": _question,
    "refusal": _refusal,
    "refusalcheck": _refusal_check,
}
"""The function for each schema, by its name."""


def _starts(patterns: Sequence[str]) -> tuple[str, ...]:
    """The text of each pattern before its first slot, by which the scripted judge recognises a kind of reply."""
    return tuple(pattern.partition("{")[0] for pattern in patterns)
