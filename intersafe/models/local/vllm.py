"""vLLM in this process: conversations enter one `LLM` one by one, and its own scheduler keeps its batch full.

Each call is rendered by itself, so that one bad conversation is refused alone. Requests, sampling and structured
outputs are those that a vLLM server makes of the same call, so that both give the same text. The engine gets an image's
bytes once and then knows it by its `uuid`, the sha256.
"""

import contextlib
import inspect
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from intersafe.engines.arguments import engine_arguments
from intersafe.engines.failures import explain, log_lines
from intersafe.engines.log import stderr_file
from intersafe.engines.metrics import Sample, sample_of
from intersafe.engines.weights import weights_of
from intersafe.errors import CallFailed, InputError, JobEnded
from intersafe.models.base import Reply
from intersafe.models.http.completions import UuidParts, as_data, message_body, remember
from intersafe.models.local.thread import EngineCall, check_extra, one_line, refused
from intersafe.recipe.engine import Engine
from intersafe.records import Finish

_KWARGS = ("chat_template_kwargs", "mm_processor_kwargs", "chat_template", "add_generation_prompt")
"""Fields of `extra` that decide how a conversation is rendered; the others are sampling parameters."""
_BAD = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, OSError, TemplateError)
"""What rendering raises about a conversation, besides vLLM's own client errors; a dead engine raises others."""
_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    # A forked engine would share the signal handlers of this process.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_NO_USAGE_STATS": "1",
    "TQDM_DISABLE": "1",
}
_FINISH: dict[str | None, Finish] = {"stop": "stop", "length": "length"}


