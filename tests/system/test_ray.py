"""Runs grown by Ray workers: the bytes are those of one process, and a lost worker, machine or driver costs little.

The first tests need no Ray: they are about journals of several writers and about what a worker refuses. The others run
in an environment of their own (`make test-ray`), with real clusters of one and two nodes on this machine.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from intersafe.generation.context import RunRequest, opened
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.jobs import jobs
from intersafe.generation.kinds import DIALOGUES
from intersafe.generation.prepare import Prepared, open_directory, prepare
from intersafe.generation.progress import Display
from intersafe.generation.workers.ray_cluster import Cluster, joined
from intersafe.generation.workers.worker import Report, Setup, Worker, share_of, versions_here
from intersafe.generation.workers.worker_log import MOST, LogLine, log_again
from intersafe.recipe.load import load_recipe
from intersafe.run.directory import Run
from intersafe.run.journal import Journal
from intersafe.storage.bundled import bundled
from intersafe.storage.jsonl import GROUP_LINES, GROUP_SECONDS, GroupWriter
from tests.support.runs import cli, demo, digest, journal_keys, rows, started, whole_demo
from tests.support.servers.scripted_server import Body, Server, scripted_server

JOBS, SLOTS = 24, 8
"""Of the runs over HTTP: dialogues, all of them kept, and how many are grown at once; each has some 50 calls, so that
to grow the jobs of a lost worker from their beginning would be noticed."""

needs_ray = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray here: run `make test-ray`"),
    pytest.mark.filterwarnings("ignore"),
]


def with_ray(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs Ray."""
    for mark in needs_ray:
        test = mark(test)
    return test


# --- journals of several writers, and what a worker refuses: without Ray ---------------------------------------------


def test_the_torn_end_of_another_writers_journal_is_skipped_and_left_alone(tmp_path: Path) -> None:
    recipe = demo(concurrency=4)
    whole = generate_dialogues(recipe, run=tmp_path / "whole", n=12)
    lines = (whole.path / "journal" / "main.jsonl").read_bytes().splitlines(keepends=True)
    run = tmp_path / "run"
    open_directory(run, prepare(recipe))
    (run / "journal").mkdir()
    worker = run / "journal" / "w-lost.jsonl"
    worker.write_bytes(b"".join(lines[:40]) + lines[40][:30])  # its writer may still be at it
    (run / "journal" / "main.jsonl").write_bytes(b"".join(lines[41:60]) + lines[60][:30])
    generate_dialogues(recipe, run=run, n=12)
    assert digest(run) == digest(whole.path)
    assert worker.read_bytes() == b"".join(lines[:40]) + lines[40][:30]
    with worker.open("ab") as file:
        file.write(lines[40][30:])
    keys = journal_keys(run)
    assert len(keys) == len(set(keys)) + 1, "the torn one was answered again, and no other"


def set_up(run: Path) -> tuple[Prepared, Setup]:
    """A run that is laid down, and what its first worker is told."""
    prepared = prepare(demo())
    open_directory(run, prepared)
    (run / "journal").mkdir()
    (run / "journal" / "w-1.jsonl").touch()
    seal = hashlib.sha256((run / "recipe.json").read_bytes()).hexdigest()
    return prepared, Setup(str(run), prepared.recipe, prepared.manifest, seal, "journal/w-1.jsonl", versions_here(), "")


def test_an_outcome_leaves_a_worker_when_its_replies_are_written(tmp_path: Path) -> None:
    prepared, setup = set_up(tmp_path / "run")
    encode = msgspec.msgpack.encode

    async def act() -> None:
        worker = Worker(encode(setup))
        await worker.open()
        for job in islice(jobs(prepared.recipe, prepared.seeds.seeds), 3):
            await worker.grow("".join(["dia", "logues"]), encode(job), encode([]))
            written = len(journal_keys(tmp_path / "run"))
            assert written == sum(tally.calls for tally in (await worker.report()).roles.values()) > 0
        _, problem = await worker.close()
        assert not problem
        journal = (tmp_path / "run" / "journal" / "w-1.jsonl").read_bytes()
        assert b'"line"' not in journal, "the kind of a dialogue is left out, wherever its name came from"

    asyncio.run(act())


