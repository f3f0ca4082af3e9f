"""Closed-loop load by threads, for clients that block."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence


def closed_loop(works: Sequence[Callable[[], object]], seconds: float) -> tuple[list[float], float]:
    """As load.closed_loop, each of `works` in a thread of its own. The first error ends it."""
    took: list[list[float]] = [[] for _ in works]
    errors: list[Exception] = []
    began_all = time.perf_counter()
    until = began_all + seconds

    def repeat(work: Callable[[], object], mine: list[float]) -> None:
        try:
            while (began := time.perf_counter()) < until and not errors:
                work()
                mine.append(time.perf_counter() - began)
        except Exception as error:  # noqa: BLE001 - raised again below, in the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(works, took, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [one for mine in took for one in mine], time.perf_counter() - began_all
