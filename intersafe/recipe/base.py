"""The base of the sections of a recipe, and the types of their numbers."""

from typing import Annotated

import msgspec
from msgspec import Meta

# Upper bounds keep every number finite and exact in JSON, the format in which a run stores its recipe.
Natural = Annotated[int, Meta(ge=0, le=10**9)]
Positive = Annotated[int, Meta(ge=1, le=10**9)]
Parallel = Annotated[int, Meta(ge=1, le=65_536)]
Share = Annotated[float, Meta(gt=0, le=1)]
Dollars = Annotated[float, Meta(ge=0, le=1e6)]
Score = Annotated[int, Meta(ge=0, le=10)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a recipe: unknown keys are errors."""
