"""A partition's record set: puts held, settings in force, and the causal context.

An observed-remove set without tombstones (Bieniusa et al., "An optimized conflict-free replicated
set", 2012). The context covers every record that this node has verified on its own disk. A put that
is covered and not held was acked, and nothing needs to be remembered about it: neither its arrival
nor its merge from a node that missed the ack brings it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from message_queue.core.messages import (
    Ack,
    Entry,
    Put,
    Puts,
    Set,
    Setting,
    Settled,
    Span,
    Spans,
    View,
)
from message_queue.core.replication.dots import DotSet, joined
from message_queue.core.replication.intervals import Intervals
from message_queue.core.runs import last_seq


class RecordSet:
    """Invariant: every held dot and every setting's dot is covered by the context."""

    __slots__ = ("context", "held", "settings")

    def __init__(self) -> None:
        self.context = Intervals()
        self.held = DotSet()
        self.settings: dict[str, Setting] = {}

    @classmethod
    def of(cls, view: View) -> RecordSet:
        records = cls()
        records.context = Intervals(view.context)
        records.held = DotSet.of(view.held)
        records.settings = {setting.key: setting for setting in view.settings}
        return records

    def view(
        self,
        sealed: int,
        origin: int,
        replicas: tuple[int, ...] = (),
        before: tuple[int, ...] = (),
    ) -> View:
        return View(
            sealed=sealed,
            origin=origin,
            context=self.context.spans(),
            held=self.held.chunks(),
            settings=tuple(sorted(self.settings.values(), key=lambda s: s.key)),
            replicas=replicas,
            before=before,
        )

    def apply(self, epoch: int, entry: Entry) -> Spans:
        """One entry of ``epoch``; idempotent and in any order. Returns the dots no longer held."""
        covered = self.context.has(epoch, entry.seq)
        match entry:
            case Put(seq):
                if not covered:
                    self.context.add(epoch, seq, seq)
                    self.held.add(epoch, seq)
                return ()
            case Puts(seq):
                last = last_seq(entry)
                # All of them, or those that no ack has overtaken.
                for _, first, end in self.context.without((epoch, seq, last)):
                    self.held.add_range(epoch, first, end)
                self.context.add(epoch, seq, last)
                return ()
            case Ack(seq, targets):
                if covered:
                    return ()
                self.context.add(epoch, seq, seq)
                gone: list[Span] = []
                for target in targets:
                    gone.extend(self.held.remove_range(*target))
                    # An ack that overtook its put covers it, so that the put is void when it comes.
                    self.context.add(*target)
                return joined(gone)
            case Set(seq, key, value):
                if covered:
                    return ()
                self.context.add(epoch, seq, seq)
                old = self.settings.get(key)
                if old is None or (old.epoch, old.seq) < (epoch, seq):
                    # An empty value stays until the next takeover, so that an earlier setting that
                    # comes later does not bring the key back.
                    self.settings[key] = Setting(epoch, seq, key, value)
                return ()
            case Settled(seq):
                self.context.add(epoch, seq, seq)
                return ()
            case _:
                assert_never(entry)

    def tidy(self) -> None:
        """Forgets removed settings: all replicas are about to start from this very state."""
        self.settings = {key: setting for key, setting in self.settings.items() if setting.value}

    def withdraw(self, lost: Spans) -> None:
        """These records can't be read: they are neither known nor acked any more."""
        for span in lost:
            self.context.remove(*span)
            self.held.remove_range(*span)
        for key, setting in list(self.settings.items()):
            if not self.context.has(setting.epoch, setting.seq):
                del self.settings[key]


def merged(parts: Sequence[RecordSet]) -> RecordSet:
    """The union: covered by any is covered; held by any and acked by none is held."""
    out = RecordSet()
    for part in parts:
        out.context.update(part.context)
        out.held.update(part.held)
    for part in parts:
        for span in out.held.minus(part.held).runs():
            for acked in part.context.within(span):
                out.held.remove_range(*acked)
    for part in parts:
        for key, setting in part.settings.items():
            old = out.settings.get(key)
            if old is None or (old.epoch, old.seq) < (setting.epoch, setting.seq):
                out.settings[key] = setting
    return out
