"""The links between nodes: garbage does no harm, strangers stay out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Final

from aiohttp import ClientError, ClientSession, ClientTimeout, ClientWebSocketResponse, WSMsgType

from testkit.contract.service import Service, Target

SECRET: Final = "contract-secret-5f0c"


def _link_url(target: Target, index: int) -> str:
    service = target.service
    address = target.cluster.views[index].bind(service.channels[-1])
    return f"{service.scheme}://{address}{service.link_path}"


async def _drain(socket: ClientWebSocketResponse) -> None:
    """Read until the node closes or falls silent."""
    try:
        while True:
            message = await socket.receive(timeout=0.3)
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR):
                return
    except TimeoutError:
        return


async def garbage_on_the_peer_link_does_no_harm(target: Target) -> None:
    if target.service.link_path is None:
        return
    rng = Random(1)
    nested = b"\x91" * 100_000  # msgpack: an array in an array in an array …
    frames: tuple[bytes | str, ...] = (
        *("", "hello", "{}", b"", b"\xc1", nested, b"\x81" * 100_000, b"\xdd\xff\xff\xff\xff"),
        *(rng.randbytes(size) for size in (1, 100, 100_000)),
        b"\x91\x92\xa6append\xff",
    )
    tls = target.cluster.tls or True
    async with ClientSession(timeout=ClientTimeout(total=20)) as session:
        for index in range(target.service.size):
            url = _link_url(target, index)
            for frame in frames:
                try:
                    socket = await session.ws_connect(url, ssl=tls)
                except ClientError:
                    continue  # refused outright, which is as good
                async with socket:
                    if isinstance(frame, str):
                        await socket.send_str(frame)
                    else:
                        await socket.send_bytes(frame)
                    await _drain(socket)
            node = target.cluster.nodes[index]
            assert node.running, f"{node.name} died of garbage\n{node.output()[-2000:]}"
    await target.find_writer()


async def strangers_stay_out_of_a_guarded_cluster(service: Service, root: Path) -> None:
    """With CLUSTER_SECRET the cluster works, a stranger's link is refused, no log shows it.

    A service whose peers show certificates instead refuses a link without one just the same.
    """
    if service.link_path is None:
        return
    guarded = dataclasses.replace(service, env={**service.env, "CLUSTER_SECRET": SECRET})
    async with guarded.cluster(root) as cluster:
        target = Target(guarded, cluster)
        await target.find_writer()
        url, tls = _link_url(target, 0), cluster.tls or True
        async with ClientSession(timeout=ClientTimeout(total=20)) as session:
            for headers in ({}, {"X-Cluster-Secret": "wrong"}, {"Authorization": "Bearer wrong"}):
                upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", **headers}
                upgrade |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x" * 22 + "=="}
                async with session.get(url, headers=upgrade, ssl=tls) as answer:
                    assert answer.status in (401, 403), f"{headers}: {answer.status}"
        for node in cluster.nodes:
            assert SECRET not in node.output(), f"{node.name} logged the secret"


CHECKS: Final = (garbage_on_the_peer_link_does_no_harm,)
STARTUP: Final = (strangers_stay_out_of_a_guarded_cluster,)
