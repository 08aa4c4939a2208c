"""The duplicate index against brute force, and its file under loss, damage and full disks."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rensa import RMinHash, RMinHashLSH

from intersafe.gates import dedup
from intersafe.gates.dedup import SIGNATURES, DuplicateIndex, bands_for, shingles, signature_of
from intersafe.gates.index.banded import BandedSignatures
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.regate import regate
from intersafe.recipe.gates import DuplicateSettings
from intersafe.recipe.override import override
from intersafe.records import Dialogue
from tests.support.dialogues import DEFAULT, colliding_signatures, made_up, nearest_of_each, similar_dialogues
from tests.support.paths import REPOSITORY
from tests.support.runs import cli, demo, digest, started

HEAD, RECORD = 64, 4 * DEFAULT.permutations + 8


def asked(one: Dialogue) -> list[str]:
    return [turn.user.text for turn in one.turns]


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"threshold": 0.3},
        {"threshold": 0.85},
        {"threshold": 1.0},
        {"unit": "word", "size": 2, "permutations": 96},
        {"permutations": 32, "threshold": 0.5},
        {"permutations": 1024},
    ],
)
def test_answers_are_those_of_rensas_own_index_and_of_brute_force(changes: dict[str, Any]) -> None:
    settings = msgspec.structs.replace(DEFAULT, **changes)
    bands = bands_for(settings.threshold, settings.permutations)
    rows = settings.permutations // bands
    lsh = RMinHashLSH(settings.threshold, settings.permutations, bands)
    hashes: list[RMinHash] = []
    bands_of: list[list[tuple[int, ...]]] = []
    dialogues, expected = similar_dialogues(), list[tuple[str, float] | None]()
    for place, one in enumerate(dialogues):
        mine = RMinHash(settings.permutations, 1)
        mine.update(sorted(shingles(asked(one), settings)))
        values = mine.digest()
        cut = [tuple(values[i : i + rows]) for i in range(0, len(values), rows)]
        sharing = [
            other
            for other, theirs in enumerate(bands_of)
            if any(one == another for one, another in zip(cut, theirs, strict=True))
        ]
        assert sharing == sorted(set(lsh.query(mine)))
        best = max(sharing, key=lambda other: mine.jaccard(hashes[other]), default=None)
        near = best is not None and mine.jaccard(hashes[best]) >= settings.threshold
        expected.append((dialogues[best].id, mine.jaccard(hashes[best])) if best is not None and near else None)
        lsh.insert(place, mine)
        hashes.append(mine)
        bands_of.append(cut)
    assert nearest_of_each(dialogues, settings=settings) == expected
    assert {bool(answer) for answer in expected} == {True, False}


@pytest.mark.parametrize("off_the_heap", [False, True])
def test_answers_hold_over_several_tables(off_the_heap: bool, tmp_path: Path) -> None:
    rng, values = random.Random(3), 32
    made = colliding_signatures(9000, rng)  # where equals are found the earliest counts, whatever table it is in
    index = BandedSignatures(values, 8, 14, tmp_path if off_the_heap else None)
    for signature in made:
        index.add(signature)
    assert len(index) == len(made)
    for mine in [*made[:3], *made[4500:4503], *colliding_signatures(12, rng)]:
        best, most = 0, 13
        for number, other in enumerate(made, 1):
            equal = [mine[i : i + 4] == other[i : i + 4] for i in range(0, len(mine), 4)]
            if sum(equal) > most and any(all(equal[i : i + 4]) for i in range(0, values, 4)):
                best, most = number, sum(equal)
        assert index.nearest(mine) == ((best, most) if best else None)


@pytest.mark.parametrize("off_the_heap", [False, True])
def test_a_slot_that_thousands_share_hides_nobody(off_the_heap: bool, tmp_path: Path) -> None:
    rng, start = random.Random(4), bytes(4 * 20)
    index = BandedSignatures(128, 32, 77, tmp_path if off_the_heap else None)
    crowd = [start + rng.randbytes(4 * 108) for _ in range(6000)]  # 20 of 128 values: a common opening
    for signature in crowd:
        index.add(signature)
    newcomer = start + rng.randbytes(4 * 108)
    assert index.candidates(newcomer) == set(range(1, 6001))
    assert index.nearest(newcomer) is None
    for number in (1, 3000, 6000):
        copy = bytearray(crowd[number - 1])
        copy[4 * 77 :] = rng.randbytes(4 * 51)
        assert index.nearest(bytes(copy)) == (number, 77)
        copy[4 * 76 :] = rng.randbytes(4 * 52)
        assert index.nearest(bytes(copy)) is None


# --- its file ---------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def records(path: Path) -> list[bytes]:
    data = path.read_bytes()[HEAD:]
    return [data[at : at + RECORD] for at in range(0, len(data), RECORD)]


def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(path.read_bytes()[:HEAD] + b"".join(change(records(path))))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_by_others(path: Path) -> None:
    path.unlink()
    nearest_of_each([made_up(number) for number in range(1000, 1128)], path)


def made_with_other_settings(path: Path) -> None:
    path.unlink()
    nearest_of_each(similar_dialogues(), path, DuplicateSettings(size=4))


HARM: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: path,
    "lost": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "torn head": lambda path: os.truncate(path, HEAD // 2),
    "damaged head": lambda path: flip(path, 5),
    "torn record": lambda path: os.truncate(path, HEAD + 40 * RECORD + 17),
    "records lost": lambda path: os.truncate(path, HEAD + 100 * RECORD),
    "longer": lambda path: path.write_bytes(path.read_bytes() + os.urandom(3 * RECORD + 5)),
    "damaged first signature": lambda path: flip(path, HEAD),
    "damaged signature": lambda path: flip(path, HEAD + 50 * RECORD + 300),
    "damaged proof": lambda path: flip(path, HEAD + 51 * RECORD - 1),
    "zeros": lambda path: path.write_bytes(path.read_bytes()[:HEAD] + bytes(128 * RECORD)),
    "backwards": lambda path: rewrite(path, lambda rows: rows[::-1]),
    "two swapped": lambda path: rewrite(path, lambda rows: [rows[1], rows[0], *rows[2:]]),
    "shifted": lambda path: rewrite(path, lambda rows: rows[1:]),
    "shifted by a byte": lambda path: path.write_bytes(path.read_bytes()[: HEAD + 9] + path.read_bytes()[HEAD + 10 :]),
    "another run's": made_by_others,
    "other settings": made_with_other_settings,
    "a folder": directory,
    "a text": lambda path: path.write_text("not a file of signatures\n" * 1000),
}


@pytest.mark.parametrize("harm", HARM)
def test_whatever_becomes_of_the_file_the_answers_are_the_same_and_it_heals(harm: str, tmp_path: Path) -> None:
    dialogues, path = similar_dialogues(), tmp_path / SIGNATURES
    expected = nearest_of_each(dialogues)
    assert nearest_of_each(dialogues, path) == expected
    sound = path.read_bytes()
    assert len(sound) == HEAD + 192 * RECORD  # whole groups of 64
    HARM[harm](path)
    assert nearest_of_each(dialogues, path) == expected
    if harm != "a folder":
        healed = path.read_bytes()
        wrong = [k for k in range(192) if healed[HEAD + k * RECORD :][:RECORD] != sound[HEAD + k * RECORD :][:RECORD]]
        assert healed[:HEAD] == sound[:HEAD]
        assert len(wrong) < 64, "what is mended is written in groups"
        assert nearest_of_each(dialogues, path) == expected


def test_a_file_that_is_ahead_of_the_rows_is_of_no_consequence(tmp_path: Path) -> None:
    dialogues, path = similar_dialogues(), tmp_path / SIGNATURES
    nearest_of_each(dialogues, path)
    others = dialogues[:90] + dialogues[:89:-1]  # killed before the rows were written, and other dialogues came then
    assert nearest_of_each(others, path) == nearest_of_each(others)
    assert nearest_of_each(others, path) == nearest_of_each(others)


def test_a_text_that_a_curator_changed_is_the_one_that_counts(tmp_path: Path) -> None:
    dialogues, path = similar_dialogues(), tmp_path / SIGNATURES
    nearest_of_each(dialogues, path)
    fresh = msgspec.structs.replace(made_up(5000), id=dialogues[7].id)
    index = DuplicateIndex(DEFAULT, path)
    for one in [*dialogues[:7], fresh, *dialogues[8:]]:
        index.add(one)
    assert index.nearest(made_up(5000)) == (fresh.id, 1.0)


def test_the_file_is_truly_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record with a valid digest that holds another text's signature is believed: nothing was made anew."""
    dialogues, path = [made_up(number) for number in range(64)], tmp_path / SIGNATURES
    index, strange = DuplicateIndex(DEFAULT, path), signature_of(asked(made_up(777)), DEFAULT)
    with monkeypatch.context() as patch:
        patch.setattr(dedup, "signature_of", lambda *_: strange)
        for one in dialogues:
            index.add(one)
    reader = DuplicateIndex(DEFAULT, path)
    reader.add(dialogues[0])
    assert reader.nearest(made_up(777)) == (dialogues[0].id, 1.0)
    assert reader.nearest(dialogues[0]) is None


