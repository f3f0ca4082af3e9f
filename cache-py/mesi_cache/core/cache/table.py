"""A line's life on one node, as a table. Everything the requester does to a line stands here.

State of the line (the names are those of gem5's directory protocols):

    I S E M   stable: absent, shared copy, exclusive clean, modified
    IS_D      asked to read, waiting for data
    IS_D_I    the same, but an invalidation came first: data granted below it may be used once only
    IM_D      asked to change, waiting for data
    SM_D      the same with a shared copy that can still be read
    MI_A EI_A SI_A   gave the line up (it holds no slot), waiting for the home's acknowledgement
    II_A      the same, and the home has asked for it meanwhile

A pair that is not in the table cannot happen between correct nodes; it is ignored and counted, so
that a faulty peer cannot bring a node down.
"""

from enum import StrEnum


class State(StrEnum):
    I = "I"  # noqa: E741 - the protocol's own name
    S = "S"
    E = "E"
    M = "M"
    IS_D = "IS_D"
    IS_D_I = "IS_D_I"
    IM_D = "IM_D"
    SM_D = "SM_D"
    MI_A = "MI_A"
    EI_A = "EI_A"
    SI_A = "SI_A"
    II_A = "II_A"


class Event(StrEnum):
    LOAD = "load"  # a client reads and there is no copy
    STORE = "store"  # a client changes and this node is not the owner
    EVICT = "evict"  # the slot is needed
    ERASED = "erased"  # the owner's own delete is logged
    COMMIT = "commit"  # the owner's own change is logged
    REFUSED = "refused"  # a change was not logged: the grant had ended
    INV = "inv"
    FETCH_KEEP = "fetch_keep"  # a shared copy may stay
    FETCH_DROP = "fetch_drop"
    DATA_S = "data_s"
    DATA_E = "data_e"
    DATA_M = "data_m"
    DATA_DEAD = "data_dead"  # granted below an invalidation seen, or after the lease ran out
    DATA_NONE = "data_none"  # answered without a copy: absent, or nothing changed
    PUT_ACK = "put_ack"
    ASK_HOME = "ask_home"  # a change that has a name: only the home knows whether it has happened
    PASSED = "passed"  # the value's own deadline is near: only the home may still tell
    LOST = "lost"  # the home restarted
    GIVE_UP = "give_up"  # nobody waits any longer, or the lease of a line put back is over


class Do(StrEnum):
    SEND_GETS = "send_gets"
    SEND_GETM = "send_getm"
    SEND_PUT = "send_put"
    RESEND = "resend"
    KILL = "kill"  # remember the number: data granted below it is dead
    DROP = "drop"  # the copy and its slot go; changes under way are asked for anew
    ACK_INV = "ack_inv"
    ACK_GONE = "ack_gone"  # to a fetch: nothing here
    ACK_KEPT = "ack_kept"  # to a fetch: owner no more, a shared copy stays
    INSTALL = "install"
    SERVE_ONCE = "serve_once"  # readers who waited before the data died
    SERVE_NONE = "serve_none"  # readers who waited before the request was sent
    SETTLE = "settle"  # the request is over
    WRITE = "write"  # the line takes the logged value


S, E, D = State, Event, Do
Row = tuple[State, tuple[Do, ...]]

