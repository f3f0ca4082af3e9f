"""A node whose peers are nowhere, opened and not started: tests play its core and its links."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from message_queue import config as configuration
from message_queue.admission import identity, place_at_start
from message_queue.api.events import EventHub
from message_queue.metrics import Metrics
from message_queue.node import Node
from message_queue.storage.data_dir import DataDir


@asynccontextmanager
async def lone_node(directory: Path) -> AsyncIterator[Node]:
    """At position 0 of three; its store and directory are closed at the end."""
    peers = "--peers=127.0.0.1:1,127.0.0.1:2,127.0.0.1:3"
    argv = ["--id=a", "--addr=127.0.0.1:1", f"--dataDir={directory}", peers]
    config = configuration.parse(argv, {})
    place = place_at_start(config)
    assert place is not None
    its = DataDir.open(directory, identity(config, place))
    node = await Node.open(config, place, Metrics(), EventHub(), its)
    yield node
    await node.store.close()
    its.close()
