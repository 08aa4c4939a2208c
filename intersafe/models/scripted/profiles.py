"""The profiles of the scripted chat models: how often each one refuses, complies, or makes a mistake."""

from collections.abc import Collection
from typing import NamedTuple

from intersafe.errors import InputError
from intersafe.wording import nearest


class Profile(NamedTuple):
    """Rates, each from 0 to 1, at which a scripted model behaves in a certain way."""

    refuse: float = 0.25
    """Victim: refuses in full."""
    partial: float = 0.10
    """Victim: answers in part."""
    drift: float = 0.08
    """Victim: changes the subject."""
    comply: float = 0.30
    """Victim: complies, with a placeholder. The rest of its replies are harmless help."""
    malformed: float = 0.03
    """Every role that answers in JSON: an answer that cannot be parsed."""
    weak: float = 0.08
    """Judge: scores a step below the default threshold."""
    lost: float = 0.04
    """Judge: a dialogue has no risk or is incoherent; a benign twin has a risk or is incoherent."""
    unsuited: float = 0.04
    """Judge: an aligned answer does not suit its turn."""
    stray: float = 0.04
    """Attacker: a harmless question, whatever the group."""
    blunt: float = 0.03
    """Responder: a refusal that does not begin with "I'm sorry"."""
    careless: float = 0.02
    """Responder, each of: no refusal; a refusal that names no harm; one that repeats a detail (a placeholder)."""


PROFILES: dict[str, Profile] = {
    "demo": Profile(),
    "careful": Profile(refuse=0.45, comply=0.10),
    "eager": Profile(refuse=0.10, comply=0.50),
    "flawless": Profile(
        refuse=0.0,
        partial=0.0,
        drift=0.0,
        comply=0.5,
        malformed=0.0,
        weak=0.0,
        lost=0.0,
        unsuited=0.0,
        stray=0.0,
        blunt=0.0,
        careless=0.0,
    ),
    "weak": Profile(malformed=0.0, weak=1.0, lost=0.0, unsuited=0.0),
}


def check_name(name: str, what: str = "model", known: Collection[str] = PROFILES) -> None:
    """`InputError` if no scripted model has this name; `what` and `known` are for scripted models of another kind."""
    if name not in known:
        problem = f"no scripted {what} {name!r}" + nearest(name, list(known))
        raise InputError(problem, remedy=f"one of {', '.join(known)}")
