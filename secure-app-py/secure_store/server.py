"""Run one node: bind, start, serve until SIGTERM or Ctrl-C, stop within five seconds, exit code 0.

Exit code 2 and one line on stderr for everything that is wrong before the node serves.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import secrets
import signal
import socket
import sqlite3
import sys
from collections.abc import Sequence
from importlib import import_module

from aiohttp import web

from secure_store import config as configuration
from secure_store import logs
from secure_store.api import app as application
from secure_store.api import connection
from secure_store.api.events import EventHub
from secure_store.api.express import Express
from secure_store.api.openapi import Route
from secure_store.api.watch import WatchHub
from secure_store.config import Address, Config, ConfigError
from secure_store.core import machine
from secure_store.core.changes import Genesis, encode_changes
from secure_store.core.effects import Effects
from secure_store.core.kv import Damaged
from secure_store.core.pair import PairState
from secure_store.core.policy import Rule
from secure_store.core.records import Record
from secure_store.core.tokens import Principal
from secure_store.engine import Engine, clock_ms, wall_ms
from secure_store.heads import log_id_of
from secure_store.metrics import Metrics
from secure_store.node import Node
from secure_store.storage.audit_log import AuditLog
from secure_store.storage.backup import restored_from
from secure_store.storage.data_dir import DataDir, Identity
from secure_store.storage.database import Database
from secure_store.storage.keyring import (
    Keyring,
    make_master_key,
    open_keyring,
    read_master_key,
)
from secure_store.storage.rollback import told_beyond
from secure_store.storage.static_access import load_policies, load_tokens
from secure_store.storage.view import View
from secure_store.storage.writer import Writer
from secure_store.transport.link import PEER_PATH, Links
from secure_store.transport.listener import listen
from secure_store.transport.tls import Tls, ensure_certificate

log = logging.getLogger(__name__)

STOP_WITHIN_S = 4.5
RELOAD_S = 1.0


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 stopped when asked, 1 halted by a fault, 2 could not start."""
    try:
        config = configuration.parse(argv)
        logs.configure(config.node_id, config.log_format, config.log_level)
        return run(config)
    except ConfigError as e:
        print(f"main.py: error: {logs.one_line(str(e))}", file=sys.stderr)  # noqa: T201
        return 2


def run(config: Config) -> int:
    # Commits and audit lines are written by threads, which take the interpreter's lock at every
    # statement: at its default of 5 ms a busy loop would hold each of them up for that long.
    sys.setswitchinterval(0.0005)
    # Socket first, files that must be right next, directory last: a refusal leaves no trace.
    listening = bind(config.addr, "--addr")
    with listening:
        static_tokens = load_tokens(config)
        base_roles = load_policies(config)
        if config.master_key_file is not None:
            read_master_key(config.master_key_file)
        if config.cert.exists() and config.key.exists():
            Tls(config)
        data_dir = DataDir.open(config.data_dir, Identity("secure_store", config.node_id))
        try:
            made = ensure_certificate(config)
            keyring = keys_of(config)
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                return runner.run(
                    serve(config, listening, keyring, static_tokens, base_roles, made_cert=made)
                )
        finally:
            data_dir.close()


def keys_of(config: Config) -> Keyring:
    """The node's keys; on loopback the master key is made at the first start, and announced."""
    path = config.master_key_path
    if config.master_key_file is None and not path.exists():
        make_master_key(path)
        log.warning(
            "made the master key %s: without it the data cannot be read, keep a copy elsewhere",
            path,
        )
    return open_keyring(config.data_dir / "keyring.json", path, finish=True)


def load(
    config: Config, database: Database, keyring: Keyring
) -> tuple[PairState, Effects, tuple[Record, ...]]:
    """The machine as the disk left it, what it wants done first, and the log not yet applied."""
    try:
        database.claim()
        database.begin_read()
        database.check_rows()
        database.end_read()
        applied = database.applied()
        recovered = database.read_log(applied.seq, 1 << 62, 1 << 62)
        if recovered is None or (recovered and recovered[-1].position != database.last()):
            raise ConfigError(f"{config.data_dir}: the log has a gap after record {applied.seq}")
        if older := told_beyond(database, config.audit_files, keyring.audit_mac_key):
            raise ConfigError(f"{config.data_dir}: {older}; see the README, Troubleshooting")
        state, fx = machine.start(
            node_id=config.node_id,
            url=config.url,
            durable=database.load_state(),
            last=recovered[-1].position if recovered else applied,
            shown_seq=applied.seq,
            has_replica_flag=config.replica is not None,
            may_found=config.primary is None,
            mode_wanted=config.mode,
            fresh_cluster_id=secrets.token_hex(16),
            genesis=encode_changes((Genesis(secrets.token_bytes(32)),)),
            now_ms=clock_ms(),
        )
    except (Damaged, sqlite3.Error, UnicodeDecodeError) as e:  # (SQLite quotes damaged names)
        raise ConfigError(f"{config.data_dir}: {e}") from None
    return state, fx, recovered


