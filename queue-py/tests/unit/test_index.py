"""The index by example; `tests/property/test_index_model.py` compares it with a dict."""

from __future__ import annotations

from array import array

from message_queue.core.delivery import stored
from message_queue.core.ids import pack_dot
from message_queue.storage.index import Index
from message_queue.storage.segments import locate

EPOCH = 1025
META = stored.encode(stored.MessageMeta("q", 5, 6))


def test_spans_are_dropped_with_their_first_and_their_last() -> None:
    index = Index()
    index.put_run(7, pack_dot(EPOCH, 1), locate(1, 0, 900), META, array("I", [9] * 40))
    index.drop_spans(7, ((EPOCH, 5, 30), (EPOCH, 40, 40)))
    assert list(index.dots(7)) == [pack_dot(EPOCH, seq) for seq in (*range(1, 5), *range(31, 40))]
    assert index.count() == 13
    index.drop_spans(7, ((EPOCH, 1, 40),))
    assert index.count() == 0
    assert not index.live, "nothing keeps the segment"
