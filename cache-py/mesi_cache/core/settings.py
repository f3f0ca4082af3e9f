"""The core's own constants of one run; config.py fills them from the flags."""

import msgspec

from mesi_cache.core.cache.slots import Policy


class Settings(msgspec.Struct, frozen=True):
    """Durations in milliseconds."""

    me: str  # this member's base URL
    capacity: int  # slots, at least 1
    lease_ms: int = 2_000  # how long a copy lives without a word from its home
    resend_ms: int = 200  # after which an unanswered message is sent again
    call_ms: int = 4_000  # after which a client is told that there is no answer
    policy: Policy = "lru"
    max_pending: int = 1_000  # invalidations that one RenewAck carries
    max_held: int = 100_000  # requests that a restarted home keeps until it may grant again
