"""Records that the store has and that were looked at lately, in bounded memory.

A look into the store's file takes a thread, and so two changes of context, which is most of what a
miss costs. This is the home's own main memory: it must be used only where nobody else writes the
store. (Not for Redis and HTTP origins, where a look is also how others' changes are seen.)
"""

from __future__ import annotations

from collections import OrderedDict

from mesi_cache.core.records import Record

OVERHEAD_BYTES = 300  # of a key and a record besides their text, as CPython keeps them


class Recent:
    """At most `most_bytes` of records; the least recently used go first. 0: keeps nothing."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._records: OrderedDict[str, Record] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> Record | None:
        """What the store has of `key`; None: it must be asked."""
        record = self._records.get(key)
        if record is not None:
            self._records.move_to_end(key)
        return record

    def put(self, key: str, record: Record) -> None:
        """The store has this now, and no longer what it had before."""
        before = self._records.pop(key, None)
        if before is not None:
            self.size_bytes -= _size(key, before)
        size = _size(key, record)
        if size > self._most_bytes // 16:
            return  # it would push out too many others
        self._records[key] = record
        self.size_bytes += size
        while self.size_bytes > self._most_bytes:
            oldest, gone = self._records.popitem(last=False)
            self.size_bytes -= _size(oldest, gone)


def _size(key: str, record: Record) -> int:
    return OVERHEAD_BYTES + len(key) + len(record.value or b"")
