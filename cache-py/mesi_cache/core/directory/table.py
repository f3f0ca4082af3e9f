"""A key's life at its home, as a table. Everything the directory does to an entry stands here.

State of the entry:

    N           nothing in memory: the value, if there is one, is in the store
    U           value loaded, no cache holds a copy
    S           caches hold shared copies
    EM          one cache, the owner, holds it exclusively (clean or modified: it does not say)
    BUSY_LOAD   waiting for the store
    BUSY_INV    waiting until every sharer has acknowledged, or its lease has run out
    BUSY_FETCH  waiting until the owner has given it up, or its lease has run out

A request that meets other nodes' copies first clears them away (BUSY_*), then is looked at again
in the stable state that this leaves (RESUME): every request ends in one of a few one-line rows.
"""

from enum import StrEnum


class State(StrEnum):
    N = "N"
    U = "U"
    S = "S"
    EM = "EM"
    BUSY_LOAD = "BUSY_LOAD"
    BUSY_INV = "BUSY_INV"
    BUSY_FETCH = "BUSY_FETCH"


class Event(StrEnum):
    # The current request, classified against the entry:
    ASK = "ask"  # any request, value not loaded
    READ = "read"  # GetS, there is a value
    READ_NONE = "read_none"  # GetS, there is none
    CHANGE = "change"  # GetM that takes effect; others hold copies, or nobody does
    CHANGE_ALONE = "change_alone"  # GetM that takes effect, from the only sharer
    ERASE = "erase"  # GetM that deletes
    NO_CHANGE = "no_change"  # GetM without effect: a CAS that fails, a delete of nothing
    OUTDATED = "outdated"  # the value's own deadline has passed
    RETURN = "return"  # the owner asks anew: it no longer has its copy
    # What else happens:
    LOADED = "loaded"
    LOAD_FAILED = "load_failed"  # who waits for it asks again
    SHARED = "shared"  # cleared away, and a shared copy remains
    FREE = "free"  # cleared away, no copy remains
    GONE = "gone"  # the last copy was put back
    BACKUP = "backup"


class Do(StrEnum):
    LOAD = "load"
    RESUME = "resume"  # look at the current request again
    GRANT_S = "grant_s"
    GRANT_E = "grant_e"
    GRANT_M = "grant_m"
    ANSWER = "answer"  # without a copy
    LOG = "log"  # the operation's effect becomes the value, its outcome is remembered
    LOG_DEADLINE = "log_deadline"  # the deadline's effect does: a delete
    INVALIDATE = "invalidate"
    FETCH_KEEP = "fetch_keep"
    FETCH_DROP = "fetch_drop"
    FORGET = "forget"  # the owner's copy


S, E, D = State, Event, Do
Row = tuple[State, tuple[Do, ...]]

_ROWS: dict[State, dict[Event, Row]] = {
    S.N: {E.ASK: (S.BUSY_LOAD, (D.LOAD,))},
    S.BUSY_LOAD: {E.LOADED: (S.U, (D.RESUME,)), E.LOAD_FAILED: (S.N, ())},
    S.U: {
        E.READ: (S.EM, (D.GRANT_E,)),
        E.READ_NONE: (S.U, (D.ANSWER,)),
        E.CHANGE: (S.EM, (D.LOG, D.GRANT_M)),
        E.ERASE: (S.U, (D.LOG, D.ANSWER)),
        E.NO_CHANGE: (S.U, (D.LOG, D.ANSWER)),
        E.OUTDATED: (S.U, (D.LOG_DEADLINE, D.RESUME)),
    },
    S.S: {
        E.READ: (S.S, (D.GRANT_S,)),
        E.CHANGE: (S.BUSY_INV, (D.INVALIDATE,)),
        E.CHANGE_ALONE: (S.EM, (D.LOG, D.GRANT_M)),
        E.ERASE: (S.BUSY_INV, (D.INVALIDATE,)),
        E.NO_CHANGE: (S.S, (D.LOG, D.ANSWER)),
        E.OUTDATED: (S.BUSY_INV, (D.INVALIDATE,)),
        E.GONE: (S.U, ()),
    },
    S.EM: {
        E.READ: (S.BUSY_FETCH, (D.FETCH_KEEP,)),
        E.CHANGE: (S.BUSY_FETCH, (D.FETCH_DROP,)),
        E.OUTDATED: (S.BUSY_FETCH, (D.FETCH_DROP,)),
        E.RETURN: (S.U, (D.FORGET, D.RESUME)),
        E.GONE: (S.U, ()),
        E.BACKUP: (S.EM, ()),
    },
    S.BUSY_INV: {
        E.SHARED: (S.S, (D.RESUME,)),
        E.FREE: (S.U, (D.RESUME,)),
    },
    S.BUSY_FETCH: {
        E.SHARED: (S.S, (D.RESUME,)),
        E.FREE: (S.U, (D.RESUME,)),
        # The owner's backups never queue behind the transaction that waits for the owner.
        E.BACKUP: (S.BUSY_FETCH, ()),
    },
}

TABLE: dict[tuple[State, Event], Row] = {
    (state, event): row for state, rows in _ROWS.items() for event, row in rows.items()
}

BUSY = frozenset({S.BUSY_LOAD, S.BUSY_INV, S.BUSY_FETCH})
STABLE = frozenset({S.U, S.S, S.EM})
