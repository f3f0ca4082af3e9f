"""Which member is a key's home: rendezvous hashing (Thaler & Ravishankar 1998) over the members.

Every node computes the same answer from the same member list, with nothing to exchange; a member
list with one member more or less moves only that member's keys.
"""

from hashlib import blake2b

_RECENT = 4096
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    # splitmix64's finaliser: one strong hash of the key, then a cheap bijection per member.
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class Placement:
    """The members of the cluster (base URLs), and the home of each key."""

    def __init__(self, members: list[str]) -> None:
        self.members = sorted(set(members))
        self._seeds = [(_digest(member), member) for member in self.members]
        self._recent: dict[str, str] = {}  # a transaction asks for the same key several times

    def home(self, key: str) -> str:
        """The one member that holds `key`'s main-memory value and serialises its transactions."""
        home = self._recent.get(key)
        if home is None:
            digest = _digest(key)
            home = max((_mix(seed ^ digest), member) for seed, member in self._seeds)[1]
            if len(self._recent) >= _RECENT:
                self._recent.clear()
            self._recent[key] = home
        return home