@pytest.mark.parametrize("allowed", [10, HEAD + 30 * RECORD + 7, HEAD + 70 * RECORD])
def test_a_full_disk_ends_the_file_and_not_the_run(allowed: int, tmp_path: Path) -> None:
    path = tmp_path / SIGNATURES
    code = f"""
import resource
from pathlib import Path
from tests.support.dialogues import nearest_of_each, similar_dialogues
resource.setrlimit(resource.RLIMIT_FSIZE, ({allowed}, {allowed}))
assert nearest_of_each(similar_dialogues(), Path({str(path)!r})) == nearest_of_each(similar_dialogues())
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
    assert path.stat().st_size <= allowed
    assert nearest_of_each(similar_dialogues(), path) == nearest_of_each(similar_dialogues())
    assert path.stat().st_size > HEAD + 136 * RECORD  # all but what waits


def test_a_path_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "index").write_text("a file where the folder should be")
    for place in ("full", SIGNATURES):
        assert nearest_of_each(similar_dialogues(), tmp_path / place) == nearest_of_each(similar_dialogues())
    assert (tmp_path / "index").read_text() == "a file where the folder should be"


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_resumes_to_the_same_bytes_whatever_its_file_holds(tmp_path: Path) -> None:
    whole = digest(generate_dialogues(demo(), run=tmp_path / "whole", n=120).path)
    short = generate_dialogues(demo(), run=tmp_path / "short", n=80).path
    assert (short / SIGNATURES).stat().st_size == HEAD + 64 * RECORD
    for number, harm in enumerate(("nothing", "lost", "damaged signature", "another run's", "a folder")):
        path = tmp_path / str(number)
        shutil.copytree(short, path)
        HARM[harm](path / SIGNATURES)
        generate_dialogues(demo(), run=path, n=120)
        assert digest(path) == whole


def _holds_a_group(file: Path) -> bool:
    return file.exists() and file.stat().st_size >= HEAD + 64 * RECORD


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    words = ("generate", "--n", "150", "--no-refusals", "--run", "./killed")
    process = started(*words, cwd=tmp_path)
    file = tmp_path / "killed" / SIGNATURES
    deadline = time.monotonic() + 60
    # A kill inside the first write would leave a part of its group, and so other groups from there on.
    while not _holds_a_group(file) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert {one.name for one in file.parent.iterdir()} <= {file.name, "seed-images.json"}
    with (tmp_path / "killed/dialogues.jsonl").open("rb+") as rows:  # and the rows that came last were lost with it
        rows.truncate(rows.seek(0, os.SEEK_END) // 2)
    assert cli(*words, cwd=tmp_path).returncode == 0
    assert cli(*words[:-1], "./whole", cwd=tmp_path).returncode == 0
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert file.read_bytes() == (tmp_path / "whole" / SIGNATURES).read_bytes()


def test_a_run_gated_again_has_a_file_of_its_own(tmp_path: Path) -> None:
    old = generate_dialogues(demo(), run=tmp_path / "old", n=80)
    looser = override(demo(), gates=msgspec.structs.replace(demo().gates, duplicates=DuplicateSettings(size=7)))
    new = regate(old.path, looser, out=tmp_path / "new")
    theirs, ours = (run.path / SIGNATURES for run in (old, new))
    assert ours.read_bytes()[:HEAD] != theirs.read_bytes()[:HEAD]
    assert ours.stat().st_size >= HEAD + 64 * RECORD
