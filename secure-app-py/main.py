"""Start one node: `python main.py --help` lists the flags. With a command, `python main.py token
--help`, operate one."""

from __future__ import annotations

import os
import signal
import sys


def stop_at_once(*_: object) -> None:
    """A request to stop before the server listens to any: nothing was promised yet. (Not by
    SystemExit: raised inside an import's callbacks it would be swallowed.)"""
    os._exit(0)


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):  # a node; a command dies of its signal
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop_at_once)

    # Takes a few tenths of a second, in which a signal would otherwise end the process unheard.
    from secure_store.cli import main

    sys.exit(main(sys.argv[1:]))
