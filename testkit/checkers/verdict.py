"""What a checker says: valid, invalid with the operations that show it, or gave up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from testkit.history import Operation


@dataclass(frozen=True, slots=True)
class Verdict:
    """`valid` is None if the search was bounded before it found out.

    `window`: the operations that show the violation, in order of invocation.
    `counts`: what a checker counted on its way (duplicates, configurations …).
    """

    valid: bool | None
    reason: str = ""
    window: Sequence[Operation] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def require(self) -> Verdict:
        """Itself if valid; AssertionError with the evidence otherwise (also after giving up)."""
        if self.valid is not True:
            raise AssertionError(str(self))
        return self

    def __str__(self) -> str:
        word = {True: "valid", False: "INVALID", None: "GAVE UP"}[self.valid]
        lines = [f"{word}: {self.reason}" if self.reason else word]
        lines += [f"  {operation}" for operation in self.window]
        if self.counts:
            lines.append("  " + " ".join(f"{k}={v}" for k, v in sorted(self.counts.items())))
        return "\n".join(lines)
