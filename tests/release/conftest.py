import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_releases import Bench, bench, make_release, rows

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def lfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("lfs"), page=3) as running:  # three entries to a page of a listing
        yield running


@pytest.fixture(scope="module")
def xet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("xet"), xet=True) as running:
        yield running


@pytest.fixture(params=["lfs", "xet"])
def either(request: pytest.FixtureRequest) -> Bench:
    running: Bench = request.getfixturevalue(request.param)
    return running


@pytest.fixture
def repo() -> str:
    return f"alice/set-{next(_numbers)}"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """Version 1.0.0 with two shards."""
    return make_release(tmp_path / "run" / "release", "1.0.0", [rows("a"), rows("b")])


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Version 1.1.0: a shard as before, one changed, one new."""
    changed = [*rows("b", 3), *rows("c", 2, "self_harm", "unsafe")]
    return make_release(tmp_path / "run" / "release", "1.1.0", [rows("a"), changed, rows("d")])