_ASKED_TO_READ: dict[Event, Row] = {
    E.INV: (S.IS_D_I, (D.KILL, D.ACK_INV)),
    E.FETCH_KEEP: (S.IS_D_I, (D.KILL, D.ACK_GONE)),
    E.FETCH_DROP: (S.IS_D_I, (D.KILL, D.ACK_GONE)),
    E.DATA_S: (S.S, (D.INSTALL, D.SETTLE)),
    E.DATA_E: (S.E, (D.INSTALL, D.SETTLE)),
    E.DATA_DEAD: (S.I, (D.SERVE_ONCE, D.SETTLE)),
    E.DATA_NONE: (S.I, (D.SERVE_NONE, D.SETTLE)),
    E.GIVE_UP: (S.I, (D.SETTLE,)),
}
_OWNED: dict[Event, Row] = {
    E.COMMIT: (S.M, (D.WRITE,)),
    E.ERASED: (S.MI_A, (D.DROP, D.SEND_PUT)),
    E.REFUSED: (S.I, (D.DROP,)),
    E.INV: (S.I, (D.DROP, D.ACK_INV)),
    E.FETCH_KEEP: (S.S, (D.ACK_KEPT,)),
    E.FETCH_DROP: (S.I, (D.DROP, D.ACK_GONE)),
    E.ASK_HOME: (S.I, (D.DROP,)),
    E.PASSED: (S.I, (D.DROP,)),
    E.LOST: (S.I, (D.DROP,)),
}
_GIVEN_UP: dict[Event, Row] = {
    E.INV: (S.II_A, (D.ACK_INV,)),
    E.FETCH_KEEP: (S.II_A, (D.ACK_GONE,)),
    E.FETCH_DROP: (S.II_A, (D.ACK_GONE,)),
    E.PUT_ACK: (S.I, ()),
    E.LOST: (S.I, ()),
    E.GIVE_UP: (S.I, ()),
}
_ROWS: dict[State, dict[Event, Row]] = {
    S.I: {
        E.LOAD: (S.IS_D, (D.SEND_GETS,)),
        E.STORE: (S.IM_D, (D.SEND_GETM,)),
        E.INV: (S.I, (D.ACK_INV,)),
        E.FETCH_KEEP: (S.I, (D.ACK_GONE,)),
        E.FETCH_DROP: (S.I, (D.ACK_GONE,)),
    },
    S.S: {
        E.STORE: (S.SM_D, (D.SEND_GETM,)),
        E.EVICT: (S.SI_A, (D.DROP, D.SEND_PUT)),
        E.INV: (S.I, (D.DROP, D.ACK_INV)),
        E.FETCH_KEEP: (S.I, (D.DROP, D.ACK_GONE)),
        E.FETCH_DROP: (S.I, (D.DROP, D.ACK_GONE)),
        E.PASSED: (S.I, (D.DROP,)),
        E.LOST: (S.I, (D.DROP,)),
    },
    S.E: {E.EVICT: (S.EI_A, (D.DROP, D.SEND_PUT)), **_OWNED},
    S.M: {E.EVICT: (S.MI_A, (D.DROP, D.SEND_PUT)), **_OWNED},
    S.IS_D: {E.LOST: (S.IS_D, (D.RESEND,)), **_ASKED_TO_READ},
    S.IS_D_I: {E.LOST: (S.IS_D_I, (D.RESEND,)), **_ASKED_TO_READ},
    S.IM_D: {
        E.INV: (S.IM_D, (D.KILL, D.ACK_INV)),
        E.FETCH_KEEP: (S.IM_D, (D.KILL, D.ACK_GONE)),
        E.FETCH_DROP: (S.IM_D, (D.KILL, D.ACK_GONE)),
        E.DATA_M: (S.M, (D.INSTALL, D.SETTLE)),
        E.DATA_DEAD: (S.I, (D.SETTLE,)),
        E.DATA_NONE: (S.I, (D.SETTLE,)),
        E.LOST: (S.IM_D, (D.RESEND,)),
        E.GIVE_UP: (S.I, (D.SETTLE,)),
    },
    S.SM_D: {
        E.EVICT: (S.IM_D, (D.DROP,)),
        E.INV: (S.IM_D, (D.DROP, D.KILL, D.ACK_INV)),
        E.FETCH_KEEP: (S.IM_D, (D.DROP, D.KILL, D.ACK_GONE)),
        E.FETCH_DROP: (S.IM_D, (D.DROP, D.KILL, D.ACK_GONE)),
        E.DATA_M: (S.M, (D.INSTALL, D.SETTLE)),
        E.DATA_DEAD: (S.I, (D.DROP, D.SETTLE)),
        E.DATA_NONE: (S.S, (D.SETTLE,)),
        E.PASSED: (S.IM_D, (D.DROP,)),
        E.LOST: (S.IM_D, (D.DROP, D.RESEND)),
        # The home may have made us owner of a newer value, so the old copy must go as well.
        E.GIVE_UP: (S.I, (D.DROP, D.SETTLE)),
    },
    S.MI_A: dict(_GIVEN_UP),
    S.EI_A: dict(_GIVEN_UP),
    S.SI_A: dict(_GIVEN_UP),
    S.II_A: dict(_GIVEN_UP),
}

TABLE: dict[tuple[State, Event], Row] = {
    (state, event): row for state, rows in _ROWS.items() for event, row in rows.items()
}

READABLE = frozenset({S.S, S.E, S.M, S.SM_D})
LETTER = {S.S: "S", S.E: "E", S.M: "M", S.SM_D: "S"}  # of a line that holds a slot, for people
OWNING = frozenset({S.E, S.M})
ASKING = frozenset({S.IS_D, S.IS_D_I, S.IM_D, S.SM_D})
PUTTING = frozenset({S.MI_A, S.EI_A, S.SI_A, S.II_A})
