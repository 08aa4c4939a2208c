"""Hours of bad luck in seconds: mixed faults, kills, outages, a call that hangs, models that change their mind.

The servers are processes of their own; what they answered is held call by call against what the run wrote down.
"""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from intersafe.generation.generate import generate_dialogues
from intersafe.generation.progress import Display, Progress
from intersafe.generation.scheduler import WINDOW
from intersafe.recipe.sections import Recipe
from intersafe.run.directory import Run
from tests.support.paths import REPOSITORY
from tests.support.runs import cli, demo, digest, journal_keys, rows, started
from tests.support.servers.chaos_server import FAULTS, Running, running_chaos
from tests.support.servers.scripted_server import Body, asks_for, scripted_server, text_of


def bench(script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Runs a script of `bench/` to its end."""
    command = [sys.executable, str(REPOSITORY / "bench" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)


def over_http(url: str, **changes: Any) -> Recipe:
    """The demo's dialogues with the whole cast behind one URL or several."""
    spec = f"openai:scripted@{url}"
    return demo(**({"attacker": spec, "judge": spec, "victims": [spec]} | changes))


def command(url: str, n: int, *more: str) -> list[str]:
    """The same by command line."""
    words = ["generate", "--n", str(n), "--run", "./run", "--no-refusals", *more]
    for role in ("--attacker", "--victim", "--judge"):
        words += [role, f"openai:scripted@{url}"]
    return words


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_a_fifth_of_the_requests_meets_a_fault_and_no_byte_changes() -> None:
    done = bench("faults.py", "--n", "40", "--timeout", "1.0", "--json")
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    quiet, faulty = found["quiet"], found["faults"]
    assert found["short"] == []
    assert faulty["sha256"] == quiet["sha256"]
    assert faulty["accepted"] == faulty["ids"] == 40
    assert (faulty["lost"], faulty["twice"], faulty["unpaid"]) == (0, 0, 0)
    assert quiet["requests"] == quiet["answered"]
    assert sum(faulty["kinds"].values()) > 0.15 * faulty["requests"]
    assert len(set(FAULTS) & set(faulty["kinds"])) > 0.8 * len(FAULTS)


@pytest.mark.alone
def test_what_is_cut_off_or_filtered_is_counted_and_never_scored(tmp_path: Path) -> None:
    with running_chaos(outcomes=0.03, profile="flawless") as server:
        recipe = over_http(server.url, concurrency=16)
        recipe = msgspec.structs.replace(recipe, limits=msgspec.structs.replace(recipe.limits, timeout=2.0))
        run = generate_dialogues(recipe, run=tmp_path / "quiet", n=20)
        server.set(faults=0.05)
        generate_dialogues(recipe, run=tmp_path / "faulty", n=20)
        filtered = sum(not message["content"] for _, _, message in server.log(whole=True)["good"].values())
    assert digest(tmp_path / "quiet") == digest(tmp_path / "faulty")
    assert filtered > 0
    ended = {(row.kind, row.stage, row.reason) for row in run.ended()}
    assert ("failed", "converse", "victim_blocked") in ended
    assert {reason for kind, _, reason in ended if kind == "failed"} == {"victim_blocked"}
    assert run.funnel().jobs == 20 + sum(run.funnel().ended.values())
    for dialogue in run.dialogues():
        assert all(turn.reply.text and turn.verdict.safety != "undetermined" for turn in dialogue.turns)


class Outage(Display):
    """Takes all servers away in the middle of a run, and brings them back once the run has noticed."""

    interval = 0.02

    def __init__(self, servers: list[Running]) -> None:
        self.servers, self.said, self.begun = servers, list[str](), False
        self.progress: Progress | None = None

    def begin(self, progress: Progress) -> None:
        self.progress = progress

    def look(self) -> None:
        assert self.progress is not None
        if not self.begun and sum(tally.calls for tally in self.progress.journal.roles.values()) > 150:
            self.begun = True
            for server in self.servers:
                server.set(down=True)

    def say(self, text: str) -> None:
        self.said.append(text)
        if self.begun:
            for server in self.servers:
                server.set(down=False)


@pytest.mark.alone
def test_all_replicas_dead_and_alive_again_lose_nothing(tmp_path: Path) -> None:
    with running_chaos(latency=0.01) as one, running_chaos(latency=0.01) as other:
        recipe = over_http(f"{one.url},{other.url.removeprefix('openai:')}", concurrency=16)
        outage = Outage([one, other])
        generate_dialogues(recipe, run=tmp_path / "run", n=30, display=outage)
        assert outage.begun
        assert outage.said
        assert min(server.log()["requests"] for server in (one, other)) > 100
        generate_dialogues(recipe, run=tmp_path / "whole", n=30)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    keys = journal_keys(tmp_path / "run")
    assert len(keys) == len(set(keys))


# --- kills -----------------------------------------------------------------------------------------------------------


def test_kills_while_it_starts_works_and_ends_change_no_byte_and_cost_what_is_in_flight() -> None:
    done = bench("kills.py", "--n", "0", "--http-n", "16", "--http-kills", "4", "--concurrency", "16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills" in done.stdout
    assert "same bytes: True" in done.stdout


def test_a_server_that_changes_its_answers_between_kills_leaves_one_sound_run(tmp_path: Path) -> None:
    with running_chaos(latency=0.01) as server:
        words = command(server.url, 25, "--concurrency", "8")
        for salt in range(1, 3):
            server.set(salt=salt)
            enough = server.log()["requests"] + 120
            process = started(*words, cwd=tmp_path)
            while server.log()["requests"] < enough:
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.communicate()
        server.set(salt=9)
        assert cli(*words, cwd=tmp_path).returncode == 0
        before, asked = digest(tmp_path / "run"), server.log()["requests"]
        run = Run(tmp_path / "run")
        made = list(run.dialogues())
        assert len(made) == len({dialogue.id for dialogue in made}) == 25
        for dialogue in made:
            paid = {entry.text for entry in run.entries(dialogue.job).values()}
            assert {turn.reply.text for turn in dialogue.turns} <= paid
        (tmp_path / "run" / "dialogues.jsonl").unlink()
        (tmp_path / "run" / "summary.json").unlink()
        server.set(salt=0)
        assert cli(*words, cwd=tmp_path).returncode == 0  # all of it from the journal
        assert digest(tmp_path / "run") == before
        assert server.log()["requests"] - asked <= 8 * 2  # what other jobs in flight begin anew at the end
    keys = journal_keys(tmp_path / "run")
    assert len(keys) == len(set(keys))


def test_an_excluded_reply_stays_excluded_after_a_kill(tmp_path: Path) -> None:
    excluded = "a note about teenagers and nudity"

    def hook(body: Body) -> str | None:
        if asks_for(body) == "message" and body["seed"] % 4 == 0:
            return json.dumps({"message": excluded})
        return None

    with scripted_server(hook, profile="flawless", delay=0.01) as server:
        words = command(server.url, 12, "--concurrency", "8")
        process = started(*words, cwd=tmp_path)
        while server.requests < 120:
            assert process.poll() is None
        process.kill()
        process.communicate()
        at_kill = sum(asks_for(body) == "message" and body["seed"] % 4 == 0 for body in server.bodies)
        assert at_kill
        assert cli(*words, cwd=tmp_path).returncode == 0
        assert not [body for body in server.bodies for m in body["messages"] if "nudity" in text_of(m)]
        again = sum(count - 1 for count in server.seen.values())
    assert again <= 8 + 64
    assert len(rows(tmp_path / "run" / "dialogues.jsonl")) == 12
    ends = {row.reason for row in Run(tmp_path / "run").ended()}
    assert "excluded" in ends


# --- the window ------------------------------------------------------------------------------------------------------


class Hanging(Display):
    """Lets the call that hangs go once all others wait for it."""

    interval = 0.02

    def __init__(self, server: Running) -> None:
        self.server = server
        self.progress: Progress | None = None
        self.looks = Counter[int]()
        self.calls, self.decided = 0, 0

    def begin(self, progress: Progress) -> None:
        self.progress = progress

    def look(self) -> None:
        assert self.progress is not None
        calls = sum(tally.calls for tally in self.progress.journal.roles.values())
        if not self.calls and sum(self.progress.in_flight.values()) == 1:
            self.looks[calls] += 1
            if self.looks[calls] == 25:  # nothing else has moved for 25 looks
                self.calls, self.decided = calls, self.progress.funnel.jobs
                self.server.set(hold=0)


@pytest.mark.alone
def test_one_call_that_hangs_does_not_stop_the_others_for_a_long_while(tmp_path: Path) -> None:
    with running_chaos(hold=5) as server:
        hanging = Hanging(server)
        run = generate_dialogues(over_http(server.url, concurrency=4), run=tmp_path / "run", n=100, display=hanging)
    calls_a_job = sum(tally.calls for tally in run.roles().values()) / run.funnel().jobs
    assert hanging.decided < 4
    # Three workers grew all that the window holds, which is far more than those that were under way.
    assert hanging.calls / calls_a_job > 0.8 * WINDOW * 4
