"""The scripted painter: a deterministic stand-in that draws small pictures, so that a run needs no GPU and no network.

A picture is a pure function of the description, the seed and the size, drawn in about a millisecond. Half of them are
scenes (landscapes, towns, charts, tables, shapes). Half are typographic: words of the description as a sign, a label or
a numbered list, the form in which FigStep hides a question in an image (Gong et al., arXiv:2311.05608). It misbehaves
at set rates, as real painters do: it returns a stock picture or truncated bytes, draws nothing, or blocks.
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

from intersafe.models.base import Call, Painted
from intersafe.models.scripted.phrases import STOP_WORDS
from intersafe.models.scripted.profiles import check_name

LONGEST_EDGE = 96
"""Pixels; a larger picture is scaled down to this edge."""
SHORTEST_EDGE = 32
"""Pixels; some vision-language models reject edges below 28."""
STOCK = 1
"""Number of different stock pictures."""


class PainterProfile(NamedTuple):
    """Rates, each from 0 to 1, at which the painter misbehaves in a certain way."""

    stock: float = 0.06
    """A stock picture, whatever the description; copies of one differ by a dot."""
    truncated: float = 0.005
    """Half of the bytes of a picture."""
    no_image: float = 0.005
    blocked: float = 0.003


PAINTER_PROFILES: dict[str, PainterProfile] = {
    "demo": PainterProfile(),
    "flawless": PainterProfile(0.0, 0.0, 0.0, 0.0),
}


def check_painter_name(name: str) -> None:
    """`InputError` if there is no such scripted painter."""
    check_name(name, "painter", PAINTER_PROFILES)


class ScriptedPainter:
    """The scripted painter; its name selects the profile."""

    def __init__(self, name: str, size: str = "96x96") -> None:
        """`name` is a key of `PAINTER_PROFILES`, `InputError` otherwise; `size` is width x height in pixels."""
        check_painter_name(name)
        self.identity = f"scripted:{name}"
        self._profile = PAINTER_PROFILES[name]
        self._size = _scaled(size)

    async def aclose(self) -> None:
        """Does nothing: there is no connection to close."""

    async def paint(self, call: Call) -> Painted:
        """The picture of the call; equal calls get equal pictures."""
        await asyncio.sleep(0)  # lets other jobs run, as a real server would
        return draw(call.messages[-1].text, call.sampling.seed, self._size, self._profile)


def draw(description: str, seed: int, size: tuple[int, int], profile: PainterProfile) -> Painted:
    """A PNG of `size` (width, height) in pixels, or one of the problems of the profile."""
    noise = hashlib.blake2b(f"{size} {seed} {description}".encode("utf-8", "surrogatepass"), digest_size=8)
    rng = random.Random(int.from_bytes(noise.digest(), "big"))
    chance = rng.random()
    if chance < profile.no_image:
        return Painted(problem="no_image")
    chance -= profile.no_image
    if chance < profile.blocked:
        return Painted(problem="blocked", detail="the scripted filter")
    chance -= profile.blocked
    if chance < profile.stock:
        number, dot = rng.randrange(STOCK), (rng.randrange(size[0]), rng.randrange(size[1]))
        return Painted(_png(random.Random(number), (), size, dot))
    chance -= profile.stock
    data = _png(rng, _words(description), size)
    return Painted(data[: len(data) // 2] if chance < profile.truncated else data)


def _scaled(size: str) -> tuple[int, int]:
    width, height = map(int, size.split("x"))
    scale = min(1.0, LONGEST_EDGE / max(width, height))
    return max(SHORTEST_EDGE, round(width * scale)), max(SHORTEST_EDGE, round(height * scale))


_WORD = re.compile(r"[A-Za-z][A-Za-z'-]{3,}")


def _words(description: str) -> tuple[str, ...]:
    """The first content words, in ASCII, which every built-in font has."""
    words = [word for word in _WORD.findall(description[:2000]) if word.lower() not in STOP_WORDS]
    return tuple(word[:12] for word in words[:24])


# --- the canvas ------------------------------------------------------------------------------------------------------

# Palette: 0 to 15 the ground, 16 to 23 the paper, 24 to 31 the paints, 32 the ink. One byte per pixel compresses well.
GROUND, PAPER, PAINTS, INK = 0, 16, 24, 32
_TO_GROUND = [GROUND + level * 16 // 256 for level in range(256)]
_TO_PAPER = [PAPER + level * 8 // 256 for level in range(256)]

Draw = ImageDraw.ImageDraw


class Canvas(NamedTuple):
    """An image in progress. The shading is under everything, so that no two pictures have the same flat areas."""

    image: Image.Image
    shading: Image.Image
    pen: Draw
    width: int
    height: int

    def paper(self, left: float, top: float, right: float, bottom: float) -> tuple[int, int, int, int]:
        """Draws a sheet of paper, with its edges as shares of the canvas; returns its box in pixels."""
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
    rng: random.Random, words: tuple[str, ...], size: tuple[int, int], dot: tuple[int, int] | None = None
) -> bytes:
    shading = Image.frombytes("L", (6, 5), rng.randbytes(30)).resize(size, Image.Resampling.BICUBIC)
    image = shading.point(_TO_GROUND)
    pen = ImageDraw.Draw(image)
    pen.fontmode = "1"  # an average of two palette entries would be an unrelated colour
    canvas = Canvas(image, shading, pen, *size)
    if words and rng.random() < 0.5:
        rng.choice(TYPOGRAPHIC)(canvas, rng, words)
    else:
        rng.choice(SCENES)(canvas, rng)
    if dot:
        pen.rectangle((*dot, dot[0] + 1, dot[1] + 1), fill=INK)
    image.putpalette(_palette(rng))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _palette(rng: random.Random) -> bytes:
    """A dark-to-light ground between two colours, a light paper, eight paints and the ink."""
    dark = [rng.randrange(90) for _ in range(3)]
    light = [rng.randrange(120, 256) for _ in range(3)]
    colours = [d + (b - d) * level // 15 for level in range(16) for d, b in zip(dark, light, strict=True)]
    tint = [rng.randrange(225, 256) for _ in range(3)]
    colours += [channel - (7 - level) * 5 for level in range(8) for channel in tint]
    colours += rng.randbytes(24)
    return bytes([*colours, 20, 20, 24])


# --- scenes ----------------------------------------------------------------------------------------------------------


def _paint(rng: random.Random) -> int:
    return PAINTS + rng.randrange(8)


def _disc(canvas: Canvas, x: float, y: float, radius: float, paint: int) -> None:
    canvas.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=paint)


def _landscape(canvas: Canvas, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    _disc(canvas, rng.random() * width, rng.uniform(0.1, 0.3) * height, rng.uniform(0.05, 0.15) * width, _paint(rng))
    for base in (0.5, 0.75):
        ridge = [(x * width / 6, (base + rng.uniform(-0.25, 0.15)) * height) for x in range(7)]
        canvas.pen.polygon([(0, height), *ridge, (width, height)], fill=_paint(rng))
    for _ in range(rng.randint(2, 7)):
        x, y, tall = rng.random() * width, rng.uniform(0.6, 0.95) * height, rng.uniform(0.1, 0.3) * height
        canvas.pen.polygon([(x - tall / 3, y), (x, y - tall), (x + tall / 3, y)], fill=_paint(rng))


def _town(canvas: Canvas, rng: random.Random) -> None:
    width, height, x = canvas.width, canvas.height, 0.0
    while x < width:
        wide, roof = rng.uniform(0.1, 0.25) * width, rng.uniform(0.1, 0.8) * height
        canvas.pen.rectangle((x, roof, x + wide, height), fill=_paint(rng), outline=INK)
        window, step = _paint(rng), max(5, height // 8)
        for y in range(int(roof) + 4, height - 4, step):
            canvas.pen.rectangle((x + wide * 0.2, y, x + wide * 0.4, y + 3), fill=window)
            canvas.pen.rectangle((x + wide * 0.6, y, x + wide * 0.8, y + 3), fill=window)
        x += wide + rng.uniform(0, 0.08) * width


def _chart(canvas: Canvas, rng: random.Random) -> None:
    left, top, right, bottom = canvas.paper(0.08, 0.08, 0.95, 0.92)
    n_bars = rng.randint(4, 8)
    wide = (right - left) / n_bars
    heights = [rng.uniform(0.1, 0.9) * (bottom - top) for _ in range(n_bars)]
    for i, tall in enumerate(heights):
        box = (left + (i + 0.15) * wide, bottom - tall, left + (i + 0.85) * wide, bottom)
        canvas.pen.rectangle(box, fill=_paint(rng))
    if rng.random() < 0.6:
        line = [(left + (i + 0.5) * wide, top + rng.random() * (bottom - top)) for i in range(n_bars)]
        canvas.pen.line(line, fill=INK, width=2)


def _table(canvas: Canvas, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    edge = rng.uniform(0.5, 0.7) * height
    canvas.pen.polygon([(0, height), (width * 0.1, edge), (width * 0.9, edge), (width, height)], fill=_paint(rng))
    for _ in range(rng.randint(3, 6)):
        x, tall, wide = rng.random() * width, rng.uniform(0.15, 0.5) * height, rng.uniform(0.05, 0.12) * width
        y = edge + rng.uniform(0, 0.25) * height
        paint = _paint(rng)
        canvas.pen.rectangle((x - wide, y - tall, x + wide, y), fill=paint, outline=INK)
        canvas.pen.rectangle((x - wide / 3, y - tall * 1.3, x + wide / 3, y - tall), fill=paint)


def _shapes(canvas: Canvas, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    for _ in range(rng.randint(5, 10)):
        x, y, reach = rng.random() * width, rng.random() * height, rng.uniform(0.08, 0.3) * width
        if rng.random() < 0.5:
            _disc(canvas, x, y, reach, _paint(rng))
        else:
            canvas.pen.rectangle((x, y, x + reach, y + reach * rng.uniform(0.4, 1.5)), fill=_paint(rng))


SCENES: tuple[Callable[[Canvas, random.Random], None], ...] = (_landscape, _town, _chart, _table, _shapes)


# --- typography ------------------------------------------------------------------------------------------------------


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(canvas: Canvas, x: float, y: float, lines: Sequence[str], size: int, ink: int = INK) -> None:
    for number, line in enumerate(lines):
        canvas.pen.text((x, y + number * (size + 2)), line, fill=ink, font=_font(size))


def _some(words: tuple[str, ...], rng: random.Random, most: int) -> tuple[str, ...]:
    start = rng.randrange(max(1, len(words) - most + 1))
    return words[start : start + most]


def _list(canvas: Canvas, rng: random.Random, words: tuple[str, ...]) -> None:
    """A heading and empty numbered lines to be completed, as in FigStep."""
    left, top, *_ = canvas.paper(rng.uniform(0, 0.15), rng.uniform(0, 0.15), rng.uniform(0.8, 1), rng.uniform(0.8, 1))
    heading, size = _some(words, rng, 3), rng.choice((10, 11, 12))
    _write(canvas, left + 4, top + 3, heading, size)
    below = top + 5 + len(heading) * (size + 2)
    _write(canvas, left + 4, below, [f"{number}." for number in range(1, rng.randint(3, 5))], 10)


def _sign(canvas: Canvas, rng: random.Random, words: tuple[str, ...]) -> None:
    """A board on a post, in front of some landscape."""
    _landscape(canvas, rng)
    width, height = canvas.width, canvas.height
    x, top = rng.uniform(0.35, 0.65) * width, rng.uniform(0.02, 0.25)
    canvas.pen.rectangle((x - 2, top * height, x + 2, height), fill=INK)
    box = canvas.paper(rng.uniform(0, 0.15), top, rng.uniform(0.85, 1), top + rng.uniform(0.35, 0.5))
    _write(canvas, box[0] + 4, box[1] + 3, _some(words, rng, 2), rng.choice((12, 14)))


def _label(canvas: Canvas, rng: random.Random, words: tuple[str, ...]) -> None:
    """A labelled object on a table."""
    _table(canvas, rng)
    width, height = canvas.width, canvas.height
    left, right, top = rng.uniform(0.1, 0.3), rng.uniform(0.7, 0.95), rng.uniform(0.05, 0.3)
    canvas.pen.rectangle((left * width, top * height, right * width, height * 0.95), fill=_paint(rng), outline=INK)
    box = canvas.paper(left, top + 0.2, right, top + rng.uniform(0.45, 0.6))
    _write(canvas, box[0] + 2, box[1] + 1, _some(words, rng, 2), 11)


TYPOGRAPHIC: tuple[Callable[[Canvas, random.Random, tuple[str, ...]], None], ...] = (_list, _sign, _label)
