"""A node for testkit's own tests: answers HTTP, counts, dials its peers; no service code."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from aiohttp import ClientSession, ClientTimeout, web


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--addr", required=True)
    parser.add_argument("--peers", default="")
    parser.add_argument("--data_dir", type=Path, required=True)
    flags = parser.parse_args()
    flags.data_dir.mkdir(parents=True, exist_ok=True)
    counter = flags.data_dir / "counter"
    session = ClientSession(timeout=ClientTimeout(total=0.5))

    async def ready(_: web.Request) -> web.Response:
        return web.json_response({"ready": True})

    async def increment(_: web.Request) -> web.Response:
        value = int(counter.read_text()) + 1 if counter.exists() else 1
        counter.write_text(str(value))
        return web.json_response({"value": value})

    async def ask(request: web.Request) -> web.Response:
        try:
            async with session.get(f"http://{request.query['peer']}/readyz") as answer:
                return web.json_response({"reached": answer.status == 200})
        except (OSError, TimeoutError) as error:
            return web.json_response({"reached": False, "why": type(error).__name__})

    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read(), headers={"X-Kind": request.method})

    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for piece in (b"one ", b"two ", b"three"):
            await response.write(piece)
        return response

    app = web.Application()
    app.router.add_get("/readyz", ready)
    app.router.add_post("/increment", increment)
    app.router.add_get("/ask", ask)
    app.router.add_route("*", "/echo", echo)
    app.router.add_get("/slow", slow)
    app.router.add_get("/stream", stream)
    runner = web.AppRunner(app)
    await runner.setup()
    host, _, port = flags.addr.rpartition(":")
    await web.TCPSite(runner, host, int(port), shutdown_timeout=0.1).start()
    print(f"serving on {flags.addr}", file=sys.stderr, flush=True)
    stop = asyncio.Event()
    if sys.platform != "win32":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await session.close()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
