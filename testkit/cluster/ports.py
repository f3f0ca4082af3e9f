"""Free loopback ports that stay reserved until the node that was promised them binds.

Asking the kernel for a port and closing the socket is a race between tests (and against outgoing
connections, which draw from the same range). So the socket stays bound, but never listens. On
Linux a bound, non-listening socket with SO_REUSEADDR lets another one with that flag (asyncio sets
it) bind and listen on top. Elsewhere the reservation must be released just before the start.
"""

from __future__ import annotations

import socket
import sys
from typing import Final

SHARES: Final = sys.platform == "linux"


class Reservation:
    """A loopback port nobody else is given. `release()` when done."""

    __slots__ = ("_socket", "port")

    def __init__(self) -> None:
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        held.bind(("127.0.0.1", 0))
        if SHARES:
            # After bind, so that the kernel chose a port with no other claim on it.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port: int = held.getsockname()[1]
        self._socket = held

    @property
    def address(self) -> str:
        """`127.0.0.1:port`."""
        return f"127.0.0.1:{self.port}"

    def about_to_bind(self) -> None:
        """A node will bind this port now; frees it where sharing is impossible."""
        if not SHARES:
            self._socket.close()

    def release(self) -> None:
        """Give the port back."""
        self._socket.close()


def free_port() -> int:
    """A port that is free now. Prefer `Reservation`; this one may be taken by somebody else."""
    reservation = Reservation()
    reservation.release()
    return reservation.port
