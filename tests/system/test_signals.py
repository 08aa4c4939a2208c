"""SIGINT, SIGTERM and SIGHUP at bad moments: one line, exit code 130, nothing left behind, and the run resumes."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from intersafe.run.directory import Run
from intersafe.run.lock import lock
from tests.support.chat_and_images import as_image, picture
from tests.support.paths import REPOSITORY
from tests.support.runs import cli, digest, hears_ctrl_c, journal_keys
from tests.support.servers.chaos_server import Running, running_chaos
from tests.support.servers.fault_server import STALL, FaultServer

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
N = 6
STOPPED = "intersafe: stopped; the same command resumes"


class Command:
    """`intersafe generate` in a process group of its own, and what it says on stderr."""

    def __init__(self, words: list[str], folder: Path, *, ignores: int = 0, env: dict[str, str] | None = None) -> None:
        def prepare() -> None:
            hears_ctrl_c()
            if ignores:
                signal.signal(ignores, signal.SIG_IGN)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "intersafe", *words],
            cwd=folder,
            env=os.environ | (env or {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
            start_new_session=True,
        )
        self.said: list[str] = []

    def has_said(self, words: str) -> None:
        """Returns once a line with these words came."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if words in line:
                return
        pytest.fail(f"it ended without {words!r}: {''.join(self.said)}")

    def ends(self) -> int:
        """Waits for the end; nothing of its process group may be left, no traceback and no complaint be said."""
        _, rest = self.process.communicate(timeout=30)
        self.said += rest.splitlines(keepends=True)
        with pytest.raises(ProcessLookupError):
            os.killpg(self.process.pid, 0)
        text = "".join(self.said)
        assert "Traceback" not in text
        assert not re.search("never awaited|Unclosed|Exception ignored|was destroyed", text), text
        return self.process.returncode

    def is_stopped_by(self, *signals: signal.Signals) -> None:
        """Sends the signals at once, and holds the end to what `docs/runs.md` says."""
        for one in signals:
            self.process.send_signal(one)
        assert self.ends() == 130, "".join(self.said)
        assert [line.strip() for line in self.said if line.startswith("intersafe:")] == [STOPPED]


def over(url: str, *more: str, n: int = N) -> list[str]:
    """The command for a small run with the whole cast behind one URL."""
    spec = f"openai:scripted@{url}"
    words = ["generate", "--n", str(n), "--run", "./run", "--no-refusals", "--attacker", spec, "--judge", spec]
    return [*words, "--victim", spec, "--concurrency", "8", *more]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_chaos() as running:
        yield running


@pytest.fixture(scope="module")
def reference(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    done = cli(*over(server.url), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def resumes(words: list[str], folder: Path, reference: Path | None) -> None:
    """Nobody holds the run, and the same command brings it to the end that an undisturbed one has."""
    if (folder / "run").exists():
        lock(folder / "run").release()
    done = cli(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert Run(folder / "run").funnel().accepted == N
    keys = journal_keys(folder / "run")
    assert len(keys) == len(set(keys))
    if reference:
        assert digest(folder / "run") == digest(reference)


@pytest.mark.parametrize("how", ALL[1:])
def test_while_it_waits_for_a_dead_server(
    how: signal.Signals, server: Running, reference: Path, tmp_path: Path
) -> None:
    server.set(down=True)
    try:
        command = Command(over(server.url), tmp_path)
        command.has_said("waiting up to")
        command.is_stopped_by(how)
    finally:
        server.set(down=False)
    resumes(over(server.url), tmp_path, reference)


@pytest.mark.parametrize("how", ALL[:2])
def test_in_the_middle_of_many_calls_and_twice_at_once(
    how: signal.Signals, server: Running, reference: Path, tmp_path: Path
) -> None:
    server.set(reset=True, hold=40)  # one call gets no answer, so that the run cannot end before it is stopped
    try:
        command = Command(over(server.url), tmp_path)
        while server.log()["requests"] < 60:
            assert command.process.poll() is None
        command.is_stopped_by(how, how, signal.SIGINT)
    finally:
        server.set(hold=0)
    resumes(over(server.url), tmp_path, reference)


def test_while_a_picture_is_painted(tmp_path: Path) -> None:
    painting, stalls = threading.Event(), True

    def script(request: object) -> object:
        painting.set()
        return STALL if stalls else as_image(picture(request.body["prompt"], request.body.get("seed", 0)))  # type: ignore[attr-defined]

    with running_chaos(profile="flawless") as chat, FaultServer(script) as images:  # type: ignore[arg-type]
        words = over(chat.url, "--painter", f"openai:painter@{images.url}")
        command = Command(words, tmp_path)
        assert painting.wait(60), command.process.poll()
        command.is_stopped_by(signal.SIGTERM)
        stalls = False
        resumes(words, tmp_path, None)


def held_at_import(folder: Path) -> tuple[dict[str, str], Callable[[], int]]:
    """An environment in which the command stops at the import of a library, and a call that waits until it is there."""
    (folder / "stub").mkdir()
    (folder / "stub" / "rensa.py").write_text("import os\nopen(os.environ['GATE']).read()\n")
    os.mkfifo(folder / "gate")
    path = os.pathsep.join(part for part in (str(folder / "stub"), os.environ.get("PYTHONPATH", "")) if part)
    # Opening a pipe for writing waits for whoever reads; as long as it is open, the reader waits for more.
    return {"GATE": str(folder / "gate"), "PYTHONPATH": path}, lambda: os.open(folder / "gate", os.O_WRONLY)


@pytest.mark.parametrize("how", ALL)
def test_while_it_starts(how: signal.Signals, server: Running, reference: Path, tmp_path: Path) -> None:
    env, is_there = held_at_import(tmp_path)
    command = Command(over(server.url), tmp_path, env=env)
    gate = is_there()
    command.process.send_signal(how)
    try:
        # Before the run is open SIGTERM and SIGHUP may end the process as they end any other.
        assert command.ends() == 130
    finally:
        os.close(gate)
    assert not (tmp_path / "run").exists()
    resumes(over(server.url), tmp_path, reference)


def test_with_nohup_a_run_outlives_its_terminal(server: Running, reference: Path, tmp_path: Path) -> None:
    server.set(reset=True, hold=40)
    try:
        command = Command(over(server.url), tmp_path, ignores=signal.SIGHUP)
        while server.log()["requests"] < 60:
            assert command.process.poll() is None
        command.process.send_signal(signal.SIGHUP)
        os.kill(command.process.pid, 0)
    finally:
        server.set(hold=0)
    assert command.ends() == 0, command.said
    assert digest(tmp_path / "run") == digest(reference)


def test_a_host_program_keeps_its_own_handlers(tmp_path: Path) -> None:
    code = """
import signal
from intersafe.generation.generate import generate_dialogues
from tests.support.runs import demo
heard = []
mine = lambda *_: heard.append(1)
for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, mine)
generate_dialogues(demo(), run="./run", n=3)
assert signal.getsignal(signal.SIGINT) is mine
assert signal.getsignal(signal.SIGTERM) is mine
"""
    path = os.pathsep.join(part for part in (str(REPOSITORY), os.environ.get("PYTHONPATH", "")) if part)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True)
