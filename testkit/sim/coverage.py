"""Counts of what a simulation met. A suite that met no election has proven nothing about them."""

from __future__ import annotations

from collections import Counter


class Coverage(Counter[str]):
    """A counter of named happenings, summed over seeds."""

    def hit(self, name: str, count: int = 1) -> None:
        """It happened."""
        self[name] += count

    def require(self, name: str, at_least: int = 1) -> None:
        """Fail unless `name` happened `at_least` times over all seeds."""
        if self[name] < at_least:
            met = ", ".join(f"{key}={self[key]}" for key in sorted(self)) or "nothing"
            raise AssertionError(
                f"coverage: {name!r} happened {self[name]} times, {at_least} required; met: {met}"
            )

    def table(self) -> str:
        """One `name count` line each, in order of name."""
        return "\n".join(f"{name:<32} {self[name]}" for name in sorted(self))
