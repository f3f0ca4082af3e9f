"""What must hold in every state of the replication core; executable, run after simulated steps.

State checks look at one node or at all of them; the ``Ledger`` remembers what was committed, as no
node does, and judges every new owner by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from message_queue.core.messages import Ack, Entry, Put, Standing
from message_queue.core.replication.dots import DotSet
from message_queue.core.replication.intervals import Intervals
from message_queue.core.replication.replicator import Replicator
from message_queue.core.replication.state import PartitionState
from message_queue.core.runs import one_by_one


def check_state(state: PartitionState) -> None:
    """A partition's stored state is consistent in itself."""
    where = f"partition {state.partition}"
    assert state.sealed <= state.promised, f"{where}: sealed beyond its promise"
    for span in state.held.spans():
        assert state.records.context.within(span) == (span,), f"{where}: held but not covered"
    for setting in state.records.settings.values():
        assert state.records.context.has(setting.epoch, setting.seq), f"{where}: stray setting"
    if state.standing is Standing.MEMBER:
        assert state.sealed > 0, f"{where}: a member without a seal"


def check_node(node: Replicator) -> None:
    """One node's view is consistent."""
    for partition, seat in node.seats.items():
        where = f"node {node.config.node}, partition {partition}"
        assert seat.tenure is None or seat.takeover is None, f"{where}: owner and candidate"
        if seat.tenure is not None:
            tenure = seat.tenure
            assert tenure.committed <= tenure.last, f"{where}: committed what was never stamped"
            assert seat.state.sealed == tenure.epoch, f"{where}: owns an epoch it has not sealed"
            assert seat.state.promised == tenure.epoch, f"{where}: owns below its own promise"
            assert tenure.own <= tenure.last, f"{where}: stored what was never stamped"


def check_owners(nodes: Iterable[tuple[Replicator, int]]) -> None:
    """At most one node may hand out a partition's messages at any moment. Each node comes with its
    own clock's time."""
    serving: dict[int, int] = {}
    for node, now_ms in nodes:
        for partition in node.seats:
            if node.may_serve(partition, now_ms):
                other = serving.setdefault(partition, node.config.node)
                assert other == node.config.node, (
                    f"partition {partition} is served by nodes {other} and {node.config.node}"
                )


class Ledger:
    """All that was ever committed, seen from outside the cluster."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int, int], Entry] = {}
        self._puts: dict[int, DotSet] = {}
        self._acked: dict[int, Intervals] = {}
        self._asked: dict[int, Intervals] = {}
        self._committed: dict[int, Intervals] = {}

    def proposed(self, partition: int, epoch: int, entries: Iterable[Entry]) -> None:
        """An owner stamped these. No dot is ever given twice."""
        for entry in one_by_one(entries):
            key = (partition, epoch, entry.seq)
            assert key not in self._entries, f"dot {key} was given twice"
            self._entries[key] = entry
            if isinstance(entry, Ack):
                asked = self._asked.setdefault(partition, Intervals())
                for span in entry.targets:
                    asked.add(*span)

    def committed(
        self,
        partition: int,
        epoch: int,
        first: int,
        upto: int,
        durable: Mapping[int, Sequence[PartitionState]],
        groups: Sequence[Sequence[int]],
    ) -> None:
        """An owner says that first..upto are committed; ``durable``: what each node's disk holds as
        of its last completed sync (and what it held before it rotted: a majority had it);
        ``groups``: the replica sets that each need a majority."""
        span = (epoch, first, upto)
        have = {
            node
            for node, states in durable.items()
            if any(state.records.context.within(span) == (span,) for state in states)
        }
        for group in groups:
            assert sum(node in have for node in group) > len(group) // 2, (
                f"partition {partition}: {span} committed, durable on {have} of {group} only"
            )
        self._committed.setdefault(partition, Intervals()).add(*span)
        for seq in range(first, upto + 1):
            match self._entries[partition, epoch, seq]:
                case Put():
                    self._puts.setdefault(partition, DotSet()).add(epoch, seq)
                case Ack(_, targets):
                    for target in targets:
                        self._acked.setdefault(partition, Intervals()).add(*target)
                case _:
                    pass

    def gained(self, partition: int, state: PartitionState) -> None:
        """A node begins to own the partition with this state: nothing committed is missing from it,
        nothing acked is back."""
        for span in self._committed.get(partition, Intervals()).spans():
            assert state.records.context.within(span) == (span,), (
                f"partition {partition}: the new owner does not know {span}"
            )
        acked = self._acked.get(partition, Intervals())
        for span in state.held.spans():
            back = acked.within(span)
            assert not back, f"partition {partition}: {back} came back after their ack"
        asked = self._asked.get(partition, Intervals())
        for span in self._puts.get(partition, DotSet()).minus(state.held).spans():
            known = asked.within(span)
            gone = sum(last - first + 1 for _, first, last in known)
            assert gone == span[2] - span[1] + 1, (
                f"partition {partition}: {span} is lost without an ack"
            )

    def check_held(self, partition: int, state: PartitionState) -> None:
        """An owner that may hand out messages never holds what was acked."""
        acked = self._acked.get(partition, Intervals())
        for span in state.held.spans():
            back = acked.within(span)
            assert not back, f"partition {partition}: {back} is held again after its ack"
