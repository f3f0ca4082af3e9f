"""Whose word decides about a partition.

A seal names the replicas. One that hands over from others names those too: then a majority of
*both* is needed, to elect, to renew and to commit, until the seal itself is known to be on both
majorities (``Settled``). Why two owners can't be: whoever knows only the old set needs a majority
of it, meets one that has the new seal, and learns that the new set must agree (joint consensus,
Ongaro and Ousterhout 2014, §6, with seals for log entries; the sealing of the old set is that of
Stoppable Paxos, Lamport et al. 2008). The new set therefore decides alone from then on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec import Struct


class Quorum(Struct, frozen=True):
    """``replicas`` decide; together with ``before``, while those hand over."""

    replicas: tuple[int, ...]
    before: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Each must agree by majority."""
        return (self.replicas, self.before) if self.before else (self.replicas,)

    @property
    def nodes(self) -> tuple[int, ...]:
        """All of them, the replicas first."""
        return self.replicas + tuple(node for node in self.before if node not in self.replicas)

    def others(self, me: int) -> tuple[int, ...]:
        """All but one."""
        return tuple(node for node in self.nodes if node != me)

    def enough(self, agreed: Collection[int]) -> bool:
        """A majority of each group is among them."""
        return all(sum(n in agreed for n in g) > len(g) // 2 for g in self.groups)

    def everybody(self, agreed: Collection[int]) -> bool:
        return all(node in agreed for node in self.nodes)

    def hopeless(self, refused: Collection[int]) -> bool:
        """Some group can't reach a majority without these."""
        return any(len(g) - sum(n in refused for n in g) <= len(g) // 2 for g in self.groups)

    def reached(self, marks: Mapping[int, int]) -> int:
        """The highest mark that a majority of each group has reached."""
        if not self.before:
            found = sorted([marks[n] for n in self.replicas], reverse=True)
            return found[len(found) // 2]
        return min(sorted((marks[n] for n in g), reverse=True)[len(g) // 2] for g in self.groups)

    @property
    def witnesses(self) -> int:
        """So many of the replicas that one of them took part in every election so far."""
        return len(self.replicas) - len(self.replicas) // 2
