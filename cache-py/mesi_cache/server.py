"""Run one node: bind, start, serve until SIGTERM or Ctrl-C, stop within five seconds, exit code 0.

Exit code 2 and one line on stderr for everything that is wrong before the node serves.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from mesi_cache import config as configuration
from mesi_cache import logs
from mesi_cache.config import Config, ConfigError
from mesi_cache.member import Member, Opened, open_member

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 stopped when asked, 1 halted by a fault, 2 could not start."""
    try:
        config = configuration.parse(argv)
        logs.configure(config.node_id, config.log_format, config.log_level)
        return run(config)
    except ConfigError as e:
        print(f"main.py: error: {logs.one_line(str(e))}", file=sys.stderr)  # noqa: T201
        return 2


def run(config: Config) -> int:
    opened = open_member(config)
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(serve(opened))
    finally:
        opened.close()


async def serve(opened: Opened) -> int:
    stop, halted = stop_requested(), asyncio.Event()

    def halt() -> None:
        halted.set()
        stop.set()

    member = await Member.start(opened, halt)
    # Lines live long and hold no cycles: looking through all of them again and again finds
    # nothing and stops the node meanwhile.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    await stop.wait()
    if halted.is_set():
        log.error("stopped: a promise could not be kept")
        return 1
    log.info("stopping")
    await member.stop()
    log.info("stopped")
    return 0


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM or SIGINT (Ctrl-C, also on Windows) sets."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, event.set)
        except (
            NotImplementedError
        ):  # Windows: the handler runs between bytecodes of the main thread
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(event.set))
    return event


def loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (not on Windows), else asyncio's own."""
    try:
        return import_module("uvloop").Loop  # type: ignore[no-any-return]
    except ImportError:
        return None