async def serve(
    config: Config,
    listening: socket.socket,
    keyring: Keyring,
    static_tokens: dict[bytes, Principal],
    base_roles: dict[str, tuple[Rule, ...]] | None,
    *,
    made_cert: bool,
) -> int:
    stop = stop_requested()
    faults: list[str] = []

    def on_fatal(reason: str) -> None:
        faults.append(reason)
        stop.set()

    metrics, events, watches = Metrics(), EventHub(), WatchHub()
    tls = Tls(config)
    path = config.data_dir / "store.db"
    database = Database(path, keyring, writable=True)
    state, fx, recovered = load(config, database, keyring)
    view = View(Database(path, keyring), base_roles)
    audit = AuditLog(
        config.node_id,
        log_id_of(keyring),
        keyring,
        config.audit_files,
        on_state=lambda failure: node.on_audit_state(failure),
    )
    node = Node(
        config, metrics, events, watches,
        view=view, audit=audit, keyring=keyring, static_tokens=static_tokens, on_fatal=on_fatal,
    )  # fmt: skip
    engine = Engine(
        state,
        view=view,
        reader=Database(path, keyring),
        open_reader=lambda: Database(path, keyring),
        replica_flag=config.replica,
        on_shown=node.on_shown,
        on_told=audit.write_out,
        on_reset=node.on_reset,
        on_note=node.system_note,
        on_head=node.heads.on_head,
        next_head=node.heads.next_head,
        next_told=lambda: (node.ledger.settled(), node.ledger.installs),
        on_failed=on_fatal,
    )
    node.attach(engine)
    writer = Writer(
        database,
        on_durable=engine.on_durable,
        on_failed=engine.on_disk_failed,
        on_quarantine=engine.on_quarantine,
        quarantine_dir=config.data_dir,
        now_ms=wall_ms,
    )
    links = Links(tls, on_up=engine.on_up, on_down=engine.on_down, on_frame=engine.on_frame)
    peer = Route("GET", PEER_PATH, links.accept, "", is_public=True, action="peer/stream")
    app = application.build(node, config, metrics, events, watches, [peer], links.hang_up)
    # handler_cancellation: a handler whose client hung up is cancelled.
    express = Express(node, metrics, action="get")
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    reloading = asyncio.create_task(reload_certificates(tls), name="certificates")
    try:
        audit.start()
        lost = recover_lines(node, database, state.shown_seq)
        announce(config, node, audit, made_cert=made_cert, lost_lines=lost)
        engine.start(writer, links, recovered, fx)
        node.begin()
        stop_listening = await listen(
            listening, connection.factory(runner, express.get), tls.server
        )
        gc.freeze()  # what is there now stays, and need not be looked through again and again
        gc.set_threshold(50_000, 20, 20)
        log.info("listening on https://%s", config.addr)
        await stop.wait()
        log.info("stopping")
        stop_listening()
        async with asyncio.timeout(STOP_WITHIN_S):
            await node.hand_over()
            await runner.cleanup()  # open requests get their answers, and their audit lines
            await node.stop()
    except TimeoutError:
        log.warning("stopped without waiting any longer for open requests")
    finally:
        reloading.cancel()
    for fault in faults:
        log.critical("halted: %s", fault)
    log.info("stopped")
    return 1 if faults else 0


def recover_lines(node: Node, database: Database, shown_seq: int) -> int:
    """Write the audit lines of decided records that a crash has lost; gives how many."""
    told = database.load_told()
    first, _, _ = database.log_size()
    after = max(told.record, first - 1)
    kept = database.read_log(after, 1 << 62, 1 << 62) or ()
    return node.ledger.recover(told, kept, shown_seq)


def announce(
    config: Config, node: Node, audit: AuditLog, *, made_cert: bool, lost_lines: int
) -> None:
    """What the operator must know, and what the audit log must say, at each start."""
    if made_cert:
        log.warning("made the certificate %s and its key %s", config.cert, config.key)
    if config.demo_tokens:
        log.warning(
            "DEMO TOKENS ARE ON: anyone on this machine can read and write with the two tokens of "
            "the README. Give --tokens_file to turn them off."
        )
    if audit.torn:
        log.warning("the audit log ended in a torn line of %d bytes; it was set aside", audit.torn)
    if lost_lines:
        log.warning("wrote %d audit lines of writes that the last run had decided", lost_lines)
    if audit.misfit:
        log.error("the end of the audit log does not fit its MAC: run main.py audit verify")
    details = "demo tokens on" if config.demo_tokens else "demo tokens off"
    if (backup := restored_from(config.data_dir)) is not None:
        details += f"; restored from cluster {backup.cluster_id}, record {backup.seq}"
    node.system_note("started", details + (f"; torn audit tail {audit.torn}" if audit.torn else ""))


async def reload_certificates(tls: Tls) -> None:
    """Take changed certificate files over without a restart: new connections use them."""
    complaint = ""
    while True:
        await asyncio.sleep(RELOAD_S)
        try:
            if tls.reload_if_changed():
                log.warning("took over the changed certificate files")
            complaint = ""
        except ConfigError as e:
            if str(e) != complaint:
                complaint = str(e)
                log.error("kept the old certificate: %s", e)


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM or SIGINT (Ctrl-C, also on Windows) sets."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, event.set)
        except (
            NotImplementedError
        ):  # Windows: the handler runs between bytecodes of the main thread
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(event.set))
    return event


def bind(addr: Address, flag: str) -> socket.socket:
    """A listening socket on `addr`; raises ConfigError naming `flag` if it cannot be had."""
    try:
        family, kind, proto, _, where = socket.getaddrinfo(
            addr.host, addr.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, proto)
    except OSError as e:
        raise ConfigError(f"{flag}: cannot use {addr}: {e.strerror or e}") from e
    try:
        if sys.platform == "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(1024)  # now, so that a second node on this port fails here and not later
        listening.setblocking(False)
    except OSError as e:
        listening.close()
        taken = e.errno == errno.EADDRINUSE
        raise ConfigError(
            f"{flag}: {addr} is already in use"
            if taken
            else f"{flag}: cannot bind {addr}: {e.strerror}"
        ) from e
    return listening


def loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (not on Windows), else asyncio's own."""
    try:
        return import_module("uvloop").Loop  # type: ignore[no-any-return]
    except ImportError:
        return None