def test_what_a_worker_logs_comes_with_its_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, setup = set_up(tmp_path / "run")
    monkeypatch.setenv("VICTIM_KEY", "sk-secret")
    cast = prepared.recipe.cast
    keyed = msgspec.structs.replace(cast, judge=msgspec.structs.replace(cast.judge, key="VICTIM_KEY"))
    recipe = msgspec.structs.replace(prepared.recipe, cast=keyed)
    setup = msgspec.structs.replace(setup, recipe=recipe, log_level=logging.INFO)
    logger = logging.getLogger("intersafe.test")

    async def act() -> None:
        worker = Worker(msgspec.msgpack.encode(setup))
        assert await worker.report() == Report({}, {}, []), "nothing is opened yet"
        assert (await worker.open()).kind == "accepted"
        logger.info("401 of sk-secret\n")
        logger.warning("out", extra={"shown": True})
        lines = [LogLine(20, "intersafe.test", "401 of *** "), LogLine(30, "intersafe.test", "out", shown=True)]
        assert (await worker.report()).logged == lines
        for number in range(MOST + 5):
            logger.info("%d", number)
        *most, last = (await worker.report()).logged
        assert (len(most), "5 more log lines" in last.text) == (MOST, True)
        await worker.close()

    before = list(logging.getLogger("intersafe").handlers)
    asyncio.run(act())
    assert logging.getLogger("intersafe").handlers == before


def test_an_event_that_several_workers_meet_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "intersafe")
    retry, event = LogLine(20, "intersafe.test", "again"), LogLine(30, "intersafe.test", "out", shown=True)
    log_again([[retry, event], [retry, event]])
    assert [record.getMessage() for record in caplog.records] == ["again", "out", "again"]
    assert [getattr(record, "shown", False) for record in caplog.records] == [False, True, False]


def refused(worker: Worker) -> str:
    grown = asyncio.run(worker.open())
    assert grown.kind == "run"
    assert grown.stage == "InputError"
    assert "\n" not in grown.detail
    assert ";" in grown.detail, "the remedy is missing"
    return grown.detail


def test_a_worker_refuses_other_directories_versions_and_missing_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    prepared, good = set_up(run)

    def worker(**changes: Any) -> Worker:
        return Worker(msgspec.msgpack.encode(msgspec.structs.replace(good, **changes)))

    assert asyncio.run(worker().open()).kind == "accepted"
    assert str(tmp_path / "elsewhere") in refused(worker(run=str(tmp_path / "elsewhere")))
    assert str(run) in refused(worker(seal="0" * 64))
    assert str(run) in refused(worker(journal="journal/w-2.jsonl"))
    assert "msgspec" in refused(worker(versions=good.versions | {"msgspec": "0.1"}))
    monkeypatch.delenv("VICTIM_KEY", raising=False)
    cast = prepared.recipe.cast
    keyed = msgspec.structs.replace(cast, judge=msgspec.structs.replace(cast.judge, key="VICTIM_KEY"))
    assert "VICTIM_KEY" in refused(worker(recipe=msgspec.structs.replace(prepared.recipe, cast=keyed)))


@pytest.mark.parametrize("workers", [1, 3, 1000])
def test_limits_are_shared_out(workers: int) -> None:
    recipe = whole_demo()
    cast = recipe.cast
    judge = msgspec.structs.replace(cast.judge, concurrency=100, rpm=60, tpm=10_000)
    recipe = msgspec.structs.replace(recipe, cast=msgspec.structs.replace(cast, judge=judge))
    part = share_of(recipe, workers)
    for whole, share in zip(recipe.cast.models.values(), part.cast.models.values(), strict=True):
        assert whole.concurrency <= share.concurrency * workers < whole.concurrency + workers
        assert whole.model == share.model
    assert part.cast.judge.rpm is not None
    assert 1 <= part.cast.judge.rpm <= max(1, 60 / workers)
    assert share_of(recipe, 1).outcome == part.outcome == recipe.outcome


def test_a_reply_that_was_lent_is_there_for_its_job_alone(tmp_path: Path) -> None:
    run = generate_dialogues(demo(concurrency=2), run=tmp_path / "run", n=3).path

    async def act() -> None:
        writer = GroupWriter(run)
        journal = Journal(writer)
        journal.load(run / "journal", {"dialogues": 1})
        handed = journal.hand_over()
        assert min(job for _, job in handed) == 1
        entries = handed["dialogues", 1]
        assert journal.take(entries[0].key) is None
        with journal.lent(entries):
            assert journal.take(entries[0].key) == entries[0]
            assert journal.take(entries[0].key) is None
        assert all(journal.take(entry.key) is None for entry in entries)
        await writer.close()

    asyncio.run(act())


