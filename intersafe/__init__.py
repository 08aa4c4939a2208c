"""Manufactures multi-turn, multimodal dialogues that make vision-language models safer in conversation.

The same from Python as from the terminal, nine names:

    import intersafe

    recipe = intersafe.load_recipe("pipelines/demo.yaml")
    run = intersafe.generate_dialogues(intersafe.override(recipe, n=20), run="notebook")
    for dialogue in run.dialogues():
        pictures = [run.image(reference) for reference in dialogue.images]

Names are imported when they are first used, so `import intersafe` costs nothing and needs no model library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intersafe.errors import IntersafeError
    from intersafe.generation.generate import generate_dialogues
    from intersafe.recipe.load import load_recipe
    from intersafe.recipe.override import override
    from intersafe.recipe.sections import Recipe
    from intersafe.records import Dialogue, Turn
    from intersafe.run.directory import Run, open_run

__all__ = [
    "Dialogue",
    "IntersafeError",
    "Recipe",
    "Run",
    "Turn",
    "generate_dialogues",
    "load_recipe",
    "open_run",
    "override",
]

_HOMES = {
    "Dialogue": "records",
    "IntersafeError": "errors",
    "Recipe": "recipe.sections",
    "Run": "run.directory",
    "Turn": "records",
    "generate_dialogues": "generation.generate",
    "load_recipe": "recipe.load",
    "open_run": "run.directory",
    "override": "recipe.override",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'intersafe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"intersafe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
