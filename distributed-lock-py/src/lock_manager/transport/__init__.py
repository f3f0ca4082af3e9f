"""Talks to the other nodes: one long-lived WebSocket per ordered pair, each carrying the messages
of one direction as MessagePack batches.

    book = core.peer_book.PeerBook(me: Hello, bound=store.peers, bind=store.bind_peer)
    book.follow(configuration)    at start (core.configuration) and on ConfigurationChanged
    book.unrecorded()             leader: a Member to propose by core.update, or None
    links = Links(me, admit=book.judge, on_messages=, on_broken=, secret=, client_ssl=)
    links.connect({position: "host:port"})   on the loop; again when addresses change
    links.send(effects.messages)
    links.accept                  aiohttp handler, to be routed at LINK_PATH on the raft address
    links.connected, links.counters
    await links.stop()
"""

from lock_manager.transport.links import LINK_PATH, SECRET_HEADER, LinkCounters, Links

__all__ = [
    "LINK_PATH",
    "SECRET_HEADER",
    "LinkCounters",
    "Links",
]
