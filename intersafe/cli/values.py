"""Values of flags: amounts of tokens, money and time, prices, files to write."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from intersafe.errors import InputError
from intersafe.recipe.sections import Price
from intersafe.run.directory import Run

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_TIME = re.compile(rf"(?:({_NUMBER})d)?(?:({_NUMBER})h)?(?:({_NUMBER})m)?(?:({_NUMBER})s)?|({_NUMBER})")
_CLOCK = re.compile(r"([0-9]{1,6}):([0-5][0-9]):([0-5][0-9])")
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def limits_of(texts: Mapping[str, str | None]) -> dict[str, float]:
    """The values of the flags `max_tokens`, `max_cost` and `max_time`; `InputError` for what is none."""
    readers = {"max_tokens": tokens_of, "max_cost": usd_of, "max_time": seconds_of}
    return {name: readers[name](text) for name, text in texts.items() if text is not None}


def tokens_of(text: str) -> int:
    """2000000, 500k, 2M or 1.5B as a number."""
    found = re.fullmatch(rf"({_NUMBER})([kmb]?)", text.strip().lower().replace("_", ""))
    number = float(found[1]) * _THOUSANDS[found[2]] if found else 0.0
    if not 1 <= number <= 10**15 or number != int(number):
        raise InputError(
            f"{text!r} is no number of tokens", at="--max-tokens", remedy="write 2000000, 500k, 2M or 1.5B"
        )
    return int(number)


def usd_of(text: str) -> float:
    """50 or 12.50 as a number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1e9:
        raise InputError(f"{text!r} is no cost", at="--max-cost", remedy="write USD above 0, as 50 or 12.50")
    return number


def seconds_of(text: str) -> float:
    """90, 90s, 30m, 8h, 1d, 1h30m or 7:30:00 in seconds."""
    text = text.strip().lower()
    if found := _CLOCK.fullmatch(text):
        seconds = int(found[1]) * 3600.0 + int(found[2]) * 60 + int(found[3])
    else:
        parts = _TIME.fullmatch(text)
        units = (86400, 3600, 60, 1, 1)
        seconds = (
            sum(float(part) * unit for part, unit in zip(parts.groups(), units, strict=True) if part) if parts else 0
        )
    if not 0 < seconds <= 1e9:
        raise InputError(f"{text!r} is no time", at="--max-time", remedy="write 90s, 30m, 8h, 1d, 7:30:00 or seconds")
    return seconds


_HOW = "write ROLE=IN,OUT or ROLE=IN,OUT,CALL, for example judge=0.4,1.6 or painter=0,0,0.02"


def parse_prices(texts: Sequence[str]) -> dict[str, Price]:
    """Role to price, from `ROLE=IN,OUT` or `ROLE=IN,OUT,CALL`; `InputError` for anything else."""
    prices: dict[str, Price] = {}
    for text in texts:
        role, _, amounts = text.partition("=")
        try:
            numbers = [float(amount) for amount in amounts.split(",")]
        except ValueError:
            numbers = []
        if not role or len(numbers) not in (2, 3) or not all(0 <= number <= 1e6 for number in numbers):
            raise InputError(f"{text!r} is no price", at="--price", remedy=_HOW)
        if role in prices:
            raise InputError(f"two prices for {role}", at="--price", remedy="give one")
        prices[role] = Price(prompt=numbers[0], completion=numbers[1], call=numbers[2] if len(numbers) > 2 else 0.0)
    return prices


def file_outside(run: Run, name: str) -> Path:
    """The file of that name; `InputError` for one that lies in the run, since what reads a run never writes into it."""
    path = Path(name)
    if not name or path.is_dir():
        raise InputError(f"{name!r} is no file", at="--json", remedy="name a file, or - for stdout")
    path = path.resolve()  # a link is followed, not replaced
    if path.exists() and not path.is_file():
        raise InputError(f"{name!r} is no regular file", at="--json", remedy="name a file, or - for stdout")
    if path.is_relative_to(run.path.resolve()):
        raise InputError(f"{name} lies in the run", at="--json", remedy="name a file elsewhere")
    return path
