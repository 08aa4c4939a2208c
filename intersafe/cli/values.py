"""The types of flag values: tokens, money, durations, prices, shard sizes, finite numbers, and the file of `--json`.

A value that cannot be read is an `InputError`: one line with the flag, the value and what to write instead.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from intersafe.errors import InputError

if TYPE_CHECKING:
    from intersafe.recipe.sections import Price

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_TIME = re.compile(rf"(?:({_NUMBER})d)?(?:({_NUMBER})h)?(?:({_NUMBER})m)?(?:({_NUMBER})s)?|({_NUMBER})")
_CLOCK = re.compile(r"([0-9]{1,6}):([0-5][0-9]):([0-5][0-9])")
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """A flag whose text `read` turns into a value; `read` raises `ValueError` for any other text."""

    def __init__(self, what: str, remedy: str, read: Callable[[str], Any]) -> None:
        """`what` names the value in errors, for example "a number of tokens"."""
        self.name, self._remedy, self._read = what, remedy, read

    def convert(self, value: Any, param: click.Parameter | None, _: click.Context | None) -> Any:
        """The value of the text; a default that is no text is the value itself."""
        if not isinstance(value, str):
            return value
        try:
            return self._read(value)
        except ValueError:
            raise InputError(f"{value!r} is not {self.name}", at=_flag(param), remedy=self._remedy) from None


class FiniteRange(click.FloatRange):
    """A range of floats without infinity and NaN, which click's own type accepts."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, within the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            raise InputError(f"{value!r} is not a finite number", at=_flag(param), remedy="write a plain number")
        return number


def _flag(param: click.Parameter | None) -> str | None:
    return param.opts[0] if param else None


# --- tokens, money, time ---------------------------------------------------------------------------------------------


def _tokens(text: str) -> int:
    found = re.fullmatch(rf"({_NUMBER})([kmb]?)", text.strip().lower().replace("_", ""))
    number = float(found[1]) * _THOUSANDS[found[2]] if found else 0.0
    if not 1 <= number <= 10**15 or number != int(number):
        raise ValueError
    return int(number)


def _usd(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1e9:
        raise ValueError
    return number


def _duration(text: str) -> float:
    text = text.strip().lower()
    if found := _CLOCK.fullmatch(text):
        seconds = int(found[1]) * 3600.0 + int(found[2]) * 60 + int(found[3])
    elif parts := _TIME.fullmatch(text):
        units = (86400, 3600, 60, 1, 1)
        seconds = sum(float(part) * unit for part, unit in zip(parts.groups(), units, strict=True) if part)
    else:
        raise ValueError
    if not 0 < seconds <= 1e9:
        raise ValueError
    return seconds


def _shard_size(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?([kKMG]?)B?", text)
    size = int(float(found[1]) * {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}[found[2]]) if found else 0
    if not 10**6 <= size <= 5 * 10**9:
        raise ValueError
    return size


TOKENS = Parsed("a number of tokens", "write 2000000, 500k, 2M or 1.5B", _tokens)
USD = Parsed("an amount of money", "write USD above 0, as 50 or 12.50", _usd)
DURATION = Parsed("a duration", "write 90s, 30m, 8h, 1d, 7:30:00 or seconds", _duration)
"""In seconds."""
SHARD_SIZE = Parsed("a shard size", "write 1MB to 5GB, for example 300MB", _shard_size)
"""In bytes; a megabyte is 10**6."""


# --- prices ----------------------------------------------------------------------------------------------------------


def _price(text: str) -> "tuple[str, Price]":
    from intersafe.recipe.sections import Price

    role, _, amounts = text.partition("=")
    numbers = [float(amount) for amount in amounts.split(",")]
    if not role or len(numbers) not in (2, 3) or not all(0 <= number <= 1e6 for number in numbers):
        raise ValueError
    prompt, completion, call = (*numbers, 0.0)[:3]
    return role, Price(prompt=prompt, completion=completion, call=call)


PRICE = Parsed(
    "a price",
    "write ROLE=IN,OUT or ROLE=IN,OUT,CALL, for example judge=0.4,1.6 or painter=0,0,0.02",
    _price,
)
"""A pair of the role and its `Price`."""


def by_role(_: click.Context, option: click.Parameter, pairs: "tuple[tuple[str, Price], ...]") -> "dict[str, Price]":
    """Callback of an option of several prices: role to price; `InputError` for a role with two."""
    prices: dict[str, Price] = {}
    for role, price in pairs:
        if role in prices:
            raise InputError(f"two prices for {role}", at=_flag(option), remedy="pass one")
        prices[role] = price
    return prices


# --- the file of --json ----------------------------------------------------------------------------------------------


class JsonTarget(NamedTuple):
    """Where a command writes its JSON: to a file, or to stdout where `path` is None."""

    path: Path | None

    def check_outside(self, folder: Path) -> None:
        """`InputError` for a file inside the folder of a run: what reads a run never writes into it."""
        if self.path and self.path.is_relative_to(folder.resolve()):
            raise InputError(f"{self.path} is inside the run", at="--json", remedy="name a file elsewhere")

    def write(self, value: object) -> None:
        """Writes the value, indented, with a newline at the end; raises `StorageError`."""
        import msgspec

        from intersafe.storage.files import write_whole

        data = msgspec.json.format(msgspec.json.encode(value)) + b"\n"
        if self.path is None:
            click.echo(data.decode(), nl=False)
            return
        write_whole(self.path, data)
        click.echo(f"wrote {self.path}", err=True)


def _json_target(name: str) -> JsonTarget:
    path = Path(name)
    if name == "-":
        return JsonTarget(None)
    if not name or (path.exists() and not path.is_file()):
        raise ValueError
    return JsonTarget(path.resolve())  # a link is followed, not replaced


JSON_TARGET = Parsed("a regular file", "name a file, or - for stdout", _json_target)
