"""A release loads in datasets 3.6, 4 and 5, pandas, polars and DuckDB, each in an environment of its own.

make test-loads
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from intersafe.release.package import PackageOptions, package
from intersafe.release.shards import check_release
from tests.support.load_release import summary
from tests.support.packaged_runs import grown, rows_of
from tests.support.paths import REPOSITORY, SUPPORT

ENVIRONMENTS = {
    "datasets-3.6": ("datasets", "streaming"),
    "datasets-4.0": ("datasets", "streaming"),
    "datasets-4": ("datasets", "streaming"),
    "datasets-5": ("datasets", "streaming"),
    "pandas": ("pandas",),
    "polars": ("polars",),
    "duckdb": ("duckdb",),
}

pytestmark = pytest.mark.loads


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in two steps, so that splits have several shards, with unsafe replies and rows without images."""
    folder = tmp_path_factory.mktemp("loads")
    grown(folder / "run", 20)
    options = PackageOptions(test_share=0.3, include_unsafe=True)
    package(grown(folder / "run", 20), options)
    done = package(grown(folder / "run", 40), options)
    check_release(done.path)
    assert len(done.manifest.shards) > len(done.manifest.counts["configs"]) * 2
    return done.path


@pytest.fixture(scope="module")
def expected(release: Path) -> dict[str, Any]:
    """What pyarrow finds in the same files."""
    configs = {path.parent.name for path in release.glob("data/*/*.parquet")}
    return {
        f"{config}/{split}": summary(rows)
        for config in configs
        for split in ("train", "test")
        if (rows := rows_of(release, config, split))
    }


@pytest.mark.parametrize(("name", "library"), [(n, library) for n, all_ in ENVIRONMENTS.items() for library in all_])
def test_every_row_and_image_arrives(name: str, library: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    environment = REPOSITORY / ".venv-loads" / name
    if not (environment / "ready").exists():  # written last: it may be under way
        pytest.skip("needs environments of its own: make test-loads")
    release, expected = request.getfixturevalue("release"), request.getfixturevalue("expected")
    done = subprocess.run(
        [environment / "bin/python", SUPPORT / "load_release.py", library, release],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {place: (each["rows"], each["images"]) for place, each in found.items()} == {
        place: (each["rows"], each["images"]) for place, each in expected.items()
    }
    assert {place: each["values"] for place, each in found.items()} == {
        place: each["values"] for place, each in expected.items()
    }
    if name.startswith("datasets"):
        assert {p: each["pixels"] for p, each in found.items()} == {p: each["pixels"] for p, each in expected.items()}
