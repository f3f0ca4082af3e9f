"""The floor: a bare aiohttp TLS 1.3 handler that gives the answer of /get, and nothing else.

python floor_tls.py PORT VALUE   (server.crt and server.key in the working directory)
"""

from __future__ import annotations

import ssl
import sys
from importlib import import_module

from aiohttp import web


def main(port: int, value: str) -> None:
    body = b'{"key":"bench-1","value":"%s"}' % value.encode()

    async def get(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/get", get)
    app.router.add_get("/healthz", get)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain("server.crt", "server.key")
    try:
        loop = import_module("uvloop").new_event_loop()
    except ImportError:
        loop = None
    web.run_app(
        app,
        host="127.0.0.1",
        port=port,
        ssl_context=context,
        access_log=None,
        print=None,
        loop=loop,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
