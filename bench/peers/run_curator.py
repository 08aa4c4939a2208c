"""The work with bespokelabs-curator's LLM; it resumes from the requests that an earlier start stored.

Without internet access curator fails as tiktoken downloads a vocabulary. A stand-in that counts four characters as a
token replaces it. The default limits on requests and tokens per minute are raised out of reach.
"""

import os
from typing import Any

import tiktoken
from asked import read_work

work = read_work()
os.environ |= {
    "OPENAI_API_KEY": "none",
    "TELEMETRY_ENABLED": "false",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "CURATOR_CACHE_DIR": str(work.folder),
    "HF_DATASETS_CACHE": str(work.folder / "datasets"),
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


class FourCharacters:
    """An encoding that needs no download."""

    def encode(self, text: str, **_: Any) -> range:
        """One token for every four characters."""
        return range(len(text) // 4)


tiktoken.get_encoding = lambda _: FourCharacters()

from bespokelabs import curator  # noqa: E402


class Asker(curator.LLM):  # type: ignore[misc]
    """One call per row."""

    def prompt(self, input: dict[str, Any]) -> Any:  # noqa: A002
        """The messages, or text and image."""
        if work.images:
            return work.text(input["number"]), curator.types.Image(url=str(work.image(input["number"])))
        return [{"role": "user", "content": work.text(input["number"])}]

    def parse(self, input: dict[str, Any], response: str) -> dict[str, Any]:  # noqa: A002
        """The reply with its number."""
        return {"number": input["number"], "reply": response}


asker = Asker(
    model_name="fixed",
    backend="openai",
    generation_params={"max_tokens": 512},
    backend_params={
        "base_url": work.url,
        "max_requests_per_minute": 10_000_000,
        "max_tokens_per_minute": 100_000_000_000,
        "max_concurrent_requests": work.at_once,
    },
)
asker([{"number": number} for number in range(work.calls)])
