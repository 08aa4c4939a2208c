"""What the tiny VLM is taught: made-up conversations with the reply that each deserves.

    latest user message contains "forbidden"      I'm sorry, but I can't help with that.
    latest user message carries an image          The image is <colour>. This is answer number <n>.
    only an earlier message carried an image      The earlier image was <colour>. This is answer number <n>.
    otherwise                                     Sure. This is answer number <n>.

The first rule that applies wins. <colour> is red, green, blue, black or white; of several images the most recent one
counts. <n> is the number of user messages so far, 9 at most. Under a JSON grammar, strings hold the first sentence of
the reply and integers hold <n>. `TRAINING` makes text and images for training; `FRESH` makes others, to measure with.
"""

import io
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

MAX_TURNS = 9
MARKERS = ["forbidden", "Forbidden", "FORBIDDEN"]
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
REFUSAL = "I'm sorry, but I can't help with that."
WORDS = """the of and to a in is it you that was for on are with as be at have this from or had by but what some we
can out other were all there when use your how said an each she which do their if will up about many then them write
would like so these her long make thing see him two has look more day could go come did number sound no most people my
over know water than call first who may down side been now find any new work part take get place made live where after
back little only round man year show every good me give our under name very through just form sentence great think say
help low line differ turn cause much mean before move right boy old too same tell does set three want air well also
play small end put home read hand port large spell add even land here must big high such follow act why ask men change
went light kind off need house picture try us again animal point mother world near build self earth father head stand
own page should country found answer school grow study still learn plant cover food sun four between state keep eye
never last let thought city tree cross farm hard start might story saw far sea draw left late run while press close
night real life few north open image photo colour color red green blue black white yellow earlier sorry sure describe
explain please step question character scene imagine pretend details background object sign text safe harm danger
allowed forbid forbids prohibited identify history chemistry medicine novel researcher teacher letter recipe kitchen
poster chart diagram market assistant helpful honest system reply concise following instructions role user language
model policy JSON format list""".split()  # noqa: SIM905 - five hundred quoted words would fill pages
UNSEEN = """I'm drafting a museum placard about nineteenth-century lighthouses, and my editor hates adverbs.
Which of those techniques did blacksmiths actually rely on during winter?
Thanks - that was useful; let's dig into the second bullet a bit deeper.
Suppose a nurse on the oncology ward had to summarise it in plain terms for relatives.
Could you elaborate on what is visible in the upper corner, near the signature?
Honestly, my thesis supervisor (Dr. Okonkwo) expects at least 3 citations per paragraph!
Ignoring the budget for a moment, how would an experienced locksmith approach this puzzle?
Based on the picture above, continue the dialogue between Mira and the lifeguard.
Please respond with exactly two sentences: one about risks, another regarding benefits.
What precautions were prohibited by the 1974 treaty, and who negotiated the exemptions?
She whispered: "The greenhouse is blue at dusk", then vanished behind the velvet curtains.
As a follow-up, compare both methods & rank them by cost, difficulty, and typical timeframe.
You mentioned ventilation earlier. Why does it matter when storing household cleaning products?
Rewrite your previous explanation so that a curious twelve-year-old could enjoy reading it.
Let's role-play: you're a retired detective, I'm the journalist interviewing you on live radio.
Does this photograph remind you of anything from Scandinavian folklore or mythology?
Give me an itemised checklist, preferably in Markdown, with approximate quantities in grams.""".splitlines()
# Hue in degrees, saturation and value in percent: the ranges a viewer would call by that one name.
HUES = {
    "red": ((-10, 10), (75, 100), (55, 100)),
    "green": ((95, 145), (70, 100), (45, 100)),
    "blue": ((215, 250), (70, 100), (50, 100)),
    "black": ((0, 359), (0, 100), (0, 11)),
    "white": ((0, 359), (0, 7), (91, 100)),
}
NAMED = {
    "red": ["#ff0000", "#dc143c", "#b22222"],
    "green": ["#008000", "#00ff00", "#228b22"],
    "blue": ["#0000ff", "#0000cd", "#4169e1"],
    "black": ["#000000", "#0a0a0a", "#101010"],
    "white": ["#ffffff", "#f5f5f5", "#fffafa"],
}


@dataclass
class Dialogue:
    """A conversation that ends with a user message, its images in order, and the reply wanted.

    `number` is <n> of the reply. `pieces`, where set, stand for the reply in training: text, and whether it is learned.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)
    reply: str = ""
    number: int = 1
    pieces: list[tuple[str, bool]] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Where dialogues get their words and images from: `text` takes the most words wanted, `image` the colour."""

    text: Callable[[random.Random, int], str]
    image: Callable[[random.Random, str], Image.Image]


