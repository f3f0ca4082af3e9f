"""What can be wrong with a data directory. Each is one clear line for stderr and exit code 2 at
start-up; later, `StoreFailed` ends the node."""

from __future__ import annotations


class StoreError(Exception):
    """The data directory cannot be used; the text says which one and why."""


class StoreInUse(StoreError):
    """Another process holds the directory."""


class ForeignStore(StoreError):
    """The directory belongs to another node or service."""


class CorruptStore(StoreError):
    """What is stored is not what was written. The node must not start: it may have promised more
    than is left. Repair: empty the directory, remove the node from the cluster and add it
    again."""


class StoreFailed(StoreError):
    """A write or its fsync failed while running. What reached the disk is unknown (after a failed
    fsync the kernel may drop the pages and report success the next time), so nothing is
    retried."""
