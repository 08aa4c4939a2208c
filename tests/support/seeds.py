"""Seed files."""

import json
from pathlib import Path


def seeds_in(folder: Path, count: int = 12, image: bytes = b"") -> Path:
    """A seed file of one category; with the same image for every seed, where one is given."""
    folder.mkdir(exist_ok=True)
    if image:
        (folder / "seed.png").write_bytes(image)
    rows = [
        {"id": f"s{number}", "query": f"Worries about an odd matter of kind {number}", "category": "fraud"}
        | {"source": "own", "license": "CC0-1.0"}
        | ({"image": "seed.png"} if image else {})
        for number in range(count)
    ]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "seeds.jsonl"
