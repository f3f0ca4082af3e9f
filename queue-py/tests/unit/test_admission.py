"""Where a node stands when it starts: as stored, as a founder, or as a member admits it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from message_queue import config as configuration
from message_queue.admission import (
    JOIN_PATH,
    Place,
    admitted,
    fingerprint,
    handler,
    identity,
    keep_ring,
    place_at_start,
    read_ring,
)
from message_queue.config import Config, ConfigError
from message_queue.core.messages import Membership
from message_queue.core.operations import Answer, refusal
from message_queue.core.placement.membership import admit, dismiss, finish, founding
from message_queue.storage.data_dir import DataDir
from message_queue.transport.links import SECRET_HEADER

THREE = founding(("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"), 128, 3)


def made(changed: object) -> Membership:
    assert isinstance(changed, Membership)
    return changed


FOUR = finish(made(admit(THREE, "127.0.0.1:4", "d")))
WITHOUT_B = finish(made(dismiss(FOUR, "127.0.0.1:2")))


def config(tmp_path: Path, *flags: str, node_id: str = "b", port: int = 2) -> Config:
    argv = [
        f"--id={node_id}",
        f"--addr=127.0.0.1:{port}",
        f"--dataDir={tmp_path / node_id}",
        *flags,
    ]
    return configuration.parse(argv, {"CLUSTER_SECRET": "s3cret"})


def peers(*ports: int) -> str:
    return "--peers=" + ",".join(f"127.0.0.1:{port}" for port in ports)


def stored(config: Config, ring: Membership | None) -> None:
    """The node has run before, and knows this ring."""
    place = place_at_start(config)
    assert place is not None
    DataDir.open(config.data_dir, identity(config, place)).close()
    if ring is not None:
        keep_ring(config.data_dir, ring)


def test_a_founder_stands_where_peers_names_it(tmp_path: Path) -> None:
    place = place_at_start(config(tmp_path, peers(1, 2, 3)))
    assert place is not None
    assert place.position == 1
    assert place.ring.version == 1
    assert [member.addr for _, member in place.ring.members] == [
        "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3",
    ]  # fmt: skip


def test_a_joiner_has_to_be_admitted(tmp_path: Path) -> None:
    assert place_at_start(config(tmp_path, "--join=127.0.0.1:1,127.0.0.1:3")) is None


def test_the_stored_ring_overrides_peers_and_join(tmp_path: Path) -> None:
    first = config(tmp_path, peers(1, 2, 3))
    stored(first, FOUR)
    for flags in (peers(1, 2, 3), peers(2, 3, 4), "--join=127.0.0.1:1"):
        place = place_at_start(config(tmp_path, flags))
        assert place == Place(1, fingerprint(first), FOUR)


def test_a_ring_that_was_never_changed_is_not_kept(tmp_path: Path) -> None:
    first = config(tmp_path, peers(1, 2, 3))
    stored(first, THREE)
    assert read_ring(first.data_dir) is None


def test_a_node_that_has_left_does_not_start(tmp_path: Path) -> None:
    first = config(tmp_path, peers(1, 2, 3))
    stored(first, WITHOUT_B)
    with pytest.raises(ConfigError, match="has left the cluster"):
        place_at_start(first)


def test_a_ring_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    first = config(tmp_path, peers(1, 2, 3))
    stored(first, FOUR)
    for content in (b"", b"{", msgspec.json.encode(FOUR)[:-4], b"[2,3,128,3,[],null,null,4]"):
        (first.data_dir / "ring.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"ring\.json"):
            place_at_start(first)


def test_without_peers_or_join_nothing_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--peers"):
        config(tmp_path)


async def test_a_joiner_asks_until_a_member_lets_it_in(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    async def let_in(addr: str, node_id: str) -> Place | Answer:
        asked.append((addr, node_id))
        if len(asked) == 1:
            return refusal(409, "Another ring change is in progress")
        return Place(3, "c", FOUR)

    app = web.Application()
    app.router.add_post(JOIN_PATH, handler(b"s3cret", let_in))
    runner = web.AppRunner(app)
    await runner.setup()
    with socket.socket() as member, socket.socket() as listening:
        for each in (member, listening):
            each.bind(("127.0.0.1", 0))
            each.listen()
        await web.SockSite(runner, member.dup()).start()
        port = member.getsockname()[1]
        joiner = config(tmp_path, f"--join=127.0.0.1:{port}", node_id="d", port=4)
        try:
            async with asyncio.timeout(20):
                place = await admitted(joiner, listening, None, None, asyncio.Event())
        finally:
            await runner.cleanup()
    assert place == Place(3, "c", FOUR)
    assert asked == [("127.0.0.1:4", "d")] * 2


async def test_a_joiner_that_is_told_to_stop_gives_up(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        stop = asyncio.Event()
        stop.set()
        joiner = config(tmp_path, "--join=127.0.0.1:9", node_id="d", port=4)
        assert await admitted(joiner, listening, None, None, stop) is None


@pytest.mark.parametrize(
    ("secret", "body", "status"),
    [
        ("wrong", b"{}", 403),
        ("s3cret", b"{", 400),
        ("s3cret", b'{"id": "d"}', 400),
        ("s3cret", b'{"id": "d", "addr": "x:1", "more": 1}', 400),
    ],
)
async def test_strangers_and_nonsense_are_not_let_in(secret: str, body: bytes, status: int) -> None:
    async def never(addr: str, node_id: str) -> Place | Answer:
        raise AssertionError((addr, node_id))

    class Request:
        headers = {SECRET_HEADER: secret}  # noqa: RUF012 - a stand-in for aiohttp's request

        async def read(self) -> bytes:
            return body

    answer = await handler(b"s3cret", never)(Request())  # type: ignore[arg-type]  # as said
    assert answer.status == status
