"""Talks to the other nodes: one long-lived WebSocket per ordered pair, each carrying the messages
of one direction as MessagePack batches (see links.py)."""
