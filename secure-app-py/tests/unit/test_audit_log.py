"""The audit log at work: durable before the answer, continued after a crash, copied to every
sink."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from secure_store.config import ConfigError
from secure_store.core.audit import FIRST_MAC, Code, Entry, make_line, verify
from secure_store.storage.anchors import AnchorError, Anchors, read_anchors
from secure_store.storage.audit_files import Sink, raw_lines, read_entries, segments
from secure_store.storage.audit_log import AuditLog, AuditUnavailable
from secure_store.storage.keyring import Keyring


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring.open_or_make(tmp_path / "keyring.json", b"m" * 32)


def opened(keyring: Keyring, *paths: Path) -> AuditLog:
    log = AuditLog("nodeA", "log", keyring, paths, on_state=lambda _: None)
    log.start()
    return log


def note(log: AuditLog, name: str, *, urgent: bool = True) -> asyncio.Future[None] | None:
    return log.note(
        name, addr="127.0.0.1", outcome="allowed", request_id="r", status=200, who="me",
        urgent=urgent,
    )  # fmt: skip


def verdict(keyring: Keyring, path: Path, *heads) -> Code:
    return verify(raw_lines(path), keyring.audit_mac_key, heads).code


async def test_an_urgent_line_is_in_the_file_when_its_future_is_done(keyring, tmp_path) -> None:
    path = tmp_path / "audit" / "audit.log"
    log = opened(keyring, path)
    note(log, "get", urgent=False)
    await note(log, "set")
    assert path.read_bytes().count(b"\n") == 2
    assert log.seq == 2
    log.stop()
    assert verdict(keyring, path) is Code.OK


async def test_many_urgent_lines_share_an_fsync(keyring, tmp_path) -> None:
    log = opened(keyring, tmp_path / "audit.log")
    await asyncio.gather(*(note(log, "set") for _ in range(500)))
    assert log.fsyncs < 100
    log.stop()


async def test_a_restart_continues_the_chain_and_sets_a_torn_line_aside(keyring, tmp_path) -> None:
    path = tmp_path / "audit.log"
    log = opened(keyring, path)
    await note(log, "one")
    log.stop()
    with path.open("ab") as f:
        f.write(b'{"action":"half')
    assert verdict(keyring, path) is Code.TORN
    again = opened(keyring, path)
    assert (again.torn, again.seq) == (15, 1)
    await note(again, "two")
    again.stop()
    assert verdict(keyring, path) is Code.OK
    assert (
        (tmp_path / next(p.name for p in tmp_path.glob("*.torn-*"))).read_bytes().endswith(b"half")
    )


async def test_every_sink_has_the_same_lines_also_one_that_was_behind(keyring, tmp_path) -> None:
    one, two = tmp_path / "one.log", tmp_path / "two.log"
    log = opened(keyring, one)
    await asyncio.gather(*(note(log, "x") for _ in range(5)))
    log.stop()
    log = opened(keyring, one, two)
    await note(log, "y")
    log.stop()
    assert one.read_bytes() == two.read_bytes()
    assert verdict(keyring, two) is Code.OK


async def test_without_a_writable_sink_requests_are_refused_and_nothing_is_lost(
    keyring, tmp_path, monkeypatch
) -> None:
    path = tmp_path / "audit.log"
    log = opened(keyring, path)
    await note(log, "before")
    broken = True
    append = Sink.append

    def failing(self: Sink, data: bytes) -> bool:
        if broken:
            self._unsynced += data
            self.failure = "no space left"
            return False
        return append(self, data)

    monkeypatch.setattr(Sink, "append", failing)
    with pytest.raises(AuditUnavailable):
        await note(log, "during")
    assert log.unavailable() == "no space left"
    broken = False
    async with asyncio.timeout(10):
        while log.unavailable() is not None:  # noqa: ASYNC110 - there is nothing to await
            await asyncio.sleep(0.01)
    await note(log, "after")
    log.stop()
    actions = [line.split(b'"')[3] for line in raw_lines(path)]
    assert actions == [b"before", b"during", b"after"]
    assert verdict(keyring, path) is Code.OK


async def test_segments_rotate_without_a_gap_and_are_read_as_one(keyring, tmp_path) -> None:
    path = tmp_path / "audit.log"
    log = opened(keyring, path)
    log._workers[0].sink._segment_bytes = 1000
    for i in range(30):
        await note(log, f"a{i}")
    log.stop()
    assert len(segments(path)) > 3
    assert verdict(keyring, path) is Code.OK
    found = read_entries(path, 10, 5)
    assert [f.split(b'"seq":')[1].split(b",")[0] for f in found] == [
        b"11",
        b"12",
        b"13",
        b"14",
        b"15",
    ]
    segments(path)[1].unlink()
    assert verdict(keyring, path) is Code.DELETE


async def test_signed_heads_kept_elsewhere_expose_a_cut(keyring, tmp_path) -> None:
    path = tmp_path / "audit.log"
    log = opened(keyring, path)
    await asyncio.gather(*(note(log, "x") for _ in range(5)))
    public = keyring.signer.public_key().public_bytes_raw()
    anchors = Anchors(tmp_path / "elsewhere", "nodeA", public)
    anchors.keep(log.signed_head())
    log.stop()
    _, heads = read_anchors(anchors.path)
    assert verdict(keyring, path, *heads) is Code.OK
    lines = list(raw_lines(path))
    path.write_bytes(b"".join(lines[:3]))
    assert verdict(keyring, path, *heads) is Code.CUT
    with pytest.raises(AnchorError):
        Anchors(tmp_path / "elsewhere", "nodeA", b"x" * 32)
    raw = anchors.path.read_bytes()
    anchors.path.write_bytes(raw.replace(b'"seq":5', b'"seq":4'))
    with pytest.raises(AnchorError):
        read_anchors(anchors.path)


class Hanging(Sink):
    """A disk whose fsync does not come back until told."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.free = threading.Event()

    def sync(self) -> bool:
        self.free.wait(30)
        return super().sync()


