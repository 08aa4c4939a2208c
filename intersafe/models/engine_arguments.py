"""The arguments of vLLM's engine out of a recipe's `serve` entry: the same for a server and for an engine here."""

from typing import Any

from intersafe.engine_settings import Engine


def engine_arguments(engine: Engine, revision: str = "") -> dict[str, Any]:
    """Arguments of `vllm.LLM` by name (vLLM 0.32); what the recipe leaves to the library is not among them.

    White space inside of JSON is switched off: a small model under a schema may write it until its tokens are used up.
    """
    optional = {
        "max_model_len": engine.max_model_len,
        "gpu_memory_utilization": engine.gpu_memory,
        "max_num_seqs": engine.max_num_seqs,
        "revision": revision or None,
        # A video that nobody sends would still be measured for at start.
        "limit_mm_per_prompt": {"image": engine.images, "video": 0} if engine.images else None,
    }
    return {
        "dtype": engine.dtype,
        "seed": 0,
        "tensor_parallel_size": engine.tensor_parallel,
        "enable_prefix_caching": engine.prefix_caching,
        "enforce_eager": engine.eager,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        **{name: value for name, value in optional.items() if value is not None},
        **engine.args,
    }
