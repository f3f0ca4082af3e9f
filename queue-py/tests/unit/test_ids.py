"""Message ids: what was issued is read back, nothing else is taken for issued."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from message_queue.core.ids import message_id, pack_dot, parse_id, unpack_dot


@settings(deadline=None)
@given(st.integers(0, 4095), st.integers(1, 2**53), st.integers(1, 2**40 - 1))
def test_an_id_names_its_message(partition: int, epoch: int, seq: int) -> None:
    dot = pack_dot(epoch, seq)
    assert unpack_dot(dot) == (epoch, seq)
    assert parse_id(message_id(partition, dot)) == (partition, dot)


@settings(deadline=None)
@given(st.text(max_size=80))
def test_made_up_ids_are_none(text: str) -> None:
    name = parse_id(text)
    assert name is None or message_id(*name) == text


def test_a_changed_character_is_noticed() -> None:
    name = message_id(0x3F, pack_dot(0x1C2, 7))
    for at in range(len(name)):
        for other in "0123456789abcdef-+_ x":
            changed = name[:at] + other + name[at + 1 :]
            if changed != name:
                assert parse_id(changed) is None
