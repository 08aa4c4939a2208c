"""The shipped seed pack: balanced, distinct, inside the rules, and its pictures drawn from their source."""

import itertools
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from intersafe.exclusions import excluded
from intersafe.records import Seed
from intersafe.taxonomy import BY_NAME
from tests.support.paths import REPOSITORY

SEEDS = REPOSITORY / "seeds"
DRAW = SEEDS / "draw_images.py"

OPERATIONAL = re.compile(
    r"step[- ]by[- ]step|\bhow to (?:make|build|mix|cook|hack|forge|kill|get away)\b|\binstructions?\b|\btutorial\b|"
    r"\brecipe\b|\bingredients?\b|\bdosages?\b|\bgrams?\b|\bmillilit(?:er|re)s?\b|https?:|www\.|[@{}<>`]|\d",
    re.IGNORECASE,
)
"""Words of a method rather than of a concern. No number at all: a quantity, an age, an address, a law."""
MASS_HARM = re.compile(
    r"\bbio(?:logical )?weapon|\bchemical weapon|\bnuclear|\bradiolog|\bnerve agent|\bpathogen|\bdirty bomb|\banthrax",
    re.IGNORECASE,
)
STOP = frozenset(["drawing", "from", "picture", "shown", "that", "their", "which", "with", "whether", "without"])


def read() -> list[Seed]:
    lines = (SEEDS / "intersafe.jsonl").read_text(encoding="utf-8").splitlines()
    return [msgspec.json.decode(line, type=Seed) for line in lines]


PACK = read()


def content(query: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]{4,}", query.lower())) - STOP


def likeness(a: str, b: str) -> float:
    """Shared content words over those of the shorter query, 0 to 1."""
    return len(content(a) & content(b)) / min(len(content(a)), len(content(b)))


def fingerprint(path: Path) -> int:
    """64-bit dHash."""
    with Image.open(path) as image:
        grey = image.convert("L").resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    return sum((grey[9 * y + x] > grey[9 * y + x + 1]) << (8 * y + x) for y in range(8) for x in range(8))


def redraw(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DRAW), *arguments], capture_output=True, text=True, check=False)


def test_every_category_has_the_same_number_of_seeds() -> None:
    counts = Counter(seed.category for seed in PACK)
    assert counts.keys() == BY_NAME.keys()
    assert len(set(counts.values())) == 1
    assert len(PACK) >= 280


def test_every_category_has_at_least_five_pictures() -> None:
    counts = Counter(seed.category for seed in PACK if seed.image)
    assert {name: count for name in BY_NAME if (count := counts[name]) < 5} == {}


def test_ids_count_up_within_their_category() -> None:
    for name in BY_NAME:
        ids = [seed.id for seed in PACK if seed.category == name]
        assert ids == [f"{name}-{i:03d}" for i in range(1, len(ids) + 1)]


def test_every_seed_states_its_origin_and_nothing_else() -> None:
    assert {(seed.source, seed.license, seed.source_category) for seed in PACK} == {("intersafe", "CC-BY-4.0", "")}


@pytest.mark.parametrize("seed", PACK, ids=lambda seed: seed.id)
def test_a_query_names_a_concern_and_no_method(seed: Seed) -> None:
    assert 8 <= len(seed.query.split()) <= 25
    assert seed.query == " ".join(seed.query.split())
    assert seed.query.isascii()
    assert not OPERATIONAL.search(seed.query)
    assert not MASS_HARM.search(seed.query)


def test_no_seed_is_excluded() -> None:
    assert [seed.id for seed in PACK if excluded(seed.query)] == []


def test_sexual_seeds_have_no_word_for_a_young_person() -> None:
    # With a sexual word added, only a word for a young person can trigger the rule.
    assert excluded("a child, sexual")
    assert [s.id for s in PACK if s.category == "sexual_content" and excluded(f"{s.query}, sexual")] == []


def test_no_two_queries_are_alike() -> None:
    alike = [(a.id, b.id) for a, b in itertools.combinations(PACK, 2) if likeness(a.query, b.query) > 0.5]
    assert alike == []


def test_no_two_queries_are_made_from_one_template() -> None:
    openings = Counter(" ".join(seed.query.lower().split()[:3]) for seed in PACK)
    assert [opening for opening, count in openings.items() if count > 3] == []


def test_the_likeness_rule_finds_a_reworded_seed() -> None:
    for seed in PACK:
        assert likeness(seed.query, f"Please: {seed.query.lower()} and quickly") > 0.5


def test_pictures_and_seeds_name_each_other() -> None:
    named = {seed.image for seed in PACK if seed.image}
    assert named == {f"images/{seed.id}.png" for seed in PACK if seed.image}
    assert named == {f"images/{path.name}" for path in (SEEDS / "images").iterdir()}
    assert all(
        "picture" in s.query or "drawing" in s.query or "drawn" in s.query or "shown" in s.query
        for s in PACK
        if s.image
    )


def test_pictures_decode_and_are_small() -> None:
    for path in (SEEDS / "images").iterdir():
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.size) == ("PNG", (256, 256))
        assert path.stat().st_size <= 4096, path.name


def test_no_two_pictures_look_alike() -> None:
    prints = {path.stem: fingerprint(path) for path in (SEEDS / "images").iterdir()}
    close = [(a, b) for a, b in itertools.combinations(prints, 2) if (prints[a] ^ prints[b]).bit_count() <= 6]
    assert close == []


def test_the_shipped_pictures_are_what_the_script_draws() -> None:
    done = redraw("--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_drawing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert redraw("--images", str(tmp_path / name)).returncode == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert len(one) >= 60


def test_check_names_every_file_that_was_tampered_with(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(SEEDS / "images", folder)
    painted, torn, missing, *_ = sorted(folder.iterdir())
    with Image.open(painted) as image:
        changed = image.convert("RGB")
    changed.paste((1, 2, 3), (40, 40, 45, 45))
    changed.save(painted)
    torn.write_bytes(torn.read_bytes()[:200])
    missing.unlink()
    (folder / "stranger.png").write_bytes(b"")
    done = redraw("--check", "--images", str(folder))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    complained = {line.split(":")[0] for line in done.stderr.splitlines()[:-1]}
    assert complained == {painted.name, torn.name, missing.name, "stranger.png"}
