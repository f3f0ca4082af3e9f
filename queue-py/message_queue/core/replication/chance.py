"""Chance, passed in as a seed: splitmix64 (Steele, Lea, Flood 2014)."""

from __future__ import annotations

WORD = (1 << 64) - 1


class Chance:
    """A deterministic stream of numbers."""

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed & WORD

    def word(self) -> int:
        """64 bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & WORD
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return z ^ (z >> 31)

    def below(self, limit: int) -> int:
        """0..limit-1, evenly enough."""
        return self.word() % limit
