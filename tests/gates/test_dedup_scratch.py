"""The duplicate index in files: the same answers as in memory, whatever the disk does, in constant memory."""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from intersafe.errors import StorageError
from intersafe.gates.dedup import SIGNATURES, DuplicateIndex, TextIndex
from intersafe.gates.index.banded import BandedSignatures
from tests.support.dialogues import DEFAULT, colliding_signatures, similar_dialogues
from tests.support.paths import REPOSITORY


@pytest.mark.parametrize(("permutations", "bands", "least"), [(128, 32, 77), (96, 96, 30), (30, 10, 15), (7, 7, 3)])
def test_files_and_memory_say_the_same(permutations: int, bands: int, least: int, tmp_path: Path) -> None:
    rng = random.Random(permutations)
    alphabet = [rng.randbytes(4) for _ in range(40)]
    made = [b"".join(rng.choices(alphabet, k=permutations)) for _ in range(300)]
    made = [made[0]] * 40 + made + [rng.randbytes(4 * permutations) for _ in range(300)]
    for _ in range(400):
        copy = bytearray(rng.choice(made))
        for value in rng.sample(range(permutations), rng.randrange(permutations)):
            copy[4 * value : 4 * value + 4] = rng.choice(alphabet)
        made.append(bytes(copy))
    rng.shuffle(made)
    one, other = (BandedSignatures(permutations, bands, least, folder) for folder in (tmp_path, None))
    for signature in made:
        # A query in between: an insertion must not blindly reuse what the last query found.
        for asked_for in (signature, rng.choice(made)):
            assert one.nearest(asked_for) == other.nearest(asked_for)
        one.add(signature)
        other.add(signature)


def test_what_is_entered_together_is_found_as_what_was_entered_alone(tmp_path: Path) -> None:
    """Across the end of the first table and a full group, with queries in between."""
    rng = random.Random(12)
    made = colliding_signatures(25_000, rng)
    alone, together, memory = (BandedSignatures(32, 8, 20, folder) for folder in (tmp_path, tmp_path, None))
    asked_at = {0, 1, 4095, 4097, 4100, 24_000}
    for number, signature in enumerate(made):
        if number < 5000:
            alone.candidates(rng.choice(made[:40]))
        for index in (alone, together, memory):
            index.add(signature)
            assert len(index) == number + 1
        if number in asked_at:
            said_of = [index.nearest(made[number // 2]) for index in (alone, together, memory)]
            assert said_of[0] == said_of[1] == said_of[2] is not None
    for mine in [*made[:5], made[20_000], *colliding_signatures(5, rng)]:
        sharing = {
            number
            for number, other in enumerate(made, 1)
            if any(mine[at : at + 16] == other[at : at + 16] for at in range(0, 128, 16))
        }
        found = [index.candidates(mine) for index in (alone, together, memory)]
        assert found[0] == found[1] >= sharing <= found[2]
        assert alone.nearest(mine) == together.nearest(mine) == memory.nearest(mine)


def test_names_come_back_as_they_were(tmp_path: Path) -> None:
    rng = random.Random(8)
    names = [
        "00000000000000ff",
        "FF000000000000FF",
        "a",
        "0" * 16,
        "00 000000000000ff",
        "é" * 16,
        "f" * 17,
        "f" * 18,
        "",
    ]
    for folder in (tmp_path, None):
        index, signatures = TextIndex(DEFAULT, folder), [rng.randbytes(512) for _ in names]
        for name, signature in zip(names, signatures, strict=True):
            index.add(name, signature)
        assert [index.nearest(signature) for signature in signatures] == [(name, 1.0) for name in names]


@pytest.mark.parametrize("after", [0, 3, 2000, 4096, 5000])
@pytest.mark.parametrize("allowed", [0, 100_000, 10_000_000])
def test_a_disk_that_refuses_a_scratch_file_changes_no_answer(after: int, allowed: int, tmp_path: Path) -> None:
    """The limit comes in the middle; 10 MB is room for the records, and not for the second table."""
    code = f"""
import random, resource
from pathlib import Path
from intersafe.gates.index.banded import BandedSignatures
from tests.support.dialogues import colliding_signatures
rng = random.Random(6)
made = colliding_signatures(5500, rng)
one, other = BandedSignatures(32, 8, 20, Path({str(tmp_path)!r})), BandedSignatures(32, 8, 20)
for place, signature in enumerate(made):
    if place == {after}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({allowed}, {allowed}))
    one.add(signature)
    other.add(signature)
    if (place % 60 == 0 and place < 4600) or place in range({after}, {after} + 5):
        assert one.nearest(made[place // 2]) == other.nearest(made[place // 2])
assert [one.nearest(mine) for mine in made[:10]] == [other.nearest(mine) for mine in made[:10]]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def scratch_files(folder: Path) -> list[Path]:
    """The descriptors of this process for files in that folder, named or not."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(str(folder)):
                found.append(link)
    return found


def test_scratch_files_have_no_name_and_end_with_their_index(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = TextIndex(DEFAULT, folder)
    assert not folder.exists()
    for number in range(5000):
        index.add(f"{number:016x}", number.to_bytes(4, "little") * 128)
    assert index.nearest(bytes(512)) == (f"{0:016x}", 1.0)
    assert list(folder.iterdir()) == []
    assert len(scratch_files(folder)) == 3  # names, records and the second table
    folder.rmdir()  # whatever becomes of the folder
    assert index.nearest((4999).to_bytes(4, "little") * 128) == (f"{4999:016x}", 1.0)
    del index
    assert scratch_files(folder) == []


def test_what_the_disk_does_not_give_back_ends_the_run_instead_of_changing_an_answer(tmp_path: Path) -> None:
    index, dialogues = DuplicateIndex(DEFAULT, tmp_path / SIGNATURES), similar_dialogues(20)
    for one in dialogues:
        index.add(one)
    for file in scratch_files(tmp_path):
        os.truncate(file, 0)
    with pytest.raises(StorageError, match="run the same command again"):
        index.check(dialogues[3])


@pytest.mark.parametrize(("folder", "least", "most"), [("None", 512, 1400), ("Path('index')", -20, 60)])
def test_memory_for_each_dialogue(folder: str, least: int, most: int, tmp_path: Path) -> None:
    """Almost none with files, whatever the number of dialogues; without files below 1,400 bytes."""
    code = f"""
import os, random
from pathlib import Path
from intersafe.recipe.gates import DuplicateSettings
from intersafe.gates.dedup import TextIndex
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
rng, index = random.Random(1), TextIndex(DuplicateSettings(), {folder})
def grow(numbers):
    for number in numbers:
        signature = rng.randbytes(512)
        if number % 10 == 0:
            index.nearest(signature)
        index.add(f"{{number:016x}}", signature)
grow(range(5_000))
before = resident()
grow(range(5_000, 30_000))
print((resident() - before) / 25_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert least < float(done.stdout) < most
