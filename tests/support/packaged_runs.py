"""For the tests of packaging: a run with every kind of job, and what a release made from it contains."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from intersafe.generation.generate import generate_dialogues
from intersafe.recipe.load import load_recipe
from intersafe.records import Dialogue
from intersafe.run.directory import Run
from intersafe.storage.bundled import bundled

Row = dict[str, Any]


def grown(path: Path, n: int = 40) -> Run:
    """A scripted run with painted images, aligned answers, refusal samples and twins."""
    return generate_dialogues(load_recipe(bundled("pipelines/aligned.yaml")), run=path, n=n)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shards(folder: Path, config: str = "*") -> list[Path]:
    """The Parquet files of a release."""
    return sorted(folder.glob(f"data/{config}/*.parquet"))


def rows_of(folder: Path, config: str, split: str = "*") -> list[Row]:
    """The rows of a config, as pyarrow reads them."""
    paths = sorted(folder.glob(f"data/{config}/{split}-*.parquet"))
    return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


def published(folder: Path, *, but: str = "") -> bytes:
    """Every byte of a release as it is on the disk, then every value of its columns unpacked."""
    parts = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and but not in path.parts]
    for path in shards(folder):
        if but not in path.parts:
            parts += [json.dumps(row, ensure_ascii=False).encode() for row in _plain(path)]
    return b"\n".join(parts)


def _plain(path: Path) -> list[Row]:
    file = pq.ParquetFile(path)
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    found: list[Row] = file.read(columns=[leaf for leaf in leaves if not leaf.endswith(".bytes")]).to_pylist()
    return found


def unsafe_texts(run: Run) -> set[str]:
    """Every reply that was not judged safe, backtracked ones included."""
    found: set[str] = set()
    for record in (*run.dialogues(), *run.twins()):
        turns = (*record.turns, *(pruned.turn for pruned in record.pruned))
        found |= {turn.reply.text for turn in turns if turn.verdict.safety != "safe"}
    return found


def kept_turns(dialogue: Dialogue) -> list[str]:
    """What user and victim said, in order."""
    return [message.text for message in dialogue.messages]
