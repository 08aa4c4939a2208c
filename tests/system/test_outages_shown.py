"""An outage is shown for as long as it lasts, and no longer."""

import re
from pathlib import Path

import pytest
from aiohttp import web

from intersafe.cli.live import status_line
from intersafe.errors import ServiceGone
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.progress import Display, Progress
from tests.support.runs import demo
from tests.support.servers.scripted_server import Body, scripted_server

pytestmark = pytest.mark.alone


class Watching(Display):
    """Records every line that a log would show."""

    interval = 0.02

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.said: list[str] = []
        self._progress: Progress | None = None

    def begin(self, progress: Progress) -> None:
        self._progress = progress

    def look(self) -> None:
        assert self._progress
        self.lines.append(status_line(self._progress, 1.0))

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_dead_service_is_named_while_the_run_waits(tmp_path: Path) -> None:
    with scripted_server() as server:
        dead = f"openai:judge@{server.url}"
    display = Watching()
    with pytest.raises(ServiceGone):
        generate_dialogues(demo(judge=dead, patience=1.0), run=tmp_path / "run", n=3, display=display)
    waiting = [line for line in display.lines if "WAITING for openai:judge" in line]
    assert waiting
    assert all("no connection" in line for line in waiting)


def test_it_is_no_longer_named_when_it_is_back(tmp_path: Path) -> None:
    display, refused = Watching(), [0]

    def lapse(_: Body) -> web.Response | None:
        refused[0] += 1
        return web.json_response({"error": {"message": "no"}}, status=401) if 20 < refused[0] < 28 else None

    with scripted_server(lapse) as server:
        recipe = demo(judge=f"openai:demo@{server.url}", concurrency=4)
        generate_dialogues(recipe, run=tmp_path / "run", n=8, display=display)
    shown = [bool(re.search("WAITING for openai:demo", line)) for line in display.lines]
    assert any(shown)
    assert not shown[-1]
    assert any("is back after" in text for text in display.said)
