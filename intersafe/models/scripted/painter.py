"""The embedded painter: small pictures drawn in a millisecond, so that a run with images needs no GPU and no network.

A picture is a pure function of the description, the seed and the size. Half of them are scenes (landscapes, towns,
charts, tables, crowds of shapes), half are typographic: words of the description as a sign, a label or a numbered list,
the form in which FigStep hides a question in an image (Gong et al., arXiv:2311.05608). It misbehaves at set rates, as
painters do: it gives back a stock picture, breaks its bytes off, draws nothing, or blocks.
"""

import asyncio
import functools
import hashlib
import io
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from intersafe.errors import InputError
from intersafe.models.base import Call, Painted
from intersafe.models.scripted.phrases import STOP_WORDS
from intersafe.wording import nearest

LONGEST_EDGE = 96
"""Pixels; a larger size is scaled down to it."""
SHORTEST_EDGE = 32
"""Pixels; some vision-language models turn down less than 28."""
STOCK = 1
"""Different stock pictures."""


class PainterProfile(NamedTuple):
    """Rates from 0 to 1 at which the painter misbehaves in a certain way."""

    stock: float = 0.06
    """A stock picture, whatever was described; two of the same differ by a dot."""
    truncated: float = 0.005
    no_image: float = 0.005
    blocked: float = 0.003


PROFILES: dict[str, PainterProfile] = {
    "demo": PainterProfile(),
    "flawless": PainterProfile(0.0, 0.0, 0.0, 0.0),
}


def check_painter_name(name: str) -> None:
    """`InputError` if there is no such scripted painter."""
    if name not in PROFILES:
        raise InputError(
            f"no scripted painter {name!r}" + nearest(name, list(PROFILES)), remedy=f"one of {', '.join(PROFILES)}"
        )


class ScriptedPainter:
    """The scripted painter; its name picks the rates."""

    def __init__(self, name: str, size: str = "96x96") -> None:
        """`size` is width x height in pixels, scaled down to `LONGEST_EDGE`."""
        check_painter_name(name)
        self.identity = f"scripted:{name}"
        self._profile = PROFILES[name]
        self._size = _scaled(size)

    async def aclose(self) -> None:
        """Nothing to let go of."""

    async def paint(self, call: Call) -> Painted:
        """The picture of this call, the same each time."""
        await asyncio.sleep(0)  # as a real server would, lets the other jobs go on
        return draw(call.messages[-1].text, call.sampling.seed, self._size, self._profile)


