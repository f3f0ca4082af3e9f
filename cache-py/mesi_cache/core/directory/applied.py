"""Which operations have happened, so that one asked for again happens once.

As in RIFL (Lee et al., SOSP 2015): every message with an operation id tells the *floor* below which
its sender no longer waits, so the memory is bounded by what is under way, without a clock.
"""

from collections.abc import Iterator

from mesi_cache.core.records import Outcome


class Applied:
    """Per member: its floor, and the outcomes of its operations from there on."""

    def __init__(self) -> None:
        self._floors: dict[str, int] = {}
        self._outcomes: dict[str, dict[int, Outcome]] = {}
        self._kept: dict[str, int] = {}  # how many outcomes the last sweep left

    def outcome(self, source: str, operation_id: int) -> Outcome | None:
        """What this operation did, if it has happened."""
        outcomes = self._outcomes.get(source)
        return outcomes.get(operation_id) if outcomes else None

    def forgotten(self, source: str, operation_id: int) -> bool:
        """Its sender no longer waits for it, and whether it happened is no longer known: it must
        not be done now."""
        return operation_id < self._floors.get(source, 0)

    def note_floor(self, source: str, floor: int) -> None:
        if floor > self._floors.get(source, 0):
            self._floors[source] = floor

    def add(self, source: str, operation_id: int, outcome: Outcome) -> None:
        outcomes = self._outcomes.setdefault(source, {})
        outcomes[operation_id] = outcome
        # A sweep costs what it looks at; doing it when the number has doubled makes it O(1) each.
        if len(outcomes) > 2 * self._kept.get(source, 0) + 64:
            floor = self._floors.get(source, 0)
            kept = {id: outcome for id, outcome in outcomes.items() if id >= floor}
            self._outcomes[source] = kept
            self._kept[source] = len(kept)

    def rows(self) -> Iterator[tuple[str, int, int, Outcome | None]]:
        """(member, floor, operation id, outcome) of everything that must survive a restart."""
        for source, floor in self._floors.items():
            yield source, floor, 0, None
        for source, outcomes in self._outcomes.items():
            floor = self._floors.get(source, 0)
            for operation_id, outcome in outcomes.items():
                if operation_id >= floor:
                    yield source, floor, operation_id, outcome

    def restore(self, source: str, floor: int, operation_id: int, outcome: Outcome | None) -> None:
        """Take in one row of `rows`, or what a log line says."""
        self.note_floor(source, floor)
        if outcome is not None:
            self.add(source, operation_id, outcome)
