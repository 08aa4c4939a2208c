import pytest

from intersafe.images.store import ImageStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """An image store for all tests of a module."""
    return ImageStore(tmp_path_factory.mktemp("images"))
