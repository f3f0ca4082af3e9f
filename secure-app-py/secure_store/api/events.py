"""GET /events: what happens in the node, as server-sent events."""

from __future__ import annotations

import msgspec

from secure_store.api.streams import Hub, Listener

MAX_SUBSCRIBERS = 64


class EventHub(Hub[Listener]):
    """Fan-out to subscribers. `publish` never waits: slow readers lose the oldest, and are told."""

    def __init__(self) -> None:
        super().__init__(MAX_SUBSCRIBERS)

    def publish(self, kind: str, **fields: object) -> None:
        """Send `{"kind": …, **fields}` to everyone who listens; free when nobody does."""
        if self.listeners:
            line = b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(fields))
            for subscriber in self.listeners:
                subscriber.put(line)
