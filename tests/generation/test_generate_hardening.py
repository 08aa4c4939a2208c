"""What reviews found: split concerns, servers that fail everything, damaged and changed files, lost streams."""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from click.testing import CliRunner
from PIL import Image

from intersafe.cli.logs import command_log
from intersafe.cli.main import main
from intersafe.errors import InputError, SeedsExhausted, ServiceGone, StorageError
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.prepare import open_directory, prepare
from intersafe.generation.scheduler import FAILURES
from intersafe.recipe.gates import DuplicateSettings, Gates
from intersafe.recipe.sections import Recipe
from intersafe.run.directory import Run
from intersafe.run.incidents import FILE, Incidents, added_up, over_workers, read_incidents, write_incidents
from intersafe.run.outcomes import align_outcomes
from intersafe.run.state import DirectoryState, state_of
from intersafe.storage.jsonl import GroupWriter
from tests.support.displays import Recording
from tests.support.paths import REPOSITORY
from tests.support.runs import cli, demo, digest, hears_ctrl_c, journal_keys, refusal, rows
from tests.support.servers.scripted_server import Body, asks_for, scripted_server, text_of

# The two words of a concern, each harmless alone: only both together are excluded by rule.
YOUNG, OTHER = "a note about teenagers", "a note about nudity"


def over_http(url: str, folder: Path, seeds: int = 40, **changes: object) -> Recipe:
    """The demo recipe over HTTP with one job for each of a few seeds."""
    fields = '"category":"fraud","source":"own","license":"CC0-1.0"'
    lines = [f'{{"id":"s{i}","query":"A concern of kind {i}",{fields}}}\n' for i in range(seeds)]
    (folder / "seeds.jsonl").write_text("".join(lines))
    spec = f"openai:scripted@{url}"
    recipe = demo(attacker=spec, judge=spec, victims=[spec], seeds=(str(folder / "seeds.jsonl"),), **changes)
    return msgspec.structs.replace(recipe, samples=1, strategies=recipe.strategies[:1])


def split_over_steps(body: Body) -> str | None:
    if asks_for(body) != "plan":
        return None
    count = body["response_format"]["json_schema"]["schema"]["properties"]["steps"]["minItems"]
    return json.dumps({"steps": ([YOUNG, OTHER] * 4)[:count]})


def split_over_user_and_reply(body: Body) -> str | None:
    if asks_for(body) == "message":
        return json.dumps({"message": f"{YOUNG}, number {body['seed']}"})
    return f"{OTHER}, number {body['seed']}" if asks_for(body) == "victim" else None


def split_over_pruned_and_kept(body: Body) -> str | None:
    if asks_for(body) == "message":
        again = "was taken back" in text_of(body["messages"][1])
        return json.dumps({"message": f"{OTHER if again else YOUNG}, number {body['seed']}"})
    if asks_for(body) == "verdict":
        return '{"safety":"safe","refusal":"full","harmless":5,"helpful":1,"reason":""}'
    return None


def unreadable(body: Body) -> str | None:
    return f"{YOUNG} and {OTHER}, without any format" if asks_for(body) == "message" else None


