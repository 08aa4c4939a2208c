"""Small models by Hugging Face transformers in this process, on one GPU or the CPU: for laptops and for debugging.

Conversations that wait are answered together, up to `batch` of them. A batch that fails is tried again one by one, so
that a bad conversation, or one that is too large for the memory, fails alone. Each conversation is sampled with a seed
of its own: the largest logit after adding Gumbel noise. Only the rounding of sums depends on what shares its batch.
llguidance constrains answers to their JSON schema.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from jinja2 import TemplateError

from intersafe.engines.failures import is_out_of_memory
from intersafe.engines.metrics import Sample
from intersafe.engines.weights import weights_of
from intersafe.errors import CallFailed, InputError, JobEnded
from intersafe.models.base import Reply
from intersafe.models.local.sampling import Row, Rows, Stops
from intersafe.models.local.thread import EngineCall, check_extra, one_line, refused
from intersafe.recipe.engine import Engine

_KNOWN = ("chat_template_kwargs", "top_k", "repetition_penalty")
"""Fields of `extra` that this backend supports."""
_BAD = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, OSError, RuntimeError, TemplateError)


class TransformersLibrary:
    """One model; loads when it is constructed."""

    def __init__(self, name: str, engine: Engine, revision: str, extras: Iterable[Mapping[str, Any]]) -> None:
        """`extras` are those of the members that will ask: an unknown field is an `InputError`."""
        for extra in extras:
            check_extra(extra, _KNOWN, "no field that the transformers backend knows")
        self._most = engine.batch
        try:
            self._load(weights_of(name, engine), engine, revision)
        except (*_BAD, ImportError, AssertionError) as error:
            raise _unloadable(name, error) from error
        self._waiting: deque[tuple[int, EngineCall]] = deque()

    def _load(self, weights: str, engine: Engine, revision: str) -> None:
        import torch  # type: ignore[import-not-found]
        import transformers  # type: ignore[import-not-found]

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._torch = torch
        device = engine.device or ("cuda" if torch.cuda.is_available() else "cpu")
        common = {"revision": revision or None, "trust_remote_code": bool(engine.args.get("trust_remote_code"))}
        auto = transformers.AutoModelForImageTextToText
        config = transformers.AutoConfig.from_pretrained(weights, **common)
        self._sees = type(config) in auto._model_mapping
        self._processor = transformers.AutoProcessor.from_pretrained(weights, **common)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        if not getattr(self._processor, "chat_template", None):  # older checkpoints have it in the tokenizer
            self._processor.chat_template = self._tokenizer.chat_template
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        dtype = {"auto": "auto" if device != "cpu" else torch.float32}.get(engine.dtype, engine.dtype)
        kind = auto if self._sees else transformers.AutoModelForCausalLM
        self._model = kind.from_pretrained(weights, dtype=dtype, **common, **_rest(engine.args)).to(device).eval()
        self._device = device
        text = config.get_text_config()
        self._vocabulary = int(self._model.get_output_embeddings().weight.shape[0])
        self._context = engine.max_model_len or int(getattr(text, "max_position_embeddings", 0)) or 32_768
        self._images = engine.images if self._sees else 0
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {token for token in (*ends, self._tokenizer.eos_token_id) if token is not None}
        self._rules: Any = None

    # --- what the thread asks ----------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """True while a conversation waits."""
        return bool(self._waiting)

    def add(self, number: int, call: EngineCall) -> None:
        """Accepts a call; `CallFailed` for more images than the model takes."""
        count = sum(len(message.images) for message in call.messages)
        if count and not self._sees:
            raise CallFailed("engine", "bad_request", "the model sees no images: name a vision-language model")
        if self._images is not None and count > self._images:
            what = f"{count} images, and the engine takes {self._images}: raise `images` in `serve`"
            raise CallFailed("engine", "bad_request", what)
        self._waiting.append((number, call))

    def drop(self, number: int) -> None:
        """Forgets a conversation that has not started."""
        self._waiting = deque(pair for pair in self._waiting if pair[0] != number)

    def step(self) -> list[tuple[int, Reply | JobEnded]]:
        """Answers one batch of the conversations that wait, to their ends."""
        batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
        if len(batch) > 1:
            try:
                replies = self._answer([call for _, call in batch])
                return [(number, reply) for (number, _), reply in zip(batch, replies, strict=True)]
            except _BAD as error:
                _raise_if_device_is_lost(error)
            # Outside of the handler nothing refers to the failed batch's memory on the device.
            if self._torch.cuda.is_available():
                self._torch.cuda.empty_cache()
        return [self._alone(number, call) for number, call in batch]

    def _alone(self, number: int, call: EngineCall) -> tuple[int, Reply | JobEnded]:
        try:
            return number, self._answer([call])[0]
        except _BAD as error:
            _raise_if_device_is_lost(error)
            return number, _failed(error)

    def sample(self) -> Sample | None:
        """None: this library has no metrics."""
        return None

    def is_alive(self) -> bool:
        """True: it has no process of its own."""
        return True

    def close(self) -> None:
        """Frees the weights."""
        del self._model
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()

    # --- a batch -----------------------------------------------------------------------------------------------------

    def _answer(self, batch: Sequence[EngineCall]) -> list[Reply]:
        torch = self._torch
        inputs = self._inputs(batch)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        width = int(inputs["input_ids"].shape[1])
        rows = []
        for call, length in zip(batch, lengths, strict=True):
            left = self._context - int(length)
            if left < 1:
                raise ValueError(f"a prompt of {length} tokens, and the maximum context length is {self._context}")
            rows.append(self._row(call, min(left, call.sampling.max_tokens), int(length)))
        with torch.inference_mode():
            made = self._model.generate(
                **inputs.to(self._device),
                do_sample=False,
                max_new_tokens=max(row.most for row in rows),
                logits_processor=[Rows(torch, rows, width, self._vocabulary, min(self._ends))],
                stopping_criteria=[Stops(torch, rows, width)],
                pad_token_id=self._tokenizer.pad_token_id,
                eos_token_id=sorted(self._ends),
                **_GREEDY,
            )
        return [
            self._reply(tokens[width:].tolist(), row, int(length))
            for tokens, row, length in zip(made, rows, lengths, strict=True)
        ]

    def _reply(self, tokens: list[int], row: Row, length: int) -> Reply:
        end = next((position for position, token in enumerate(tokens) if token in self._ends), None)
        used = tokens[: row.most] if end is None or end >= row.most else tokens[:end]
        text = self._tokenizer.decode(used, skip_special_tokens=True)
        is_cut = end is None or end >= row.most
        return Reply(text, "length" if is_cut else "stop", (length, len(used) + (not is_cut)))

    def _inputs(self, batch: Sequence[EngineCall]) -> Any:
        texts, pictures = [], []
        for call in batch:
            options = call.extra.get("chat_template_kwargs", {})
            messages = [self._message(message) for message in call.messages]
            texts.append(
                self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
            )
            pictures.append([_picture(call, ref) for message in call.messages for ref in message.images])
        if not self._sees:
            return self._tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        # The template has written the special tokens. Some processors take one list of images for all texts, others one
        # for each.
        options = {"text": texts, "padding": True, "return_tensors": "pt", "add_special_tokens": False}
        flat = [picture for group in pictures for picture in group]
        try:
            return self._processor(images=flat or None, **options)
        except (ValueError, TypeError, LookupError):
            return self._processor(images=[group or None for group in pictures], **options)

    def _message(self, message: Any) -> dict[str, Any]:
        if not self._sees:
            return {"role": message.role, "content": message.text}
        parts: list[dict[str, str]] = [{"type": "image"} for _ in message.images]
        return {"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]}

    def _row(self, call: EngineCall, most: int, prompt: int) -> Row:
        drawn, extra = call.sampling, call.extra
        matcher = self._matcher(call.schema.schema) if call.schema else None
        return Row(
            prompt=prompt,
            most=most,
            temperature=drawn.temperature,
            top_p=drawn.top_p,
            top_k=int(extra.get("top_k", 0)),
            repetition_penalty=float(extra.get("repetition_penalty", 1.0)),
            generator=self._torch.Generator("cpu").manual_seed(drawn.seed),
            matcher=matcher,
        )

    def _matcher(self, schema: dict[str, Any]) -> Any:
        import llguidance  # type: ignore[import-not-found]
        import llguidance.hf  # type: ignore[import-not-found]

        if self._rules is None:
            self._rules = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocabulary)
        compact = schema | {"x-guidance": {"whitespace_flexible": False}}
        grammar = llguidance.LLMatcher.grammar_from_json_schema(msgspec.json.encode(compact).decode())
        matcher = llguidance.LLMatcher(self._rules, grammar)
        if problem := matcher.get_error():
            raise ValueError(f"JSON schema: {problem}")
        return matcher


_GREEDY = {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None}
"""Without these the checkpoint's own defaults would count too."""


