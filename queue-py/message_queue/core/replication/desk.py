"""The desk that all parts of the core write on: what to persist and send, and what waits for the
disk.

It is the one place where "durable before told" is decided. Everything handed to ``persist`` in a
step belongs to that step's batch; ``later`` keeps an answer back until the newest batch, and with
it everything that the answer may speak of, is durable.
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from message_queue.core.messages import LogRecord, PeerMessage, Stored
from message_queue.core.replication.chance import Chance
from message_queue.core.replication.config import ReplicationConfig
from message_queue.core.replication.effects import Effects, Note
from message_queue.core.replication.state import PartitionState


class Answer(Struct, frozen=True):
    """A message that speaks of something that may not be durable yet."""

    to: int
    message: PeerMessage


class OwnPromise(Struct, frozen=True):
    """The candidate's own promise counts when it is durable."""

    partition: int
    epoch: int


class OwnStored(Struct, frozen=True):
    """The owner's own copy of its records (0: of its seal) counts when it is durable."""

    partition: int
    epoch: int
    upto: int


Later = Answer | OwnPromise | OwnStored


class Desk:
    """Invariant: every Later in the queue waits for a batch that is not yet durable."""

    __slots__ = ("_waiting", "batch", "beat", "chance", "config", "durable", "fx", "states")

    def __init__(self, config: ReplicationConfig, states: dict[int, PartitionState]) -> None:
        self.config = config
        self.states = states
        self.chance = Chance(config.seed)
        self.fx = Effects()
        self.beat = 0
        """Rounds of heartbeats sent."""
        self.batch = 0
        self.durable = 0
        self._waiting: deque[tuple[int, Later]] = deque()

    def begin(self) -> Effects:
        """A new step."""
        self.fx = Effects()
        return self.fx

    def persist(self, record: LogRecord, state: PartitionState | None = None) -> None:
        """Hands a record to the log, and applies it to the state that replaying it would change."""
        fx = self.fx
        if not fx.batch:
            self.batch += 1
            fx.batch = self.batch
        fx.persist.append(record)
        if state is not None:
            gone = state.apply(record)
            if gone:
                fx.forget.append((state.partition, gone))

    def send(self, to: int, message: PeerMessage) -> None:
        self.fx.send.append((to, message))

    def later(self, item: Later) -> None:
        """To be done when all that was persisted so far is durable."""
        self._waiting.append((self.batch, item))

    @property
    def due(self) -> bool:
        """Something waits for nothing any more."""
        return bool(self._waiting) and self._waiting[0][0] <= self.durable

    def ready(self, batch: int) -> list[Later]:
        """What may be done now that ``batch`` is durable (0: what waits for nothing). Answers about
        how far a partition is stored are thinned out to the last one each."""
        self.durable = max(self.durable, batch)
        items: list[Later] = []
        stored: dict[tuple[int, int], int] = {}
        waiting = self._waiting
        while waiting and waiting[0][0] <= self.durable:
            item = waiting.popleft()[1]
            if isinstance(item, Answer) and isinstance(item.message, Stored):
                key = (item.to, item.message.partition)
                at = stored.get(key)
                if at is not None:
                    items[at] = item
                    continue
                stored[key] = len(items)
            items.append(item)
        return items

    def note(self, name: str, partition: int, epoch: int, detail: str = "") -> None:
        self.fx.notes.append(Note(name, partition, epoch, detail))
