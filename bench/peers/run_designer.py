"""The work with NeMo DataDesigner: one text column over seed rows; it resumes by whole row groups."""

import os
from pathlib import Path

from asked import read_work

work = read_work()
os.environ |= {"NEMO_TELEMETRY_ENABLED": "false", "DATA_DESIGNER_HOME": str(work.folder / "home"), "BENCH_KEY": "none"}

import base64  # noqa: E402

import data_designer.config as dd  # noqa: E402
import pandas as pd  # noqa: E402
from data_designer.interface import DataDesigner  # noqa: E402

rows = {"asked": [work.text(number) for number in range(work.calls)]}
if work.images:
    files = [work.image(number) or Path() for number in range(work.calls)]
    rows["image"] = [base64.b64encode(path.read_bytes()).decode() for path in files]
seeds = work.folder / "seeds.parquet"
if not seeds.exists():
    pd.DataFrame(rows).to_parquet(seeds)
del rows

model = dd.ModelConfig(
    alias="fixed",
    model="fixed",
    provider="bench",
    inference_parameters=dd.ChatCompletionInferenceParams(max_tokens=512, max_parallel_requests=work.at_once),
    skip_health_check=True,
)
provider = dd.ModelProvider(name="bench", endpoint=work.url, provider_type="openai", api_key="BENCH_KEY")
designer = DataDesigner(artifact_path=work.folder / "artifacts", model_providers=[provider])
designer.set_run_config(dd.RunConfig(otel_metrics_port=None))
builder = dd.DataDesignerConfigBuilder(model_configs=[model])
builder.with_seed_dataset(dd.LocalFileSeedSource(path=str(seeds)))
shown = (
    [dd.ImageContext(column_name="image", data_type=dd.ModalityDataType.BASE64, image_format=dd.ImageFormat.JPG)]
    if work.images
    else None
)
builder.add_column(
    dd.LLMTextColumnConfig(name="reply", model_alias="fixed", prompt="{{ asked }}", multi_modal_context=shown)
)
# By default it starts anew each time; told to resume, it requires an earlier start.
mode = dd.ResumeMode.ALWAYS if (work.folder / "artifacts" / "bench").exists() else dd.ResumeMode.NEVER
designer.create(builder, num_records=work.calls, dataset_name="bench", resume=mode)
