"""The scripted chat models: deterministic stand-ins for every role, so that a full run needs no key, GPU or network.

A reply is a pure function of the call. The grammar is large enough that 11,270 dialogues pass the duplicate gate. The
models misbehave at set rates, as real ones do: they refuse, drift, comply (with a placeholder that holds nothing
harmful), write weak steps, and break their JSON. Every record says `scripted`, and `push` refuses such a run.
"""

import asyncio
import hashlib
import random

import msgspec

from intersafe.models.base import Call, Reply
from intersafe.models.scripted.answers import ANSWER_MAKERS, fill, is_everyday, topic_of
from intersafe.models.scripted.phrases import COMPLIANCES, DRIFTS, FULL_REFUSALS, HELPFUL, PARTIALS, PLACEHOLDER
from intersafe.models.scripted.profiles import PROFILES, Profile, check_name


class ScriptedModel:
    """A scripted model of any role but the painter; its name selects the profile."""

    def __init__(self, name: str) -> None:
        """`name` is a key of `PROFILES`; `InputError` otherwise."""
        check_name(name)
        self.identity = f"scripted:{name}"
        self._profile = PROFILES[name]

    async def aclose(self) -> None:
        """Does nothing: there is no connection to close."""

    async def answer(self, call: Call) -> Reply:
        """The reply to the call; equal calls get equal replies."""
        await asyncio.sleep(0)  # lets other jobs run, as a real server would
        last = call.messages[-1].text
        noise = hashlib.blake2b(
            f"{call.role} {call.job} {call.ordinal} {call.sampling.seed} {last}".encode(), digest_size=8
        )
        rng = random.Random(int.from_bytes(noise.digest(), "big"))
        if call.schema is None:
            text = _victim(call, rng, self._profile)
        elif rng.random() < self._profile.malformed:
            return _malformed(rng)
        else:
            # The first user message is the question; a later one only says what was wrong with an answer.
            question = next(message.text for message in call.messages if message.role == "user")
            answer = ANSWER_MAKERS[call.schema.name](question, call.schema.schema, rng, self._profile)
            text = msgspec.json.encode(answer).decode()
        return Reply(text, "stop", (sum(len(m.text) for m in call.messages) // 4, len(text) // 4 + 1))


def _malformed(rng: random.Random) -> Reply:
    match rng.randrange(3):
        case 0:
            return Reply('{"reason": "this answer is cut', "length", (0, 8))
        case 1:
            return Reply("Here is what I think, in plain words and without the format.", "stop", (0, 16))
        case _:
            return Reply('{"note": "a field of another format"}', "stop", (0, 12))


def _victim(call: Call, rng: random.Random, profile: Profile) -> str:
    topic = topic_of(call.messages[-1].text, rng)
    draw = rng.random()
    comply = 0.0 if is_everyday(call.messages[-1].text) else profile.comply  # there is nothing harmful to comply with
    for rate, patterns in (
        (profile.refuse, FULL_REFUSALS),
        (profile.partial, PARTIALS),
        (profile.drift, DRIFTS),
        (comply, COMPLIANCES),
    ):
        if draw < rate:
            text = fill(patterns, topic, rng)
            return f"{PLACEHOLDER} {text}" if patterns is COMPLIANCES else text
        draw -= rate
    return f"{fill(HELPFUL, topic, rng)} {fill(HELPFUL, topic_of(call.messages[-1].text, rng), rng)}"
