"""Two processes on one run: exactly one writes, whatever happened to the owner before, the disk and the clocks."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from intersafe.errors import InputError, StorageError
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.regate import regate
from intersafe.run.lock import LIMIT, Lease, lock
from intersafe.run.owner import read_owner
from tests.support.paths import REPOSITORY
from tests.support.runs import cli, demo, digest, refusal, rows, started
from tests.support.shims import shim

BEAT = 0.2
OWNER = """
import asyncio, sys
from pathlib import Path
from intersafe.errors import InputError, StorageError
from intersafe.run.journal import GroupWriter
from intersafe.run.lock import lock

async def write(lease):
    writer = GroupWriter(Path(sys.argv[1]), lease.check)
    while True:
        await asyncio.sleep(0.02)
        writer.add("lines.jsonl", {"by": sys.argv[3]})

if sys.argv[2] == "gate":
    sys.stdin.read()
try:
    lease = lock(Path(sys.argv[1]), beat=0.2)
except InputError as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("got", lease.news, flush=True)
try:
    asyncio.run(write(lease)) if sys.argv[2] == "write" else sys.stdin.read() if sys.argv[2] == "hold" else None
except StorageError as error:
    print("lost", error, flush=True)
    sys.exit(4)
if sys.argv[2] != "gate":
    lease.release()
    sys.exit(0)
print("held", flush=True)
sys.stdout.close()
import time
time.sleep(60)
"""


def owner(
    run: Path, what: str, name: str = "", before: tuple[str, ...] = (), env: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """A process that takes the run and holds it, or writes into it, or first waits for its gate (its stdin)."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", OWNER, str(run), what, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(env or {}),
        cwd=REPOSITORY,
    )


def line_of(process: "subprocess.Popen[str]") -> str:
    out: IO[str] | None = process.stdout
    assert out is not None
    return out.readline().strip()


@contextlib.contextmanager
def ended(*processes: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def changed(run: Path, **fields: Any) -> None:
    """The owner's file with other fields, as another machine would have written it, and long ago."""
    path = run / ".lock"
    status = path.stat()
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    os.utime(path, (status.st_atime - 3600, status.st_mtime - 3600))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("before", "faults", "many"),
    [
        ("free", "none", 20),
        ("dead", "none", 8),
        ("garbage", "none", 6),
        ("free", "no links", 6),
        ("dead", "no links, no flock", 8),
    ],
)
def test_of_many_at_once_exactly_one_gets_it(before: str, faults: str, many: int, run: Path, tmp_path: Path) -> None:
    env = {} if faults == "none" else shim("no_locks", tmp_path, *(["-DNO_FLOCK"] if "flock" in faults else []))
    if before == "dead":
        first = owner(run, "hold", env=env)
        with ended(first):
            assert line_of(first).startswith("got")
    elif before == "garbage":
        (run / ".lock").write_bytes(b"\0" * 40)
        os.utime(run / ".lock", (1, 1))
    crowd = [owner(run, "gate", env=env) for _ in range(many)]
    with ended(*crowd):
        for process in crowd:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        said = [line_of(process).split()[0] for process in crowd]
        assert sorted(said) == ["got"] + ["refused"] * (many - 1)
        assert json.loads((run / ".lock").read_text())["pid"] == crowd[said.index("got")].pid
        assert [path.name for path in run.iterdir() if path.name.startswith(".lock")] == [".lock"]


@pytest.mark.parametrize("faults", ["none", "no links", "no links, no flock"])
def test_a_refusal_names_who_has_it_and_a_kill_frees_it_at_once(faults: str, run: Path, tmp_path: Path) -> None:
    env = {} if faults == "none" else shim("no_locks", tmp_path, *(["-DNO_FLOCK"] if "flock" in faults else []))
    first = owner(run, "hold", env=env)
    with ended(first):
        assert line_of(first) == "got"
        said = refusal(lambda: lock(run))
        for word in ("another process", str(first.pid), socket.gethostname(), "since 20", "wait for it"):
            assert word in said
    with lock(run) as lease:
        assert "taken over from a dead process" in lease.news
        assert str(first.pid) in lease.news
    assert not list(run.glob(".lock*")), "given back"
    with lock(run) as lease:
        assert not lease.news


def test_a_process_that_nobody_collected_is_dead(run: Path) -> None:
    first = owner(run, "hold")
    assert line_of(first) == "got"
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    lock(run).release()
    first.communicate()


def test_a_number_that_was_given_to_another_process_is_not_its_owner(run: Path) -> None:
    lease = lock(run, beat=BEAT)
    changed(run, started="1")  # the process of that number, this one, is another than the one that took the lock
    with lock(run):
        pass
    with pytest.raises(StorageError, match="deleted"):
        lost(lease)
    lease.release()


def lost(lease: Lease) -> None:
    """Waits until the heartbeat has seen that the run is another's, which `check` then says."""
    for _ in range(600):
        lease.check()
        time.sleep(0.02)


ELSEWHERE = {"host": "elsewhere", "boot": "another"}


@pytest.mark.alone
@pytest.mark.parametrize("clock", [-3600, 3600])
def test_another_machines_owner_is_dead_once_its_heartbeat_stops(clock: int, run: Path) -> None:
    first = owner(run, "hold")
    with ended(first):
        assert line_of(first) == "got"
    changed(run, **ELSEWHERE)
    os.utime(run / ".lock")
    said = refusal(lambda: lock(run))
    assert "elsewhere" in said
    assert "sign of life" in said
    now = time.time()
    os.utime(run / ".lock", (now + clock, now + clock))  # the server's clock has jumped either way since
    with lock(run) as lease:
        assert "elsewhere" in lease.news


