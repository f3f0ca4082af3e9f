"""Who is where: a member's name and addresses, as far as this node knows them.

Flags say where to dial (which may be a proxy, and differs from node to node); the configuration
says it for members that were added later.
"""

from __future__ import annotations

from lock_manager.config import Address, Config
from lock_manager.core.peer_book import PeerBook
from lock_manager.core.raft import Configuration, Member


class Directory:
    def __init__(self, config: Config, book: PeerBook) -> None:
        self._config = config
        self._book = book

    def name(self, position: int) -> str | None:
        """The `--id` of the node at a position; None before first contact."""
        if position == self._config.position:
            return self._config.node_id
        known = self._book.expected(position)
        return known.node_id or None if known is not None else None

    def find(self, configuration: Configuration, name: str) -> Member | None:
        """A member by its name."""
        return next((m for m in configuration.members if self.name(m.node_id) == name), None)

    def dialled(self, configuration: Configuration) -> dict[int, str]:
        """Where to dial every other member; while a node that joins knows of none, everybody whom
        its flags name."""
        if configuration.members:
            addresses = {
                m.node_id: m.raft_addr or self._by_flags(self._config.peers, m.node_id)
                for m in configuration.members
            }
        else:
            addresses = {i: str(address) for i, address in enumerate(self._config.peers, 1)}
        return {
            position: address
            for position, address in addresses.items()
            if address and position != self._config.position
        }

    def http_addr(self, member: Member) -> str:
        """Where clients find a member; empty if nobody said so."""
        return member.http_addr or self._by_flags(self._config.peer_http_addrs, member.node_id)

    def leader(
        self, configuration: Configuration, position: int | None
    ) -> tuple[str | None, str | None]:
        """Name and URL of the leader at `position`, as far as they are known."""
        if position is None:
            return None, None
        address = self.http_addr(configuration.get(position) or Member(node_id=position))
        return self.name(position), f"{self._config.scheme}://{address}" if address else None

    def free_position(self, configuration: Configuration, raft_addr: str) -> int:
        """The position of a node that is to be added: its place in the flags, or the next one."""
        taken = {member.node_id for member in configuration.members}
        flags = [str(address) for address in self._config.peers]
        if raft_addr in flags and flags.index(raft_addr) + 1 not in taken:
            return flags.index(raft_addr) + 1
        return max(len(flags), *taken) + 1

    @staticmethod
    def _by_flags(addresses: tuple[Address, ...], position: int) -> str:
        return str(addresses[position - 1]) if position <= len(addresses) else ""