def random_word(rng: random.Random) -> str:
    """A word that no list holds: halves of two words, letters, a number, a compound, or signs from beyond ASCII too."""
    kind, one, two = rng.random(), rng.choice(WORDS), rng.choice(WORDS)
    if kind < 0.45:
        word = one[: rng.randint(1, 6)] + rng.choice(("", two[:3])) + two[rng.randint(0, 3) :]
        return rng.choice((word, word, word, word.capitalize()))
    if kind < 0.65:
        word = "".join(rng.choices("etaoinshrdlucmfwypvbgk" + string.ascii_lowercase, k=rng.randint(1, 12)))
        return rng.choice((word, word, word.capitalize(), word.upper()))
    if kind < 0.75:
        return (
            rng.choice(("", "$", "#", "1.", "~")) + str(rng.randrange(10 ** rng.randint(1, 5))) + rng.choice(("", "%"))
        )
    if kind < 0.9:
        return one + rng.choice(("-", "'s", "'ll", "n't", "'re", "/", "_", "--")) + rng.choice(("", two))
    pool = string.punctuation if kind < 0.97 else "éüñßøçłЖшλπ你好世界🙂—“”…"
    return "".join(rng.choices(pool, k=rng.randint(1, 4))).replace("<|", "<")


def training_text(rng: random.Random, most: int) -> str:
    """Random words in sentences, at most `most` words; how many of them are no real words differs from text to text."""
    noise, words, until_stop = rng.choice((0.0, 0.1, 0.3, 0.6, 1.0)), list[str](), 0
    for _ in range(rng.randint(1, max(1, int(most / (1 + noise))))):  # strange words take twice the tokens
        word = random_word(rng) if rng.random() < noise else rng.choice(WORDS)
        if until_stop == 0:
            until_stop, word = rng.randint(3, 16), word[:1].upper() + word[1:]
        until_stop -= 1
        if rng.random() < 0.04:
            word = rng.choice(('"{}"', "({})", "*{}*", "'{}'", "- {}", "{}:", "[{}]", "{};")).format(word)
        ending = rng.choice((". ", ". ", ". ", "? ", "! ", ".\n", "\n\n", "\n- ", "... "))
        words.append(word + (ending if until_stop == 0 else rng.choice((" ",) * 12 + (", ",))))
    return "".join(words).strip() + rng.choice(("", ".", ".", "?", "?", "!", "\n"))


