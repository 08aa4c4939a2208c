"""Faults of the disk under a run: full, read-only, files that vanish; and a clock that jumps. Nothing is lost."""

import asyncio
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from intersafe.errors import InputError, StorageError
from intersafe.generation.generate import generate_dialogues
from intersafe.images.store import ImageStore, read_image
from intersafe.recipe.load import load_recipe
from intersafe.run.directory import Run
from intersafe.run.kinds import RECORDS
from intersafe.run.outcomes import align_outcomes
from intersafe.storage.bundled import bundled
from intersafe.storage.jsonl import GroupWriter
from tests.support.runs import cli, digest, journal_keys, rows, started
from tests.support.servers.scripted_server import scripted_server
from tests.support.shims import shim

N = 60


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo recipe with a tenth of its refusals."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    text = bundled("pipelines/demo.yaml").read_text()
    for name in ("seeds", "prompts"):
        text = text.replace(f"../{name}", str(bundled(name)))
    path.write_text(re.sub(r"^(      n: \d+)0$", r"\1", text, flags=re.MULTILINE))
    return path


@pytest.fixture(scope="module")
def words(recipe: Path) -> tuple[str, ...]:
    """The command that makes the run."""
    return ("generate", "--pipeline", str(recipe), "--run", "./run", "--n", str(N))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without any fault."""
    path = tmp_path_factory.mktemp("whole") / "run"
    generate_dialogues(load_recipe(recipe), run=path, n=N)
    return path


def one_line(stderr: str) -> str:
    """The line that ends a failed command; all before it is progress."""
    assert "Traceback" not in stderr, stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("intersafe: "), stderr
    assert ";" in last, "the remedy is missing"
    return last


# --- a full disk -----------------------------------------------------------------------------------------------------


def limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [99_999, 199_999])
def test_a_disk_that_fills_up_inside_a_line_costs_nothing_once_it_is_freed(
    size: int, words: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "intersafe", *words]
    full = subprocess.run(
        command, cwd=tmp_path, preexec_fn=limited(size), capture_output=True, text=True, check=False, timeout=60
    )
    assert full.returncode == 4, full.stderr
    assert "cannot write" in one_line(full.stderr)
    journal = tmp_path / "run" / "journal" / "main.jsonl"
    assert journal.stat().st_size == size, "the last line is torn"
    paid = [json.loads(line)["key"] for line in journal.read_bytes().splitlines()[:-1]]
    done = cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "run") == digest(whole)
    keys = journal_keys(tmp_path / "run")
    assert keys[: len(paid)] == paid
    assert len(keys) == len(set(keys))


MOUNTED = """
mkdir run && mount -t tmpfs -o size=$1 tmpfs run || exit 77
"$0" -m intersafe generate --pipeline "$2" --run ./run --n 60 2>full.log; echo $? >full.rc
cp -r run full
mount -o remount,ro run && "$0" -m intersafe generate --pipeline "$2" --run ./run --n 60 2>ro.log; echo $? >ro.rc
mount -o remount,rw,size=100m run
"$0" -m intersafe generate --pipeline "$2" --run ./run --n 60 2>done.log; echo $? >done.rc
mount -o remount,ro run
"$0" -m intersafe generate --pipeline "$2" --run ./run --n 60 >again.out 2>again.log; echo $? >again.rc
"$0" -m intersafe show ./run --funnel >show.out 2>&1; echo $? >show.rc
"$0" -m intersafe generate --pipeline "$2" --run ./run --n 70 2>more.log; echo $? >more.rc
cp -r run made
"""


@pytest.mark.parametrize("size", ["80k", "700k"])
def test_a_real_file_system_that_is_full_then_read_only_then_mended(
    size: str, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*space, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a file system of his own")
    script = [*space, "sh", "-c", MOUNTED, sys.executable, size, str(recipe)]
    made = subprocess.run(script, cwd=tmp_path, check=False, timeout=110)
    if made.returncode == 77:
        pytest.skip("this system lets nobody mount a tmpfs of his own")
    codes = {
        name: int((tmp_path / f"{name}.rc").read_text()) for name in ("full", "ro", "done", "again", "show", "more")
    }
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in ("full", "ro", "more")}
    assert codes == {"full": 4, "ro": 4, "done": 0, "again": 0, "show": 0, "more": 4}, logs
    assert "No space left" in one_line(logs["full"])
    assert "Read-only" in one_line(logs["ro"])
    assert "Read-only" in one_line(logs["more"])
    assert digest(tmp_path / "made") == digest(whole)
    assert not list((tmp_path / "made").rglob("*.tmp"))


def test_an_image_of_a_run_that_was_moved_away_is_a_fault_of_the_disk(tmp_path: Path) -> None:
    """Not bad input (exit code 2): nothing is wrong with the command, and nothing is lost."""
    store, ref = ImageStore(tmp_path / "run" / "images"), "0" * 64 + ".png"
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="missing from the store"):
        store.read(ref)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(StorageError, match=r"run is gone: was it moved"):
        store.read(ref)


def test_a_full_disk_leaves_no_half_image(tmp_path: Path) -> None:
    Image.frombytes("RGB", (200, 200), os.urandom(120_000)).save(tmp_path / "noise.png")
    code = (
        "import sys; from pathlib import Path; from intersafe.images.store import ImageStore, read_image\n"
        "ImageStore(Path('store')).put(read_image(Path('noise.png')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        preexec_fn=limited(50_000),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "StorageError" in done.stderr
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    image = read_image(tmp_path / "noise.png")
    assert ImageStore(tmp_path / "store").is_sound(ImageStore(tmp_path / "store").put(image))


# --- files that vanish, and folders in their place -------------------------------------------------------------------


@pytest.mark.parametrize("file", ["journal/main.jsonl", "dialogues.jsonl"])
@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_a_file_that_vanishes_during_a_run_is_noticed_and_the_run_resumes(file: str, how: str, tmp_path: Path) -> None:
    words = ("generate", "--run", "./run", "--n", "200", "--no-refusals")
    process = started(*words, cwd=tmp_path)
    path = tmp_path / "run" / file
    while not (path.exists() and path.stat().st_size > 60_000) and process.poll() is None:
        time.sleep(0.005)
    path.unlink() if how == "deleted" else os.truncate(path, 40_000)
    err = process.communicate(timeout=60)[1]
    if how == "deleted":
        assert process.returncode == 4, err
        assert "deleted while it was written" in one_line(err)
        assert str(file) in err
    else:
        assert "Traceback" not in err
    done = cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "run").funnel().accepted == 200
    assert [row["job"] for row in rows(tmp_path / "run" / "dialogues.jsonl")] == sorted(
        row["job"] for row in rows(tmp_path / "run" / "dialogues.jsonl")
    )


PLACES = ["dialogues.jsonl", "failed.jsonl", "journal/main.jsonl", "summary.json", "seeds.jsonl", "recipe.json"]


@pytest.mark.parametrize("place", [*PLACES, "prompts/judge/turn.md"])
def test_a_folder_in_place_of_a_file_is_said_in_one_line(place: str, recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    path, aside = run / place, tmp_path / "aside"
    if path.exists():
        path.rename(aside)
    path.mkdir()
    (path / "kept").write_text("")
    with pytest.raises((StorageError, InputError)) as caught:
        generate_dialogues(load_recipe(recipe), run=run, n=N + 5)
    assert "\n" not in str(caught.value)
    assert ("no run there" if place == "recipe.json" else path.name) in str(caught.value)
    assert ";" in str(caught.value)
    shutil.rmtree(path)
    if aside.exists():
        aside.rename(path)
    assert generate_dialogues(load_recipe(recipe), run=run, n=N + 5).funnel().accepted == N + 5


@pytest.mark.parametrize("place", ["journal", "images", "prompts"])
def test_a_file_in_place_of_a_folder_is_said_in_one_line(place: str, recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / place)
    (run / place).write_text("a file")
    done = cli("generate", "--pipeline", str(recipe), "--run", "./run", "--n", str(N + 5), cwd=tmp_path)
    assert done.returncode in (2, 4), done.stderr
    assert place in one_line(done.stderr)


# --- the writer and the files of outcomes ----------------------------------------------------------------------------


def test_what_is_settled_is_on_the_disk_and_many_may_wait_at_once(tmp_path: Path) -> None:
    async def write() -> None:
        writer = GroupWriter(tmp_path)

        async def one(number: int) -> None:
            for step in range(20):
                writer.add("journal/a.jsonl", {"n": number, "step": step})
                await writer.settled()
                assert {"n": number, "step": step} in rows(tmp_path / "journal" / "a.jsonl")

        await asyncio.gather(*(one(number) for number in range(10)))
        await writer.settled()
        await writer.close()

    asyncio.run(write())
    assert len(rows(tmp_path / "journal" / "a.jsonl")) == 200


def test_settled_says_that_the_disk_is_full(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("this system has no /dev/full")
    (tmp_path / "full.jsonl").symlink_to("/dev/full")

    async def write() -> None:
        writer = GroupWriter(tmp_path)
        writer.add("full.jsonl", {"n": 1})
        with pytest.raises(StorageError, match="No space left"):
            await writer.settled()
        with pytest.raises(StorageError, match="No space left"):
            writer.add("full.jsonl", {"n": 2})  # nothing more is paid for in vain
        with pytest.raises(StorageError):
            await writer.close()

    asyncio.run(write())


def naive_point(root: Path) -> int:
    """The first job that no file decides, as a person would look for it."""
    decided: set[int] = set()
    for name in RECORDS["dialogues"].files:
        last = -1
        for line in (root / name).read_bytes().splitlines(keepends=True) if (root / name).exists() else ():
            try:
                job = json.loads(line)["job"] if line.endswith(b"\n") else -1
            except ValueError:
                job = -1
            if job <= last:
                break
            decided.add(job)
            last = job
    return next(job for job in range(len(decided) + 1) if job not in decided)


@pytest.mark.parametrize("seed", range(12))
def test_any_three_torn_and_damaged_files_are_cut_to_the_common_job(seed: int, tmp_path: Path) -> None:
    dice = hashlib.shake_256(bytes([seed])).digest(600)
    files: dict[str, list[bytes]] = {name: [] for name in RECORDS["dialogues"].files}
    for job in range(100):
        name = RECORDS["dialogues"].files[dice[job] % 3]
        files[name].append(b'{"job":%d,"x":"%s"}\n' % (job, b"y" * dice[100 + job]))
    for place, lines in enumerate(files.values()):
        if dice[300 + place] % 2 and lines:
            lines[dice[310 + place] % len(lines)] = (b"broken\n", b'{"job":3}\n', b"\n")[dice[320 + place] % 3]
    for place, (name, lines) in enumerate(files.items()):
        data = b"".join(lines)
        (tmp_path / name).write_bytes(data[: len(data) - dice[330 + place]])
    expected = naive_point(tmp_path)
    assert align_outcomes(tmp_path) == expected
    left = [row["job"] for name in RECORDS["dialogues"].files for row in rows(tmp_path / name)]
    assert sorted(left) == list(range(expected))
    assert align_outcomes(tmp_path) == expected


def test_a_summary_notices_rows_that_go_after_it_was_read(whole: Path, tmp_path: Path) -> None:
    run = Run(shutil.copytree(whole, tmp_path / "run"))
    assert run.summary is not None
    path = run.path / RECORDS["dialogues"].accepted
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert run.summary is None


# --- a clock that jumps ----------------------------------------------------------------------------------------------


def sane(summary: Path) -> None:
    roles = json.loads(summary.read_text())["roles"]
    assert roles
    assert all(0 <= role["seconds"] < 3000 for role in roles.values()), roles


@pytest.mark.alone
def test_a_clock_that_jumps_back_an_hour_and_ahead_a_day_changes_nothing(
    words: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    env = shim("jumping_clock", tmp_path) | {"JUMP_AFTER": "0.3"}
    code = (
        "import time\na = time.time()\ntime.sleep(0.4)\nb = time.time()\ntime.sleep(0.4)\nprint(b - a, time.time() - b)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=True
    )
    back, ahead = map(float, told.stdout.split())
    assert back < -3000, "the shim works"
    assert ahead > 80_000
    done = cli(*words, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"-\d+(\.\d+)? ?s\b", done.stderr), "no negative seconds"
    assert digest(tmp_path / "run") == digest(whole)
    sane(tmp_path / "run" / "summary.json")


def test_a_clock_that_jumps_over_http_changes_nothing(tmp_path: Path) -> None:
    env = shim("jumping_clock", tmp_path) | {"JUMP_AFTER": "1.0"}
    with scripted_server(delay=0.04) as server:
        spec = f"openai:scripted@{server.url}"
        models = ("--attacker", spec, "--judge", spec, "--victim", spec, "--no-refusals")
        words = ("generate", "--n", "30", *models)
        done = cli(*words, "--run", "./jumped", cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        assert cli(*words, "--run", "./whole", cwd=tmp_path).returncode == 0
    assert digest(tmp_path / "jumped") == digest(tmp_path / "whole")
    sane(tmp_path / "jumped" / "summary.json")
    keys = journal_keys(tmp_path / "jumped")
    assert len(keys) == len(set(keys)), "nothing was paid twice"
