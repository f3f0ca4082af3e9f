"""When a partition of which nobody shows a trace may be made: only with every founder there."""

from __future__ import annotations

from message_queue.core.messages import Heartbeat
from message_queue.core.placement.membership import founding
from message_queue.core.replication.config import ReplicationConfig
from message_queue.core.replication.replicator import Replicator
from message_queue.core.replication.takeover import Founding

LIFE = 10


def beat(number: int, heard: int = LIFE, ring: int = 1) -> tuple[Heartbeat, ...]:
    return (Heartbeat(number, heard, 0, (), (), ring, ()),)


def test_a_new_cluster_waits_for_the_word_of_every_founder_about_the_first_ring() -> None:
    ring = founding(("a:1", "b:1", "c:1", "d:1"), 128, 3)
    config = ReplicationConfig(node=0, nodes=4, incarnation=LIFE, membership=ring, seed=1)
    core = Replicator(config, {}, 0, 0)
    offices = core._offices
    assert offices._founding(0) is Founding.NEVER
    core.receive_all(1, 5, beat(1), 0)
    core.receive_all(2, 5, beat(1), 0)
    # The fourth is missing, then speaks without having heard this node, then knows a later ring.
    assert offices._founding(0) is Founding.NEVER
    core.receive_all(3, 5, beat(1, heard=0), 0)
    assert offices._founding(0) is Founding.NEVER
    core.receive_all(3, 5, beat(2, ring=2), 0)
    assert offices._founding(0) is Founding.NEVER
    core.receive_all(3, 5, beat(3), 0)
    assert offices._founding(0) is Founding.ALL
