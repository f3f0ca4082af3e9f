"""The desk that all parts of the core write on: what to persist and send, and what waits for the
disk.

It is the one place where "durable before told" is decided. Everything handed to ``persist`` in a
step belongs to that step's batch; ``later`` keeps an answer back until the newest batch, and with
it everything that the answer may speak of, is durable.
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct
from msgspec.structs import replace

from message_queue.core.messages import LogRecord, Membership, PeerMessage, Stored
from message_queue.core.placement.membership import before, changing, nodes
from message_queue.core.replication.chance import Chance
from message_queue.core.replication.config import ReplicationConfig
from message_queue.core.replication.effects import Effects, Note
from message_queue.core.replication.quorum import Quorum
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

    __slots__ = (
        "_founders",
        "_waiting",
        "batch",
        "beat",
        "chance",
        "config",
        "durable",
        "fx",
        "in_place",
        "moved",
        "now_ms",
        "preference",
        "ring",
        "states",
    )

    def __init__(self, config: ReplicationConfig, states: dict[int, PartitionState]) -> None:
        self.config = config
        self.states = states
        self.chance = Chance(config.seed)
        self.fx = Effects()
        self.now_ms = 0
        """Of the step that is being taken."""
        self.beat = 0
        """Rounds of heartbeats sent."""
        self.batch = 0
        self.durable = 0
        self._waiting: deque[tuple[int, Later]] = deque()
        self.ring: Membership
        """The latest that is known to be committed."""
        self.preference: dict[int, tuple[int, ...]]
        """Where it wants each partition, best owner first."""
        self.moved: frozenset[int]
        """Partitions that the change under way takes to other replicas."""
        self.in_place: dict[int, int] = {}
        """Partition -> the version of the ring for which its owner said that it is in place."""
        first = config.founding()
        founders = tuple((p, m) for p, m in nodes(first).items() if p < first.founders)
        self._founders = config.placed(first)
        if first.version > 1 and founders:
            every = tuple((p, dict(founders).get(p, founders[0][1])) for p in range(first.founders))
            self._founders = config.placed(replace(first, members=every))
        self.adopt(first)

    # -- placement -------------------------------------------------------------------------------

    def adopt(self, ring: Membership) -> None:
        """Another ring is in force: it says where partitions shall go."""
        self.ring = ring
        self.preference = self.config.placed(ring)
        self.moved = frozenset()
        if changing(ring):
            old = self.config.placed(before(ring))
            self.moved = frozenset(p for p, n in self.preference.items() if set(n) != set(old[p]))

    def ring_of(self, state: PartitionState) -> int:
        """The version under which this node claims and seals a partition: the latest that it knows,
        or has promised under. Who told it of that one may have lost it with its disk before telling
        anybody what is in it; only an owner of the ring's partition can find it again, and replicas
        accept no version below their own."""
        return max(self.ring.version, state.ring)

    def quorum(self, state: PartitionState) -> Quorum:
        """Who decides about a partition, as this node knows from its seal."""
        if state.replicas:
            return Quorum(self.ranked(state.partition, state.replicas), state.before)
        if state.sealed:
            return self.unnamed(state.partition)
        return Quorum(self.preference[state.partition])

    def unnamed(self, partition: int) -> Quorum:
        """Who decides if a seal names nobody: it is the founders' own."""
        return Quorum(self._founders[partition])

    def ranked(self, partition: int, replicas: tuple[int, ...]) -> tuple[int, ...]:
        """Replicas in the ring's order: best owner first, those that it does not want last."""
        wanted = self.preference[partition]
        if replicas == wanted:
            return replicas
        rank = {node: i for i, node in enumerate(wanted)}
        return tuple(sorted(replicas, key=lambda node: (rank.get(node, len(rank)), node)))

    def rank(self, state: PartitionState) -> int:
        """This node's place among the replicas; beyond the last if it is none."""
        replicas = self.quorum(state).replicas
        return replicas.index(self.me) if self.me in replicas else len(replicas)

    def progress(self) -> tuple[int, int]:
        """How many partitions the change under way has moved, and how many it has to."""
        version = self.ring.version
        return sum(self.in_place.get(p) == version for p in self.moved), len(self.moved)

    @property
    def me(self) -> int:
        return self.config.node

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
