"""The work with a bare aiohttp loop: encode, POST, decode; nothing is stored."""

import asyncio

import aiohttp
import msgspec
from asked import read_work


async def main() -> None:
    """Makes all calls, `--at-once` of them concurrently."""
    work = read_work()
    numbers = iter(range(work.calls))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def worker() -> None:
            for number in numbers:
                messages = [{"role": "user", "content": work.content(number)}]
                body = msgspec.json.encode({"model": "fixed", "messages": messages, "max_tokens": 512})
                async with session.post(f"{work.url}/chat/completions", data=body) as response:
                    assert msgspec.json.decode(await response.read())["choices"][0]["message"]["content"]

        await asyncio.gather(*(worker() for _ in range(work.at_once)))


asyncio.run(main())
