"""Start and stop: mistakes are one line and exit code 2, a stop is clean and quick."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testkit.cluster import Cluster, NodeProcess
from testkit.contract.service import Service, Target

STOP_S: Final = 5.0
SLACK_S: Final = 1.0  # for the process's own end, on a busy machine
REFUSAL_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Ended:
    code: int
    out: str
    err: str


async def _run(service: Service, arguments: Sequence[str], root: Path) -> _Ended:
    """Start a node that should refuse; what it said."""
    command = [sys.executable, str(service.folder / service.main), *arguments]
    environment = {**os.environ, "CLUSTER_SECRET": "", **service.env}
    child = await asyncio.create_subprocess_exec(
        *command,
        cwd=root,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(REFUSAL_S):
            out, err = await child.communicate()
    except TimeoutError:
        raise AssertionError(f"it did not refuse: {' '.join(command)}") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.communicate()  # to the end: an open pipe outlives the event loop otherwise
    assert child.returncode is not None
    return _Ended(child.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def _tree(root: Path) -> dict[str, str]:
    """Every file under `root` and a digest of it."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(root.rglob("*"))
    }


async def _refuses(service: Service, arguments: Sequence[str], root: Path, *about: str) -> None:
    """Exit code 2, one line on stderr that names what is wrong, nothing written."""
    before = _tree(root)
    ended = await _run(service, arguments, root)
    shown = f"{' '.join(arguments)}\n{ended}"
    assert ended.code == 2, shown
    assert len(ended.err.strip().splitlines()) == 1, f"not one line on stderr: {shown}"
    assert ended.out == "", shown
    for words in about:
        assert words in ended.err, f"the line does not name {words!r}: {shown}"
    assert _tree(root) == before, f"something was written: {shown}"


def _prepared(service: Service, root: Path) -> tuple[Cluster, list[str]]:
    """A cluster that is not started, in a folder of its own, and the flags of its node 0."""
    root.mkdir(parents=True, exist_ok=True)
    cluster = service.cluster(root)
    cluster.prepare()
    return cluster, list(service.flags(cluster.views[0]))


def _with(flags: Sequence[str], flag: str, value: str) -> list[str]:
    """`flags` with another value of `flag` (`--flag value` or `--flag=value`), or with it added."""
    changed = list(flags)
    for at, text in enumerate(changed):
        if text == flag:
            changed[at + 1] = value
            return changed
        if text.startswith(flag + "="):
            changed[at] = f"{flag}={value}"
            return changed
    return [*changed, f"{flag}={value}"]


async def bad_flags_are_refused(service: Service, root: Path) -> None:
    cluster, flags = _prepared(service, root)
    try:
        bind = cluster.views[0].bind(service.channels[0])
        missing = str(root / "no such file")
        wrong: tuple[tuple[list[str], str], ...] = (
            ([*flags, "--no_such_flag=1"], "no_such_flag"),
            ([], ""),
            (_with(flags, "--log_level", "nonsense"), "log_level"),
            (_with(flags, "--max_body_bytes", "-1"), "max_body_bytes"),
            (_with(flags, "--id", "../evil"), "--id"),
            ([text.replace(bind, "127.0.0.1:99999") for text in flags], "99999"),
            ([text.replace(bind, "127.0.0.1") for text in flags], ""),
            (_with(flags, service.file_flag, missing), service.file_flag),
        )
        for pair in zip(wrong[::2], wrong[1::2], strict=True):
            await asyncio.gather(*(_refuses(service, line, root, about) for line, about in pair))
    finally:
        cluster.close()


async def help_explains_every_flag(service: Service, root: Path) -> None:
    ended = await _run(service, ["--help"], root)
    assert ended.code == 0, ended
    cluster, flags = _prepared(service, root)
    cluster.close()
    used = {text.partition("=")[0] for text in flags if text.startswith("--")}
    for flag in (*sorted(used), "--log_format", "--log_level", "--max_body_bytes"):
        assert flag in ended.out, f"--help does not explain {flag}"


async def a_peer_list_without_the_node_itself_is_refused(service: Service, root: Path) -> None:
    if service.peers_flag is None:
        return
    cluster, flags = _prepared(service, root)
    try:
        view = cluster.views[0]
        own = {view.bind(channel) for channel in service.channels}
        at = next(i for i, t in enumerate(flags) if t.partition("=")[0] == service.peers_flag)
        listed = (flags[at].partition("=")[2] or flags[at + 1]).split(",")
        others = ",".join(address for address in listed if address not in own)
        await _refuses(service, _with(flags, service.peers_flag, others), root)
    finally:
        cluster.close()


