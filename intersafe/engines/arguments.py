"""Turns an `Engine` of the recipe into vLLM's arguments: for its Python classes, and as flags of its server."""

from typing import Any

import msgspec

from intersafe.recipe.engine import Engine


def engine_arguments(engine: Engine, revision: str = "") -> dict[str, Any]:
    """vLLM's engine arguments by their Python names, without those that equal vLLM's own defaults.

    `engine` comes from `Recipe.engine`. An entry of its `args` replaces the argument of the same name; null drops it.
    """
    ours = {
        "seed": 0,
        "revision": revision or None,
        "dtype": None if engine.dtype == "auto" else engine.dtype,
        "max_model_len": engine.max_model_len,
        "limit_mm_per_prompt": None if engine.images is None else {"image": engine.images, "video": 0},
        "tensor_parallel_size": engine.tensor_parallel if engine.tensor_parallel > 1 else None,
        "gpu_memory_utilization": engine.gpu_memory,
        "max_num_seqs": engine.max_num_seqs,
        "enable_prefix_caching": None if engine.prefix_caching else False,
        "enforce_eager": engine.eager or None,
        # Otherwise a model may write white space between the parts of an object until it reaches max_tokens.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    return {name: value for name, value in (ours | python_names(engine.args)).items() if value is not None}


def python_names(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their Python names; the recipe may spell them as flags (`max-num-batched-tokens`)."""
    return {name.lstrip("-").replace("-", "_"): value for name, value in args.items()}


def flags_of(arguments: dict[str, Any]) -> list[str]:
    """The arguments as flags of `vllm serve`; lists and mappings become JSON."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            flags += [f"--{flag}", text]
    return flags
