"""Judges of histories; each is itself tested with histories that must fail."""

from testkit.checkers import linearizable, locks, sets, total_queue
from testkit.checkers.verdict import Verdict

__all__ = ["Verdict", "linearizable", "locks", "sets", "total_queue"]
