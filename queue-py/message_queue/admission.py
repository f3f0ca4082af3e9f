"""Where a node stands in the ring when it starts: as stored, as founder, or as a member admits it.

```
 ring.json in --dataDir ──yes──▶ as stored (--peers and --join are overridden)
        │ no
     --join ──yes──▶ POST /peer/join to a member, until it is admitted: a new position
        │ no
     --peers ──────▶ a founder: the position in the list
```
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from message_queue import anteroom
from message_queue.config import Config, ConfigError
from message_queue.core.messages import Membership, Position
from message_queue.core.operations import Answer
from message_queue.core.placement.membership import departed, founding
from message_queue.core.replication.validation import plausible_ring
from message_queue.storage.data_dir import Identity, stored_identity, write_durably
from message_queue.transport.links import SECRET_HEADER

log = logging.getLogger(__name__)

JOIN_PATH = "/peer/join"
ASK_AGAIN_S = 0.5
ASK_WITHIN_S = 5.0
MAX_ANSWER_BYTES = 1 << 20


class Place(msgspec.Struct, frozen=True):
    """A node's position, the ring as last known, and the name of the cluster."""

    position: Position
    cluster: str
    ring: Membership


class JoinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who wants in."""

    id: str
    addr: str


_place = msgspec.json.Decoder(Place)
_request = msgspec.json.Decoder(JoinRequest)


def fingerprint(config: Config) -> str:
    """Names the cluster by what places its data: founders with other numbers would place it
    elsewhere.

    Addresses are not in it: they are only for dialling, and may differ from node to node.
    """
    copies = min(config.replication_factor, len(config.peers))
    facts = f"{len(config.peers)} {copies} {config.virtual_nodes}"
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def place_at_start(config: Config) -> Place | None:
    """From the data directory or the flags; None: it has to be admitted. Raises ConfigError."""
    stored = stored_identity(config.data_dir)
    ring = read_ring(config.data_dir) if stored is not None else None
    if stored is not None and ring is not None:
        if departed(ring, stored.position):
            raise ConfigError(
                f"{config.data_dir}: this node has left the cluster; start with an empty "
                "--dataDir and --join"
            )
        return Place(stored.position, stored.cluster, ring)
    if config.join:
        return None
    ring = founding(
        tuple(str(peer) for peer in config.peers),
        config.virtual_nodes,
        config.replication_factor,
        (config.position, config.node_id),
    )
    return Place(config.position, fingerprint(config), ring)


def identity(config: Config, place: Place) -> Identity:
    """What the data directory is bound to."""
    return Identity("queue", config.node_id, place.position, place.cluster)


def read_ring(data_dir: Path) -> Membership | None:
    """The stored ring; None if it was never changed. Raises ConfigError if it is unreadable."""
    path = data_dir / "ring.json"
    try:
        ring = msgspec.json.decode(path.read_bytes(), type=Membership)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (msgspec.MsgspecError, OSError) as e:
        raise ConfigError(f"{path} is not readable: {e}") from e
    if not plausible_ring(ring):
        raise ConfigError(f"{path} is not a ring")
    return ring


def keep_ring(data_dir: Path, ring: Membership) -> None:
    """Store a committed ring: it overrides ``--peers`` from now on. Raises OSError."""
    if ring.version > 1:
        write_durably(data_dir / "ring.json", msgspec.json.encode(ring))


# --- the joiner's side ----------------------------------------------------------------------------


async def admitted(
    config: Config, listening: socket.socket, client_ssl: ssl.SSLContext | None,
    server_ssl: ssl.SSLContext | None, stop: asyncio.Event,
) -> Place | None:  # fmt: skip
    """Ask members until one lets this node in. Meanwhile whoever asks is told so. None: `stop` was
    set first."""
    async with anteroom.answering(listening, server_ssl, "waiting to be admitted to the ring"):
        asking = asyncio.create_task(_ask(config, client_ssl))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
        finally:
            asking.cancel()
            stopping.cancel()
            await asyncio.gather(asking, stopping, return_exceptions=True)


async def _ask(config: Config, client_ssl: ssl.SSLContext | None) -> Place:
    body = msgspec.json.encode(JoinRequest(config.node_id, str(config.addr)))
    headers = {"Content-Type": "application/json"}
    if config.cluster_secret:
        headers[SECRET_HEADER] = config.cluster_secret.decode("latin-1")
    told = ""
    connector = aiohttp.TCPConnector(ssl=client_ssl or True)
    timeout = aiohttp.ClientTimeout(total=ASK_WITHIN_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        while True:
            for member in config.join:
                try:
                    async with session.post(
                        f"{config.scheme}://{member}{JOIN_PATH}", data=body, headers=headers
                    ) as reply:
                        answer = await reply.content.read(MAX_ANSWER_BYTES)
                        if reply.status == 200:
                            place = _place.decode(answer)
                            if plausible_ring(place.ring):
                                log.info("admitted by %s at position %d", member, place.position)
                                return place
                    problem = f"{reply.status} {answer[:200].decode('utf-8', 'replace')}"
                except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as e:
                    problem = str(e) or type(e).__name__
                if problem != told:  # once per reason
                    told = problem
                    log.warning("not admitted by %s yet: %s", member, problem)
            await asyncio.sleep(ASK_AGAIN_S)


# --- the member's side ----------------------------------------------------------------------------


def handler(
    secret: bytes | None, admit: Callable[[str, str], Awaitable[Place | Answer]]
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """`POST /peer/join`. `admit(addr, id)` makes that node a member, or says why not."""

    async def join(request: web.Request) -> web.StreamResponse:
        given = request.headers.get(SECRET_HEADER, "").encode("latin-1", "replace")
        if secret is not None and not hmac.compare_digest(given, secret):
            return web.json_response({"error": "Cluster secret required"}, status=403)
        try:
            asked = _request.decode(await request.read())
        except msgspec.MsgspecError as e:
            return web.json_response({"error": str(e)}, status=400)
        found = await admit(asked.addr, asked.id)
        if isinstance(found, Place):
            return web.Response(body=msgspec.json.encode(found), content_type="application/json")
        return web.Response(body=found.body, status=found.status, content_type="application/json")

    return join
