"""Same bytes for any concurrency and after SIGKILLs at random moments.   python bench/kills.py [--n 11270] [--kills 10]

Grows the demo recipe three times: with concurrency 1, with 64, and with 64 while the process is killed and restarted.
Prints the sha256 of all outcome files together (dialogues, refusals, what was rejected) and whether any call stands in
the journals twice.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec


class Key(msgspec.Struct):
    """What is read of a journal line."""

    key: str


def start(folder: Path, n: int, concurrency: int) -> "subprocess.Popen[bytes]":
    """Starts `intersafe generate` in a folder."""
    words = ["generate", "--n", str(n), "--concurrency", str(concurrency), "--run", "./run"]
    return subprocess.Popen(
        [sys.executable, "-m", "intersafe", *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def grow(n: int, concurrency: int, kills: int, dice: random.Random) -> tuple[str, int, int, float]:
    """sha256, journal lines, lines whose key stood there before, and seconds; the first process sets the pace."""
    with tempfile.TemporaryDirectory() as name:
        folder, killed, began = Path(name), 0, time.monotonic()
        while True:
            process = start(folder, n, concurrency)
            try:
                # Spread over the run: about 100 dialogues a second on two quiet cores.
                code = process.wait(timeout=1 + dice.random() * n / 100 / kills if killed < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                continue
            assert code == 0, code
            break
        seconds = time.monotonic() - began
        outcomes = sorted(path for path in (folder / "run").glob("*.jsonl") if path.name != "seeds.jsonl")
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in outcomes)).hexdigest()
        lines = (folder / "run" / "journal" / "main.jsonl").read_bytes().splitlines()
        keys = [msgspec.json.decode(line, type=Key).key for line in lines]
        print(f"concurrency {concurrency:>3}, {killed:>2} kills: sha256 {digest}  {seconds:.0f} s", flush=True)
        return digest, len(keys), len(keys) - len(set(keys)), seconds


def main() -> None:
    """Exits with 1 if a byte differs or a call was written twice."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--n", type=int, default=11_270)
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    dice = random.Random(given.seed)
    done = [grow(given.n, 1, 0, dice), grow(given.n, 64, 0, dice), grow(given.n, 64, given.kills, dice)]
    same = len({digest for digest, *_ in done}) == 1
    twice, lines = [entry[2] for entry in done], [entry[1] for entry in done]
    print(f"same bytes: {same}; calls written twice: {twice} of {lines}")
    sys.exit(0 if same and not any(twice) else 1)


if __name__ == "__main__":
    main()
