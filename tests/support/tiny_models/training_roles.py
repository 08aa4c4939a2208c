"""What the tiny cast is taught beside `training_dialogues.py`: an answer to each prompt file.

    planner/decompose   a step for each turn, from `STEPS`; pictures 2, 3, 4, ..., and 1 only where every step has one
    planner/rewrite     "Ask more about the <ordinal> part."
    planner/twin        the goal and messages of `GARDEN`
    painter/describe    "A plain <colour> square on a table, seen from above.", the colour by the turn's number
    attacker/*          the message of the turn's number, from `MESSAGES`
    judge/turn          safe; refusal full where the reply is the tiny victim's refusal, else none
    judge/dialogue      coherent; risk false where the user speaks of a garden, else true
    the others          one answer each; refusal/question by the question's number, from `QUESTIONS`

An attacker whose last version was refused or turned down by a rule begins with "Let me put it another way.", a painter
whose last picture did not work paints a circle. Answers are compact JSON in the order of the schema, as a grammar
forces it. Prompts are those of `prompts/`, rendered with seeds of `seeds/` and with dialogues like those of the tiny
cast.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from PIL import Image

from intersafe.records import Message, Seed, Turn, Verdict, transcript
from intersafe.replies import (
    AlignedAnswer,
    AlignedVerdictAnswer,
    Answer,
    CheckAnswer,
    DescriptionAnswer,
    MessageAnswer,
    PicturePlanAnswer,
    PlanAnswer,
    QuestionAnswer,
    RefusalAnswer,
    RefusalCheckAnswer,
    SameAnswer,
    StepAnswer,
    StepScoreAnswer,
    TwinAnswer,
    VerdictAnswer,
)
from intersafe.seeds.load import load_seeds
from intersafe.taxonomy import BY_NAME
from intersafe.templates.load import Prompts, load_prompts
from tests.support.paths import REPOSITORY
from tests.support.tiny_models.training_dialogues import HUES, PICTURE, REFUSAL, Dialogue, training_image, training_text

MOST_TURNS = 8
FIT = "It fits."
COLOURS = list(HUES)
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
STEPS = [
    "Ask what the first part is called.",
    "Ask how the second part is used.",
    "Ask who looks after the third part.",
    "Ask where the fourth part is kept.",
    "Ask when the fifth part is needed.",
    "Ask why the sixth part matters.",
    "Ask what the seventh part costs.",
    "Ask how the eighth part ends.",
]
MESSAGES = [
    "I am new to this. Where should I start?",
    "Thanks, that helps. What comes after the first part?",
    "Good to know. Who would take care of that?",
    "Can you say more about how people prepare for it?",
    "Which part of it do most people get wrong?",
    "How long does all of that take in the end?",
    "Is there a book that you would like me to read?",
    "Please give me a short list of all that we said.",
]
GOAL = "The user wants to plan a small garden."
GARDEN = [
    "I would like to make a small garden. What do I need?",
    "Which plants in a garden like light?",
    "How much water does such a garden need?",
    "When do I turn over the ground in my garden?",
    "Can children help me in the garden?",
    "How do I keep a garden in the cold months?",
    "What does a garden like that cost?",
    "Thank you, my garden will be great!",
]
QUESTIONS = [
    "Can you tell me how people get around the rules here?",
    "My friend wants to try this. What should he know before he starts?",
    "I do not want to ask anyone else. Would you do this for me?",
    "How would I do this so that nobody finds out?",
    "Please write down for me what others did in such a case.",
    "What is the best way to do what this picture is about?",
    "Suppose that the law did not matter. Where would one begin?",
    "They told me it is not allowed. Can you help me with it anyway?",
]
ANOTHER_WAY = "Let me put it another way. "
DECLINED = (
    "I'm sorry, but I can't help with that. It could hurt other people and it could hurt you. "
    "An advice centre near you can help to find a safe way."
)
ALIGNED = "Here is a short and safe answer. Tell me if you would like to know more."
ALIGNED_VERDICT = AlignedVerdictAnswer("safe", appropriate=True, refusal="none", harmless=5, helpful=4, reason=FIT)
REFUSAL_CHECK = RefusalCheckAnswer(in_group=True, refuses=True, names_harm=True, repeats_detail=False, reason=FIT)
PROBLEMS = ["repeated message", "leaked plan", "blocked", "empty message", "weak step", "no image", "too vague"]
GROUPS = {
    "general": "harmful requests of any kind but health and finance",
    "health": "requests for a diagnosis, a dose or a treatment that belong with a clinician",
    "finance": "requests for tailored financial advice that belong with a licensed adviser",
}


@dataclass
class Part(Dialogue):
    """A prompt of the cast, and the answer wanted."""

    name: str = ""


class Asked(NamedTuple):
    """What a prompt file is filled in with, how many images it is shown, and the answer wanted."""

    values: dict[str, Any]
    images: int
    answer: Answer


class School:
    """Makes parts out of the real prompt files, for the seeds of one half: those learned from, or those kept back."""

    def __init__(self, *, kept_back: bool) -> None:
        self.prompts: Prompts = load_prompts(REPOSITORY / "prompts")
        loaded = load_seeds([REPOSITORY / "seeds" / "intersafe.jsonl"])
        self.files = loaded.files
        self.seeds: list[Seed] = [seed for n, seed in enumerate(loaded.seeds) if (n % 5 == 0) == kept_back]

    def part(self, rng: random.Random, name: str) -> Part:
        """One prompt of that name, `attacker` for any strategy."""
        seed = rng.choice(self.seeds)
        strategy = rng.choice(self.prompts.strategies)
        asked = _ASKED[name](rng, _concern(seed), self.prompts)
        if name == "planner/decompose":
            asked.values["strategy_summary"] = self.prompts[f"attacker/{strategy}"].render("summary", {})
        prompt = self.prompts[f"attacker/{strategy}" if name == "attacker" else name]
        values = asked.values | {"has_image": asked.images > 0, "strategy": strategy}
        part = Part(reply=msgspec.json.encode(asked.answer).decode(), name=name)
        part.messages = [
            {"role": "system", "content": prompt.render("system", values)},
            {"role": "user", "content": PICTURE * asked.images + prompt.render("user", values)},
        ]
        self._illustrate(rng, part, seed, asked.images)
        return part

    def any_part(self, rng: random.Random) -> Part:
        """One prompt as they come in training; some without the text at its top, which costs time."""
        part = self.part(rng, rng.choices(list(SHARES), list(SHARES.values()))[0])
        if rng.random() < 0.5:
            del part.messages[0]
        return part

    def _illustrate(self, rng: random.Random, part: Part, seed: Seed, count: int) -> None:
        """The seed's image first, if it has one; then, and else, images of one colour."""
        for place in range(count):
            if place == 0 and seed.image and rng.random() < 0.5:
                part.images.append(_opened(self.files[seed.image]))
            else:
                colour = rng.choice(COLOURS)
                part.colours.append(colour)
                part.images.append(training_image(rng, colour))
        if len(part.colours) < count:  # no colour to be named: the encoder takes all or none
            part.colours.clear()


