"""Connections in the simulated network: ordered streams over something that orders nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from secure_store.core.messages import Message

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


@dataclass(frozen=True, slots=True)
class Syn:
    """I dial you on this connection."""

    connection: tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """One message of a connection's stream."""

    connection: tuple[str, int, int]
    number: int
    message: Message


@dataclass(frozen=True, slots=True)
class Reset:
    connection: tuple[str, int, int]


def wire(packet: Any) -> Any:
    """Every message crosses the real codec."""
    if isinstance(packet, Part):
        message = _decoder.decode(_encoder.encode(packet.message))
        return Part(packet.connection, packet.number, message)
    return packet


class Stream:
    """One end of a connection: an ordered stream over a network that orders nothing."""

    def __init__(self, link: int, connection: tuple[str, int, int], *, dialed: bool) -> None:
        self.link = link
        self.connection = connection
        self.dialed = dialed
        self.answered = not dialed
        self.sent = 0
        self.taken = 0
        self.early: dict[int, Message] = {}
        self.gap_since_ms: int | None = None