async def test_a_sink_that_hangs_does_not_hold_up_one_that_works(keyring, tmp_path) -> None:
    log = AuditLog(
        "nodeA", "log", keyring, (tmp_path / "a.log", tmp_path / "b.log"), on_state=lambda _: None
    )
    stuck = log._workers[0].sink = Hanging(tmp_path / "a.log")
    log.start()
    for i in range(20):
        await note(log, f"a{i}")
        assert log.unavailable() is None
    assert log.seq == 20
    stuck.free.set()
    log.stop()
    assert (tmp_path / "a.log").read_bytes() == (tmp_path / "b.log").read_bytes()
    assert verdict(keyring, tmp_path / "b.log") is Code.OK


async def test_if_every_sink_hangs_requests_are_refused_within_a_second(keyring, tmp_path) -> None:
    states: list[str | None] = []
    path = tmp_path / "a.log"
    log = AuditLog("nodeA", "log", keyring, (path,), on_state=states.append)
    stuck = log._workers[0].sink = Hanging(path)
    log.start()
    began = time.monotonic()
    with pytest.raises(AuditUnavailable):
        await note(log, "denied")
    assert time.monotonic() - began < 5  # 0.7 s and what a busy machine adds
    assert log.unavailable() == "the audit disk hangs"
    before = log.noted_seq
    for _ in range(1_000):
        log.refuse()
    assert log.noted_seq == before, "nothing grows while the disk is away"
    stuck.free.set()
    async with asyncio.timeout(20):
        while log.seq != log.noted_seq or log.unavailable():  # noqa: ASYNC110 - nothing to await
            await asyncio.sleep(0.01)
    log.stop()
    assert states == ["the audit disk hangs", None]
    assert b"1000 requests were refused" in path.read_bytes()
    assert verdict(keyring, path) is Code.OK


async def test_what_a_failed_fsync_left_in_doubt_is_written_anew(keyring, tmp_path) -> None:
    path = tmp_path / "a.log"
    log = AuditLog("nodeA", "log", keyring, (path,), on_state=lambda _: None)
    real = os.fsync
    fails = [True]

    def fsync(fd: int) -> None:
        if fails and threading.current_thread().name == "audit":
            fails.clear()
            os.ftruncate(fd, os.fstat(fd).st_size - 5)  # the disk lost what it did not report
            raise OSError(5, "Input/output error")
        real(fd)

    log.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(AuditUnavailable):
            await note(log, "one")
        async with asyncio.timeout(20):
            while log.seq != 1:  # noqa: ASYNC110 - nothing to await
                await asyncio.sleep(0.01)
        await note(log, "two")
    log.stop()
    assert verdict(keyring, path) is Code.OK
    assert [line.split(b'"')[3] for line in raw_lines(path)] == [b"one", b"two"]


def record_line(log: AuditLog, number: int) -> int:
    log.note("set", addr="", outcome="allowed", request_id="r", status=200, who="me", record=number)
    return log.noted_seq


