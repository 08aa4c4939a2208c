"""Real servers for the tests, each started as a process of its own on a free port of 127.0.0.1."""

import contextlib
import importlib.util
import os
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
    # The engine logs to stdout unless it is told not to; what it says in spite of that comes before the ready line.
    quiet = os.environ | {"RUST_LOG": "error", "RUST_BACKTRACE": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as server:
        try:
            assert server.stdout is not None
            ready = next((line for line in server.stdout if line.startswith("ready ")), "")
            assert ready, "the tiny VLM did not start"
            yield ready.split()[1]
        finally:
            server.kill()
