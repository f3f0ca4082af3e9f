"""How deep a text is nested is told from its brackets, whatever its strings hold."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from message_queue.api.errors import ApiError
from message_queue.api.schemas import MAX_JSON_DEPTH, ProduceBody, decode_json, may_be_deep

_produce = msgspec.json.Decoder(ProduceBody)
_texts = st.text('[]{}"\\,:ab', max_size=6)
_values = st.recursive(
    st.none() | st.integers(-9, 9) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=12,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def wrapped(value: Any, levels: int) -> Any:
    for level in range(levels):
        value = [value] if level % 3 else {'"]\\': value}
    return value


@settings(max_examples=60)
@given(values=st.lists(_values, max_size=5), levels=st.integers(MAX_JSON_DEPTH - 8, 70))
def test_a_text_may_be_deep_if_it_is(values: list[Any], levels: int) -> None:
    value = [wrapped(values, levels), [[]] * MAX_JSON_DEPTH]
    assert may_be_deep(json.dumps(value).encode()) == (depth(value) > MAX_JSON_DEPTH)


def test_a_batch_of_many_small_objects_is_not_deep_and_a_deep_one_among_them_is_found() -> None:
    small = [{"body": {"a": [1, "]]", {"b": '\\"}'}]}} for _ in range(100)]
    text = json.dumps({"queue": "q", "messages": small}).encode()
    assert not may_be_deep(text)
    decode_json(text, _produce)
    for levels, refused in ((50, False), (80, True)):
        messages = [*small, {"body": wrapped(["]" * 100], levels)}]
        text = json.dumps({"queue": "q", "messages": messages}).encode()
        if not refused:
            decode_json(text, _produce)
            continue
        with pytest.raises(ApiError, match="JSON nested too deeply"):
            decode_json(text, _produce)


@pytest.mark.parametrize("bad", [b"1" * 20, b"NaN", rb'"\ud800"', b"[1,]", b'"\x01"', b'"\xff"'])
def test_what_no_message_may_hold_is_found_in_a_batch_too(bad: bytes) -> None:
    many = b'{"body":[{}]},' * 100
    with pytest.raises(ApiError, match="Invalid JSON"):
        decode_json(b'{"queue":"q","messages":[%b{"body":%b}]}' % (many, bad), _produce)
