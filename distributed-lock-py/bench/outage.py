"""Time without service: how long no pair was completed after the leader was killed or hung."""

from __future__ import annotations

from itertools import pairwise

from contender import Contender
from ours import Ours

BEFORE_S = 0.7
AFTER_S = 2.0


def gap_s(at: float, done: list[float]) -> float:
    """The longest pause in `done` that the fault at `at` falls into or that follows it."""
    around = [moment for moment in done if moment > at - 0.1]
    if len(around) < 2 or around[-1] < at:
        return float("inf")
    return max(later - earlier for earlier, later in pairwise(around))


def after_kill(contender: Contender, after_s: float = AFTER_S) -> float:
    """kill -9 of the leader under load; the node is back when this returns. Seconds."""
    alive = {i for i, node in enumerate(contender.nodes) if node is not None}
    found = gap_s(*contender.successes_around_kill(BEFORE_S, after_s))
    for gone in alive - {i for i, node in enumerate(contender.nodes) if node is not None}:
        contender.restart(gone)
    return found


def after_hang(ours: Ours) -> float:
    """SIGSTOP of the leader under load; it goes on before this returns. Seconds."""
    leader = ours.lead()
    server = ours.server(leader)
    try:
        return gap_s(*ours.successes_around(server.pause, BEFORE_S, AFTER_S, [leader]))
    finally:
        server.resume()
