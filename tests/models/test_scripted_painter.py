"""The scripted painter: the same bytes in every process, pictures that differ, faults at their rates."""

import asyncio
import hashlib
import itertools
import random
import subprocess
import sys
from collections import Counter

import pytest

from intersafe.errors import InputError
from intersafe.images.store import dhash, distance, normalise
from intersafe.models.base import Hooks, Painted
from intersafe.models.open import open_painter
from intersafe.models.scripted.painter import PAINTER_PROFILES, STOCK, draw
from intersafe.recipe.sections import Limits, Painter
from tests.support.endpoints import paint_call
from tests.support.paths import REPOSITORY

WORDS = ("kitchen", "poster", "bottle", "street", "warning", "market", "ladder", "tunnel", "garden", "window", "crowd")


def descriptions(count: int) -> list[tuple[str, int]]:
    """Random descriptions with their seeds."""
    dice = random.Random(7)
    return [
        (f"A photo of {' '.join(dice.choices(WORDS, k=dice.randint(2, 30)))}", dice.randrange(2**31))
        for _ in range(count)
    ]


def test_scripted_pictures_are_small_sound_and_do_not_resemble_each_other() -> None:
    pictures = [draw(*given, (96, 96), PAINTER_PROFILES["flawless"]).data for given in descriptions(500)]
    assert len(set(pictures)) == 500
    assert max(map(len, pictures)) < 6000
    assert {normalise(data, at="scripted")[2:] for data in pictures} == {(96, 96)}
    near = [distance(a, b) <= 4 for a, b in itertools.combinations(map(dhash, pictures), 2)]
    assert sum(near) < 0.002 * len(near)


@pytest.mark.parametrize("size", ["16x16", "96x96", "1024x1024", "10x9999", "1024x512"])
@pytest.mark.parametrize(
    "description", ["", "  \n", "日本語の看板", "\ud800", "x" * 5000, "\N{ZERO WIDTH SPACE} knife"]
)
def test_any_description_and_size_gives_a_sound_small_picture(description: str, size: str) -> None:
    async def main() -> list[Painted]:
        painter = open_painter(Painter(model="scripted:flawless", size=size), Limits(), Hooks())
        return [await painter.paint(paint_call(description, seed=seed)) for seed in range(30)]

    for painted in asyncio.run(main()):
        image = normalise(painted.data, at="scripted")
        assert 32 <= min(image.width, image.height) <= max(image.width, image.height) <= 96


def test_the_scripted_painter_misbehaves_at_its_rates_and_its_stock_pictures_resemble_each_other() -> None:
    outcomes: Counter[str] = Counter()
    hashes: dict[int, int] = {}
    stock: set[bytes] = set()
    for description, seed in descriptions(4000):
        painted = draw(description, seed, (96, 96), PAINTER_PROFILES["demo"])
        try:
            image = normalise(painted.data, at="scripted") if not painted.problem else None
        except InputError:
            outcomes["truncated"] += 1
            continue
        outcomes[painted.problem or "sound"] += 1
        if image and image.data != draw(description, seed, (96, 96), PAINTER_PROFILES["flawless"]).data:
            stock.add(image.data)
            hashes[dhash(image.data)] = hashes.get(dhash(image.data), 0) + 1
    rate = {name: count / 4000 for name, count in outcomes.items()}
    assert 0.002 < rate["truncated"] < 0.009
    assert 0.002 < rate["no_image"] < 0.009
    assert 0.001 < rate["blocked"] < 0.007
    assert 0.048 < sum(hashes.values()) / 4000 < 0.072
    assert len(stock) > 50, "stock pictures are near-identical, not identical"
    for some in itertools.combinations(list(hashes)[:60], STOCK + 1):
        assert min(distance(x, y) for x, y in itertools.combinations(some, 2)) <= 4


DIGEST = """
import hashlib
from tests.models.test_scripted_painter import descriptions
from intersafe.models.scripted.painter import PAINTER_PROFILES, draw
for given in descriptions(200):
    painted = draw(*given, (96, 96), PAINTER_PROFILES["demo"])
    print(hashlib.sha256(painted.data).hexdigest(), painted.problem)
"""


def test_two_processes_draw_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = set()
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        command = [sys.executable, "-c", DIGEST]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=60)
        outputs.add(done.stdout)
    assert len(outputs) == 1
    here = [draw(*given, (96, 96), PAINTER_PROFILES["demo"]) for given in descriptions(200)]
    (there,) = outputs
    assert there.splitlines() == [f"{hashlib.sha256(p.data).hexdigest()} {p.problem}" for p in here]


def test_description_seed_and_size_each_decide_the_picture_and_the_job_does_not() -> None:
    async def main() -> list[bytes]:
        small, wide = (
            open_painter(Painter(model="scripted:flawless", size=size), Limits(), Hooks())
            for size in ("96x96", "96x64")
        )
        calls = (paint_call("a"), paint_call("b"), paint_call("a", seed=1), paint_call("a", job="another"))
        pictures = [(await small.paint(each)).data for each in calls]
        return [*pictures, (await wide.paint(paint_call("a"))).data]

    one, *others, another_job, wide = asyncio.run(main())
    assert another_job == one
    assert len({one, *others, wide}) == 4