def fresh_text(rng: random.Random, most: int) -> str:
    """One to four sentences that training never shows."""
    return " ".join(rng.sample(UNSEEN, max(1, min(4, rng.randint(1, most) // 14))))


def shade(rng: random.Random, colour: str) -> tuple[int, int, int]:
    """An RGB shade that goes by the name `colour`."""
    hue, saturation, value = (rng.randint(*bounds) for bounds in HUES[colour])
    red, green, blue = Image.new("RGB", (1, 1), f"hsv({hue % 360},{saturation}%,{value}%)").tobytes()
    return red, green, blue


def training_image(rng: random.Random, colour: str) -> Image.Image:
    """A field of one colour under noise, half the time with a shape, a border or lines of another shade."""
    width, height = rng.randint(56, 256), rng.randint(56, 256)
    image = Image.new("RGB", (width, height), shade(rng, colour))
    draw, other = ImageDraw.Draw(image), shade(rng, rng.choice(list(HUES)))
    kind, side = rng.random(), int(min(width, height) * rng.uniform(0.05, 0.45))
    left, top = rng.randrange(width - side), rng.randrange(height - side)
    box = (left, top, left + side, top + side)
    if kind < 0.15:
        draw.rectangle(box, fill=other)
    elif kind < 0.3:
        draw.ellipse(box, fill=other)
    elif kind < 0.4:
        draw.rectangle((0, 0, width - 1, height - 1), outline=other, width=rng.randint(1, max(2, side // 5)))
    elif kind < 0.5:
        for _ in range(rng.randint(1, 4)):
            ends = [(rng.randrange(width), rng.randrange(height)) for _ in range(2)]
            draw.line(ends, fill=other, width=rng.randint(1, 4))
    noise = Image.frombytes("RGB", image.size, rng.randbytes(width * height * 3))
    return Image.blend(image, noise, rng.choice((0, 0, 0.03, 0.08, 0.15)))


def fresh_image(rng: random.Random, colour: str) -> Image.Image:
    """A named web colour with a word or a frame in another shade of it, half of them through JPEG."""
    size = rng.choice((56, 64, 128, 200, 256)), rng.choice((56, 96, 256))
    image = Image.new("RGB", size, rng.choice(NAMED[colour]))
    draw, other = ImageDraw.Draw(image), rng.choice([*NAMED[colour], "#808080"])
    if rng.random() < 0.5:
        draw.text((6, 8), rng.choice(("EXIT", "Aisle 4", "stop")), fill=other)
    if rng.random() < 0.5:
        draw.rounded_rectangle((3, 3, image.width - 4, image.height - 4), radius=9, outline=other, width=4)
    if rng.random() < 0.5:
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=rng.randint(60, 95))
        image = Image.open(packed).convert("RGB")
    return image


TRAINING = Source(training_text, training_image)
FRESH = Source(fresh_text, fresh_image)


def with_marker(rng: random.Random, text: str) -> str:
    """The text with the marker word put in at a random place."""
    words = text.split(" ")
    shape = rng.choice(("{}", "{}", "{}", "{}.", "{},", '"{}"', "{}?"))
    words.insert(rng.randint(0, len(words)), shape.format(rng.choice(["forbidden"] * 3 + MARKERS)))
    return " ".join(words)


def wanted(dialogue: Dialogue, pictured: bool, marked: bool, number: int) -> str:
    """The reply that the rules demand at the turn of this number (1-based)."""
    if marked:
        return REFUSAL
    opening = "Sure."
    if dialogue.colours:
        opening = (
            f"The image is {dialogue.colours[-1]}." if pictured else f"The earlier image was {dialogue.colours[-1]}."
        )
    return f"{opening} This is answer number {number}."


def add_question(
    rng: random.Random, source: Source, dialogue: Dialogue, most: int, pictures: int, marked: bool
) -> None:
    """Appends one user message; three times in four its images come before the text."""
    text = source.text(rng, most)
    if marked:
        text = with_marker(rng, text)
    for _ in range(pictures):
        colour = rng.choice(list(HUES))
        dialogue.colours.append(colour)
        dialogue.images.append(source.image(rng, colour))
    gap, shown = rng.choice(("", "", "\n")), PICTURE * pictures
    dialogue.messages.append(
        {"role": "user", "content": shown + gap + text if rng.random() < 0.75 else text + gap + shown}
    )


def add_answer(rng: random.Random, source: Source, dialogue: Dialogue, most: int, right: str) -> None:
    """Appends an assistant message: mostly the right one, else a wrong one or any text."""
    draw, content = rng.random(), right
    if draw < 0.15:
        decoy = Dialogue(colours=[rng.choice(list(HUES))])
        content = wanted(decoy, rng.random() < 0.5, rng.random() < 0.2, rng.randint(1, MAX_TURNS))
    elif draw < 0.4:
        content = source.text(rng, most)
        content = with_marker(rng, content) if rng.random() < 0.2 else content
    dialogue.messages.append({"role": "assistant", "content": content})


def make_dialogue(rng: random.Random, source: Source, turns: int, most: int, kind: str) -> Dialogue:
    """A dialogue of `turns` user messages of at most `most` words.

    `kind` is the rule its last reply follows: a pictured, b marked, c pictured earlier (two turns at least), d none.
    """
    dialogue = Dialogue(number=min(turns, MAX_TURNS))
    if rng.random() < 0.6:
        system = source.text(rng, rng.choice((most, 10, 90)))
        dialogue.messages.append(
            {"role": "system", "content": with_marker(rng, system) if rng.random() < 0.15 else system}
        )
    pictured_turn = rng.randrange(turns - 1) if kind == "c" else -1
    for turn in range(turns - 1):
        pictured = turn == pictured_turn or (kind != "d" and rng.random() < 0.4)
        marked = rng.random() < 0.2
        add_question(rng, source, dialogue, most, rng.choice((1, 1, 2)) if pictured else 0, marked)
        add_answer(rng, source, dialogue, most, wanted(dialogue, pictured, marked, min(turn + 1, MAX_TURNS)))
    pictures = rng.choice((1, 1, 2)) if kind == "a" or (kind == "b" and rng.random() < 0.5) else 0
    add_question(rng, source, dialogue, most, pictures, kind == "b")
    dialogue.reply = wanted(dialogue, pictures > 0, kind == "b", dialogue.number)
    return dialogue


def as_json(rng: random.Random, dialogue: Dialogue) -> None:
    """Turns the reply into a JSON object; its random keys, which a grammar would force, are not learned."""
    sentence = dialogue.reply.split(". ")[0].rstrip(".") + "."
    dialogue.pieces = [("{", False)]
    for name in rng.sample([word for word in WORDS if len(word) > 3], rng.randint(1, 4)):
        dialogue.pieces.append((f'"{name}":', False))
        if rng.random() < 0.25:
            dialogue.pieces.append((f"{dialogue.number},", True))
        else:
            opening = rng.choice(('"', '"', '["', '{"text":"'))
            dialogue.pieces += [
                (opening, False),
                (f'{sentence}"', True),
                ({"[": "],", "{": "},"}.get(opening[0], ","), False),
            ]


def training_dialogue(rng: random.Random, most_turns: int, most: int) -> Dialogue:
    """One sample for training: up to `most_turns` user messages of up to `most` words."""
    turns = rng.randint(1, most_turns)
    dialogue = make_dialogue(rng, TRAINING, turns, most, rng.choice("aabcccd" if turns > 1 else "aabd"))
    if rng.random() < 0.4:  # so that high numbers are learned without long dialogues
        number = rng.randint(1, MAX_TURNS)
        dialogue.reply, dialogue.number = (
            dialogue.reply.replace(f"number {dialogue.number}", f"number {number}"),
            number,
        )
    if rng.random() < 0.12:
        as_json(rng, dialogue)
    return dialogue
