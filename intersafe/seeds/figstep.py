"""Imports FigStep's SafeBench (Gong et al., arXiv 2311.05608) as a seed file."""

import csv
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from intersafe import exclusions, taxonomy
from intersafe.errors import InputError
from intersafe.images.store import read_image
from intersafe.records import Seed
from intersafe.seeds.load import check_seed, verify_image
from intersafe.storage.files import write_whole
from intersafe.wording import nearest

_COLUMNS = ("dataset", "category_id", "task_id", "category_name", "question", "instruction")
_WORD = re.compile(r"[A-Za-z0-9_-]{1,40}")


class Imported(NamedTuple):
    """Counts of an import: seeds written to `out`, rows excluded, seeds with and without their image."""

    written: int
    excluded: int
    with_images: int
    missing_images: int
    out: Path


class _Row(NamedTuple):
    """A seed, where its image should be, and its line in the table."""

    seed: Seed
    image: Path
    line: int


def import_figstep(source: Path, out: Path) -> Imported:
    """Writes FigStep's SafeBench (a CSV file and `images/`) as `out/seeds.jsonl` with its images.

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
        raise InputError(f"no usable row ({excluded} excluded)", at=table, remedy="pass FigStep's CSV file")
    for row in found.values():
        verify_image(row.image, row.image.name, table, row.line, {})
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
        what = f"{len(tables)} CSV files in the folder" if tables else "no CSV file in the folder"
        raise InputError(what, at=source, remedy="pass the CSV file itself, with `images/` next to it")
    return tables[0]


def _rows(table: Path) -> tuple[list[_Row], int]:
    """The rows of the table that become seeds, and the number of excluded rows."""
    rows: list[_Row] = []
    lines: dict[str, int] = {}
    excluded = 0
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            absent = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise InputError(f"column `{absent[0]}` is missing", at=table, line=1, remedy="pass FigStep's CSV file")
            for fields in reader:
                row = _row(fields, table, reader.line_num)
                if row.seed.id in lines:
                    what = f"the category and task are also in line {lines[row.seed.id]}"
                    raise InputError(what, at=table, line=row.line, remedy="remove one of the two")
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
        raise InputError(f"not a CSV file in UTF-8 ({error})", at=table, remedy="pass FigStep's CSV file") from None
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
        what = f"unknown category {label[:80]!r}" + nearest(label, taxonomy.FIGSTEP)
        raise InputError(what, at=table, line=line, remedy="correct it")
    seed = Seed(
        id=f"figstep-{category}-{task}",
        query=fields["question"].strip(),
        category=taxonomy.FIGSTEP[label],
        source="figstep",
        license="MIT",
        source_category=label,
    )
    checked = check_seed(msgspec.to_builtins(seed), table, line)
    return _Row(checked, table.parent / "images" / f"query_{dataset}_{category}_{task}_6.png", line)
