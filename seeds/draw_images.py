"""Draws the pictures of the seed pack: `python seeds/draw_images.py`; `--check` compares them with a fresh drawing.

What is drawn stands in `pictures.txt`, in a small language that is explained there. No system font and no random number
is used, so the same Pillow draws the same bytes. Another zlib may pack the same pixels otherwise: `--check` compares
pixels.
"""

import argparse
import io
import sys
from functools import cache
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

SIZE = 256
"""Edge of a picture in pixels."""
SCALE = 3
"""Pictures are drawn this many times too large and averaged down, for smooth edges."""
COLOURS = 24
TOLERANCE = 8
"""Pixels that may differ: Pillow 11.0 rounds one or two at the tips of polygons otherwise than 12 and 13 do."""
LEVELS = 16
"""Difference of a channel, of 255, up to which pixels count as the same: those tips can shift the palette."""
IMAGES = Path(__file__).resolve().parent / "images"
DRAWINGS = Path(__file__).resolve().parent / "pictures.txt"

INKS: dict[str, str] = {
    "ink": "#26323f",
    "white": "#ffffff",
    "paper": "#fff6df",
    "grey": "#8793a0",
    "silver": "#d3dae1",
    "red": "#d1495b",
    "orange": "#ee964b",
    "yellow": "#ffd166",
    "green": "#4f9d69",
    "mint": "#b7e4c7",
    "teal": "#2a9d8f",
    "sky": "#a9d6e5",
    "blue": "#3a6ea5",
    "navy": "#1d3557",
    "purple": "#7d5ba6",
    "pink": "#f6bdc0",
    "brown": "#8d5b4c",
    "tan": "#d9b08c",
    "sand": "#f2e2c4",
}

Frame = tuple[float, float, float]
"""Left, top and pixels per grid unit of the place that a drawing fills."""


@cache
def drawings() -> dict[str, str]:
    """Every drawing of `pictures.txt` by name, its shapes as one string with `/` between."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in DRAWINGS.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            found[name].append(line)
        elif line and not line.startswith("#"):
            name = line
            found[name] = []
    return {name: "/".join(lines) for name, lines in found.items()}


def pictures() -> list[str]:
    """The ids of the seeds that have a picture: the names with a hyphen; the others are objects."""
    return [name for name in drawings() if "-" in name]


def _points(numbers: list[float], frame: Frame) -> list[tuple[int, int]]:
    left, top, unit = frame
    scaled = [round(number * unit) for number in numbers]
    return [(round(left) + x, round(top) + y) for x, y in zip(scaled[::2], scaled[1::2], strict=True)]


def _shape(pen: ImageDraw.ImageDraw, verb: str, ink: str, numbers: list[float], frame: Frame) -> None:
    """One area, with an outline where the verb is a capital."""
    points = _points(numbers, frame)
    outline, width = (INKS["ink"], round(frame[2])) if verb.isupper() else (None, 0)
    match verb.lower():
        case "r":
            pen.rectangle(points, ink, outline, width)
        case "q":
            pen.rounded_rectangle(points, 4 * frame[2], ink, outline, width)
        case "o":
            pen.ellipse(points, ink, outline, width)
        case _:
            pen.polygon(points, ink)
            if outline:
                pen.line([*points, points[0], points[1]], outline, width, joint="curve")


def _stroke(pen: ImageDraw.ImageDraw, verb: str, ink: str, numbers: list[float], frame: Frame) -> None:
    """One line or arc; its first number is the width."""
    width = round(numbers[0] * frame[2])
    if verb == "l":
        pen.line(_points(numbers[1:], frame), ink, width, joint="curve")
    else:
        pen.arc(_points(numbers[1:5], frame), numbers[5], numbers[6], ink, width)


def _text(pen: ImageDraw.ImageDraw, ink: str, words: list[str], frame: Frame) -> None:
    size, x, y = (float(number) for number in words[:3])
    font = ImageFont.load_default(size * frame[2])
    pen.text(_points([x, y], frame)[0], " ".join(words[3:]), ink, font, anchor="mm")


def _draw(pen: ImageDraw.ImageDraw, drawing: str, frame: Frame, star: str = "ink") -> None:
    """All shapes of a drawing, with `*` in the colour `star`; raises `KeyError` for an unknown colour or object."""
    for shape in drawing.split("/"):
        verb, colour, *words = shape.split()
        name = star if colour == "*" else colour
        if verb == "t":
            _text(pen, INKS[name], words, frame)
            continue
        numbers = [float(word) for word in words]
        if verb == "bg":
            pen.rectangle((0, 0, SIZE * SCALE, SIZE * SCALE), INKS[name])
        elif verb in ("l", "a"):
            _stroke(pen, verb, INKS[name], numbers, frame)
        elif len(verb) == 1:
            _shape(pen, verb, INKS[name], numbers, frame)
        else:
            x, y, size = numbers
            left, top, unit = frame
            _draw(pen, drawings()[verb], (left + x * unit, top + y * unit, unit * size / 100), name)


def picture(seed_id: str) -> Image.Image:
    """The picture of a seed, SIZE by SIZE pixels in palette mode; raises `KeyError` for an id without one."""
    large = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
    _draw(ImageDraw.Draw(large), drawings()[seed_id], (0, 0, SIZE * SCALE / 100))
    return large.reduce(SCALE).quantize(COLOURS, dither=Image.Dither.NONE)


def _changed(one: Image.Image, other: Image.Image) -> int:
    """How many pixels differ by more than LEVELS."""
    if one.size != other.size:
        return SIZE * SIZE
    red, green, blue = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).split()
    return sum(ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()[LEVELS + 1 :])


def _complaint(path: Path) -> str:
    """What is wrong with a file, or nothing."""
    try:
        with Image.open(path) as found:
            changed = _changed(found, picture(path.stem))
    except OSError as error:
        return f"{path.name}: not readable ({type(error).__name__})"
    return f"{path.name}: {changed} pixels differ from its drawing" if changed > TOLERANCE else ""


def check(folder: Path) -> list[str]:
    """One complaint for each picture that is missing, unreadable or unlike its drawing, and each file that is none."""
    unknown = sorted(path.name for path in folder.iterdir() if path.suffix != ".png" or path.stem not in pictures())
    complaints = [_complaint(folder / f"{seed_id}.png") for seed_id in pictures()]
    return [line for line in complaints if line] + [f"{name}: no picture has this name" for name in unknown]


def write(folder: Path) -> None:
    """Every picture as `<seed id>.png` into the folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed_id in pictures():
        buffer = io.BytesIO()
        picture(seed_id).save(buffer, "PNG", optimize=True)
        (folder / f"{seed_id}.png").write_bytes(buffer.getvalue())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draws the pictures of the seed pack.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs from its drawing")
    parser.add_argument("--images", type=Path, default=IMAGES, help="the folder of the pictures (default: %(default)s)")
    options = parser.parse_args()
    if not options.check:
        write(options.images)
    elif complaints := check(options.images):
        sys.exit("\n".join([*complaints, "draw them again: python seeds/draw_images.py"]))


if __name__ == "__main__":
    main()
