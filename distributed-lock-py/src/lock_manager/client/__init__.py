"""The Python client.

    async with LockClient(["http://127.0.0.1:8000", "http://127.0.0.1:8001"]) as client:
        async with client.lock("jobs", ttl_ms=5_000) as held:
            write(token=held.fencing_token)

It finds the leader, follows it when it changes, and sends every request again under the same
request id until the outcome is known. In the background it keeps the leases alive. When one is
lost all the same (no majority for too long, an operator, this process slept), `held.lost` becomes
true and the body of the `async with` is cancelled and leaves by `LeaseLost`: code that believes it
holds a lock must not go on by mistake. What the body did in its last moments is only safe if the
resource checks `held.fencing_token`.

A lease is counted from the moment its request was *sent*, so the client gives up no later than the
cluster does. One `LockClient` is one `client_id`: within it a lock is held once at a time, and a
second task that wants the same one waits its turn here.
"""

from lock_manager.client.errors import (
    DeadlockDetected,
    LeaseLost,
    LockError,
    LockHeld,
    LockTimeout,
    Refused,
    Unavailable,
)
from lock_manager.client.locks import Held, LockClient

__all__ = [
    "DeadlockDetected",
    "Held",
    "LeaseLost",
    "LockClient",
    "LockError",
    "LockHeld",
    "LockTimeout",
    "Refused",
    "Unavailable",
]
