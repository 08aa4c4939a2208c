"""The `serve` section of a recipe: how a model is put up, as a server of `intersafe serve` or in this process.

None of it is part of a run's digest: like a URL it says where and how a model runs. What changes its answers in a way
that matters - a quantised checkpoint, say - belongs into the member's `revision`.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from intersafe.recipe.base import Parallel, Positive, Section, Share

Word = Annotated[str, Meta(pattern=r"^[ -~]*\Z", max_length=4096)]
"""Printable ASCII on one line."""


class Engine(Section, frozen=True):
    """One model's engine. Defaults are the library's own where a field is null."""

    path: Word = ""
    """Folder or Hub name of the weights, where the model's name in the cast is another."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: Positive | None = None
    """Most tokens of prompt and answer together; null: the model's own."""
    images: Annotated[int, Meta(ge=0, le=256)] | None = None
    """Most images of one request; null: as many as a dialogue of the recipe can have."""
    tensor_parallel: Parallel = 1
    """GPUs over which each layer is spread."""
    data_parallel: Parallel = 1
    """Copies of the model behind one URL, each on `tensor_parallel` GPUs; of a server alone."""
    gpu_memory: Share | None = None
    """Share of each GPU's memory that the engine may take; what models on one GPU take together stays below 1."""
    max_num_seqs: Positive | None = None
    """Most requests that are answered at once."""
    prefix_caching: bool = True
    """Keep the talk so far in the KV cache; a dialogue goes on where its last turn ended."""
    eager: bool = False
    """No compilation and no CUDA graphs: a quicker start, slower answers."""
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    """Any other argument of the engine by its Python name, for example `quantization: fp8`."""
    env: dict[str, Word] = msgspec.field(default_factory=dict)
    """Environment variables for the engine; never a key."""
    gpus: tuple[Annotated[str, Meta(pattern=r"^[A-Za-z0-9,/-]+\Z")], ...] = ()
    """Which GPUs, as CUDA_VISIBLE_DEVICES has them, one entry for each URL of the cast; of a server alone."""
    command: Word = ""
    """What starts the server, instead of the `vllm` that is installed: `/opt/vllm/bin/vllm serve`."""
    startup: Annotated[float, Meta(gt=0, le=86_400)] = 1800.0
    """Seconds that a server may take until it answers."""
    device: Annotated[str, Meta(pattern=r"^([a-z]+(:[0-9]+)?)?\Z")] = ""
    """Of `transformers:` alone: cuda, cuda:1, cpu ...; empty: the first GPU, or else the CPU."""
    batch: Annotated[int, Meta(ge=1, le=1024)] = 8
    """Of `transformers:` alone: most conversations of one batch."""
