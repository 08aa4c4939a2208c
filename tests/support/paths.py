"""Where things are in the repository."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"
FIXTURES = REPOSITORY / "tests" / "fixtures"
SUPPORT = REPOSITORY / "tests" / "support"
