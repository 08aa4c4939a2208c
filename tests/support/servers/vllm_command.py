"""Stands in for the `vllm` command, and for `python -m vllm.entrypoints.openai.api_server`: the same flags, the same
routes, the scripted cast as its model, and vLLM 0.32's own words where it is told to fail.

    python tests/support/servers/vllm_command.py serve WEIGHTS --host 127.0.0.1 --port 8001 --served-model-name NAME ...

What else it does is told by its environment, so by `env` in a recipe: `STANDIN_*` below. Like vLLM it has an engine
process in its process group, and demands the key of VLLM_API_KEY.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PREFIX = "(EngineCore pid=7940) ERROR 11-28 11:02:12 [core.py:1510] "
FAILURES = {
    # What vLLM 0.32.0 really printed, but for the frames of its traces.
    "free": "ValueError: Free memory on device cuda:0 (12.0/79.1 GiB) on startup is less than desired GPU memory "
    "utilization (0.92, 72.8 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
    "cpu": "ValueError: Available memory on node 0 (6.64/9.09 GiB) on kv cache allocation is less than requested "
    "memory for kv (4000.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used "
    "by other processes.",
    "blocks": "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
    "initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its name).",
    "cache": "ValueError: To serve at least one request with the model's max seq len (8192), (0.01 GiB KV cache is "
    "needed, which is larger than the available KV cache memory (0.0 GiB). Based on the available memory, the "
    "estimated maximum model length is 128.",
    "cuda": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
    "79.11 GiB of which 1.02 GiB is free.",
    "port": "OSError: [Errno 98] Address already in use",
    "model": "OSError: Nobody/no-such-model is not a local folder and is not a valid model identifier listed on "
    "'https://huggingface.co/models'",
    "gated": "OSError: You are trying to access a gated repo. Make sure to have access to it at "
    "https://huggingface.co/meta-llama/Llama-3.2-11B-Vision.",
    "offline": "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for "
    "the specified revision on the local disk and outgoing traffic has been disabled.",
    "length": "  Value error, User-specified max_model_len (9000000) is greater than the derived max_model_len "
    "(max_position_embeddings=8192.0 or model_max_length=None in model's config.json).",
    "other": "AssertionError: \x1b[31mthe flux\x1b[0m capacitor is \x07empty",
}
AFTERWARDS = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
)
TRUTH = argparse.BooleanOptionalAction


def arguments(words: list[str]) -> argparse.Namespace:
    """The flags that intersafe sends and a few more; others are refused as vLLM does."""
    parser = argparse.ArgumentParser(prog="api_server.py")
    parser.add_argument("model_tag", nargs="?")
    for name in ("model", "host", "served-model-name", "dtype", "revision", "quantization"):
        parser.add_argument(f"--{name}")
    for name in ("port", "seed", "max-model-len", "tensor-parallel-size", "data-parallel-size", "max-num-seqs"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    for name in ("limit-mm-per-prompt", "structured-outputs-config"):
        parser.add_argument(f"--{name}", type=json.loads)
    for name in ("enable-prefix-caching", "enforce-eager", "trust-remote-code", "omni"):
        parser.add_argument(f"--{name}", action=TRUTH)
    found = parser.parse_args(words)
    found.model = found.model or found.model_tag
    return found


def told(name: str, default: str = "") -> str:
    """What the environment says about `STANDIN_<name>`."""
    return os.environ.get(f"STANDIN_{name}", default)


def note(event: str, **more: Any) -> None:
    """Appends to the diary, by which tests know what happened when: one line of JSON."""
    if diary := told("DIARY"):
        line = json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **more})
        with Path(diary).open("a") as file:
            file.write(f"{line}\n")


def fail(how: str) -> None:
    """Ends as vLLM does: the cause, then long traces of those that it took along."""
    print(PREFIX + FAILURES[how])
    for number in range(40):
        print(f'  File "vllm/v1/engine/core.py", line {number}, in frame_{number}\n')
    print(AFTERWARDS, flush=True)
    sys.exit(1)


async def serve(found: argparse.Namespace, engine: "subprocess.Popen[bytes]") -> None:
    """Loads for `STANDIN_LOADS` seconds, then answers until SIGTERM, or dies at request `STANDIN_DIES_AT`."""
    from aiohttp import web

    from intersafe.models.scripted.chat import ScriptedModel
    from tests.support.servers.scripted_server import completion

    model, key, asked = ScriptedModel("demo"), os.environ.get("VLLM_API_KEY"), 0

    @web.middleware
    async def allowed(request: web.Request, handler: Any) -> Any:
        if key and request.path.startswith("/v1") and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": found.served_model_name, "object": "model"}]})

    async def chat(request: web.Request) -> web.Response:
        nonlocal asked
        body = await request.json()
        if body["model"] != found.served_model_name:
            return web.json_response({"error": {"message": "The model does not exist."}}, status=404)
        asked += 1
        if asked == int(told("DIES_AT", "0")) and _is_first_time():
            print(
                PREFIX + "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. "
                "See stack trace (above) for the root cause.",
                flush=True,
            )
            os._exit(0)  # as it really does
        return await completion(model, body)

    app = web.Application(middlewares=[allowed], client_max_size=64 * 2**20)
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    stop = asyncio.Event()
    is_deaf = told("STUBBORN") or told("DEAF")
    ends = (lambda: note("sigterm")) if is_deaf else stop.set
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ends)
    await asyncio.sleep(float(told("LOADS", "0")))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    if not told("NEVER"):
        await web.TCPSite(runner, found.host, found.port).start()
        note("answers")
        print("Application startup complete.", flush=True)
    while not stop.is_set():
        if engine.poll() is not None and not told("STUBBORN"):
            break  # as vLLM does, whatever it made of the signal itself
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.1)
    await runner.cleanup()


def _is_first_time() -> bool:
    """True unless `STANDIN_DIES` is `once`, and it died before."""
    if told("DIES", "once") != "once":
        return True
    try:
        Path(told("DIARY") + ".died").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main(words: list[str]) -> None:
    """Runs until it is stopped, or fails as it is told to."""
    found = arguments(words)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    note("starts", argv=words, gpus=gpus, keyed="VLLM_API_KEY" in os.environ, port=found.port)
    print(f"non-default args: {vars(found)}", flush=True)
    if told("TELLS"):
        print(f"the key is {os.environ.get('VLLM_API_KEY')}", flush=True)
    if how := told("FAILS"):
        fail(how)
    with subprocess.Popen(["sleep", "1000"]) as engine:
        note("engine", engine=engine.pid)
        try:
            asyncio.run(serve(found, engine))
        finally:
            engine.kill()
    note("ends")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    main(sys.argv[2:] if sys.argv[1:2] == ["serve"] else sys.argv[1:])
