"""The gates: pure rules on a finished dialogue. A gate returns None to accept it, or the `Reason` to reject it.

The contract:

- Gates decide in job order, one dialogue after the other, whatever the order in which the jobs finished.
- A gate may remember what was accepted before. It reads no clock, draws no random number and calls no model, and no
  file can change its decision. So the same dialogues in the same order get the same answers in any process.
- A gate without memory is a function, `check_rules(dialogue, settings)`. A gate with memory is a `Gate`: `check`
  decides and changes nothing, `add` remembers an accepted dialogue. Both are called in job order. A resumed run calls
  `add` for all that it had accepted.
- The word of a reason is snake_case and of a small set, so that a funnel can count it. Its detail is for people, counts
  turns from 1, and never quotes the dialogue.

Every gate's settings are a frozen section of the recipe (`intersafe/recipe/gates.py`).
"""

from typing import Protocol

from intersafe.records import Dialogue, Reason


class Gate(Protocol):
    """A gate that remembers what was accepted."""

    def check(self, dialogue: Dialogue) -> Reason | None:
        """The reason to reject the dialogue, or None; does not change the gate."""

    def add(self, dialogue: Dialogue) -> None:
        """Remembers a dialogue that every gate accepted."""