def test_without_ray_installed_the_remedy_is_named(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('none here')\n")
    done = cli("generate", "--n", "2", "--run", "./run", "--ray", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'intersafe[ray]'" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--ray-workers", "2"), "--ray"),
        (("--ray", "--painter", "diffusers:nowhere"), "HTTP"),
    ],
)
def test_flags_that_do_not_go_together(flags: tuple[str, ...], named: str, tmp_path: Path) -> None:
    done = cli("generate", "--n", "2", "--run", "./run", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr
    assert not (tmp_path / "run").exists()


# --- with Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of one node with two cores, for all tests that leave it whole; its address."""
    with nodes(2) as (address, _):
        yield address


@contextlib.contextmanager
def nodes(*cores: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """A cluster of a node for each number of cores: its address, and what kills the last node with all it runs."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": cores[0], **small})
    try:
        others = [made.add_node(num_cpus=number, object_store_memory=80 * 2**20) for number in cores[1:]]
        yield made.address, lambda: made.remove_node(others[-1], allow_graceful=False)
    finally:
        made.shutdown()


def demo_with_twins(folder: Path) -> Path:
    """The demo recipe, pictures and all, with few refusals and with twins."""
    text = bundled("pipelines/demo.yaml").read_text().replace("n: 300\n", "n: 12\n").replace("n: 100\n", "n: 4\n")
    text = text.replace("../seeds", str(bundled("seeds"))).replace("../prompts", str(bundled("prompts")))
    path = folder / "demo.yaml"
    path.write_text(f"{text}\ntwins: {{ratio: 0.2}}\n")
    return path


def over_http(folder: Path, server: Server) -> Path:
    """Dialogues with the cast behind a server; every job is grown and kept, so that every call can be accounted for."""
    fields = '"category":"fraud","source":"own","license":"CC0-1.0"'
    lines = [f'{{"id":"s{i}","query":"A concern of kind {i}",{fields}}}\n' for i in range(JOBS)]
    (folder / "seeds.jsonl").write_text("".join(lines))
    model = f"openai:scripted@{server.url}"
    path = folder / "http.yaml"
    path.write_text(
        f"""
name: http
cast: {{attacker: "{model}", victims: ["{model}"], judge: "{model}"}}
seeds: seeds.jsonl
prompts: {bundled("prompts")}
strategies: [role_play]
n: {JOBS}
turns: {{min: 10, mean: 12, max: 14}}
gates: {{rules: null, images: null, coverage: null, duplicates: null}}
limits: {{concurrency: {SLOTS}}}
"""
    )
    return path


def whole_over_http(folder: Path, server: Server, *, delay: float) -> tuple[Path, dict[str, str]]:
    """The recipe, and what comes of it in one process; then the server counts anew and takes `delay` for an answer."""
    recipe = over_http(folder, server)
    whole = generate_dialogues(load_recipe(recipe), run=folder / "whole").path
    server.seen.clear()
    server.delay = delay
    return recipe, digest(whole)


def tokens(run: Path) -> int:
    """What a run has used so far."""
    return sum(tally.prompt_tokens + tally.completion_tokens for tally in Run(run).roles().values())


def grown(run: Path) -> int:
    """How many dialogues are kept."""
    with contextlib.suppress(FileNotFoundError):
        return (run / "dialogues.jsonl").read_bytes().count(b"\n")
    return 0


def wait_for(reached: Callable[[], bool], process: "subprocess.Popen[str] | None" = None) -> None:
    """Waits until something is so, as long as the process lives."""
    deadline = time.monotonic() + 60
    while not reached():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def writer_of(journal: Path) -> int:
    """The process that has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == journal.resolve():
                return int(link.parts[2])
    raise AssertionError(f"nobody writes {journal}")


def on_two_workers(recipe: Path, address: str) -> tuple[str, ...]:
    """The command that grows `./run` on that cluster."""
    return ("generate", "--pipeline", str(recipe), "--run", "./run", "--ray", address, "--ray-workers", "2")


def journals(run: Path) -> list[Path]:
    """The workers' journals."""
    return sorted((run / "journal").glob("w-*.jsonl"))


def all_write(run: Path) -> bool:
    """True once there are two workers and both have been answered."""
    return len(journals(run)) == 2 and all(path.stat().st_size for path in journals(run))


def check_paid_once(run: Path, server: Server, losses: int = 1) -> None:
    """All that was answered is in the journals; paid again is what was in flight at each loss, and one group."""
    keys = set(journal_keys(run))
    group = min(GROUP_LINES, math.ceil(GROUP_SECONDS * SLOTS / server.delay))
    assert len(keys) == len(server.seen), "a call that the server answered is in no journal"
    assert server.requests - len(keys) <= losses * (SLOTS + group)


@with_ray
def test_the_bytes_are_those_of_one_process(cluster: str, tmp_path: Path) -> None:
    recipe = demo_with_twins(tmp_path)
    whole = generate_dialogues(load_recipe(recipe), run=tmp_path / "whole", n=40)
    assert rows(whole.path / "twins.jsonl")
    for run, flags in {"one": ("--ray", cluster, "--ray-workers", "1"), "two": ("--ray", "--ray-workers", "2")}.items():
        done = cli("generate", "--pipeline", str(recipe), "--n", "40", "--run", f"./{run}", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert digest(tmp_path / run) == digest(whole.path)
        paid, kept = (Run(tmp_path / name).roles() for name in (run, "whole"))
        entries = journal_keys(tmp_path / run)
        assert len(entries) == len(set(entries)) == sum(tally.calls for tally in paid.values())
        assert set(paid) == set(kept)
        assert "ray" not in done.stdout.lower().replace(str(tmp_path).lower(), "")
        assert "(raylet)" not in done.stderr


@with_ray
def test_the_log_file_has_what_the_workers_log(cluster: str, tmp_path: Path) -> None:
    faults = [500] * 3

    def hook(_: Body) -> web.Response | None:
        return web.json_response({"error": "passing"}, status=faults.pop()) if faults else None

    with scripted_server(hook, profile="flawless") as server:
        command = (*on_two_workers(over_http(tmp_path, server), cluster), "--log-file", "log.txt")
        done = cli(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert " INFO intersafe.models.http: attacker: " in (tmp_path / "log.txt").read_text()


@with_ray
def test_a_run_resumes_with_ray_and_without(cluster: str, tmp_path: Path) -> None:
    with scripted_server(profile="flawless") as server:
        recipe, whole = whole_over_http(tmp_path, server, delay=0.01)
        words = ("generate", "--pipeline", str(recipe), "--run", "./run")
        run, ray = tmp_path / "run", ("--ray", cluster, "--ray-workers", "2")
        for flags, least in (((), 4), (ray, 10), ((), 16)):
            process = started(*words, *flags, cwd=tmp_path)
            wait_for(lambda least=least: grown(run) >= least, process)  # type: ignore[misc]
            process.kill()
            process.communicate()
        done = cli(*words, *ray, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert digest(run) == whole
        check_paid_once(run, server, losses=3)


@with_ray
@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_workers_cleanly(name: signal.Signals, cluster: str, tmp_path: Path) -> None:
    with scripted_server(profile="flawless") as server:
        recipe, whole = whole_over_http(tmp_path, server, delay=0.02)
        words, run = ("generate", "--pipeline", str(recipe), "--run", "./run"), tmp_path / "run"
        # Ctrl-C reaches all of a terminal's foreground, Ray's own processes included; SIGTERM the driver alone.
        where = () if name == signal.SIGINT else (cluster,)
        process = started(*words, "--ray", *where, "--ray-workers", "2", cwd=tmp_path, new_session=True)
        wait_for(lambda: grown(run) >= 5, process)
        workers = [writer_of(path) for path in journals(run)]
        (os.killpg if name == signal.SIGINT else os.kill)(process.pid, name)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert said.splitlines()[-1] == "intersafe: stopped; the same command resumes"
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        answered = len(server.seen)
        assert answered - len(journal_keys(run)) <= SLOTS, "only calls in flight are lost"
        assert cli(*words, cwd=tmp_path).returncode == 0
        assert digest(run) == whole
        check_paid_once(run, server)


@with_ray
def test_a_killed_worker_is_replaced_and_its_jobs_continue(cluster: str, tmp_path: Path) -> None:
    with scripted_server(profile="flawless") as server:
        recipe, whole = whole_over_http(tmp_path, server, delay=0.02)
        run = tmp_path / "run"
        process = started(*on_two_workers(recipe, cluster), cwd=tmp_path)
        wait_for(lambda: grown(run) >= 5, process)
        os.kill(writer_of(journals(run)[0]), signal.SIGKILL)
        _, said = process.communicate(timeout=90)
        assert process.returncode == 0, said
        assert [line for line in said.splitlines() if "is lost" in line]
        assert digest(run) == whole
        check_paid_once(run, server)
        assert len([path for path in journals(run) if path.stat().st_size]) == 3, "the new worker has a file of its own"
        paid = Run(run).roles()
        assert sum(tally.calls for tally in paid.values()) == len(journal_keys(run))


@with_ray
def test_a_node_is_killed_in_the_middle(tmp_path: Path) -> None:
    with scripted_server(profile="flawless") as server, nodes(1, 1) as (address, kill_last):
        recipe, whole = whole_over_http(tmp_path, server, delay=0.02)
        run = tmp_path / "run"
        process = started(*on_two_workers(recipe, address), cwd=tmp_path)
        wait_for(lambda: grown(run) >= 5 and all_write(run), process)
        kill_last()
        _, said = process.communicate(timeout=90)
        assert process.returncode == 0, said
        assert [line for line in said.splitlines() if "is lost" in line and "1 of 2 workers are left" in line]
        assert digest(run) == whole
        check_paid_once(run, server)


class Said(Display):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@with_ray
def test_a_worker_that_hangs_is_given_up_and_keeps_its_file_to_itself(cluster: str, tmp_path: Path) -> None:
    from intersafe.generation.workers.driver import RayWorkers

    with scripted_server(profile="flawless") as server:
        recipe, _ = whole_over_http(tmp_path, server, delay=0.02)
        run, display = tmp_path / "run", Said()
        request = RunRequest(prepare(load_recipe(recipe)), run, JOBS, display, cluster=Cluster(cluster, 2))

        async def act() -> list[Any]:
            async with joined(request.cluster) as count:
                with opened(request, count) as context:
                    async with RayWorkers(context, silence=2.0) as workers:
                        every = islice(jobs(context.recipe, context.prepared.seeds.seeds), SLOTS)
                        growing = [asyncio.create_task(workers.grow(DIALOGUES, job)) for job in every]
                        await asyncio.to_thread(wait_for, lambda: all_write(run))
                        hangs = writer_of(journals(run)[0])
                        os.kill(hangs, signal.SIGSTOP)
                        outcomes = await asyncio.gather(*growing)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(hangs, signal.SIGCONT)
                        return outcomes

        outcomes = asyncio.run(act())
    assert [line for line in display.lines if "no longer answered" in line]
    assert [one.id for one in outcomes] == [one.id for one in islice(Run(tmp_path / "whole").dialogues(), SLOTS)]
    assert len(set(journal_keys(run))) == len(server.seen)


@with_ray
def test_a_budget_stops_the_workers_and_the_run_resumes(cluster: str, tmp_path: Path) -> None:
    with scripted_server(profile="flawless") as server:
        recipe, whole = whole_over_http(tmp_path, server, delay=0.05)
        total = tokens(tmp_path / "whole")
        words = ("generate", "--pipeline", str(recipe), "--run", "./run")
        ray = ("--ray", cluster, "--ray-workers", "2")
        done = cli(*words, *ray, "--max-tokens", str(total // 4), cwd=tmp_path)
        assert done.returncode == 5, done.stderr
        assert "--max-tokens" in done.stderr.splitlines()[-1]
        assert total // 4 <= tokens(tmp_path / "run") < total
        assert cli(*words, *ray, cwd=tmp_path).returncode == 0
        assert digest(tmp_path / "run") == whole
        keys = journal_keys(tmp_path / "run")
        assert len(keys) == len(set(keys)) == server.requests, "nothing is paid twice at a budget"


@with_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_a_wrong_address_is_one_line(address: str, tmp_path: Path) -> None:
    done = cli("generate", "--n", "2", "--run", "./run", "--ray", address, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert address in done.stderr
    assert "ray start" in done.stderr
    assert not (tmp_path / "run").exists()


@with_ray
def test_a_server_that_stays_away_ends_the_run_resumable(cluster: str, tmp_path: Path) -> None:
    with scripted_server(profile="flawless") as server:
        recipe, whole = whole_over_http(tmp_path, server, delay=0.0)
        words = ("generate", "--pipeline", str(recipe), "--run", "./run", "--ray", cluster)
        away = ("--judge", "openai:scripted@http://127.0.0.1:9/v1", "--patience", "0.5")
        done = cli(*words, *away, cwd=tmp_path)
        assert done.returncode == 4, done.stderr
        assert "127.0.0.1:9" in done.stderr.splitlines()[-1]
        assert cli(*words, cwd=tmp_path).returncode == 0
        assert digest(tmp_path / "run") == whole