def _rest(args: Mapping[str, Any]) -> dict[str, Any]:
    """Further arguments of `from_pretrained`, for example `attn_implementation`."""
    return {name: value for name, value in args.items() if name != "trust_remote_code"}


def _picture(call: EngineCall, ref: str) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(call.images.read(ref))).convert("RGB")


def _raise_if_device_is_lost(error: Exception) -> None:
    """Every later call would meet an error of the device itself too."""
    if "CUDA error" in str(error) or "device-side assert" in str(error):
        raise error


def _failed(error: Exception) -> CallFailed:
    if is_out_of_memory(error):
        return CallFailed("engine", "out_of_memory", f"{one_line(error)}; lower `batch` or `images.max`")
    return refused(error)


def _unloadable(name: str, error: Exception) -> InputError:
    if is_out_of_memory(error):
        remedy = "take a smaller model, another `device`, or `dtype: bfloat16` in `serve`"
        return InputError(f"not enough memory for {name!r} ({one_line(error)})", remedy=remedy)
    remedy = "give a folder of weights or owner/name of the Hugging Face Hub (`path` in `serve`)"
    if isinstance(error, AssertionError):
        remedy = "correct `device`: this torch supports none of that kind"
    if isinstance(error, ImportError):
        remedy = "pip install 'intersafe[transformers]'; torch and torchvision must be builds that go together"
    return InputError(f"transformers cannot load {name!r} ({one_line(error)})", remedy=remedy)
