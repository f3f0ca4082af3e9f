"""Configurations: which are in force, and how one is changed (§6; thesis chapter 4).

A configuration acts from the moment it is appended and stops acting if its entry is truncated. One
server at a time is added or removed, so that any majority of the old configuration meets any
majority of the new one; a change waits until the previous one is committed and, for the bug that
Ongaro reported on the raft-dev list in 2015, until the leader's own no-op is.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from lock_manager.core.raft.messages import Configuration, Entry, EntryKind, Member, Snapshot

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Configuration)


def encode_configuration(configuration: Configuration) -> bytes:
    return _encoder.encode(configuration)


def decode_configuration(payload: bytes) -> Configuration:
    """Raises msgspec.DecodeError (ValidationError included) if it is none."""
    return _decoder.decode(payload)


class ConfigurationHistory:
    """The configurations of the log, oldest first; the first one is that of the snapshot or the
    flags.

    Invariant: the last one is in force; none but the first is at or below the log's base.
    """

    __slots__ = ("_history", "configuration", "index", "voters")

    def __init__(
        self, bootstrap: Configuration, snapshot: Snapshot, entries: Iterable[Entry]
    ) -> None:
        first = snapshot.configuration if snapshot.index else bootstrap
        self._history: list[tuple[int, Configuration]] = [(snapshot.index, first)]
        for entry in entries:
            if entry.kind is EntryKind.CONFIGURATION:
                self._history.append((entry.index, decode_configuration(entry.payload)))
        self.index = 0
        self.configuration = first
        self.voters: frozenset[int] = frozenset()
        self._settle()

    def _settle(self) -> None:
        self.index, self.configuration = self._history[-1]
        self.voters = self.configuration.voters

    def append(self, index: int, configuration: Configuration) -> None:
        self._history.append((index, configuration))
        self._settle()

    def truncate_from(self, index: int) -> bool:
        """Entries >= `index` are gone; returns whether another configuration is in force now."""
        before = len(self._history)
        while len(self._history) > 1 and self._history[-1][0] >= index:
            self._history.pop()
        self._settle()
        return len(self._history) != before

    def as_of(self, index: int) -> Configuration:
        """The configuration in force at `index` (at or above the last compaction)."""
        return next(
            (configuration for at, configuration in reversed(self._history) if at <= index),
            self._history[0][1],
        )

    def compact(self, index: int) -> None:
        """Nobody will ask for what was in force below `index`."""
        while len(self._history) > 1 and self._history[1][0] <= index:
            del self._history[0]

    def install(self, snapshot: Snapshot, *, keep_later: bool) -> None:
        """A leader's snapshot replaces the log up to its index, or all of it."""
        later = [item for item in self._history if keep_later and item[0] > snapshot.index]
        self._history = [(snapshot.index, snapshot.configuration), *later]
        self._settle()


def with_learner(configuration: Configuration, member: Member) -> Configuration:
    """`member` added as a learner, to be promoted if it is meant to vote."""
    learner = msgspec.structs.replace(member, voter=False, promote=member.voter or member.promote)
    return Configuration(
        tuple(sorted((*configuration.members, learner), key=lambda one: one.node_id))
    )


def with_promoted(configuration: Configuration, node_id: int) -> Configuration:
    return Configuration(
        tuple(
            msgspec.structs.replace(member, voter=True, promote=False)
            if member.node_id == node_id
            else member
            for member in configuration.members
        )
    )


def with_updated(configuration: Configuration, update: Member) -> Configuration:
    """Name, store id and addresses as in `update`; whether it votes stays."""
    return Configuration(
        tuple(
            msgspec.structs.replace(update, voter=member.voter, promote=member.promote)
            if member.node_id == update.node_id
            else member
            for member in configuration.members
        )
    )


def without(configuration: Configuration, node_id: int) -> Configuration:
    return Configuration(
        tuple(member for member in configuration.members if member.node_id != node_id)
    )
