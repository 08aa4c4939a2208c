"""Faults of the operating system: small C files in this folder, compiled and loaded before the C library."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def shim(name: str, folder: Path, *flags: str) -> dict[str, str]:
    """The environment in which a process meets that fault; skips the test where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler (cc)")
    made = folder / f"{name}{''.join(flags)}.so"
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", *flags, "-o", str(made), str(source)], check=True)
    return {"LD_PRELOAD": str(made)}