async def a_taken_port_is_refused(service: Service, root: Path) -> None:
    cluster, flags = _prepared(service, root)
    try:
        for channel in service.channels:
            host, _, port = cluster.views[0].bind(channel).rpartition(":")
            with socket.socket() as holder:
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                holder.bind((host, int(port)))
                holder.listen()
                await _refuses(service, flags, root, port)
    finally:
        cluster.close()


async def a_foreign_data_directory_is_refused(service: Service, root: Path) -> None:
    cluster, flags = _prepared(service, root)
    try:
        node = cluster.nodes[0]
        cluster.start(0)
        await node.wait_url(cluster.url(0, "/healthz"), tls=cluster.tls)
        assert await node.terminate() == 0
        await _refuses(service, _with(flags, "--id", "somebody-else"), root)
    finally:
        cluster.close()


async def beyond_loopback_needs_a_secret(service: Service, root: Path) -> None:
    cluster, flags = _prepared(service, root)
    try:
        for channel in service.channels:
            own = cluster.views[0].bind(channel)
            wide = "0.0.0.0:" + own.rpartition(":")[2]
            await _refuses(service, [text.replace(own, wide) for text in flags], root)
    finally:
        cluster.close()


async def a_stop_is_clean_and_quick_and_restarts(service: Service, root: Path) -> None:
    async with service.cluster(root) as cluster:
        target = Target(service, cluster)
        await target.find_writer()
        async with target.stream("/events") as (status, _):  # an open stream must not hold it up
            assert status == 200
            began = time.monotonic()
            codes = await asyncio.gather(*(_stop(node) for node in cluster.nodes))
            took_s = time.monotonic() - began
        assert codes == [0] * service.size, f"exit codes {codes}\n{_logs(cluster)}"
        assert took_s < STOP_S + SLACK_S, f"the stop took {took_s:.1f} s\n{_logs(cluster)}"
        await cluster.start_all()
        await target.find_writer()
        if hasattr(signal, "SIGSTOP"):  # POSIX: Ctrl-C, with its peers gone
            for node in cluster.nodes[1:]:
                node.kill()
            os.kill(cluster.nodes[0].pid, signal.SIGINT)
            began = time.monotonic()
            code = await cluster.nodes[0].wait()
            assert code == 0, f"SIGINT: exit code {code}\n{_logs(cluster)}"
            took_s = time.monotonic() - began
            assert took_s < STOP_S + SLACK_S, f"SIGINT took {took_s:.1f} s\n{_logs(cluster)}"


async def _stop(node: NodeProcess) -> int:
    return await node.terminate()


def _logs(cluster: Cluster) -> str:
    return "\n".join(
        f"--- {n.name}\n" + "\n".join(n.output().splitlines()[-10:]) for n in cluster.nodes
    )


async def the_folder_runs_alone_from_a_path_with_spaces(service: Service, root: Path) -> None:
    alone = root / "a copy elsewhere" / service.folder.name
    ignored = shutil.ignore_patterns("tests", "bench", "__pycache__", "data", ".*", "*.log")
    shutil.copytree(service.folder, alone, ignore=ignored)
    work = root / "work dir"
    cluster, flags = _prepared(service, work)
    log = root / "alone.log"
    environment = {"CLUSTER_SECRET": "", "PYTHONPATH": "", **service.env}
    command = [sys.executable, str(alone / service.main), *flags]
    try:
        with NodeProcess("alone", command, log=log, cwd=work, env=environment) as node:
            await node.wait_url(cluster.url(0, "/healthz"), tls=cluster.tls)
            assert await node.terminate() == 0
    finally:
        cluster.close()


CHECKS: Final = (
    bad_flags_are_refused,
    help_explains_every_flag,
    a_peer_list_without_the_node_itself_is_refused,
    a_taken_port_is_refused,
    a_foreign_data_directory_is_refused,
    beyond_loopback_needs_a_secret,
    a_stop_is_clean_and_quick_and_restarts,
    the_folder_runs_alone_from_a_path_with_spaces,
)
