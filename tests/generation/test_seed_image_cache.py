"""The cache of verified seed images: a wrong, torn or missing cache changes nothing."""

import json
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from intersafe.errors import InputError
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.prepare import KNOWN
from intersafe.recipe.sections import Recipe
from tests.support.runs import demo, digest


@pytest.fixture
def seeded(tmp_path: Path) -> Recipe:
    lines = []
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
        seed = {"id": f"seed-{number}", "query": "How is an account kept safe?", "category": "fraud"}
        lines.append(json.dumps(seed | {"source": "test", "license": "CC0-1.0", "image": f"{colour}.png"}))
    (tmp_path / "seeds.jsonl").write_text("\n".join(lines))
    return demo(seeds=(str(tmp_path / "seeds.jsonl"),), samples=10)


def swapped(known: dict[str, str]) -> bytes:
    return msgspec.json.encode(dict(zip(known, reversed(known.values()), strict=True)))


@pytest.mark.parametrize("damage", ["swapped", "torn", "nonsense", "gone"])
def test_a_wrong_cache_changes_nothing(seeded: Recipe, tmp_path: Path, damage: str) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    generate_dialogues(seeded, run=whole, n=6)
    generate_dialogues(seeded, run=run, n=3)
    known = msgspec.json.decode((run / KNOWN).read_bytes(), type=dict[str, str])
    assert len(known) == 3
    if damage == "gone":
        (run / KNOWN).unlink()
    else:
        wrong = {"swapped": swapped(known), "torn": b'{"a', "nonsense": msgspec.json.encode(dict.fromkeys(known, "x"))}
        (run / KNOWN).write_bytes(wrong[damage])
    generate_dialogues(seeded, run=run, n=6)
    assert digest(run) == digest(whole)
    assert msgspec.json.decode((run / KNOWN).read_bytes(), type=dict[str, str]) == known


def test_another_picture_under_the_same_name_is_a_change_of_the_seeds(seeded: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    generate_dialogues(seeded, run=run, n=3)
    Image.new("RGB", (64, 64), "yellow").save(tmp_path / "red.png")
    with pytest.raises(InputError, match="made from something else: seeds"):
        generate_dialogues(seeded, run=run, n=6)
