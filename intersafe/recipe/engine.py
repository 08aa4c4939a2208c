"""The `serve` section of a recipe: how a model is deployed, as a server of `intersafe serve` or in this process.

Like URLs, these settings are not part of a run's digest. A change that matters for the answers, such as a quantised
checkpoint, belongs in the member's `revision`.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from intersafe.recipe.base import Parallel, Positive, Section, Share

Word = Annotated[str, Meta(pattern=r"^[ -~]*\Z", max_length=4096)]
"""Printable ASCII on one line."""


class Engine(Section, frozen=True):
    """One model's engine. A null field leaves the default of the library."""

    path: Word = ""
    """Folder or Hub name of the weights, if it is not the model's name in the cast."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: Positive | None = None
    """Most tokens of prompt and answer together; null: the model's own limit."""
    images: Annotated[int, Meta(ge=0, le=256)] | None = None
    """Most images in one request; null: the most that a dialogue of the recipe can have."""
    tensor_parallel: Parallel = 1
    """GPUs over which each layer is split."""
    data_parallel: Parallel = 1
    """Copies of the model behind one URL, each on `tensor_parallel` GPUs; for servers only."""
    gpu_memory: Share | None = None
    """Share of each GPU's memory for the engine; the models on one GPU must stay below 1 together."""
    max_num_seqs: Positive | None = None
    """Most requests in progress at once."""
    prefix_caching: bool = True
    """Keeps the conversation so far in the KV cache, so that each turn processes only what is new."""
    eager: bool = False
    """No compilation and no CUDA graphs: a faster start, slower answers."""
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    """Any other argument of the engine by its Python name, for example `quantization: fp8`."""
    env: dict[str, Word] = msgspec.field(default_factory=dict)
    """Environment variables for the engine; never a secret."""
    gpus: tuple[Annotated[str, Meta(pattern=r"^[A-Za-z0-9,/-]+\Z")], ...] = ()
    """GPUs as in CUDA_VISIBLE_DEVICES, one entry for each URL of the cast; for servers only."""
    command: Word = ""
    """Command that starts the server instead of the installed `vllm`, for example `/opt/vllm/bin/vllm serve`."""
    startup: Annotated[float, Meta(gt=0, le=86_400)] = 1800.0
    """Seconds within which a server must answer after its start."""
    device: Annotated[str, Meta(pattern=r"^([a-z]+(:[0-9]+)?)?\Z")] = ""
    """For `transformers:` only: cuda, cuda:1, cpu ...; empty: the first GPU, else the CPU."""
    batch: Annotated[int, Meta(ge=1, le=1024)] = 8
    """For `transformers:` only: most conversations in one batch."""
