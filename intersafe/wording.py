"""Texts for people: durations, amounts of money, counts, suggestions for typos, printable lines."""

import difflib
from collections.abc import Collection


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 7:30:00."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def dollars(usd: float) -> str:
    """Two decimals, and two significant digits below 1 USD: 12.31, 0.0042."""
    return f"{usd:,.2f}" if usd >= 1 or usd == 0 else f"{usd:.2g}"


def counted(number: float, what: str) -> str:
    """1 job, 2 jobs."""
    shown = f"{number:,.0f}"
    return f"{shown} {what}" + ("" if shown == "1" else "s")


def nearest(word: str, known: Collection[str]) -> str:
    """`, did you mean 'x'?` for a typo; else `, known: ...` if the list is short, else nothing."""
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.5)
    if close:
        return f", did you mean {close[0]!r}?"
    return f", known: {', '.join(known)}" if len(known) <= 20 else ""


def printable(text: str, *, secret: str = "", instead: str = " ") -> str:
    """The text without characters that could control a terminal: `instead` replaces each, *** the secret."""
    if secret:
        text = text.replace(secret, "***")
    return "".join(c if c.isprintable() else instead for c in text)


def plain(text: str) -> str:
    """Untrusted text of several lines, safe to print on a terminal."""
    return "\n".join(printable(line, instead="\N{REPLACEMENT CHARACTER}") for line in text.split("\n"))
