"""What a person sees of the lines: named, and never more than a busy node can bear."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from mesi_cache import logs
from mesi_cache.core.step import Transition
from mesi_cache.logs import TRANSITIONS_PER_S, Narrator


def test_transitions_are_limited_and_the_rest_is_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    caplog.set_level(logging.INFO)
    published = []
    narrator = Narrator(lambda *_, **fields: published.append(fields["key"]))
    for number in range(TRANSITIONS_PER_S + 25):
        narrator.tell(Transition(f"k{number}", "S", "I", "inv", "nodeA"))
    assert caplog.messages[0] == "INVALIDATE key=k0 S->I from=nodeA"
    assert len(caplog.messages) == TRANSITIONS_PER_S
    now_s[0] += 1
    narrator.tell(Transition("next", "M", "S", "fetch_keep", ""))
    assert caplog.messages[-2:] == ["… and 25 more transitions", "DOWNGRADE key=next M->S"]
    assert len(published) == TRANSITIONS_PER_S + 26  # the event stream has all of them
