"""FigStep's SafeBench (Gong et al., arXiv 2311.05608) as a seed file."""

import csv
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from intersafe import exclusions, taxonomy
from intersafe.errors import InputError
from intersafe.images.store import read_image
from intersafe.records import Seed
from intersafe.seeds.load import _nearest, _seed, _verify
from intersafe.storage.files import write_whole

_COLUMNS = ("dataset", "category_id", "task_id", "category_name", "question", "instruction")
_WORD = re.compile(r"[A-Za-z0-9_-]{1,40}")


class Imported(NamedTuple):
    """What an import did: seeds written to `out`, rows excluded, seeds with and without their image."""

    written: int
    excluded: int
    with_images: int
    missing_images: int
    out: Path


class _Row(NamedTuple):
    """A seed to be and where its image should lie."""

    seed: Seed
    image: Path
    line: int


def import_figstep(source: Path, out: Path) -> Imported:
    """Turns FigStep's SafeBench (csv and `images/`; Gong et al., arXiv 2311.05608) into `out/seeds.jsonl` with images.

    Every image is verified before anything is written; `seeds.jsonl` is written last. Raises `InputError`.
    """
    table = _table(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("exists and is not an empty folder", at=out, remedy="choose a new folder")
    rows, excluded = _rows(table)
    found = {row.line: row for row in rows if row.image.is_file()}
    missing = len(rows) - len(found)
    if missing * 2 >= len(rows) and rows:
        what = f"{missing} of {len(rows)} images are missing"
        raise InputError(what, at=table.parent / "images", remedy="download the images of the same release")
    if not rows:
        raise InputError(f"no usable row ({excluded} excluded)", at=table, remedy="give FigStep's csv file")
    for row in found.values():
        _verify(row.image, row.image.name, table, row.line, {})
    lines = []
    for row in rows:
        seed = row.seed
        if row.line in found:
            seed = msgspec.structs.replace(seed, image=f"images/{seed.id}.png")
            write_whole(out / f"images/{seed.id}.png", read_image(row.image).data)
        lines.append(msgspec.json.encode(seed) + b"\n")
    write_whole(out / "seeds.jsonl", b"".join(lines))
    return Imported(len(rows), excluded, len(found), missing, out)


def _table(source: Path) -> Path:
    if not source.is_dir():
        return source
    tables = sorted(path for path in source.iterdir() if path.suffix.lower() == ".csv")
    if len(tables) != 1:
        what = f"{len(tables)} csv files in the folder" if tables else "no csv file in the folder"
        raise InputError(what, at=source, remedy="give the csv file itself, `images/` beside it")
    return tables[0]


def _rows(table: Path) -> tuple[list[_Row], int]:
    """The rows of the csv that become seeds, and how many are excluded."""
    rows: list[_Row] = []
    lines: dict[str, int] = {}
    excluded = 0
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            absent = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise InputError(f"column `{absent[0]}` is missing", at=table, line=1, remedy="give FigStep's csv file")
            for fields in reader:
                row = _row(fields, table, reader.line_num)
                if row.seed.id in lines:
                    what = f"category and task are those of line {lines[row.seed.id]}"
                    raise InputError(what, at=table, line=row.line, remedy="remove one")
                lines[row.seed.id] = row.line
                if exclusions.excluded(row.seed.query, row.seed.source_category):
                    excluded += 1
                else:
                    rows.append(row)
    except FileNotFoundError:
        raise InputError("no such file or folder", at=table, remedy="check the path") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", at=table, remedy="check the path") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"not a csv file in UTF-8 ({error})", at=table, remedy="give FigStep's csv file") from None
    return rows, excluded


def _row(fields: dict[str, Any], table: Path, line: int) -> _Row:
    if None in fields or None in fields.values():
        raise InputError("the row has more or fewer cells than columns", at=table, line=line, remedy="correct it")
    dataset, category, task = (fields[name].strip() for name in _COLUMNS[:3])
    if not all(_WORD.fullmatch(word) for word in (dataset, category, task)):
        remedy = "use letters, digits, _ and -"
        raise InputError("dataset, category_id or task_id is not a word", at=table, line=line, remedy=remedy)
    label = fields["category_name"].strip()
    if label not in taxonomy.FIGSTEP:
        remedy = _nearest(label, taxonomy.FIGSTEP)
        raise InputError(f"unknown category {label[:80]!r}", at=table, line=line, remedy=remedy)
    seed = Seed(
        id=f"figstep-{category}-{task}",
        query=fields["question"].strip(),
        category=taxonomy.FIGSTEP[label],
        source="figstep",
        license="MIT",
        source_category=label,
    )
    checked = _seed(msgspec.to_builtins(seed), table, line)
    return _Row(checked, table.parent / "images" / f"query_{dataset}_{category}_{task}_6.png", line)
