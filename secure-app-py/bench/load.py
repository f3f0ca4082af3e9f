"""Load on a pair of real nodes over TLS: get/s and set/s, latencies.

    python bench/load.py                      starts its own pair in a scratch folder
    python bench/load.py --clients 1 --seconds 5 --floor

`--floor` also measures a bare aiohttp TLS handler in the same run, so that the cost of
authorisation, audit and encryption can be read off. The client is a raw asyncio.Protocol: an
aiohttp client would cost more than the server. `cpu_us` is what the node itself spent per request
(Linux), which a busy machine distorts least. Compare only figures of one run on one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAIN = Path(__file__).resolve().parents[1] / "main.py"
FLOOR = """
import ssl, sys
from aiohttp import web
try:
    import uvloop; uvloop.install()
except ImportError: pass
async def get(request):
    return web.Response(body=b'{"key":"bench-1","value":"' + b"x" * 100 + b'"}',
                        content_type="application/json")
app = web.Application(); app.router.add_get("/get", get)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.minimum_version = ssl.TLSVersion.TLSv1_3
context.load_cert_chain("server.crt", "server.key")
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), ssl_context=context, access_log=None,
            print=None)
"""
HEAD = "Host: x\r\nAuthorization: Bearer token-admin-123\r\n"


class Client(asyncio.Protocol):
    """One keep-alive connection with one request in flight."""

    def __init__(self) -> None:
        self.buffer = b""
        self.waiting: asyncio.Future[bytes] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        stop = head.find(b"\r\n", at)
        length = int(head[at + 15 : stop if stop > 0 else None])
        if len(self.buffer) >= end + 4 + length and self.waiting is not None:
            answer, self.buffer = self.buffer[: end + 4 + length], self.buffer[end + 4 + length :]
            self.waiting.set_result(answer)

    async def ask(self, request: bytes) -> bytes:
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.waiting


def set_request(key: str) -> bytes:
    body = b'{"key":"%s","value":"%s"}' % (key.encode(), b"x" * 100)
    return f"POST /set HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body


def get_request(key: str) -> bytes:
    return f"GET /get?key={key} HTTP/1.1\r\n{HEAD}\r\n".encode()


def cpu_s(pid: int) -> float:
    """Processor time of a process so far; 0 where /proc is not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(port: int, pid: int, clients: int, seconds: float, make) -> dict[str, float]:
    """Requests per second and percentiles with one request in flight per client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    loop = asyncio.get_running_loop()
    took: list[float] = []
    until = time.perf_counter() + seconds

    async def one(number: int) -> None:
        transport, client = await loop.create_connection(Client, "127.0.0.1", port, ssl=context)
        request = make(f"bench-{number}")
        while time.perf_counter() < until:
            began = time.perf_counter()
            answer = await client.ask(request)
            took.append(time.perf_counter() - began)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer.decode())
        transport.close()

    before = cpu_s(pid)
    await asyncio.gather(*(one(n) for n in range(clients)))
    spent = cpu_s(pid) - before
    took.sort()
    return {
        "per_s": round(len(took) / seconds),
        "cpu_us": round(spent / len(took) * 1e6),
        "p50_ms": round(took[len(took) // 2] * 1e3, 3),
        "p99_ms": round(took[int(len(took) * 0.99)] * 1e3, 3),
    }


def launch(line: list[str], folder: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(line, cwd=folder, stderr=subprocess.DEVNULL)


async def ready(port: int) -> None:
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise SystemExit(f"nothing listens on {port}")


async def run(args: argparse.Namespace) -> None:
    a, b, floor = args.port, args.port + 1, args.port + 2
    with tempfile.TemporaryDirectory() as folder:
        node = [sys.executable, str(MAIN)]
        line_a = [*node, "--id=nodeA", f"--addr=127.0.0.1:{a}", f"--replica=https://127.0.0.1:{b}"]
        line_b = [*node, "--id=nodeB", f"--addr=127.0.0.1:{b}"]
        lines = [line_a, line_b]
        started = []
        try:
            for line in lines:
                started.append(launch(line, folder))
            await ready(a)
            await ready(b)
            await asyncio.sleep(1.5)
            if args.floor:
                line = [sys.executable, "-c", FLOOR, str(floor)]
                started.append(launch(line, folder))
                await ready(floor)
            counts = [int(c) for c in args.clients.split(",")]
            for clients in counts:
                row = await measure(a, started[0].pid, clients, args.seconds, set_request)
                print(f"set    clients={clients:<3} {row}")
                row = await measure(a, started[0].pid, clients, args.seconds, get_request)
                print(f"get    clients={clients:<3} {row}")
                if args.floor:
                    row = await measure(floor, started[2].pid, clients, args.seconds, get_request)
                    print(f"floor  clients={clients:<3} {row}")
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="1,32")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--port", type=int, default=19400)
    parser.add_argument("--floor", action="store_true")
    args = parser.parse_args()
    try:
        import uvloop
    except ImportError:
        asyncio.run(run(args))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(args))


if __name__ == "__main__":
    main()
