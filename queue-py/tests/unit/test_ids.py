"""Message ids: what was issued is read back, nothing else is taken for issued."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from message_queue.core.ids import (
    delivery_text,
    id_bytes,
    ids_of,
    message_id,
    pack_dot,
    parse_delivery,
    parse_id,
    parse_ids,
    unpack_dot,
)


@settings(deadline=None)
@given(st.integers(0, 4095), st.integers(1, 2**53), st.integers(1, 2**40 - 1))
def test_an_id_names_its_message(partition: int, epoch: int, seq: int) -> None:
    dot = pack_dot(epoch, seq)
    assert unpack_dot(dot) == (epoch, seq)
    assert parse_id(message_id(partition, dot)) == (partition, dot)


# With digits that are no ASCII, which `int` would take. (All of Unicode costs four seconds.)
@settings(deadline=None)
@given(st.text("0123456789abcdefgABF-_.+ \n\0\u0660\u00b2\uff11", max_size=80))
def test_made_up_ids_are_none(text: str) -> None:
    name = parse_id(text)
    assert name is None or message_id(*name) == text


@settings(deadline=None)
@given(
    st.integers(0, 4095),
    st.integers(1, 2**53),
    st.sampled_from([1, 3, 200, 255, 256, 1020, 2**20, 2**39]),
    st.integers(1, 600),
    st.sets(st.integers(0, 599), max_size=3),
)
def test_ids_of_neighbours_are_the_same_as_one_by_one(
    partition: int, epoch: int, seq: int, count: int, wrong: set[int]
) -> None:
    first = pack_dot(epoch, seq)
    ids = ids_of(partition, first, count)
    assert ids == [id_bytes(partition, dot) for dot in range(first, first + count)]
    texts = [name.decode() for name in ids]
    for at in wrong:
        texts[at % count] += "0"
    assert parse_ids(texts) == [parse_id(text) for text in texts]


@settings(deadline=None)
@given(
    st.integers(0, 4095),
    st.lists(
        st.tuples(
            st.tuples(st.integers(1, 2**53), st.integers(1, 2**39)),
            st.integers(1, 1000),
            st.integers(1, 2**53),
            st.integers(1, 99),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_a_delivery_is_named_and_no_other_text_names_it(
    partition: int, named: list[tuple[tuple[int, int], int, int, int]]
) -> None:
    runs = [(pack_dot(*dot), count, epoch, attempt) for dot, count, epoch, attempt in named]
    text = delivery_text(partition, runs)
    assert parse_delivery(text) == (partition, runs)
    for at in range(len(text)):
        for other in "0f-.+_ x":
            changed = text[:at] + other + text[at + 1 :]
            assert changed == text or parse_delivery(changed) is None
    assert parse_delivery(text.upper()) in (None, (partition, runs))
    assert parse_delivery(f"{text}.{delivery_text(partition ^ 1, runs)}") is None


def test_a_changed_character_is_noticed() -> None:
    name = message_id(0x3F, pack_dot(0x1C2, 7))
    for at in range(len(name)):
        for other in "0123456789abcdef-+_ x":
            changed = name[:at] + other + name[at + 1 :]
            if changed != name:
                assert parse_id(changed) is None
