"""Start one node: `python main.py --help` lists the flags."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def stop_at_once(*_: object) -> None:
    """A request to stop before the server listens to any: nothing was promised yet. (Not by
    SystemExit: raised inside an import's callbacks it would be swallowed.)"""
    os._exit(0)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Importing takes a few tenths of a second, of which this spares a fifth. aiohttp loads the
    system's certificates as it is imported: a node trusts only those that it is given (--tls_ca).
    And there is no garbage yet that would be worth looking for."""
    name = "SSL_CERT_FILE"
    before = os.environ.get(name)
    os.environ[name] = os.devnull
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_at_once)

    # Meanwhile a signal would otherwise end the process unheard.
    with quick_imports():
        from message_queue.server import main

    sys.exit(main(sys.argv[1:]))
