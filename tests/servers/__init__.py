"""Real servers for the tests, each started as a process of its own on a free port of 127.0.0.1."""

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent


@contextlib.contextmanager
def running_vlm(*options: str) -> Iterator[str]:
    """Yields the base URL (with `/v1`) of a tiny real VLM; `options` go to `vlm_server.py`. Skips without mistralrs."""
    if importlib.util.find_spec("mistralrs") is None:
        import pytest  # here, because the environment that trains the model has none

        pytest.skip("mistralrs is not installed: pip install 'intersafe[test]'")
    command = [sys.executable, str(HERE / "vlm_server.py"), "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            first_line = server.stdout.readline()
            assert first_line.startswith("ready "), f"the tiny VLM did not start: {first_line!r}"
            yield first_line.split()[1]
        finally:
            server.kill()
