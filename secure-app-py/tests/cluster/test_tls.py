"""The edges of TLS: plain HTTP on the port, certificates that change while serving, pins that
overlap, and what a scanner has to say."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from testkit.cluster import HttpClient, Reply
from testkit.sim.loading import load

pytestmark = pytest.mark.cluster


kit = load(str(Path(__file__).with_name("pair.py")))


def address(cluster, index: int) -> tuple[str, int]:
    host, port = cluster.views[index].bind().split(":")
    return host, int(port)


def presented(host: str, port: int) -> bytes:
    """The certificate that a new connection gets (DER)."""
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, port)))


def der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


async def test_plain_http_on_the_port_is_told_what_is_wrong(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        host, port = address(cluster, 0)
        async with HttpClient(host, port) as plain:
            reply = await plain.get("/healthz")
            assert isinstance(reply, Reply), reply
            assert reply.status == 400
            assert reply.json == {"error": "Client sent an HTTP request to an HTTPS server"}
            assert reply.headers["connection"] == "close"
        for bad in (b"\x00" * 20, b"\x80\x2e\x01\x00\x02", b"\xff"):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(bad)
            async with asyncio.timeout(10):
                assert await reader.read() == b""
            writer.close()
        silent = [await asyncio.open_connection(host, port) for _ in range(50)]
        halves = [await asyncio.open_connection(host, port) for _ in range(20)]
        for _, writer in halves:
            writer.write(b"\x16\x03\x01")  # and then nothing: the handshake hangs
        async with cluster.client(0) as admin:
            assert (await kit.set_value(admin, "a", 1)).status == 200
        for _, writer in silent + halves:
            writer.close()
        assert await cluster.terminate_all() == [0, 0]
        assert "Traceback" not in cluster.nodes[0].output()


async def test_certificates_are_exchanged_while_serving_and_a_broken_one_is_not_taken(
    tmp_path: Path,
) -> None:
    """One pair, no restart: a broken file, then the replica's new certificate, then the primary's,
    with the pins of old and new overlapping, and the link comes back each time."""
    for name in ("a", "b", "a2", "b2"):
        made = kit.command(
            tmp_path, "cert", "--cert", f"{name}.crt", "--key", f"{name}.key", "--host", "127.0.0.1"
        )
        assert made.returncode == 0, made.stderr
    live = {name: tmp_path / f"live-{name}" for name in ("a.crt", "a.key", "b.crt", "b.key")}
    for name, path in live.items():
        shutil.copy(tmp_path / name, path)
    pins = [f"--peer_cert={tmp_path / n}.crt" for n in ("a", "b", "a2", "b2")]
    cluster = kit.pair(tmp_path, *pins, certificates=("live-a", "live-b"))
    async with cluster, cluster.client(0) as admin:
        host, port = address(cluster, 0)

        async def shows(path: Path) -> None:
            async def there() -> bool:
                return await asyncio.to_thread(presented, host, port) == der(path)

            await kit.eventually(there)

        await shows(tmp_path / "a.crt")
        good = live["a.crt"].read_bytes()
        live["a.crt"].write_bytes(b"-----BEGIN CERTIFICATE-----\nbroken\n")
        await cluster.nodes[0].wait_log("kept the old certificate")
        assert await asyncio.to_thread(presented, host, port) == der(tmp_path / "a.crt")
        assert (await kit.set_value(admin, "k", 1)).status == 200
        live["a.crt"].write_bytes(good)
        for name in ("b", "a"):
            live[f"{name}.key"].write_bytes((tmp_path / f"{name}2.key").read_bytes())
            live[f"{name}.crt"].write_bytes((tmp_path / f"{name}2.crt").read_bytes())
            index = "ab".index(name)
            await cluster.nodes[index].wait_log("took over the changed certificate files")
            cluster.kill(1)  # the new ones are what the next link is made with
            await cluster.unlinked()
            cluster.start(1)
            await cluster.linked()
            reply = await kit.set_value(admin, "k", name)
            assert (reply.status, "x-replication" in reply.headers) == (200, False)
        await shows(tmp_path / "a2.crt")
        assert await cluster.terminate_all() == [0, 0]


async def test_a_node_with_another_certificate_is_no_peer(tmp_path: Path) -> None:
    for name in ("a", "b", "other"):
        kit.command(tmp_path, "cert", "--cert", f"{name}.crt", "--key", f"{name}.key")
    pins = [f"--peer_cert={tmp_path / n}.crt" for n in ("a", "other")]
    cluster = kit.pair(tmp_path, *pins, certificates=("a", "b"))
    cluster.prepare()
    try:
        for index in (0, 1):
            cluster.start(index)
        await cluster.nodes[0].wait_log("cannot trust")
        assert await cluster.link() == "down"
    finally:
        cluster.close()


async def test_tls_12_only_by_flag(tmp_path: Path) -> None:
    async with kit.pair(tmp_path, "--tls_min=1.2") as cluster:
        host, port = address(cluster, 0)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.minimum_version = context.maximum_version = version
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            assert writer.get_extra_info("ssl_object").version() == version.name.replace("_", ".")
            writer.close()


@pytest.mark.skipif(shutil.which("sslscan") is None, reason="needs sslscan (apt install sslscan)")
@pytest.mark.parametrize("least", ["1.2", "1.3"])
async def test_sslscan_finds_nothing_to_say(tmp_path: Path, least: str) -> None:
    async with kit.pair(tmp_path, f"--tls_min={least}") as cluster:
        host, port = address(cluster, 0)
        words = ["sslscan", "--no-colour", f"{host}:{port}"]
        scan = await asyncio.to_thread(
            subprocess.run, words, capture_output=True, text=True, timeout=90, check=True
        )
        found = scan.stdout
        for old in ("SSLv2", "SSLv3", "TLSv1.0", "TLSv1.1"):
            assert f"{old}     disabled" in found or f"{old}   disabled" in found, found
        assert ("TLSv1.2   enabled" in found) is (least == "1.2")
        assert "TLSv1.3   enabled" in found
        assert "vulnerable to heartbleed" not in found.replace("not vulnerable to heartbleed", "")
        assert "Compression enabled" not in found
        accepted = [
            line for line in found.splitlines() if line.startswith(("Accepted", "Preferred"))
        ]
        assert accepted
        for weak in ("RC4", "3DES", "DES-CBC", "NULL", "EXP", "MD5", "anon", "CBC", "AES128-SHA"):
            assert not any(weak in line for line in accepted), accepted
        assert all("ECDHE" in line or "TLS_" in line for line in accepted), accepted
