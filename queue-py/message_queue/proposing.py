"""What clients asked leaves in batches, two under way for each partition (see `gathering`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, assert_never

from message_queue.clocks import monotonic_ms
from message_queue.core.messages import PeerMessage
from message_queue.core.operations import NodeMessage
from message_queue.core.replication.drafts import Accepted, NotOwner
from message_queue.core.replication.effects import Effects
from message_queue.core.replication.replicator import Replicator
from message_queue.hosting import Host
from message_queue.transport.links import Links

AnyMessage = PeerMessage | NodeMessage
BATCH_BYTES = 4 << 20
BATCHES_UNDER_WAY = 2
"""While one is on the disks, the next is taken in. (Measured: DESIGN.md, Speed.)"""


class Node(Protocol):
    """What is asked of it."""

    replicator: Replicator
    links: Links[AnyMessage]

    def cluster_ms(self) -> int:
        """Cluster time."""

    def apply(self, fx: Effects) -> None:
        """Do what a step asks."""


class Proposer:
    """Of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._call_soon: Callable[..., object] = asyncio.get_running_loop().call_soon
        self._hosts: list[Host] = []

    def flush_soon(self, host: Host) -> None:
        """Propose at the end of a turn of the loop, unless enough batches are under way."""
        if len(host.batches) < BATCHES_UNDER_WAY and not host.flushing:
            host.flushing = True
            self._line_up(host)

    def _line_up(self, host: Host) -> None:
        if not self._hosts:
            self._call_soon(self._flush)
        self._hosts.append(host)

    def _flush(self) -> None:
        hosts, self._hosts = self._hosts, []
        # Batches of several partitions leave as one frame a peer.
        with self._node.links.together():
            for host in hosts:
                if host.gathering.goes_on(host.owner.gathered, host.owner.gathered_bytes):
                    self._line_up(host)
                else:
                    host.flushing = False
                    self._propose(host)

    def _propose(self, host: Host) -> None:
        node, owner = self._node, host.owner
        if host.ended or not owner.has_gathered:
            return
        now_ms = node.cluster_ms()
        drafts, gathered = owner.gather(BATCH_BYTES)
        if not drafts:
            owner.proposed(gathered, 0, now_ms)
            host.after()
            return
        match node.replicator.propose(host.partition, drafts, monotonic_ms()):
            case Accepted(epoch, first, effects):
                if epoch != owner.epoch:
                    raise AssertionError("a host outlived its epoch")
                owner.proposed(gathered, first, now_ms)
                host.batches.append(owner.assigned)
                node.apply(effects)
            case NotOwner():
                owner.refused(gathered, now_ms)
                host.after()
            case other:
                assert_never(other)
