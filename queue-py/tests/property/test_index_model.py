"""The compact index against a dict, and a queue's backlog against a sorted list."""

from __future__ import annotations

import os
import sys
from array import array

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from message_queue.core.delivery import stored
from message_queue.core.delivery.backlog import Backlog
from message_queue.core.ids import pack_dot, unpack_dot
from message_queue.core.replication.dots import DotSet
from message_queue.storage.index import FRAME_BYTES, Index
from message_queue.storage.segments import locate, segment_of
from message_queue.storage.shelf import PartitionShelf
from message_queue.storage.snapshot import MAGIC, End, encode, pages, parse

DOTS = st.builds(
    pack_dot,
    st.sampled_from([65, 129, 1 << 40]),
    # Within a block, at its edges, and in far ones.
    st.one_of(st.integers(1, 40), st.integers(1015, 1030), st.integers(1 << 39, (1 << 39) + 3)),
)
METAS = st.sampled_from(
    [
        stored.MessageMeta("a", 5, 6),
        stored.MessageMeta("b", 7, 8, b'{"k":1}', priority=9),
        stored.MessageMeta("a", 9, 10, b"{}", group="g"),
        stored.MessageMeta("c", 9, 10, expires_ms=77),
        stored.DedupeMark("a", "id", 1, 99),
    ]
).map(stored.encode) | st.just(b"none of ours")


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sut = Index()
        self.model: dict[int, tuple[int, bytes, int]] = {}

    @rule(
        dots=st.lists(DOTS, min_size=1, max_size=30), segment=st.integers(1, 4), meta=METAS,
        size=st.integers(0, 5000),
    )  # fmt: skip
    def put(self, dots: list[int], segment: int, meta: bytes, size: int) -> None:
        for dot in dots:
            locator = locate(segment, dot % 1000, size + 50)
            self.sut.put(7, dot, locator, meta, size)
            self.model[dot] = locator, meta, size

    @rule(
        dot=DOTS, segment=st.integers(1, 3), meta=METAS,
        sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    )  # fmt: skip
    def put_run(self, dot: int, segment: int, meta: bytes, sizes: list[int]) -> None:
        locator = locate(segment, dot % 1000, sum(sizes) + 50)
        self.sut.put_run(7, dot, locator, meta, array("I", sizes))
        for offset, size in enumerate(sizes):
            self.model[dot + offset] = locator, meta, size

    @rule(dot=DOTS)
    def drop(self, dot: int) -> None:
        self.sut.drop(7, dot)
        self.model.pop(dot, None)

    @rule(low=DOTS, width=st.sampled_from([0, 3, 9, 1200, 1 << 38]))
    def drop_span(self, low: int, width: int) -> None:
        epoch, first = unpack_dot(low)
        self.sut.drop_spans(7, ((epoch, first, first + width),))
        self.model = {d: p for d, p in self.model.items() if not low <= d <= low + width}

    @rule()
    def restart(self) -> None:
        """Through a snapshot and back."""
        frames = [encode(page) for page in pages(self.sut)]
        end = End(len(frames), sys.byteorder, (1, 8), (), 0)
        self.sut = parse(MAGIC + b"".join(frames) + encode(end)).index

    @invariant()
    def agree(self) -> None:
        sut = self.sut
        assert list(sut.dots(7)) == sorted(self.model)
        assert sut.count() == len(self.model)
        live: dict[int, tuple[int, int]] = {}
        for dot, (locator, meta, size) in self.model.items():
            place = sut.get(7, dot)
            assert place is not None
            assert place.locator == locator == sut.locator(7, dot)
            assert place.body_bytes == size
            card = stored.digest(meta)
            assert card == (place.plain if place.plain is not None else place.meta)
            puts, total = live.get(segment_of(locator), (0, 0))
            live[segment_of(locator)] = puts + 1, total + size + FRAME_BYTES
        assert {s: (found.puts, found.bytes) for s, found in sut.live.items()} == live
        used = {c.queue for _, m, _ in self.model.values()
                if isinstance(c := stored.digest(m), stored.Plain)}  # fmt: skip
        assert len(sut.names) == len(used), "names outlive their use"

    @invariant()
    def a_takeover_sees_every_message_once(self) -> None:
        held = DotSet()
        for dot in self.model:
            held.add(*unpack_dot(dot))
        held.add(65, 900)  # one that is not on this disk
        shelf = PartitionShelf(self.sut, 7)
        seen: dict[int, int] = {}
        missing = []
        for chunk in held.numbered():
            part = shelf.part(*chunk)
            for _, _, bits, total in part.plain:
                dots = [part.base + n for n in range(1024) if bits >> n & 1]
                assert total == sum(self.model[dot][2] for dot in dots)
                assert not seen.keys() & set(dots)
                seen.update(dict.fromkeys(dots, 1))
            for dot, _, size in part.others:
                assert size == self.model[dot][2]
                assert dot not in seen
                seen[dot] = 2
            missing += [part.base + n for n in range(1024) if part.missing >> n & 1]
        assert sorted(seen) == sorted(self.model)
        assert missing == [pack_dot(65, 900)]


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "20")),
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "first", "name", "purge"]), st.integers(0, 9), DOTS),
    max_size=60,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.booleans())
def test_a_backlog_is_a_list_sorted_by_priority_and_dot(
    steps: list[tuple[str, int, int]], refused: bool
) -> None:
    sut, model = Backlog(), set[tuple[int, int]]()
    for what, priority, dot in steps:
        if what == "add" and all(dot != other for _, other in model):
            sut.add(dot, priority, 3)
            model.add((-priority, dot))
        elif what == "first" and model:
            head = sut.head()
            assert head is not None
            assert (-head[0], head[1]) == min(model)
            assert sut.remove(head[1], head[0], 3)
            model.remove(min(model))
        elif what == "name":
            assert sut.has(dot, priority) == ((-priority, dot) in model)
            assert sut.remove(dot, priority, 3) == ((-priority, dot) in model)
            model.discard((-priority, dot))
        elif what == "purge":
            purged = sut.end_all("q")
            assert (purged.messages if purged else 0) == len(model)
            assert sut.count == 0
            assert sut.held == len(model)
            if purged is not None and refused:
                sut.back(purged)
            else:
                model.clear()
                if purged is not None:
                    sut.gone(purged)
        assert sut.count == sut.held == len(model)
        assert sut.bytes == 3 * len(model)
        assert sut.ending_bytes == 0
        assert sut.oldest() == min((d for _, d in model), default=None)
        for priority in range(10):
            mine = sorted(d for p, d in model if p == -priority)
            assert sut.first(priority, 3) == mine[:3]