@pytest.mark.alone
def test_another_machines_owner_that_still_renews_it_is_alive_whatever_the_clock_says(run: Path) -> None:
    lease = lock(run, beat=BEAT)
    path = run / ".lock"
    moved = json.loads(path.read_text()) | ELSEWHERE
    path.write_text(json.dumps(moved))
    beating = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time\nwhile True: os.utime(sys.argv[1], (1000 + time.monotonic(),) * 2); time.sleep(0.05)",
            str(path),
        ]
    )
    try:
        while path.stat().st_mtime > time.time() - 3600:
            time.sleep(0.01)
        assert "elsewhere" in refusal(lambda: lock(run))
    finally:
        beating.kill()
        beating.wait()
    lease.release()


@pytest.mark.alone
def test_an_owner_that_was_stopped_writes_nothing_once_another_has_taken_over(run: Path) -> None:
    first = owner(run, "write", "first")
    with ended(first):
        assert line_of(first) == "got"
        while not rows(run / "lines.jsonl"):
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
        changed(run, **ELSEWHERE)
        second = owner(run, "write", "second")
        with ended(second):
            assert "elsewhere" in line_of(second)
            while not (written := rows(run / "lines.jsonl")) or written[-1]["by"] != "second":
                time.sleep(0.01)
            os.kill(first.pid, signal.SIGCONT)
            said = line_of(first)
            assert said.startswith("lost")
            assert str(second.pid) in said
            assert first.wait(10) == 4
            assert second.poll() is None
    by = [row["by"] for row in rows(run / "lines.jsonl")]
    assert by == ["first"] * by.count("first") + ["second"] * by.count("second"), "nothing of the first came later"


@pytest.mark.parametrize("content", [b"", b"{", b'{"host":"h"}\n', b"\xff" * 5000])
def test_a_lock_file_that_names_nobody_is_waited_for_and_then_taken(content: bytes, run: Path) -> None:
    (run / ".lock").write_bytes(content)
    assert "names no process" in refusal(lambda: lock(run))
    os.utime(run / ".lock", (time.time() - 1000,) * 2)
    with lock(run) as lease:
        assert "its name is unknown" in lease.news


def test_owners_that_were_killed_before_they_could_sign_are_followed(run: Path) -> None:
    """Without hard links a lock file is empty for a moment: two kills just then leave two."""
    path = run / ".lock"
    for _ in range(2):
        path.touch()
        os.utime(path, (1, 1))
        found = read_owner(path)
        assert found is not None
        path = run / f".lock-{found.nonce}"
    process = owner(run, "release")
    with ended(process):
        said, _ = process.communicate(timeout=20)
        assert said.startswith("got")
    assert [path.name for path in run.iterdir() if path.name.startswith(".lock")] == []


def test_a_run_whose_lock_file_is_a_folder_is_refused_in_one_line(run: Path) -> None:
    (run / ".lock").mkdir()
    with pytest.raises(StorageError, match=r"\.lock: cannot be written"):
        lock(run)


def test_a_run_whose_lock_file_is_a_link_to_nowhere_is_refused_in_one_line(run: Path) -> None:
    (run / ".lock").symlink_to(run / "nowhere")
    assert "delete it" in refusal(lambda: lock(run))
    assert [path.name for path in run.glob(".lock*")] == [".lock"]
    (run / ".lock").unlink()
    lock(run).release()


def test_a_container_of_the_same_name_is_not_mistaken(run: Path) -> None:
    unshare = shutil.which("unshare")
    before = (str(unshare), "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child")
    if unshare is None or subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody make a pid namespace")
    first = owner(run, "hold", before=before)
    with ended(first):
        assert line_of(first) == "got"
        assert json.loads((run / ".lock").read_text())["pid"] < 10, "a number that means another process here"
        assert "another process" in refusal(lambda: lock(run))
        (inside,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(inside), signal.SIGKILL)
        first.wait()
        with lock(run) as lease:
            assert "taken over" in lease.news


def test_a_copy_of_a_run_that_is_written_is_not_written_by_its_owner(run: Path, tmp_path: Path) -> None:
    with lock(run):
        copied = Path(shutil.copytree(run, tmp_path / "copy"))
        changed(copied, beat=BEAT)
        os.utime(copied / ".lock", (time.time() - 2 * LIMIT * BEAT,) * 2)
        lock(copied).release()  # the owner of the original does not own the copy, so this raises nothing
    assert not (copied / ".lock").exists()


def test_two_commands_on_one_run_and_regate_of_a_run_that_is_written(tmp_path: Path) -> None:
    process = started("generate", "--n", "11270", "--run", "./run", cwd=tmp_path)
    with ended(process):
        while not (tmp_path / "run" / "dialogues.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        done = cli("generate", "--n", "11270", "--run", "./run", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert str(process.pid) in done.stderr
        assert done.stderr.count("\n") == 1
        with pytest.raises(InputError, match="another process"):
            regate(tmp_path / "run", demo(), tmp_path / "new")
        assert cli("show", "./run", cwd=tmp_path).returncode == 0, "who only reads needs no lock"
    assert not (tmp_path / "new").exists()
    made = cli(
        "generate", "--n", str(len(rows(tmp_path / "run" / "dialogues.jsonl")) + 5), "--run", "./run", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    assert "taken over" in made.stderr


def test_a_run_is_given_back_after_every_end(tmp_path: Path) -> None:
    generate_dialogues(demo(), run=tmp_path / "run", n=4)
    assert not list((tmp_path / "run").glob(".lock*"))
    with lock(tmp_path / "run"):
        refusal(lambda: generate_dialogues(demo(), run=tmp_path / "run", n=8))
    generate_dialogues(demo(), run=tmp_path / "run", n=8)
    assert digest(tmp_path / "run") == digest(generate_dialogues(demo(), run=tmp_path / "other", n=8).path)
