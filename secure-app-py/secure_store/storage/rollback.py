"""Whether a whole older copy of the database was put back.

Nothing inside a database can tell that. What lies beside it can: the audit log's line of a write
names the write's record (epoch and number), and no line is written before its record is durable
here. On one node the end of the log never goes back: within an epoch it only grows, and a history
is only ever replaced by one of a higher epoch. So a line of a record beyond the database's end says
that the database is older than the line.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from secure_store.config import ConfigError
from secure_store.storage.audit_files import newest_record
from secure_store.storage.database import Database


def told_beyond(database: Database, audit_files: Iterable[Path], key: bytes) -> str:
    """What is wrong, in a sentence; "" if the database is as new as the audit log. Looks at the
    lines after the last one that the database knows to be durable. Outside of transactions a node
    may be running: the database is looked at after the lines. Raises ConfigError."""
    told = database.load_told()
    for path in audit_files:
        if not path.is_file():
            continue  # there is none yet; or a pipe, which would hang (AuditLog refuses it)
        try:
            epoch, record, entry = newest_record(path, key, told.line)
        except OSError as e:
            raise ConfigError(f"audit file {e.filename}: {e.strerror or e}") from None
        last = database.last()
        if (epoch, record) > (last.epoch, last.seq):
            return (
                f"the database ends at record {last.seq} of epoch {last.epoch}, and entry {entry} "
                f"of the audit log tells of record {record} of epoch {epoch}: an older copy of the "
                "database was put back"
            )
    return ""
