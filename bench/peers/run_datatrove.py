"""The work with datatrove's InferenceRunner; `--checkpoints` for its request cache, without which nothing resumes."""

import sys
from typing import Any

checkpoints = "--checkpoints" in sys.argv
if checkpoints:
    sys.argv.remove("--checkpoints")

from asked import read_work  # noqa: E402
from datatrove.data import Document  # noqa: E402
from datatrove.executor.local import LocalPipelineExecutor  # noqa: E402
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner  # noqa: E402
from datatrove.pipeline.writers import JsonlWriter  # noqa: E402

work = read_work()


async def rollout(document: Any, generate: Any) -> Any:
    """One call."""
    return await generate({"messages": [{"role": "user", "content": work.content(int(document.id))}]})


runner = InferenceRunner(
    rollout_fn=rollout,
    config=InferenceConfig(
        server_type="endpoint",
        model_name_or_path="fixed",
        endpoint_url=work.url.removesuffix("/v1"),
        default_generation_params={"max_tokens": 512},
        max_concurrent_generations=work.at_once,
    ),
    output_writer=JsonlWriter(
        str(work.folder / "output"), output_filename="${rank}_chunk_${chunk_index}.jsonl", compression=None
    ),
    checkpoints_local_dir=str(work.folder / "checkpoints") if checkpoints else None,
)
documents = [Document(text="", id=str(number)) for number in range(work.calls)]
LocalPipelineExecutor([documents, runner], logging_dir=str(work.folder / "logs")).run()
