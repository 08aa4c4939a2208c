"""Memory is bounded by what is on its way, not by the size of the images that wait for an answer."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

SCRIPT = """
import asyncio, io, os, sys
from pathlib import Path
from aiohttp import web
from PIL import Image
from intersafe.images.store import ImageStore, normalise
from intersafe.models.base import Call, Hooks, Sampling
from intersafe.models.http.chat import EndpointModel
from intersafe.records import Message
from intersafe.recipe.sections import Limits, Member

store = ImageStore(Path(sys.argv[1]))

def image(number):
    buffer = io.BytesIO()
    Image.frombytes("RGB", (720, 720), os.urandom(720 * 720 * 3)).save(buffer, "PNG", compress_level=0)
    return store.put(normalise(buffer.getvalue(), at=number))

def peak():
    # Not `ru_maxrss`: a child takes over its parent's, and the parent of this one is large.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024

async def main():
    waiting, all_here = 0, asyncio.Event()

    async def chat(request):
        nonlocal waiting
        async for _ in request.content.iter_any():
            pass
        waiting += 1
        if waiting == 96:
            all_here.set()
        await all_here.wait()
        return web.json_response({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})

    app = web.Application(client_max_size=2**30)
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=256)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    images = [image(number) for number in range(24)]
    model = EndpointModel(Member(model=f"openai:x@{url}"), Limits(), store, Hooks())
    before = peak()
    calls = [
        Call("judge", "", (Message("user", "hi", tuple(images[(3 * n + k) % 24] for k in range(3))),),
             Sampling(0, 1, 10, n), None, f"job {n}", 0)
        for n in range(96)
    ]
    await asyncio.gather(*(model.answer(call) for call in calls))
    print(peak() - before)
    await model.aclose()
    await runner.cleanup()

asyncio.run(main())
"""


def test_96_requests_with_large_images_wait_for_their_answers_without_holding_them(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "images")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    # 96 bodies of 6 MB would be 600 MB and more; eight on their way, their parts and the cache of 32 MB are not.
    assert 20 < int(done.stdout) < 300
