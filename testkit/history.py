"""What clients did and saw: invocations and completions in real-time order.

An operation ends as `ok` (it happened, with this result), `fail` (it certainly did not happen) or
`unknown` (a timeout, a reset, `"definite": false`): it may take effect at any later time, or never.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

Status = Literal["ok", "fail", "unknown"]


class Operation(msgspec.Struct, kw_only=True):
    """One client call. `process` is the client: it waits for each answer before it calls again.

    `completed_us` is None while the outcome is unknown (also if it never completed).
    `kind` names the operation ("read", "cas", "acquire" …), `argument` its input, `result` what
    came back, `info` anything for a human (the HTTP status, the error).
    """

    number: int
    process: str
    kind: str
    key: str = ""
    argument: Any = None
    invoked_us: int
    completed_us: int | None = None
    status: Status = "unknown"
    result: Any = None
    info: Any = None

    def __str__(self) -> str:
        end = "…" if self.completed_us is None else f"{self.completed_us / 1000:.3f}"
        shown = "" if self.result is None else f" -> {self.result!r}"
        note = "" if self.info is None else f" ({self.info})"
        argument = "" if self.argument is None else f" {self.argument!r}"
        return (
            f"[{self.invoked_us / 1000:.3f}..{end}] {self.process}: {self.kind} {self.key}"
            f"{argument} {self.status}{shown}{note}"
        )


class History:
    """Records operations; `clock` returns microseconds (the monotonic clock by default)."""

    def __init__(
        self,
        operations: Iterable[Operation] = (),
        *,
        clock: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        self.operations = list(operations)
        self._clock = clock
        self._last_us = 0

    def invoke(self, process: str, kind: str, key: str = "", argument: Any = None) -> Operation:
        """The call leaves now. Complete it with `ok`, `fail` or `unknown`, or leave it unknown."""
        operation = Operation(
            number=len(self.operations),
            process=process,
            kind=kind,
            key=key,
            argument=argument,
            invoked_us=self._tick(),
        )
        self.operations.append(operation)
        return operation

    def ok(self, operation: Operation, result: Any = None, info: Any = None) -> None:
        """It happened, and answered `result`."""
        self._complete(operation, "ok", result, info)

    def fail(self, operation: Operation, result: Any = None, info: Any = None) -> None:
        """It certainly did not happen (a definite refusal, or the request never left)."""
        self._complete(operation, "fail", result, info)

    def unknown(self, operation: Operation, info: Any = None) -> None:
        """Nobody knows. It stays open to the end of the history."""
        operation.status, operation.info = "unknown", info

    def _complete(self, operation: Operation, status: Status, result: Any, info: Any) -> None:
        operation.status, operation.result, operation.info = status, result, info
        operation.completed_us = self._tick()

    def _tick(self) -> int:
        """Strictly increasing, so that what was recorded first is ordered first in any clock."""
        self._last_us = max(self._clock(), self._last_us + 1)
        return self._last_us

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    def __len__(self) -> int:
        return len(self.operations)

    def by_key(self) -> dict[str, list[Operation]]:
        """Operations of each key, in order of invocation."""
        keys: dict[str, list[Operation]] = {}
        for operation in self.operations:
            keys.setdefault(operation.key, []).append(operation)
        return keys

    def save(self, path: Path | str) -> None:
        """Write JSON lines, one operation each."""
        lines = [msgspec.json.encode(operation) for operation in self.operations]
        Path(path).write_bytes(b"\n".join([*lines, b""]))

    @classmethod
    def load(cls, path: Path | str) -> History:
        """Read what `save` wrote (to replay a failing history)."""
        decoder = msgspec.json.Decoder(Operation)
        return cls(decoder.decode(line) for line in Path(path).read_bytes().splitlines())