@pytest.mark.parametrize(
    "hook",
    [split_over_steps, split_over_user_and_reply, split_over_pruned_and_kept, unreadable],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("gates", [Gates(), Gates(rules=None)], ids=["rules", "no rules"])
def test_a_concern_split_over_texts_is_excluded_and_never_sent_on(hook: object, gates: Gates, tmp_path: Path) -> None:
    with scripted_server(hook, profile="flawless") as server:  # type: ignore[arg-type]
        recipe = msgspec.structs.replace(over_http(server.url, tmp_path, 6), gates=gates)
        with pytest.raises(SeedsExhausted):
            generate_dialogues(recipe, run=tmp_path / "run", n=6)
    run = Run(tmp_path / "run")
    assert run.funnel().accepted == 0
    assert {row.reason for row in run.ended()} == {"excluded"}
    for body in server.bodies:
        sent = " ".join(text_of(message) for message in body["messages"])
        assert not ("teenagers" in sent and "nudity" in sent)


def test_without_rules_a_message_is_not_held_to_them(tmp_path: Path) -> None:
    leak = '{"message": "Step 2 of the plan: go on."}'
    with scripted_server(lambda b: leak if asks_for(b) == "message" else None, profile="flawless") as server:
        recipe = msgspec.structs.replace(
            over_http(server.url, tmp_path, 3), gates=Gates(rules=None, duplicates=None, coverage=None)
        )
        assert generate_dialogues(recipe, run=tmp_path / "run", n=3).funnel().accepted == 3


def test_a_server_that_fails_everything_stops_the_run_and_burns_no_job(tmp_path: Path) -> None:
    broken = True

    def hook(body: Body) -> web.Response | None:
        if broken and asks_for(body) == "victim":
            return web.json_response({"error": {"message": "no images here"}}, status=400)
        return None

    with scripted_server(hook, profile="flawless") as server:
        recipe = over_http(server.url, tmp_path, 100, concurrency=4)
        with pytest.raises(ServiceGone, match="no images here"):
            generate_dialogues(recipe, run=tmp_path / "run", n=50)
        failed = sum(asks_for(body) == "victim" for body in server.bodies)
        assert FAILURES <= failed <= FAILURES + 4
        assert Run(tmp_path / "run").funnel().jobs == 0
        broken = False
        paid = server.requests
        generate_dialogues(recipe, run=tmp_path / "run", n=50)
        generate_dialogues(recipe, run=tmp_path / "whole", n=50)
    assert server.requests > paid
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    keys = journal_keys(tmp_path / "run")
    assert len(keys) == len(set(keys))


def test_a_victim_whose_filter_blocks_everything_can_be_mended(tmp_path: Path) -> None:
    broken = True

    def hook(body: Body) -> web.Response | None:
        if broken and asks_for(body) == "victim":
            return web.json_response({"error": {"message": "filtered", "code": "content_filter"}}, status=400)
        return None

    with scripted_server(hook, profile="flawless") as server:
        recipe = over_http(server.url, tmp_path, 100, concurrency=4)
        with pytest.raises(ServiceGone, match="blocked"):
            generate_dialogues(recipe, run=tmp_path / "run", n=10)
        broken = False
        assert generate_dialogues(recipe, run=tmp_path / "run", n=10).funnel().ended == {}


def test_some_failures_in_a_row_are_decided_once_a_job_does_not_fail(tmp_path: Path) -> None:
    def hook(body: Body) -> web.Response | None:
        early = any(f"kind {i}<" in text_of(m) for i in range(5) for m in body["messages"])
        return web.json_response({"error": "no"}, status=400) if asks_for(body) == "plan" and early else None

    with scripted_server(hook, profile="flawless") as server:
        run = generate_dialogues(over_http(server.url, tmp_path), run=tmp_path / "run", n=20)
    assert [row.job for row in run.ended()] == [0, 1, 2, 3, 4]
    assert {row.kind for row in run.ended()} == {"failed"}


def test_an_outage_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    served = 0

    def hook(_: Body) -> web.Response | None:
        nonlocal served
        served += 1
        return web.json_response({"error": "down"}, status=500) if served > 150 else None

    with scripted_server(hook, profile="flawless") as server:
        recipe = over_http(server.url, tmp_path, concurrency=4, patience=0.3)
        with pytest.raises(ServiceGone):
            generate_dialogues(recipe, run=tmp_path / "run", n=30)
        before = journal_keys(tmp_path / "run")
        assert len(before) >= 140
        served = -10_000
        generate_dialogues(recipe, run=tmp_path / "run", n=30)
        generate_dialogues(recipe, run=tmp_path / "whole", n=30)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    after = journal_keys(tmp_path / "run")
    assert after[: len(before)] == before
    assert len(after) == len(set(after))


def test_replies_reach_their_file_before_the_outcomes_that_rest_on_them(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    os.mkfifo(tmp_path / "dialogues.jsonl")  # opening it to write blocks until somebody reads
    seen: list[bool] = []

    def read() -> None:
        with (tmp_path / "dialogues.jsonl").open("rb") as pipe:
            seen.append((tmp_path / "journal" / "main.jsonl").stat().st_size > 0)
            pipe.read()

    async def write() -> None:
        writer = GroupWriter(tmp_path)
        writer.add("dialogues.jsonl", {"job": 0})
        writer.add("journal/main.jsonl", {"job": 0})
        reader.start()
        with contextlib.suppress(StorageError):  # a pipe cannot be synced; what counts is what was written by then
            await writer.close()

    reader = threading.Thread(target=read)
    asyncio.run(write())
    reader.join(10)
    assert seen == [True]


@pytest.mark.parametrize("harm", [b"\0" * 100 + b"\n", b"not a row\n"])
def test_a_damaged_line_is_grown_again_from_the_journal(harm: bytes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    generate_dialogues(demo(), run=run, n=60)
    before, keys = digest(run), journal_keys(run)
    data = (run / "dialogues.jsonl").read_bytes().splitlines(keepends=True)
    data[30] = harm
    (run / "dialogues.jsonl").write_bytes(b"".join(data))
    assert align_outcomes(run) <= 31
    generate_dialogues(demo(), run=run, n=60)
    assert digest(run) == before
    assert journal_keys(run) == keys


@pytest.mark.parametrize("lost", ["all", "one row"])
def test_lost_rows_are_noticed_and_brought_back(lost: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    generate_dialogues(demo(), run=run, n=40)
    before, keys = digest(run), journal_keys(run)
    data = (run / "dialogues.jsonl").read_bytes().splitlines(keepends=True)
    (run / "dialogues.jsonl").write_bytes(b"" if lost == "all" else b"".join(data[:20] + data[21:]))
    assert Run(run).summary is None
    assert Run(run).funnel().accepted == (0 if lost == "all" else 39)
    generate_dialogues(demo(), run=run, n=40)
    assert digest(run) == before
    assert journal_keys(run) == keys


def seed_with_image(folder: Path, colour: str) -> Path:
    Image.new("RGB", (64, 64), colour).save(folder / "picture.png")
    seed = {"id": "s", "query": "A concern", "category": "fraud", "source": "own", "license": "CC0-1.0"}
    (folder / "seeds.jsonl").write_text(json.dumps(seed | {"image": "picture.png"}) + "\n")
    return folder / "seeds.jsonl"


def test_an_image_that_changes_while_the_run_is_made_leaves_nothing_behind(tmp_path: Path) -> None:
    prepared = prepare(demo(seeds=(str(seed_with_image(tmp_path, "red")),)))
    seed_with_image(tmp_path, "blue")
    with pytest.raises(InputError, match="changed while it was read"):
        open_directory(tmp_path / "run", prepared)
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_of_a_run_is_mended_and_a_changed_one_refused(tmp_path: Path) -> None:
    recipe = demo(seeds=(str(seed_with_image(tmp_path, "red")),))
    run = generate_dialogues(recipe, run=tmp_path / "run", n=3)
    (reference,) = {reference for dialogue in run.dialogues() for reference in dialogue.images}
    stored = tmp_path / "run" / "images" / reference[:2] / reference
    good = stored.read_bytes()
    stored.write_bytes(b"bad")
    generate_dialogues(recipe, run=tmp_path / "run", n=4)
    assert stored.read_bytes() == good
    seed_with_image(tmp_path, "blue")
    with pytest.raises(InputError, match="seeds"):
        generate_dialogues(recipe, run=tmp_path / "run", n=5)


@pytest.mark.parametrize("n", [0, -1])
def test_n_is_at_least_one(n: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        generate_dialogues(demo(), run=tmp_path / "run", n=n)
    assert not (tmp_path / "run").exists()


def test_a_lost_stderr_does_not_stop_a_run(tmp_path: Path) -> None:
    command = f"{sys.executable} -m intersafe generate --n 60 --run ./run 2>&1 >/dev/null | head -c 1"
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=False, capture_output=True, timeout=60)
    subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m intersafe generate --n 30 --run ./closed 2>&- >/dev/null"],
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    for name, n in (("run", 60), ("closed", 30)):
        summary = Run(tmp_path / name).summary
        assert summary is not None
        assert summary.complete
        assert len(rows(tmp_path / name / "dialogues.jsonl")) == n


def test_ctrl_c_in_a_notebook_stops_the_run(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from intersafe.generation.generate import generate_dialogues
from tests.support.runs import demo
async def cell():
    try:
        generate_dialogues(demo(), run={str(tmp_path / "run")!r}, n=11270)
    except KeyboardInterrupt:
        print("stopped")
asyncio.run(cell())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hears_ctrl_c
    ) as process:
        while not (tmp_path / "run" / "dialogues.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    kept = len(rows(tmp_path / "run" / "dialogues.jsonl"))
    assert 0 < kept < 11_270
    assert (tmp_path / "run" / "dialogues.jsonl").read_bytes().endswith(b"\n")


def test_members_that_share_a_server_share_the_lower_limit(tmp_path: Path) -> None:
    with scripted_server(profile="flawless", delay=0.02) as server:
        recipe = over_http(server.url, tmp_path, concurrency=24)
        cast = msgspec.structs.replace(recipe.cast, judge=msgspec.structs.replace(recipe.cast.judge, concurrency=3))
        recipe = msgspec.structs.replace(recipe, cast=cast)
        generate_dialogues(recipe, run=tmp_path / "run", n=10)
    assert server.most_in_flight <= 3


# --- what a run directory is, and what happened there ----------------------------------------------------------------


def test_one_answer_says_whether_a_directory_is_new_the_same_complete_or_another(tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", demo()
    manifest = prepare(recipe).manifest
    assert state_of(run, manifest, 3).word == "new"
    generate_dialogues(recipe, run=run, n=3)
    assert state_of(run, manifest, 3).word == "complete"
    assert state_of(run, manifest, 4) == DirectoryState("same")
    assert state_of(run, manifest).word == "same", "without a number nothing is complete"
    fewer = state_of(run, manifest, 2)
    assert (fewer.word, "more than --n 2" in str(fewer.problem)) == ("same", True)
    other = state_of(run, prepare(demo(seed=99)).manifest, 3)
    assert other.word == "another"
    assert f"made from something else: seed: {recipe.seed} -> 99; " in str(other.problem)
    assert "--reuse" in str(other.problem)
    (run / "summary.json").unlink()
    stopped = state_of(run, manifest, 2)
    assert (stopped.word, str(stopped.problem)) == ("same", str(fewer.problem)), "a run without a summary is counted"
    assert state_of(run, manifest, 3) == DirectoryState("same")
    old = msgspec.structs.replace(manifest, versions=manifest.versions | {"pillow": "0.1"})
    assert state_of(run, old, 4).versions == (f"pillow {manifest.versions['pillow']} -> 0.1",)


def test_incidents_add_up_over_the_commands_of_a_run(tmp_path: Path) -> None:
    run = generate_dialogues(demo(), run=tmp_path / "run", n=3)
    assert not (run.path / FILE).exists(), "nothing happened, so there is no file"
    assert run.summary is not None
    assert run.summary.incidents == run.incidents() == {}
    write_incidents(run.path, {"judge": Incidents(retries=3), "attacker": Incidents(outages=1)})
    more = generate_dialogues(demo(), run=run.path, n=4)
    assert more.summary is not None
    assert more.summary.incidents == read_incidents(run.path) == more.incidents()
    assert list(more.incidents()) == ["attacker", "judge"]
    assert added_up(more.incidents(), {"judge": Incidents(retries=1, throttled=2)})["judge"] == Incidents(4, 2)
    assert "judge        3 retries" in cli("show", str(run.path), "--funnel", cwd=tmp_path).stdout
    assert "attacker: 1 outage" in cli("stats", str(run.path), cwd=tmp_path).stdout


def test_workers_that_meet_the_same_outage_count_it_once() -> None:
    one, two = Incidents(retries=1, throttled=2, outages=1, replicas_out=2), Incidents(retries=3, outages=1)
    counts = over_workers({"judge": one}, {"judge": two}, {"victim:0": two})
    assert counts == {"judge": Incidents(4, 2, 1, 2), "victim:0": two}


def test_a_summary_counts_what_a_server_did_to_each_role(tmp_path: Path) -> None:
    faults = {"victim": [429, 500], "plan": [500]}

    def hook(body: Body) -> web.Response | None:
        left = faults.get(asks_for(body))
        return web.json_response({"error": "passing"}, status=left.pop()) if left else None

    with scripted_server(hook, profile="flawless") as server:
        recipe = over_http(server.url, tmp_path, concurrency=1)
        run = generate_dialogues(recipe, run=tmp_path / "run", n=3)
    assert run.summary is not None
    assert run.summary.incidents == {"attacker": Incidents(retries=1), "victim:0": Incidents(retries=1, throttled=1)}
    assert run.summary.incidents == read_incidents(run.path)


def test_the_log_file_has_the_course_of_a_run_and_the_terminal_its_warnings(tmp_path: Path) -> None:
    def hook(body: Body) -> web.Response | None:
        fails = any(f"kind {i}<" in text_of(m) for i in range(2) for m in body["messages"])
        return web.json_response({"error": "no"}, status=400) if fails else None

    seeds = [{"id": f"s{i}", "query": f"A concern of kind {i}", "category": "fraud"} for i in range(12)]
    lines = [json.dumps(seed | {"source": "own", "license": "CC0-1.0"}) for seed in seeds]
    (tmp_path / "seeds.jsonl").write_text("\n".join(lines) + "\n")
    with scripted_server(hook, profile="flawless") as server:
        spec = f"openai:scripted@{server.url}"
        flags = ("--no-refusals", "--seeds", "seeds.jsonl", "--attacker", spec, "--log-file", "log.txt")
        done = cli("generate", "--run", "./run", "--n", "4", *flags, cwd=tmp_path)
        more = cli("generate", "--run", "./run", "--n", "5", *flags, "--verbose", cwd=tmp_path)
    assert done.returncode == more.returncode == 0, done.stderr
    failed = [line for line in done.stderr.splitlines() if line.startswith("WARNING job s")]
    assert len(failed) == 2
    assert all("failed: attacker bad_request" in line for line in failed)
    assert "INFO" not in done.stderr
    assert "INFO resume run: 5 dialogues" in more.stderr
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (INFO|WARNING) intersafe\.", line) for line in log)
    course = [line.partition(": ")[2] for line in log]
    assert course[0] == "begin run: 4 dialogues"
    assert course[-2:] == ["resume run: 5 dialogues", "end run: complete"]
    assert sum(line.endswith("end run: complete") for line in log) == 2


def test_an_outage_is_one_line_of_the_log_and_one_on_the_terminal(tmp_path: Path) -> None:
    faults = [404] * 2

    def hook(body: Body) -> web.Response | None:
        return web.json_response({"error": "away"}, status=faults.pop()) if faults else None

    shown = Recording()
    with scripted_server(hook, profile="flawless") as server, command_log(tmp_path / "log.txt", False, shown.say):
        recipe = over_http(server.url, tmp_path, concurrency=1)
        generate_dialogues(recipe, run=tmp_path / "run", n=1, display=shown)
    log = (tmp_path / "log.txt").read_text().splitlines()
    for words in ("HTTP 404", "is back after"):
        assert len([line for line in shown.lines if words in line]) == 1
        assert [line.split()[1] for line in log if words in line] == ["WARNING"]


def test_no_line_of_a_log_holds_a_key_or_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    shown: list[str] = []
    logger = logging.getLogger("intersafe.test")
    with command_log(tmp_path / "log.txt", True, shown.append, ["SOME_KEY", "NO_SUCH_KEY"]):
        logger.warning("HTTP 401 of Bearer sk-secret\n%s", "\x1b[2J")
        logger.info("seen on the display", extra={"shown": True})
    assert shown == ["WARNING HTTP 401 of Bearer ***  [2J"]
    log = (tmp_path / "log.txt").read_text()
    assert log.count("\n") == 2
    assert "secret" not in log


def test_a_run_that_was_stopped_before_its_first_dialogue_shows_what_it_used(tmp_path: Path) -> None:
    done = cli("generate", "--n", "50", "--run", "./run", "--no-refusals", "--max-tokens", "2000", cwd=tmp_path)
    assert done.returncode == 5
    assert Run(tmp_path / "run").funnel().accepted == 0
    shown = cli("show", "./run", "--funnel", cwd=tmp_path).stdout
    roles = Run(tmp_path / "run").roles()
    assert roles
    for role, tally in roles.items():
        assert re.search(rf"{role} +{tally.calls:,} calls", shown)


def test_a_run_that_fell_short_shows_of_how_many(tmp_path: Path) -> None:
    gates = Gates(duplicates=DuplicateSettings(threshold=0.05))
    with pytest.raises(SeedsExhausted):
        generate_dialogues(demo(gates=gates), run=tmp_path / "run", n=9, tries=1)
    shown = cli("show", "./run", "--funnel", cwd=tmp_path).stdout
    assert re.search(r"^ +[1-8] accepted of 9   \(not complete", shown, re.MULTILINE)


def test_the_error_that_ends_a_command_is_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    words = ("generate", "--n", "1", "--run", "./run", "--log-file", "log.txt")
    assert cli(*words, "--seeds", "nowhere.jsonl", cwd=tmp_path).returncode == 2
    assert re.search(r" ERROR intersafe: .*nowhere.jsonl: no such seed file", log.read_text())
    assert cli(*words, cwd=tmp_path).returncode == 0
    assert cli(*words, cwd=tmp_path).returncode == 0
    assert log.read_text().splitlines()[-1].endswith("run is complete: 1 dialogues")


@pytest.mark.parametrize("name", ["recipe.yaml", "fifo", "-/log.txt"])
def test_a_log_that_is_no_log_is_refused_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    os.mkfifo(tmp_path / "fifo")
    done = cli("generate", "--n", "1", "--log-file", name, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("intersafe: --log-file: ")
    assert (tmp_path / "recipe.yaml").read_text() == "name: mine\n"
    assert not (tmp_path / "outputs").exists()


def test_the_log_of_a_command_ends_with_it(tmp_path: Path) -> None:
    logger = logging.getLogger("intersafe")
    before, shown = (list(logger.handlers), logger.level), list[str]()
    assert "--log-file" in refusal(lambda: command_log(tmp_path / "no" / "log.txt", False, shown.append).__enter__())
    assert (list(logger.handlers), logger.level) == before
    for name in ("one", "two"):
        flags = [
            "--n",
            "1",
            "--no-refusals",
            "--run",
            str(tmp_path / name),
            "--log-file",
            str(tmp_path / f"{name}.txt"),
        ]
        assert CliRunner().invoke(main, ["generate", *flags]).exit_code == 0
        assert (list(logger.handlers), logger.level) == before
    assert "two" not in (tmp_path / "one.txt").read_text()
    assert "two" in (tmp_path / "two.txt").read_text()
