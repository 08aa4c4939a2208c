"""The work that every library does: CALLS single-turn calls of 6 KB, with an image of 100 KB each if asked for.

    python run_<library>.py URL CALLS FOLDER [--at-once 64] [--images FOLDER]

Every script does it as its library's manual shows, in the library's own environment. This module needs the standard
library alone. FOLDER keeps what a second start of the script resumes from.
"""

import argparse
import base64
from pathlib import Path
from typing import Any, NamedTuple


class Work(NamedTuple):
    """The arguments of a script."""

    url: str
    """Base URL of the server, with `/v1`."""
    calls: int
    folder: Path
    at_once: int
    images: tuple[Path, ...]
    """Empty: text only."""

    def text(self, number: int) -> str:
        """The text of call `number`, 6 KB."""
        return f"{number} " + "word " * 1_200

    def image(self, number: int) -> Path | None:
        """The image of call `number`; None for text only."""
        return self.images[number % len(self.images)] if self.images else None

    def content(self, number: int) -> str | list[dict[str, Any]]:
        """Text, or the parts of an OpenAI message."""
        if (path := self.image(number)) is None:
            return self.text(number)
        url = f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.text(number)}]


def read_work() -> Work:
    """The work that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("calls", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--images", type=Path)
    given = parser.parse_args()
    images = tuple(sorted(given.images.glob("*.jpg"))) if given.images else ()
    return Work(given.url, given.calls, given.folder, given.at_once, images)
