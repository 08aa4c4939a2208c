"""Reads every config and split of a release with one library and prints what it found as JSON.

    python load_release.py datasets FOLDER       or: streaming, pandas, polars, duckdb

It runs in environments that have that library and nothing of this repository.
"""

import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main() -> None:
    """Prints `config/split` to the number of rows and a hash over all of them."""
    library, folder = sys.argv[1], Path(sys.argv[2])
    found = {}
    for path in sorted(folder.glob("data/*/*-00000.parquet")):
        config, split = path.parent.name, path.name.partition("-")[0]
        found[f"{config}/{split}"] = summary(READERS[library](folder, config, split))
    print(json.dumps(found, sort_keys=True))


def summary(rows: Iterable[Row]) -> Row:
    """Rows, images, and hashes over all values with the images as they are stored and as they look."""
    values, pixels, count, images = hashlib.sha256(), hashlib.sha256(), 0, 0
    for row in rows:
        count += 1
        plain = {name: plainly(value, pixels) for name, value in row.items()}
        images += len(plain["images"]) if "images" in plain else plain["image"] is not None
        values.update(json.dumps(plain, sort_keys=True).encode())
    return {"rows": count, "images": images, "values": values.hexdigest(), "pixels": pixels.hexdigest()}


def plainly(value: Any, pixels: Any) -> Any:
    """A value as plain JSON; an image as its name, after its bytes were checked against it and decoded."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        name = str(value["path"])
        assert hashlib.sha256(value["bytes"]).hexdigest() == name.partition(".")[0]
        look(value["bytes"], pixels)
        return name
    if isinstance(value, dict):
        return {name: plainly(inner, pixels) for name, inner in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()  # numpy, as pandas has it
    if isinstance(value, list | tuple):
        return [plainly(inner, pixels) for inner in value]
    if isinstance(value, float):
        return None if value != value else int(value)  # pandas has no integer without a value
    return value


def look(data: bytes, pixels: Any) -> None:
    """Adds what an image shows to the hash, where Pillow is at hand."""
    try:
        from PIL import Image
    except ImportError:
        return
    image = Image.open(io.BytesIO(data))
    pixels.update(repr((image.size, image.mode)).encode() + image.tobytes())


def read_datasets(folder: Path, config: str, split: str, streaming: bool = False) -> Iterator[Row]:
    """As a user loads it: by the card's YAML, images decoded by the library; then again as bytes."""
    import datasets
    from PIL.Image import Image

    loaded = datasets.load_dataset(str(folder), config, split=split, streaming=streaming)
    shown: list[Row] = []
    for row in loaded:
        images = row["images"] if "images" in row else [row["image"]] if row["image"] else []
        assert all(isinstance(image, Image) for image in images)
        shown.append({name: value for name, value in row.items() if name not in ("images", "image")})
    table = datasets.load_dataset(str(folder), config, split=split)
    assert loaded.features == table.features
    stored = [row for batch in table.with_format("arrow").iter(50) for row in batch.to_pylist()]
    assert len(shown) == len(stored)
    for row, seen in zip(stored, shown, strict=True):
        yield row | seen


def read_streaming(folder: Path, config: str, split: str) -> Iterator[Row]:
    """The same without a copy on the disk."""
    yield from read_datasets(folder, config, split, streaming=True)


def files(folder: Path, config: str, split: str) -> list[str]:
    return [str(path) for path in sorted(folder.glob(f"data/{config}/{split}-*.parquet"))]


def read_pandas(folder: Path, config: str, split: str) -> Iterator[Row]:
    """One data frame a shard."""
    import pandas

    for path in files(folder, config, split):
        yield from pandas.read_parquet(path).to_dict("records")


def read_polars(folder: Path, config: str, split: str) -> Iterator[Row]:
    """One data frame over all shards."""
    import polars

    yield from polars.read_parquet(files(folder, config, split)).to_dicts()


def read_duckdb(folder: Path, config: str, split: str) -> Iterator[Row]:
    """One query over all shards."""
    import duckdb

    found = duckdb.sql(f"select * from read_parquet({files(folder, config, split)!r})")
    for row in found.fetchall():
        yield dict(zip(found.columns, row, strict=True))


READERS: dict[str, Callable[[Path, str, str], Iterable[Row]]] = {
    "datasets": read_datasets,
    "streaming": read_streaming,
    "pandas": read_pandas,
    "polars": read_polars,
    "duckdb": read_duckdb,
}

if __name__ == "__main__":
    main()