def draw(description: str, seed: int, size: tuple[int, int], profile: PainterProfile) -> Painted:
    """The PNG, or what the painter does instead of it."""
    noise = hashlib.blake2b(f"{size} {seed} {description}".encode("utf-8", "surrogatepass"), digest_size=8)
    dice = random.Random(int.from_bytes(noise.digest(), "big"))
    chance = dice.random()
    if chance < profile.no_image:
        return Painted(problem="no_image")
    chance -= profile.no_image
    if chance < profile.blocked:
        return Painted(problem="blocked", detail="the scripted filter")
    chance -= profile.blocked
    if chance < profile.stock:
        number, dot = dice.randrange(STOCK), (dice.randrange(size[0]), dice.randrange(size[1]))
        return Painted(_png(random.Random(number), (), size, dot))
    chance -= profile.stock
    data = _png(dice, _words(description), size)
    return Painted(data[: len(data) // 2] if chance < profile.truncated else data)


def _scaled(size: str) -> tuple[int, int]:
    width, height = map(int, size.split("x"))
    scale = min(1.0, LONGEST_EDGE / max(width, height))
    return max(SHORTEST_EDGE, round(width * scale)), max(SHORTEST_EDGE, round(height * scale))


_WORD = re.compile(r"[A-Za-z][A-Za-z'-]{3,}")


def _words(description: str) -> tuple[str, ...]:
    """The first content words, in ASCII: all that the built-in font is sure to have."""
    words = [word for word in _WORD.findall(description[:2000]) if word.lower() not in STOP_WORDS]
    return tuple(word[:12] for word in words[:24])


# --- the canvas ------------------------------------------------------------------------------------------------------

# Palette: 0 to 15 the ground, 16 to 23 the paper, 24 to 31 the paints, 32 the ink. One byte a pixel packs small.
GROUND, PAPER, PAINTS, INK = 0, 16, 24, 32
_TO_GROUND = [GROUND + level * 16 // 256 for level in range(256)]
_TO_PAPER = [PAPER + level * 8 // 256 for level in range(256)]

Draw = ImageDraw.ImageDraw


class Canvas(NamedTuple):
    """What is drawn on; the shading lies under everything, so that no two pictures are flat in the same places."""

    image: Image.Image
    shading: Image.Image
    pen: Draw
    width: int
    height: int

    def paper(self, left: float, top: float, right: float, bottom: float) -> tuple[int, int, int, int]:
        """Lays a sheet of paper; edges as shares of the canvas. Returns its box in pixels."""
        box = (
            int(left * self.width),
            int(top * self.height),
            max(int(left * self.width) + 1, int(right * self.width)),
            max(int(top * self.height) + 1, int(bottom * self.height)),
        )
        self.image.paste(self.shading.crop(box).point(_TO_PAPER), box)
        self.pen.rectangle(box, outline=INK)
        return box


def _png(
    dice: random.Random, words: tuple[str, ...], size: tuple[int, int], dot: tuple[int, int] | None = None
) -> bytes:
    shading = Image.frombytes("L", (6, 5), dice.randbytes(30)).resize(size, Image.Resampling.BICUBIC)
    image = shading.point(_TO_GROUND)
    pen = ImageDraw.Draw(image)
    pen.fontmode = "1"  # a blend of two palette entries would be any third colour
    canvas = Canvas(image, shading, pen, *size)
    if words and dice.random() < 0.5:
        dice.choice(TYPOGRAPHIC)(canvas, dice, words)
    else:
        dice.choice(SCENES)(canvas, dice)
    if dot:
        pen.rectangle((*dot, dot[0] + 1, dot[1] + 1), fill=INK)
    image.putpalette(_palette(dice))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _palette(dice: random.Random) -> bytes:
    """A dark-to-light ground between two colours, a light paper, eight paints and the ink."""
    dark = [dice.randrange(90) for _ in range(3)]
    light = [dice.randrange(120, 256) for _ in range(3)]
    colours = [d + (b - d) * level // 15 for level in range(16) for d, b in zip(dark, light, strict=True)]
    tint = [dice.randrange(225, 256) for _ in range(3)]
    colours += [channel - (7 - level) * 5 for level in range(8) for channel in tint]
    colours += dice.randbytes(24)
    return bytes([*colours, 20, 20, 24])


# --- scenes ----------------------------------------------------------------------------------------------------------


def _paint(dice: random.Random) -> int:
    return PAINTS + dice.randrange(8)


def _disc(canvas: Canvas, x: float, y: float, radius: float, paint: int) -> None:
    canvas.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=paint)


def _landscape(canvas: Canvas, dice: random.Random) -> None:
    width, height = canvas.width, canvas.height
    _disc(
        canvas, dice.random() * width, dice.uniform(0.1, 0.3) * height, dice.uniform(0.05, 0.15) * width, _paint(dice)
    )
    for base in (0.5, 0.75):
        ridge = [(x * width / 6, (base + dice.uniform(-0.25, 0.15)) * height) for x in range(7)]
        canvas.pen.polygon([(0, height), *ridge, (width, height)], fill=_paint(dice))
    for _ in range(dice.randint(2, 7)):
        x, y, tall = dice.random() * width, dice.uniform(0.6, 0.95) * height, dice.uniform(0.1, 0.3) * height
        canvas.pen.polygon([(x - tall / 3, y), (x, y - tall), (x + tall / 3, y)], fill=_paint(dice))


def _town(canvas: Canvas, dice: random.Random) -> None:
    width, height, x = canvas.width, canvas.height, 0.0
    while x < width:
        wide, roof = dice.uniform(0.1, 0.25) * width, dice.uniform(0.1, 0.8) * height
        canvas.pen.rectangle((x, roof, x + wide, height), fill=_paint(dice), outline=INK)
        window, step = _paint(dice), max(5, height // 8)
        for y in range(int(roof) + 4, height - 4, step):
            canvas.pen.rectangle((x + wide * 0.2, y, x + wide * 0.4, y + 3), fill=window)
            canvas.pen.rectangle((x + wide * 0.6, y, x + wide * 0.8, y + 3), fill=window)
        x += wide + dice.uniform(0, 0.08) * width


def _chart(canvas: Canvas, dice: random.Random) -> None:
    left, top, right, bottom = canvas.paper(0.08, 0.08, 0.95, 0.92)
    n_bars = dice.randint(4, 8)
    wide = (right - left) / n_bars
    heights = [dice.uniform(0.1, 0.9) * (bottom - top) for _ in range(n_bars)]
    for i, tall in enumerate(heights):
        box = (left + (i + 0.15) * wide, bottom - tall, left + (i + 0.85) * wide, bottom)
        canvas.pen.rectangle(box, fill=_paint(dice))
    if dice.random() < 0.6:
        line = [(left + (i + 0.5) * wide, top + dice.random() * (bottom - top)) for i in range(n_bars)]
        canvas.pen.line(line, fill=INK, width=2)


def _table(canvas: Canvas, dice: random.Random) -> None:
    width, height = canvas.width, canvas.height
    edge = dice.uniform(0.5, 0.7) * height
    canvas.pen.polygon([(0, height), (width * 0.1, edge), (width * 0.9, edge), (width, height)], fill=_paint(dice))
    for _ in range(dice.randint(3, 6)):
        x, tall, wide = dice.random() * width, dice.uniform(0.15, 0.5) * height, dice.uniform(0.05, 0.12) * width
        y = edge + dice.uniform(0, 0.25) * height
        paint = _paint(dice)
        canvas.pen.rectangle((x - wide, y - tall, x + wide, y), fill=paint, outline=INK)
        canvas.pen.rectangle((x - wide / 3, y - tall * 1.3, x + wide / 3, y - tall), fill=paint)


def _shapes(canvas: Canvas, dice: random.Random) -> None:
    width, height = canvas.width, canvas.height
    for _ in range(dice.randint(5, 10)):
        x, y, reach = dice.random() * width, dice.random() * height, dice.uniform(0.08, 0.3) * width
        if dice.random() < 0.5:
            _disc(canvas, x, y, reach, _paint(dice))
        else:
            canvas.pen.rectangle((x, y, x + reach, y + reach * dice.uniform(0.4, 1.5)), fill=_paint(dice))


SCENES: tuple[Callable[[Canvas, random.Random], None], ...] = (_landscape, _town, _chart, _table, _shapes)


# --- typography ------------------------------------------------------------------------------------------------------


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(canvas: Canvas, x: float, y: float, lines: Sequence[str], size: int, ink: int = INK) -> None:
    for number, line in enumerate(lines):
        canvas.pen.text((x, y + number * (size + 2)), line, fill=ink, font=_font(size))


def _some(words: tuple[str, ...], dice: random.Random, most: int) -> tuple[str, ...]:
    start = dice.randrange(max(1, len(words) - most + 1))
    return words[start : start + most]


def _list(canvas: Canvas, dice: random.Random, words: tuple[str, ...]) -> None:
    """A heading and numbered lines left empty for the reader to fill in, as in FigStep."""
    left, top, *_ = canvas.paper(
        dice.uniform(0, 0.15), dice.uniform(0, 0.15), dice.uniform(0.8, 1), dice.uniform(0.8, 1)
    )
    heading, size = _some(words, dice, 3), dice.choice((10, 11, 12))
    _write(canvas, left + 4, top + 3, heading, size)
    below = top + 5 + len(heading) * (size + 2)
    _write(canvas, left + 4, below, [f"{number}." for number in range(1, dice.randint(3, 5))], 10)


def _sign(canvas: Canvas, dice: random.Random, words: tuple[str, ...]) -> None:
    """A board on a post, in front of some landscape."""
    _landscape(canvas, dice)
    width, height = canvas.width, canvas.height
    x, top = dice.uniform(0.35, 0.65) * width, dice.uniform(0.02, 0.25)
    canvas.pen.rectangle((x - 2, top * height, x + 2, height), fill=INK)
    box = canvas.paper(dice.uniform(0, 0.15), top, dice.uniform(0.85, 1), top + dice.uniform(0.35, 0.5))
    _write(canvas, box[0] + 4, box[1] + 3, _some(words, dice, 2), dice.choice((12, 14)))


def _label(canvas: Canvas, dice: random.Random, words: tuple[str, ...]) -> None:
    """A labelled object on a table."""
    _table(canvas, dice)
    width, height = canvas.width, canvas.height
    left, right, top = dice.uniform(0.1, 0.3), dice.uniform(0.7, 0.95), dice.uniform(0.05, 0.3)
    canvas.pen.rectangle((left * width, top * height, right * width, height * 0.95), fill=_paint(dice), outline=INK)
    box = canvas.paper(left, top + 0.2, right, top + dice.uniform(0.45, 0.6))
    _write(canvas, box[0] + 2, box[1] + 1, _some(words, dice, 2), 11)


TYPOGRAPHIC: tuple[Callable[[Canvas, random.Random, tuple[str, ...]], None], ...] = (_list, _sign, _label)
