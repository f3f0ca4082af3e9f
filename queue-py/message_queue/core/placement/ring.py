"""Consistent hashing: queue -> partition -> the nodes that hold it (Karger et al. 1997; the fixed
partitions and preference lists are Dynamo's, DeCandia et al. 2007, §6.2).

Everything is hashed with BLAKE2b, so every node, version and platform computes the same ring. Nodes
are named by their position in the member list, never by an address: a node behind a proxy or with a
new address keeps its place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

PARTITIONS: Final = 64


def stable_hash(text: str) -> int:
    """64 bits, the same everywhere and for ever."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def partition_of(queue: str) -> int:
    """The partition that a queue lives in: 0..63."""
    return stable_hash(f"queue/{queue}") % PARTITIONS


class Ring:
    """An immutable ring of virtual nodes.

    ``members``: positions of the nodes that take part; ``virtual_nodes``: points per node (the
    load's standard deviation falls with its square root).
    """

    __slots__ = ("_owners", "_points", "members", "preference", "version", "virtual_nodes")

    def __init__(
        self, members: Sequence[int], virtual_nodes: int, replication_factor: int, version: int = 1
    ) -> None:
        if not members or len(set(members)) != len(members):
            raise ValueError("a ring needs distinct members")
        if virtual_nodes < 1 or replication_factor < 1:
            raise ValueError("virtual nodes and replicas are counted from 1")
        self.members = tuple(sorted(members))
        self.virtual_nodes = virtual_nodes
        self.version = version
        points = sorted(
            (stable_hash(f"node/{node}/{v}"), node)
            for node in self.members
            for v in range(virtual_nodes)
        )
        self._points = [point for point, _ in points]
        self._owners = [node for _, node in points]
        copies = min(replication_factor, len(self.members))
        self.preference: tuple[tuple[int, ...], ...] = tuple(
            self._walk(stable_hash(f"partition/{partition}"), copies)
            for partition in range(PARTITIONS)
        )
        """Per partition its replicas, best owner first."""

    def _walk(self, point: int, copies: int) -> tuple[int, ...]:
        """The first distinct nodes clockwise from a point."""
        found: list[int] = []
        start = bisect_right(self._points, point)
        for step in range(len(self._owners)):
            node = self._owners[(start + step) % len(self._owners)]
            if node not in found:
                found.append(node)
                if len(found) == copies:
                    break
        return tuple(found)
