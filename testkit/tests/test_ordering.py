"""Files that wait and files that compute take turns; nothing is lost, no file is torn."""

from dataclasses import dataclass, field

from testkit.ordering import taking_turns


@dataclass(frozen=True)
class Stub:
    nodeid: str
    marks: frozenset[str] = field(default_factory=frozenset)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


def file(name: str, count: int, *marks: str) -> list[Stub]:
    return [Stub(f"{name}.py::test_{n}", frozenset(marks)) for n in range(count)]


def test_waiting_and_computing_files_take_turns_and_simulations_come_first() -> None:
    unit, other = file("unit", 3), file("other", 1)
    sim, chaos, rows = (
        file("sim", 2, "sim"),
        file("chaos", 2, "cluster"),
        file("rows", 1, "cluster"),
    )
    assert taking_turns([*unit, *chaos, *other, *sim, *rows]) == [
        *chaos, *sim, *rows, *unit, *other,
    ]  # fmt: skip


def test_one_kind_alone_keeps_its_order() -> None:
    chaos, rows = file("chaos", 2, "cluster"), file("rows", 3, "cluster")
    assert taking_turns([*chaos, *rows]) == [*chaos, *rows]
    assert taking_turns([*file("b", 2), *file("a", 1)]) == [*file("b", 2), *file("a", 1)]
    assert taking_turns([]) == []
