"""Displays that remember what a run tells its user."""

from intersafe.generation.progress import Display


class Recording(Display):
    """Remembers every line that is said."""

    interval = 0.05

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Keeps the line."""
        self.lines.append(text)

    def heard(self, words: str) -> bool:
        """True if a line has these words."""
        return any(words in line for line in self.lines)
