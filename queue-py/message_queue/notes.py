"""What the core notes, for people: a line in the log, an event, a counter."""

from __future__ import annotations

import logging

from message_queue.api.events import EventHub
from message_queue.core.replication.effects import Note
from message_queue.metrics import Metrics

log = logging.getLogger(__name__)

_LOUD = frozenset(
    {"damaged", "disk_lost", "implausible", "origin_conflict", "outlived", "puts_lost"}
)
"""Said once a partition; the rest is on /events and in the metrics."""


class Notes:
    """One per node."""

    def __init__(self, metrics: Metrics, events: EventHub) -> None:
        self._metrics = metrics
        self._events = events
        self._told: set[tuple[str, int]] = set()

    def tell(self, note: Note) -> None:
        """Pass it on."""
        told = (note.name, note.partition)
        level = logging.WARNING if note.name in _LOUD and told not in self._told else logging.DEBUG
        self._told.add(told)
        log.log(level, "partition %d epoch %d: %s %s", note.partition, note.epoch, note.name,
                note.detail)  # fmt: skip
        self._metrics.notes[note.name] = self._metrics.notes.get(note.name, 0) + 1
        self._events.publish(
            note.name, partition=note.partition, epoch=note.epoch, detail=note.detail
        )
