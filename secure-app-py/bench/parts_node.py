"""A node with one of its parts switched off, to see what the part costs. For the bench only: the
product has no such switch.

python parts_node.py audit|encryption|authorisation|tally|cache|replication FLAGS…
                     express|gathering|loop FLAGS…   (what makes it quicker)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from secure_store import server
from secure_store.api.express import Express
from secure_store.gathering import Gathering
from secure_store.node import Node
from secure_store.storage.audit_log import AuditLog
from secure_store.storage.connection import Connection
from secure_store.storage.keyring import OVERHEAD_BYTES, Keyring
from secure_store.storage.view import View
from secure_store.storage.writer import Writer


def nothing(*_: Any, **__: Any) -> None:
    return None


def switch_off(part: str) -> None:
    """Replace the part's methods by ones that do nothing."""
    target: Any
    match part:
        case "audit":
            target = AuditLog
            target.note = target.note_read = target.written = nothing
        case "encryption":
            target = Keyring
            target.seal = lambda _self, _name, plain: bytes(OVERHEAD_BYTES) + plain
            target.open = lambda _self, _name, sealed: sealed[OVERHEAD_BYTES:]
        case "authorisation":
            everybody: list[Any] = []

            def authenticate(self: Any, token: str) -> Any:
                if not everybody:
                    everybody.append(real(self, token))
                return everybody[0]

            target = Node
            real = target.authenticate
            target.authenticate = authenticate
            target.allows = lambda *_: True
        case "cache":
            target = View
            target._remember = nothing
        case "tally":
            target = Connection
            target.came = target.went = target.log_grew = nothing
            target.commit = lambda self: self.db.execute("COMMIT")
        case "express":
            target = Express
            target.get = nothing
        case "gathering":
            target = Gathering
            target.begin = lambda self: self._loop.call_soon(self._go)
        case "loop":
            target = Writer
            target._may_commit = lambda *_: False
        case "replication":
            pass  # it is started without a replica
        case _:
            raise SystemExit(f"no such part: {part}")


if __name__ == "__main__":
    switch_off(sys.argv[1])
    sys.exit(server.main(sys.argv[2:]))
