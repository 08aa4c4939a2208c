"""The OpenAI Images API over a diffusers pipeline, with the fields that vLLM-Omni adds to it.

    python tests/support/servers/t2i_server.py PORT DIR

Prints `ready http://127.0.0.1:<port>/v1` once it serves (PORT 0 takes any free port).
"""

import argparse
import base64
import inspect
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found]
from diffusers import DiffusionPipeline

MOST_PIXELS = 512 * 512


class Refused(Exception):
    """The request gets a 400 with these words."""


class Painter:
    """One pipeline, one image at a time."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.known = set(inspect.signature(self.pipeline.__call__).parameters)
        self.turn = threading.Lock()

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """The response to one request."""
        if body.get("response_format", "b64_json") != "b64_json":
            raise Refused("only response_format b64_json is served")
        width, height = map(int, body.get("size", "64x64").split("x"))
        if width * height > MOST_PIXELS:
            raise Refused(f"size {width}x{height} has more than {MOST_PIXELS} pixels")
        guidance = "true_cfg_scale" if "true_cfg_scale" in self.known else "guidance_scale"
        options = {
            "width": width,
            "height": height,
            "num_inference_steps": body.get("num_inference_steps"),
            "negative_prompt": body.get("negative_prompt"),
            guidance: body.get("true_cfg_scale"),
        }
        given = {name: value for name, value in options.items() if value is not None}
        images = []
        for number in range(body.get("n", 1)):
            noise = torch.Generator().manual_seed(body.get("seed", 0) + number)
            with self.turn:
                image = self.pipeline(body["prompt"], generator=noise, **given).images[0]
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            images.append({"b64_json": base64.b64encode(buffer.getvalue()).decode(), "url": None})
        return {"created": 0, "data": images, "output_format": "png", "size": f"{width}x{height}"}


class Handler(BaseHTTPRequestHandler):
    """One HTTP/1.1 connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    painter: Painter

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Stays silent."""

    def answer(self, status: int, content: dict[str, Any]) -> None:
        """Sends JSON."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def do_POST(self) -> None:
        """Images, or the error that the request deserves."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/images/generations":
            self.answer(404, {"error": {"message": "Not Found", "code": None}})
            return
        try:
            self.answer(200, self.painter.generate(body))
        except (Refused, KeyError, TypeError, ValueError) as error:
            self.answer(400, {"error": {"message": f"{type(error).__name__}: {error}", "code": None}})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A diffusers pipeline behind the OpenAI Images API.")
    parser.add_argument("port", type=int)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    Handler.painter = Painter(options.model)
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    print(f"ready http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
