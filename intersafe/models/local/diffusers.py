"""Any text-to-image pipeline of Hugging Face diffusers in this process: one image at a time in one thread.

The pipeline is loaded in that thread while the seeds are read. It gets only the arguments that its signature names, so
that one recipe fits Qwen-Image (`true_cfg_scale`) and Stable Diffusion (`guidance_scale`). The noise comes from the
CPU's generator, so that a seed means the same on every device.
"""

import asyncio
import importlib.util
import inspect
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from intersafe.errors import CallFailed, InputError
from intersafe.models.base import Call, Painted
from intersafe.models.local.thread import one_line
from intersafe.recipe.sections import Painter

_LOADING = threading.Lock()
"""Held while a pipeline is loaded: the libraries change torch's defaults for the whole process."""


def check_diffusers() -> None:
    """`InputError` where the library is not installed; imports nothing."""
    missing = [name for name in ("diffusers", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"cast.painter: the diffusers backend needs {' and '.join(missing)}, which is not installed",
            remedy="pip install 'intersafe[diffusers]'",
        )


class DiffusersPainter:
    """One pipeline, loaded from a folder or the Hub; `cuda` where there is one."""

    def __init__(self, painter: Painter) -> None:
        """Begins to load; if that fails, every `paint` is an `InputError`."""
        check_diffusers()
        self.identity = painter.identity
        self._painter = painter
        self._width, self._height = map(int, painter.size.split("x"))
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="painter")
        self._pipeline = self._worker.submit(_load, painter.spec.model, painter.revision)

    async def aclose(self) -> None:
        """Finishes the image that is being drawn, and draws no other one."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def paint(self, call: Call) -> Painted:
        """The image as PNG; `CallFailed` where the pipeline cannot draw it, out of memory included."""
        text, seed = call.messages[-1].text, call.sampling.seed
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._draw, text, seed)

    def _draw(self, description: str, seed: int) -> Painted:
        pipeline = self._pipeline.result()  # done: the only worker's first task
        try:
            result = pipeline(description, **self._options(pipeline, seed))
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise CallFailed("painter", "server_error", one_line(error)) from error
        if any(getattr(result, "nsfw_content_detected", None) or ()):
            return Painted(problem="blocked", detail="the pipeline's safety checker")
        buffer = io.BytesIO()
        result.images[0].save(buffer, "PNG")
        return Painted(buffer.getvalue())

    def _options(self, pipeline: Any, seed: int) -> dict[str, Any]:
        import torch  # type: ignore[import-not-found]

        painter = self._painter
        known = inspect.signature(pipeline.__call__).parameters
        options = {
            "width": self._width,
            "height": self._height,
            "num_inference_steps": painter.steps,
            "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale": painter.guidance,
            "negative_prompt": painter.negative_prompt or None,
            "generator": torch.Generator("cpu").manual_seed(seed),
        } | painter.extra
        return {name: value for name, value in options.items() if name in known and value is not None}


def _load(model: str, revision: str) -> Any:
    from safetensors import SafetensorError  # type: ignore[import-not-found]

    try:
        with _LOADING:
            return _loaded(model, revision)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError) as error:
        raise _unloadable(model, error) from error
    except SafetensorError as error:
        raise _unloadable(model, error) from error


def _loaded(model: str, revision: str) -> Any:
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers  # type: ignore[import-not-found]

    for logging in (of_diffusers, of_transformers):  # their bars would tear the run's own display
        logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(model, revision=revision or None, torch_dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unloadable(model: str, error: Exception) -> InputError:
    return InputError(
        f"cast.painter: {model!r} cannot be loaded as a diffusers pipeline ({one_line(error)})",
        remedy="give the folder of a pipeline, or owner/name of one on the Hugging Face Hub",
    )