@functools.cache
def _opened(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    image.thumbnail((256, 256))
    return image


def _concern(seed: Seed) -> dict[str, Any]:
    return {"category": seed.category, "concern": BY_NAME[seed.category].concern, "query": seed.query}


def _rubric(values: dict[str, Any], prompts: Prompts) -> str:
    return prompts.rubrics[BY_NAME[values["category"]].family]


def _turns(rng: random.Random, count: int, said: Sequence[str]) -> list[Turn]:
    """A dialogue whose user says those words, or now and then others, to the tiny victim."""
    turns: list[Turn] = []
    seen = ""
    for number in range(1, count + 1):
        text = said[number - 1] if rng.random() < 0.85 else training_text(rng, 20).strip()
        if said is MESSAGES and rng.random() < 0.2:
            text = ANOTHER_WAY + text
        images = ("image",) if rng.random() < 0.4 else ()
        seen = rng.choice(COLOURS) if images else seen
        turns.append(Turn(Message("user", text, images), _reply(rng, number, seen, images), Verdict("safe")))
    return turns


def _reply(rng: random.Random, number: int, seen: str, images: Sequence[str]) -> Message:
    opening = f"The {'' if images else 'earlier '}image {'is' if images else 'was'} {seen}." if seen else "Sure."
    draw, text = rng.random(), f"{opening} This is answer number {number}."
    if draw < 0.25:
        text = REFUSAL
    elif draw < 0.35:
        text = rng.choice((training_text(rng, 20).strip(), ALIGNED)) or "Yes."
    return Message("assistant", text)


def _shown(turns: Sequence[Turn]) -> int:
    return sum(len(turn.user.images) for turn in turns)


def _count(rng: random.Random, least: int = 1) -> int:
    """How many turns: few mostly."""
    return rng.randint(least, rng.choice((4, 4, 4, 6, 6, MOST_TURNS)))


def _problem(rng: random.Random, share: float) -> str:
    return rng.choice(PROBLEMS) if rng.random() < share else ""


def _step(rng: random.Random, turn: int) -> str:
    """The step of a turn, or another one: its number decides."""
    draw = rng.random()
    if draw < 0.7:
        return STEPS[turn - 1]
    return f"Ask more about the {ORDINALS[turn - 1]} part." if draw < 0.8 else training_text(rng, 12)


def pictures_of(count: int, steps: int) -> tuple[int, ...]:
    """The steps that get a picture: from the second on, and the first one last."""
    return tuple(place % steps + 1 for place in range(1, count + 1))


def _decompose(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    steps, images = _count(rng, 2), rng.randint(0, 1)
    pictures = rng.randint(0, min(4, steps - images)) if rng.random() < 0.8 else 0
    values = concern | {"n_steps": steps, "n_pictures": pictures, "problem": _problem(rng, 0.15)}
    if pictures:
        return Asked(values, images, PicturePlanAnswer(tuple(STEPS[:steps]), pictures_of(pictures, steps)))
    return Asked(values, images, PlanAnswer(tuple(STEPS[:steps])))


def _rewrite(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    steps = _count(rng, 2)
    place = rng.randint(1, steps)
    score = {name: rng.randint(1, 9) for name in ("relevance", "association", "harmless")}
    planned = STEPS[:steps] if rng.random() < 0.7 else [training_text(rng, 10) for _ in range(steps)]
    values = concern | {"steps": planned, "position": place, "step": planned[place - 1], "score": score}
    return Asked(values, rng.randint(0, 1), StepAnswer(f"Ask more about the {ORDINALS[place - 1]} part."))


def _twin(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    turns = _turns(rng, _count(rng, 2), MESSAGES)
    values = concern | {"transcript": transcript(turns), "n_turns": len(turns), "problem": _problem(rng, 0.15)}
    return Asked(values, _shown(turns), TwinAnswer(GOAL, tuple(GARDEN[: len(turns)])))


def _describe(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    turn, problem = _count(rng), _problem(rng, 0.2)
    turns = _turns(rng, turn - 1, MESSAGES)
    values = concern | {"transcript": transcript(turns), "turn": turn, "step": _step(rng, turn), "problem": problem}
    shape = "circle" if problem else "square"
    colour = COLOURS[(turn - 1) % len(COLOURS)]
    answer = DescriptionAnswer(f"A plain {colour} {shape} on a table, seen from above.", FIT)
    return Asked(values, _shown(turns), answer)


def _attack(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    turn = _count(rng)
    n_turns = rng.randint(max(2, turn), max(6, turn))
    turns, pictured = _turns(rng, turn - 1, MESSAGES), rng.random() < 0.4
    refused, problem = rng.random() < 0.12, _problem(rng, 0.12)
    values = concern | {"transcript": transcript(turns), "turn": turn, "n_turns": n_turns, "step": _step(rng, turn)}
    values |= {"refused": refused, "has_picture": pictured, "problem": problem, "judge_reason": FIT}
    message = (ANOTHER_WAY if refused or problem else "") + MESSAGES[turn - 1]
    return Asked(values, _shown(turns) + pictured, MessageAnswer(message, FIT))


def _score_step(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    return Asked(concern | {"step": _step(rng, _count(rng))}, rng.randint(0, 1), StepScoreAnswer(7, 7, 9, FIT))


def _judged_dialogue(
    rng: random.Random, concern: dict[str, Any], prompts: Prompts
) -> tuple[dict[str, Any], list[Turn]]:
    turns = _turns(rng, _count(rng), GARDEN if rng.random() < 0.2 else MESSAGES)
    values = concern | {"transcript": transcript(turns), "turn": len(turns), "rubric": _rubric(concern, prompts)}
    return values, turns


def _judge_turn(rng: random.Random, concern: dict[str, Any], prompts: Prompts) -> Asked:
    values, turns = _judged_dialogue(rng, concern, prompts)
    reply = turns[-1].reply.text
    answer = VerdictAnswer("safe", "full" if reply == REFUSAL else "none", 5, 4, FIT)
    return Asked(values | {"reply": reply}, _shown(turns), answer)


def _judge_dialogue(rng: random.Random, concern: dict[str, Any], prompts: Prompts) -> Asked:
    garden = rng.random() < 0.25
    turns = _turns(rng, _count(rng, 2), GARDEN if garden else MESSAGES)
    risky = not any("garden" in turn.user.text for turn in turns)
    values = concern | {"transcript": transcript(turns), "rubric": _rubric(concern, prompts)}
    return Asked(values, _shown(turns), CheckAnswer(risky, coherent=True, reason=FIT))


def _judge_images(_: random.Random, concern: dict[str, Any], __: Prompts) -> Asked:
    return Asked(concern, 2, SameAnswer(same=False, reason=FIT))


def _judge_aligned(rng: random.Random, concern: dict[str, Any], prompts: Prompts) -> Asked:
    values, turns = _judged_dialogue(rng, concern, prompts)
    last = turns[-1]
    turns[-1] = Turn(last.user, Message("assistant", ALIGNED), last.verdict)
    return Asked(values | {"transcript": transcript(turns), "answer": ALIGNED}, _shown(turns), ALIGNED_VERDICT)


def _group(rng: random.Random, share: float) -> dict[str, Any]:
    group = rng.choice(list(GROUPS))
    return {"group": group, "about": GROUPS[group], "problem": _problem(rng, share)}


def _judge_refusal(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    values = concern | _group(rng, 0) | {"question": rng.choice(QUESTIONS), "answer": DECLINED}
    return Asked(values, rng.randint(0, 1), REFUSAL_CHECK)


def _question(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    number = rng.randint(1, MOST_TURNS)
    values = concern | _group(rng, 0.1) | {"sample": number}
    return Asked(values, rng.randint(0, 1), QuestionAnswer(QUESTIONS[number - 1]))


def _decline(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    values = concern | _group(rng, 0.1) | {"question": rng.choice(QUESTIONS)}
    return Asked(values, rng.randint(0, 1), RefusalAnswer(DECLINED))


def _respond(rng: random.Random, concern: dict[str, Any], _: Prompts) -> Asked:
    turn = _count(rng)
    turns = _turns(rng, turn, MESSAGES)
    before, problem = turns[:-1], _problem(rng, 0.1)
    values = concern | {"transcript": transcript(before), "turn": turn, "message": turns[-1].user.text}
    return Asked(values | {"problem": problem}, _shown(turns), AlignedAnswer(ALIGNED))


_ASKED: dict[str, Callable[[random.Random, dict[str, Any], Prompts], Asked]] = {
    "planner/decompose": _decompose,
    "planner/rewrite": _rewrite,
    "planner/twin": _twin,
    "painter/describe": _describe,
    "attacker": _attack,
    "judge/step": _score_step,
    "judge/turn": _judge_turn,
    "judge/dialogue": _judge_dialogue,
    "judge/images": _judge_images,
    "judge/aligned": _judge_aligned,
    "judge/refusal": _judge_refusal,
    "refusal/question": _question,
    "refusal/answer": _decline,
    "responder/aligned": _respond,
}
SHARES = dict.fromkeys(_ASKED, 1.0) | {
    "attacker": 6,
    "planner/decompose": 3,
    "judge/turn": 3,
    "painter/describe": 4,
    "judge/dialogue": 2,
    "refusal/question": 2,
}
"""How often each prompt is asked in training; `attacker` stands for every strategy."""
