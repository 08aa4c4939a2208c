"""The work with distilabel: one text generation step in a process of its own, its default."""

from asked import read_work
from distilabel.models.llms import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration


def main() -> None:
    """One pipeline of two steps."""
    work = read_work()
    with Pipeline(name="bench", cache_dir=work.folder / "cache") as pipeline:
        rows = LoadDataFromDicts(data=[{"instruction": work.text(n)} for n in range(work.calls)], batch_size=64)
        model = OpenAILLM(model="fixed", base_url=work.url, api_key="none", generation_kwargs={"max_new_tokens": 512})
        rows >> TextGeneration(llm=model, input_batch_size=work.at_once)
    pipeline.run(use_cache=True)


if __name__ == "__main__":
    main()