class VllmLibrary:
    """One engine; loads when it is constructed."""

    def __init__(self, name: str, engine: Engine, revision: str, extras: Iterable[Mapping[str, Any]]) -> None:
        """`extras` are those of the members that will ask: an unknown field is an `InputError`."""
        self._name = name
        _quiet()
        log = stderr_file()
        try:
            from vllm import LLM, SamplingParams, exceptions  # type: ignore[import-not-found]
            from vllm.sampling_params import (  # type: ignore[import-not-found]
                RequestOutputKind,
                StructuredOutputsParams,
            )
        except (ImportError, OSError, RuntimeError) as error:
            raise InputError(f"vllm cannot be imported ({one_line(error)})", remedy="repair its installation") from None
        self._params, self._structured, self._final = SamplingParams, StructuredOutputsParams, RequestOutputKind
        self._bad = (*_BAD, getattr(exceptions, "VLLMClientError", ValueError))
        sampling = inspect.signature(SamplingParams).parameters
        for extra in extras:
            check_extra(extra, [*sampling, *_KWARGS], "no sampling parameter of vLLM")
        arguments = {"disable_log_stats": False, "served_model_name": name} | engine_arguments(engine, revision)
        try:
            self._llm: Any = LLM(model=weights_of(name, engine), **arguments)
        except (*self._bad, RuntimeError) as error:
            raise _unloadable(name, error, log) from error
        default = self._llm.get_default_sampling_params()
        # A server takes these defaults from the checkpoint's generation_config.json.
        self._defaults = {field: getattr(default, field) for field in ("repetition_penalty", "top_k", "min_p")}
        self._numbers: dict[str, int] = {}
        self._requests: dict[int, str] = {}
        self._known: dict[str, None] = {}

    @property
    def is_busy(self) -> bool:
        """True while a call has not ended."""
        return bool(self._numbers)

    def add(self, number: int, call: EngineCall) -> None:
        """Accepts a call; `JobEnded` where the engine refuses it."""
        refs = dict.fromkeys(ref for message in call.messages for ref in message.images)
        try:
            params = self._sampling(call)
            request = self._enqueue(call, params, self._known)
            if request is None:  # the engine may have forgotten an image
                for ref in refs:
                    self._known.pop(ref, None)
                request = self._enqueue(call, params, {})
        except self._bad as error:
            raise refused(error) from None
        assert request is not None
        remember(self._known, refs)
        self._numbers[_plain(request)], self._requests[number] = number, request

    def _enqueue(self, call: EngineCall, params: Any, known: Mapping[str, None]) -> str | None:
        """The request's id; None if it failed and the bytes of an image were left out."""
        parts = UuidParts(partial(as_data, call.images), known)
        messages = [message_body(message, parts) for message in call.messages]
        options = {name: value for name, value in call.extra.items() if name in _KWARGS}
        try:
            requests: list[str] = self._llm.enqueue_chat([messages], params, use_tqdm=False, **options)
        except self._bad:
            if parts.has_omitted:
                return None
            raise
        return requests[0]

    def _sampling(self, call: EngineCall) -> Any:
        own = {name: value for name, value in call.extra.items() if name not in _KWARGS}
        drawn = call.sampling
        fields = self._defaults | {
            "temperature": drawn.temperature,
            "top_p": drawn.top_p,
            "max_tokens": drawn.max_tokens,
            "seed": drawn.seed,
            "output_kind": self._final.FINAL_ONLY,
        }
        if call.schema:
            fields["structured_outputs"] = self._structured(json=call.schema.schema)
        return self._params(**fields | own)

    def step(self) -> list[tuple[int, Reply | JobEnded]]:
        """One iteration of the engine; the calls that ended in it, by number."""
        ended: list[tuple[int, Reply | JobEnded]] = []
        for output in self._llm.llm_engine.step():
            if not output.finished:
                continue
            number = self._numbers.pop(_plain(output.request_id), None)
            if number is None:
                continue
            self._requests.pop(number, None)
            reason = output.outputs[0].finish_reason
            if reason == "abort":  # nobody asked for that: the engine ends
                raise RuntimeError("it broke off what it was answering")
            if reason == "error":
                self._known.clear()  # the cause may be an image that the engine has dropped
                ended.append((number, CallFailed("engine", "server_error", "vLLM broke the answer off")))
                continue
            ended.append((number, _reply(output)))
        return ended

    def drop(self, number: int) -> None:
        """Cancels a request that nobody waits for."""
        if request := self._requests.pop(number, None):
            self._numbers.pop(_plain(request), None)
            self._llm.llm_engine.abort_request([request, _plain(request)])

    def sample(self) -> Sample | None:
        """The engine's own metrics."""
        # The list covers all engines of this process; with two it covers the latest alone.
        mine = [m for m in self._llm.get_metrics() if hasattr(m, "value") and m.labels.get("model_name") == self._name]
        return sample_of((metric.name, float(metric.value)) for metric in mine)

    def is_alive(self) -> bool:
        """False once vLLM has noticed that its engine's process has ended; its `step` may wait even then."""
        core = self._llm.llm_engine.engine_core
        return not getattr(getattr(core, "resources", None), "engine_dead", False)

    def close(self) -> None:
        """Ends the engine's processes."""
        with contextlib.suppress(AttributeError):
            self._llm.llm_engine.engine_core.shutdown()


def _plain(request: str) -> str:
    """`enqueue_chat` names a request `7-892b42a2`, its output may be named `7`."""
    return request.partition("-")[0]


def _reply(output: Any) -> Reply:
    answer = output.outputs[0]
    tokens = len(output.prompt_token_ids or ()), len(answer.token_ids)
    return Reply(answer.text, _FINISH.get(answer.finish_reason, "blocked"), tokens)


def _quiet() -> None:
    """Keeps the engine's own lines out of the run's display."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _unloadable(name: str, error: Exception, log: tuple[Path, int] | None) -> InputError:
    """Why there is no engine, and what can be done; vLLM may say so in the log alone.

    `log`: the file that its processes write to, and the byte at which they began.
    """
    lines = str(error).splitlines() + (log_lines(*log) if log else [])
    failure = explain(lines, log[0] if log else Path("engines.log"), had_answered=False)
    return InputError(f"vllm cannot load {name!r} ({failure.what or one_line(error)})", remedy=failure.remedy)
