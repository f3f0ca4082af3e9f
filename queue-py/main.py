"""Start one node: `python main.py --help` lists the flags."""

from __future__ import annotations

import os
import signal
import sys


def stop_at_once(*_: object) -> None:
    """A request to stop before the server listens to any: nothing was promised yet. (Not by
    SystemExit: raised inside an import's callbacks it would be swallowed.)"""
    os._exit(0)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_at_once)

    # Takes a few tenths of a second, in which a signal would otherwise end the process unheard.
    from message_queue.server import main

    sys.exit(main(sys.argv[1:]))
