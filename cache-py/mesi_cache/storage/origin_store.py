"""Main memory elsewhere (origins.py), with what it cannot keep in this node's own file.

In the file: each key's version, and a digest by which its value is recognised. A value that is not
the one we know (somebody else wrote to the origin) gets a new version, so that a version never
means two values; the digests are bounded in number, and what is forgotten of them is in the floors
(store.py). Deadlines are in the file too, since an origin need not know any.

A change that the origin refuses (a read-only one answers 405) is kept in the file instead, and from
then on that key is read there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from mesi_cache.core.records import Record
from mesi_cache.storage.origins import Origin, Refused
from mesi_cache.storage.sqlite_store import Known, SqliteFile
from mesi_cache.storage.store import RESERVED, Loaded, Restored, Saving, StoreUnavailable

log = logging.getLogger(__name__)

PUT_CHUNK = 500


class OriginStore:
    """Main memory at `origin`, with `file` beside it."""

    def __init__(
        self,
        origin: Origin,
        file: SqliteFile,
        reader: ThreadPoolExecutor,
        writer: ThreadPoolExecutor,
    ) -> None:
        self._origin = origin
        self._file = file
        self._reader = reader
        self._writer = writer
        self._refused = False

    async def load(self, keys: Sequence[str]) -> Sequence[Loaded]:
        loop = asyncio.get_running_loop()
        here, known, floors = await loop.run_in_executor(self._reader, self._look, keys)
        elsewhere = [key for key in keys if key not in here and not key.startswith(RESERVED)]
        values = dict(zip(elsewhere, await self._origin.get(elsewhere), strict=True))
        found: dict[str, Loaded] = {key: Record(None, floor) for key, floor in floors.items()}
        found |= here
        news: list[tuple[str, Known]] = []
        for key, value in values.items():
            if isinstance(value, StoreUnavailable):
                found[key] = value
                continue
            before, digest = known.get(key), _digest(value)
            if before is None:
                before = Known(floors.get(key, 0), None, 0)
            if digest != before.digest:
                before = Known(before.version + 1, digest, 0)
                news.append((key, before))
            found[key] = Record(value, before.version, before.expires_ms if value else 0)
        if news:
            await loop.run_in_executor(self._writer, self._file.learn, news)
        return [found.get(key) for key in keys]

    def _look(
        self, keys: Sequence[str]
    ) -> tuple[dict[str, Record], dict[str, Known], dict[str, int]]:
        # In this order: what is gone from one of them by now stands in the next already.
        return self._file.rows(keys), self._file.known(keys), self._file.floors(keys)

    async def save(self, saving: Saving) -> None:
        loop = asyncio.get_running_loop()
        mine = [(key, r) for key, r in saving.records if key.startswith(RESERVED)]
        theirs = [(key, r) for key, r in saving.records if not key.startswith(RESERVED)]
        changing = {key for key, _ in theirs}
        overdue = await loop.run_in_executor(self._writer, self._file.known_overdue, saving.wall_ms)
        forgotten = [key for key in overdue if key not in changing]
        values = [*((key, r.value) for key, r in theirs), *((key, None) for key in forgotten)]
        answers: list[Refused | StoreUnavailable | None] = []
        for start in range(0, len(values), PUT_CHUNK):  # each has its own deadline
            answers += await self._origin.put(values[start : start + PUT_CHUNK])
        known: list[tuple[str, Known]] = []
        for (key, record), answer in zip(theirs, answers, strict=False):
            if isinstance(answer, StoreUnavailable):
                raise answer
            if isinstance(answer, Refused):
                self._note_refusal(key, answer)
                mine.append((key, record))
            else:
                known.append((key, Known(record.version, _digest(record.value), record.expires_ms)))
        removed = [
            key
            for key, answer in zip(forgotten, answers[len(theirs) :], strict=True)
            if answer is None
        ]
        kept = Saving(mine, saving.applied, saving.retries, saving.wall_ms)
        await loop.run_in_executor(self._writer, self._file.save_known, kept, known, removed)

    def _note_refusal(self, key: str, answer: Refused) -> None:
        if not self._refused:
            self._refused = True
            log.warning("the store does not take %s (%s): kept in the data directory", key, answer)

    async def stop(self) -> None:
        await self._origin.stop()

    def restored(self) -> Restored:
        return self._file.restored()

    def close(self) -> None:
        self._file.close()


def _digest(value: bytes | None) -> bytes | None:
    return None if value is None else blake2b(value, digest_size=16).digest()
