"""Keeps what Raft must not forget: durable before anyone is told.

    store = Store.open(path, Owner(node_id, position, raft_addr, http_addr))
                                  blocking, at start-up; raises StoreError or its subclasses
                                  CorruptStore, StoreInUse, ForeignStore (main: one line, exit 2)
    store.restored                core.raft.Restored, checked row by row
    store.store_id                this directory's random id (hex), made together with it
    store.peers, bind_peer(...)   who answered at which position when first met
    store.start(done, failed)     on the running loop: starts the writer thread; `done(seq)` and
                                  `failed(StoreFailed)` are called on the loop
    store.submit(persist)         returns at once; all that waits shares one transaction and fsync
    store.backlog_bytes           payload bytes submitted and not durable yet
    await store.close()           finishes what was submitted, then closes

After `failed` nothing is written any more and `done` is never called again: the node halts.
"""

from lock_manager.storage.data_dir import Owner
from lock_manager.storage.errors import (
    CorruptStore,
    ForeignStore,
    StoreError,
    StoreFailed,
    StoreInUse,
)
from lock_manager.storage.store import Store

__all__ = [
    "CorruptStore",
    "ForeignStore",
    "Owner",
    "Store",
    "StoreError",
    "StoreFailed",
    "StoreInUse",
]