async def test_lines_of_writes_are_in_the_file_before_anybody_is_told(keyring, tmp_path) -> None:
    path = tmp_path / "a.log"
    log = opened(keyring, path)
    for round_number in range(5):
        log.note_read("get", "127.0.0.1", "r", "me", "k")
        lines = [record_line(log, round_number * 3 + n) for n in range(3)]
        log.write_out()
        assert all(log.written(line) is None for line in lines), "nobody has to wait"
        assert len(list(raw_lines(path))) == lines[-1], "reads that came before stand before"
        await asyncio.sleep(0.03)
    async with asyncio.timeout(20):
        while log.seq != log.noted_seq:  # noqa: ASYNC110 - nothing to await
            await asyncio.sleep(0.01)
    assert log.fsyncs < 5, "they are synced together"
    log.stop()
    assert verdict(keyring, path) is Code.OK


async def test_while_a_file_is_not_ready_its_thread_writes_and_the_order_holds(
    keyring, tmp_path
) -> None:
    path = tmp_path / "a.log"
    log = opened(keyring, path)
    sink = log._workers[0].sink
    sink._segment_bytes = 4_000  # it rotates, which is the thread's
    waited = 0
    for number in range(1, 200):
        log.note_read("get", "127.0.0.1", "r", "me", "k")
        line = record_line(log, number)
        if number % 10 == 0:
            with sink.mutex:  # the thread is in the middle of a write
                log.write_out()
                assert log.written(line) is not None
        else:
            log.write_out()
        if number % 25 == 0:
            await note(log, "denied")
        if (written := log.written(line)) is not None:
            waited += 1
            async with asyncio.timeout(20):
                await written
    assert 19 <= waited < 150, "mostly nobody had to wait"
    log.stop()
    assert len(segments(path)) > 3
    assert verdict(keyring, path) is Code.OK
    assert len(list(raw_lines(path))) == log.noted_seq


async def test_a_line_appended_during_an_fsync_is_not_taken_for_durable(keyring, tmp_path) -> None:
    path = tmp_path / "a.log"
    log = AuditLog("nodeA", "log", keyring, (path,), on_state=lambda _: None)
    inside, free = threading.Event(), threading.Event()
    real = os.fsync

    def fsync(fd: int) -> None:
        if threading.current_thread().name == "audit" and not free.is_set():
            inside.set()
            free.wait(30)
        real(fd)

    log.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        first = note(log, "one")
        await asyncio.to_thread(inside.wait, 20)
        line = record_line(log, 1)
        log.write_out()
        assert log.written(line) is None, "a fsync that hangs does not hold up a write"
        free.set()
        await first
    log.stop()
    assert verdict(keyring, path) is Code.OK


def test_what_is_appended_during_an_fsync_is_written_anew_if_the_next_one_fails(tmp_path) -> None:
    sink = Sink(tmp_path / "a.log")
    sink.open()
    sink.append(b"one\n")
    real = os.fsync

    def meanwhile(fd: int) -> None:
        with sink.mutex:
            sink.append(b"two\n")
        real(fd)

    def failing(fd: int) -> None:
        os.ftruncate(fd, 4)
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", meanwhile)
        assert sink.sync()
        assert sink.backlog_bytes == 4, "nobody knows whether it was in time"
        patch.setattr(os, "fsync", failing)
        assert not sink.sync()
    assert not sink.takes_now(1)
    assert sink.append(b"three\n")
    assert sink.sync()
    assert sink.path.read_bytes() == b"one\ntwo\nthree\n"


def test_a_pipe_is_no_audit_file(keyring, tmp_path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError):
        AuditLog("nodeA", "log", keyring, (tmp_path / "pipe",), on_state=lambda _: None)


def test_a_page_deep_in_a_long_log_is_found_without_reading_all_of_it(keyring, tmp_path) -> None:
    path = tmp_path / "audit.log"
    mac, lines = FIRST_MAC, []
    for seq in range(1, 5_001):
        entry = Entry(action="get", addr="", node="n", outcome="allowed", request_id=f"r{seq}",
                      seq=seq, status=200, ts="", who="x" * (seq % 90))  # fmt: skip
        line, mac = make_line(keyring.audit_mac_key, mac, entry)
        lines.append(line)
    path.write_bytes(b"".join(lines))
    for after in (0, 1, 2_499, 4_990, 4_999):
        assert read_entries(path, after, 7) == [line[:-1] for line in lines[after : after + 7]]
    assert read_entries(path, 5_000, 7) == []
