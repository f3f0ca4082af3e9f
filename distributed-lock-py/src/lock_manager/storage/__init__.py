"""Keeps what Raft must not forget: durable before anyone is told.

    store = Store.open(data_dir)  blocking, at start-up; raises StoreError or its subclasses
                                  CorruptStore, StoreInUse (main: one line, exit 2)
    store.restored                core.raft.Restored, checked row by row
    store.store_id                this directory's random id (hex), made together with it
    store.identity, bind_peer()   whose directory this is and whom it met (identity.py)
    store.start(done, failed)     on the running loop: starts the writer thread; `done(seq)` and
                                  `failed(error)` are called on the loop
    store.submit(persist)         never blocks; all that waits shares one transaction and one fsync
    store.backlog_bytes           payload bytes submitted and not durable yet
    await store.close()           finishes what was submitted, then closes

After `failed` nothing is written any more and `done` is never called again: the node halts.
"""
