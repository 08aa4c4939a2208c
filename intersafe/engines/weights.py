"""Where a model's weights lie, and what their folder tells before anything is loaded."""

from pathlib import Path
from typing import Any

import msgspec

from intersafe.recipe.engine import Engine


def weights_of(name: str, engine: Engine) -> str:
    """Folder or Hub name of a model's weights."""
    return str(Path(engine.path).expanduser()) if engine.path else name


def config_of(weights: str) -> dict[str, Any] | None:
    """The `config.json` of a folder of weights; None where they are no folder, or have none that can be read."""
    try:
        config = msgspec.json.decode((Path(weights) / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    return config if isinstance(config, dict) else None


def is_folder(weights: str) -> bool:
    """True if the weights are meant as a folder of this machine, be it there or not; else they are a Hub name."""
    return weights.startswith(("/", ".")) or Path(weights).exists()
