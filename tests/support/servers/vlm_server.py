"""OpenAI-compatible chat server over the tiny Qwen2.5-VL of `tests/fixtures`, run by mistralrs on the CPU.

    python tests/support/servers/vlm_server.py PORT [--model DIR] [--pool 2] [--api-key KEY]

Prints `ready http://127.0.0.1:<port>/v1` once it serves (PORT 0 takes any free port). Beside `/v1/chat/completions`,
`/v1/models` and `/health` it answers `/requests`: what was sent, so that tests can prove it. `training_dialogues.py`
tells what the model replies to what. Without a temperature it decodes greedily; a seed is ignored, mistralrs takes none
on a CPU.
"""

import argparse
import base64
import binascii
import contextlib
import hashlib
import io
import json
import os
import queue
import threading
import time
import uuid
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mistralrs import ChatCompletionRequest, ModelDType, MultimodalArchitecture, Runner, Which
from PIL import Image

MODEL = "tiny-vlm"
FIXTURE = Path(__file__).parents[2] / "fixtures" / "tiny_vlm"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SMALLEST = 28  # pixels a side: one merged patch, below which mistralrs rejects an image
REMEMBERED = 10_000


class Refused(Exception):
    """The request gets an HTTP error instead of a reply."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def image_bytes(url: object) -> bytes:
    """The decoded bytes of a data URI, proven to be an image that the model takes."""
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url:
        raise Refused(400, "image_url must be a data URI: data:image/...;base64,...")
    try:
        data = base64.b64decode(url.split(",", 1)[1], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            smallest = min(image.size)
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(400, f"Failed to load image: {error}") from error
    if smallest < SMALLEST:
        raise Refused(400, f"Failed to load image: a side of {smallest} pixels, the least is {SMALLEST}")
    return data


def for_model(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages as mistralrs wants them, and the sha256 of every image in their order.

    The template of this model sees text only, so a placeholder is in the text where the image was.
    """
    if not messages:
        raise Refused(400, "messages must not be empty")
    converted, hashes = [], list[str]()
    for message in messages:
        role, content = message["role"], message["content"]
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text, images = "", list[dict[str, Any]]()
        for part in parts:
            if part["type"] == "image_url":
                hashes.append(hashlib.sha256(image_bytes(part["image_url"]["url"])).hexdigest())
                images.append({"type": "image_url", "image_url": {"url": part["image_url"]["url"]}})
                text += PICTURE
            elif part["type"] == "text":
                text += part["text"].replace("<|", "< |")  # a message must not smuggle in special tokens
            else:
                raise Refused(400, f"unknown content part {part['type']!r}")
        converted.append({"role": role, "content": [*images, {"type": "text", "text": text}] if images else text})
    return converted, hashes


def grammar(body: dict[str, Any]) -> dict[str, str]:
    """The decoding constraint of a `response_format`, if there is one."""
    wanted = body.get("response_format") or {"type": "text"}
    if wanted["type"] == "text":
        return {}
    if wanted["type"] not in {"json_schema", "json_object"}:
        raise Refused(400, f"unknown response_format {wanted['type']!r}")
    schema = wanted["json_schema"]["schema"] if wanted["type"] == "json_schema" else {"type": "object"}
    compact = {**schema, "x-guidance": {"whitespace_flexible": False}}
    return {"grammar": json.dumps(compact), "grammar_type": "json_schema"}


class Engine:
    """A pool of runners, each good for one call at a time, and the memory of what was asked."""

    def __init__(self, model: Path, pool: int) -> None:
        self.runners: queue.Queue[Runner] = queue.Queue()
        arch = MultimodalArchitecture.Qwen2_5VL
        which: Any = Which.MultimodalPlain(model_id=str(model), arch=arch, dtype=ModelDType.F32)
        for _ in range(pool):
            self.runners.put(Runner(which, max_seqs=4, prefix_cache_n=0))
        self.count, self.lock = 0, threading.Lock()
        self.latest: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)

    def history(self) -> dict[str, Any]:
        """How many requests were served, and the images (sha256) and number of messages of the latest ones."""
        with self.lock:
            return {"count": self.count, "latest": list(self.latest)}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """One chat completion, request and response as in the OpenAI API."""
        if body["model"] != MODEL:
            raise Refused(404, f"The model {body['model']!r} does not exist.", "model_not_found")
        messages, hashes = for_model(body["messages"])
        stop = body.get("stop")
        form: dict[str, Any] = dict(grammar(body))
        request = ChatCompletionRequest(
            model="default",
            messages=messages,
            max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
            temperature=body.get("temperature"),
            top_p=body.get("top_p"),
            n_choices=body.get("n") or 1,
            stop_seqs=[stop] if isinstance(stop, str) else stop,
            **form,
        )
        runner = self.runners.get()
        try:
            response: Any = runner.send_chat_completion_request(request)
        finally:
            self.runners.put(runner)
        with self.lock:
            self.count += 1
            self.latest.append({"images": hashes, "messages": len(messages)})
        return completion(response)


def completion(response: Any) -> dict[str, Any]:
    """The response of mistralrs as the JSON of the OpenAI API."""
    choices = [
        {
            "index": choice.index,
            "finish_reason": choice.finish_reason,
            "message": {"role": "assistant", "content": choice.message.content},
        }
        for choice in response.choices
    ]
    usage = {name: getattr(response.usage, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    identity = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
    return {**identity, "model": MODEL, "choices": choices, "usage": usage}


class Handler(BaseHTTPRequestHandler):
    """One HTTP/1.1 connection."""

    protocol_version = "HTTP/1.1"
    # Unbuffered small writes under Nagle's algorithm cost 40 ms a reply.
    disable_nagle_algorithm = True
    wbufsize = -1
    engine: Engine
    api_key: str | None

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Stays silent."""

    def answer(self, status: int, content: dict[str, Any]) -> None:
        """Sends JSON; a client that has gone is no error of the server."""
        data = json.dumps(content).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

    def do_GET(self) -> None:
        """Health, models and what was asked so far."""
        pages: dict[str, dict[str, Any]] = {
            "/health": {},
            "/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "tests"}]},
            "/requests": self.engine.history(),
        }
        if self.path in pages:
            self.answer(200, pages[self.path])
        else:
            self.answer(404, {"error": {"message": "Not Found", "code": None}})

    def do_POST(self) -> None:
        """A chat completion or the error that it deserves."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            if self.path != "/v1/chat/completions":
                raise Refused(404, "Not Found")
            if self.api_key is not None and self.headers["Authorization"] != f"Bearer {self.api_key}":
                raise Refused(401, "Incorrect API key provided.", "invalid_api_key")
            self.answer(200, self.engine.chat(json.loads(data)))
        except Refused as error:
            self.answer(error.status, {"error": {"message": str(error), "code": error.code}})
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # the body's shape, or mistralrs on its content
            self.answer(400, {"error": {"message": f"{type(error).__name__}: {error}", "code": None}})


class Server(ThreadingHTTPServer):
    """Takes hundreds of connections at once, where the standard library's backlog is 5."""

    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A tiny real VLM behind an OpenAI-compatible API.")
    parser.add_argument("port", type=int)
    parser.add_argument("--model", type=Path, default=FIXTURE)
    parser.add_argument("--pool", type=int, default=2)
    parser.add_argument("--api-key")
    options = parser.parse_args()
    os.environ["MISTRALRS_CPU_KV_F32"] = "1"  # half precision, the default, moves a near-tied choice now and then
    Handler.engine, Handler.api_key = Engine(options.model, options.pool), options.api_key
    server = Server(("127.0.0.1", options.port), Handler)
    print(f"ready http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
