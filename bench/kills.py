"""Same bytes for any concurrency and after kills at random moments, and what the kills cost.

    python bench/kills.py [--n 11270] [--kills 10] [--http-n 400] [--http-kills 60]

First the demo recipe with its scripted models in process: concurrency 1, 64, and 64 with SIGKILLs. Then over HTTP with
a server that counts: SIGKILL, SIGTERM and SIGINT in turn, while the run starts, works and ends. A call was paid again
if the server gave a good answer to its body twice. A kill may cost the calls in flight, a SIGKILL also one group of the
journal. `--n 0` or `--http-n 0` skips a part. Exits with 1 if anything differs.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the server is the tests'

from intersafe.storage.jsonl import GROUP_LINES
from tests.support.servers.chaos_server import Running, running_chaos

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
STOPPED = (130, *(-how for how in SIGNALS))


class Key(msgspec.Struct):
    """The part of a journal line that is read."""

    key: str


def start(folder: Path, n: int, concurrency: int, *more: str) -> "subprocess.Popen[bytes]":
    """Starts `intersafe generate` in a folder."""
    words = ["generate", "--n", str(n), "--concurrency", str(concurrency), "--run", "./run", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "intersafe", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A script started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def digest(folder: Path) -> str:
    """sha256 of all outcome files of the run in a folder."""
    outcomes = sorted(path for path in (folder / "run").glob("*.jsonl") if path.name != "seeds.jsonl")
    return hashlib.sha256(b"".join(path.read_bytes() for path in outcomes)).hexdigest()


def journal(folder: Path) -> tuple[int, int]:
    """Lines of the journal, and how many of them have a key that occurred before."""
    lines = (folder / "run" / "journal" / "main.jsonl").read_bytes().splitlines()
    keys = [msgspec.json.decode(line, type=Key).key for line in lines]
    return len(keys), len(keys) - len(set(keys))


# --- in process ------------------------------------------------------------------------------------------------------


def grow(n: int, concurrency: int, kills: int, dice: random.Random) -> tuple[str, int, int]:
    """sha256 of the outcome files, journal lines, and lines whose key occurred before."""
    with tempfile.TemporaryDirectory() as name:
        folder, killed, began = Path(name), 0, time.monotonic()
        while True:
            process = start(folder, n, concurrency)
            try:
                # Spread over the run: about 100 dialogues per second on two idle cores.
                code = process.wait(timeout=1 + dice.random() * n / 100 / kills if killed < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                continue
            assert code == 0, code
            break
        seconds, found = time.monotonic() - began, digest(folder)
        print(f"concurrency {concurrency:>3}, {killed:>2} kills: sha256 {found}  {seconds:.0f} s", flush=True)
        return found, *journal(folder)


def in_process(n: int, kills: int, dice: random.Random) -> bool:
    """True if all three runs gave the same bytes and wrote no call twice."""
    done = [grow(n, 1, 0, dice), grow(n, 64, 0, dice), grow(n, 64, kills, dice)]
    same = len({found for found, *_ in done}) == 1
    twice, lines = [entry[2] for entry in done], [entry[1] for entry in done]
    print(f"same bytes: {same}; calls written twice: {twice} of {lines}")
    return same and not any(twice)


# --- over HTTP -------------------------------------------------------------------------------------------------------


class Kill(NamedTuple):
    """One process that was killed."""

    how: signal.Signals
    when: str
    code: int
    in_flight: int
    """Calls that the server was working on."""

    @property
    def allowed(self) -> int:
        """Most calls that it may cost."""
        return self.in_flight + (GROUP_LINES if self.how == signal.SIGKILL else 0)


def accepted(folder: Path) -> int:
    """Number of dialogues on the disk."""
    path = folder / "run" / "dialogues.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(
    process: "subprocess.Popen[bytes]", server: Running, folder: Path, how: signal.Signals, when: str, more: float
) -> Kill | None:
    """Waits for the moment and sends the signal; None if the process ended by itself before.

    `more` is the moment: seconds for `start`, requests for `work`, dialogues on the disk for `end`.
    """
    began, before = time.monotonic(), server.log()["requests"]
    moments: dict[str, Callable[[], float]] = {
        "start": lambda: time.monotonic() - began,
        "work": lambda: server.log()["requests"] - before,
        "end": lambda: accepted(folder),
    }
    while process.poll() is None and moments[when]() < more:
        time.sleep(0.002)
    process.send_signal(how)
    in_flight: int = server.log()["in_flight"]
    code = process.wait()
    while server.log()["in_flight"]:  # the calls in flight are paid for
        time.sleep(0.002)
    if code == 0:
        return None
    assert code in STOPPED, f"exit code {code} after {how.name}"
    return Kill(how, when, code, in_flight)


def over_http(n: int, kills: int, concurrency: int, latency: float, dice: random.Random) -> bool:
    """True if the bytes are the same and the kills cost no more calls than allowed."""
    done: list[Kill] = []
    with running_chaos(latency=latency) as server, tempfile.TemporaryDirectory() as name:
        whole, folder = Path(name) / "whole", Path(name) / "killed"
        whole.mkdir()
        folder.mkdir()
        more = ["--no-refusals", "--attacker", f"openai:scripted@{server.url}", "--judge"]
        more += [f"openai:scripted@{server.url}", "--victim", f"openai:scripted@{server.url}"]
        assert start(whole, n, concurrency, *more).wait() == 0
        calls = server.log()["requests"]
        server.set(reset=True)
        began = time.monotonic()
        while len(done) < kills:
            how = SIGNALS[len(done) % len(SIGNALS)]
            when = "end" if len(done) >= kills * 0.85 else "start" if len(done) % 5 == 1 else "work"
            bound = {"start": 0.8 * dice.random(), "work": dice.random() * 2 * calls / kills, "end": n}[when]
            process = start(folder, n, concurrency, *more)
            if one := kill(process, server, folder, how, when, bound):
                done.append(one)
            else:  # as if it had been killed just before it wrote its last file
                (folder / "run" / "summary.json").unlink()
                done.append(Kill(how, "end", 0, 0))
        assert start(folder, n, concurrency, *more).wait() == 0
        seconds, good = time.monotonic() - began, server.log(whole=True)["good"]
        again, allowed = sum(count - 1 for count, *_ in good.values()), sum(one.allowed for one in done)
        same, (lines, twice) = digest(whole) == digest(folder), journal(folder)
        rows = accepted(folder)
    moments = ", ".join(f"{when} {sum(one.when == when for one in done)}" for when in ("start", "work", "end"))
    print(f"over HTTP: {rows} dialogues, {calls} calls, {len(done)} kills (while at {moments}), {seconds:.0f} s")
    print(
        f"same bytes: {same}; paid again: {again}, {again / max(1, len(done)):.1f} per kill, allowed {allowed} "
        f"({sum(one.in_flight for one in done)} in flight and {GROUP_LINES} for each SIGKILL); "
        f"calls written twice: {twice} of {lines}"
    )
    return same and again <= allowed and twice == 0 and rows == n


def main() -> None:
    """Exits with 1 if a byte differs, a call was written twice, or the kills cost too much."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--n", type=int, default=11_270)
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--http-n", type=int, default=400)
    options.add_argument("--http-kills", type=int, default=60)
    options.add_argument("--concurrency", type=int, default=32, help="over HTTP")
    options.add_argument("--latency", type=float, default=0.03, help="of the server, in seconds")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    dice = random.Random(given.seed)
    sound = not given.n or in_process(given.n, given.kills, dice)
    if given.http_n:
        sound &= over_http(given.http_n, given.http_kills, given.concurrency, given.latency, dice)
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
