"""An `Engine` of the recipe in vLLM's own words: for its Python classes, and for the command line of its server."""

from typing import Any

import msgspec

from intersafe.recipe.engine import Engine


def engine_arguments(engine: Engine, revision: str = "") -> dict[str, Any]:
    """vLLM's engine arguments by their Python names; what is as vLLM has it anyway is left out.

    `engine` is that of `Recipe.engine`. Of `args` each stands in place of ours, and null takes ours away.
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
        # A model that may write any white space between the parts of an object can do so until its tokens are spent.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    return {name: value for name, value in (ours | named(engine.args)).items() if value is not None}


def named(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments by their Python names, where they were given as flags too (`max-num-batched-tokens`)."""
    return {name.lstrip("-").replace("-", "_"): value for name, value in args.items()}


def flags_of(arguments: dict[str, Any]) -> list[str]:
    """The same arguments as flags of `vllm serve`; lists and mappings are JSON."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            flags += [f"--{flag}", text]
    return flags
