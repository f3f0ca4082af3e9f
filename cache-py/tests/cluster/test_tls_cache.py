"""Clients and peers over TLS: the same service, and no other way in."""

from __future__ import annotations

import datetime
import ipaddress
import sys
from pathlib import Path
from typing import Any

import pytest

from mesi_cache.core.placement import Placement
from testkit.cluster import Cluster, HttpClient, NodeView, NoReply, Reply

sys.path.insert(0, str(Path(__file__).parent))

from cache_nodes import MAIN, until

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

pytestmark = pytest.mark.cluster


async def answer(reply: Any) -> Any:
    got = await reply
    assert isinstance(got, Reply), got
    assert got.status == 200, got
    return got.json


def certificate(folder: Path, name: str) -> list[str]:
    """A certificate that vouches for itself, as flags."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = folder / f"{name}.crt", folder / f"{name}.key"
    cert_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return [f"--tls_cert={cert_path}", f"--tls_key={key_path}", f"--tls_ca={cert_path}"]


async def test_over_tls_all_is_as_without_and_a_stranger_is_no_peer(tmp_path: Path) -> None:
    ours, theirs = certificate(tmp_path, "ours"), certificate(tmp_path, "theirs")

    def argv(view: NodeView) -> list[str]:
        members = ",".join(f"https://{view.real(other)}" for other in view.others())
        stranger = view.index == 2
        return [
            sys.executable, str(MAIN), f"--addr={view.bind()}", f"--peers={members}",
            f"--id=node{view.index}", f"--data_dir={view.data_dir}",
            *(theirs if stranger else ours),
        ]  # fmt: skip

    secret = {"CLUSTER_SECRET": "of the cluster"}
    async with (
        Cluster(argv, 3, root=tmp_path, scheme="https", env=secret) as cluster,
        cluster.client(0) as a,
        cluster.client(1) as b,
    ):

        async def peers(client: HttpClient) -> list[str]:
            return list((await answer(client.get("/status")))["peers_connected"])

        for client, other in ((a, 1), (b, 0)):

            async def met(client: HttpClient = client, other: int = other) -> bool:
                return cluster.url(other) in await peers(client)

            await until(met, "those who trust each other are linked")
        home = Placement(cluster.urls).home
        names = (f"tls{number}" for number in range(3_000))
        keys = [name for name in names if home(name) != cluster.url(2)][:600]
        items = [{"key": key, "value": key * 50} for key in keys]  # frames of many TLS records
        written = await answer(a.post("/mwrite", {"items": items}))
        assert [each["version"] for each in written["results"]] == [1] * 600
        read = await answer(b.post("/mread", {"keys": keys}))
        assert [each["value"] for each in read["results"]] == [key * 50 for key in keys]
        for number, key in enumerate(keys[:20]):
            await answer((a, b)[number % 2].post("/write", {"key": key, "value": number}))
            assert (await answer((b, a)[number % 2].get(f"/read?key={key}")))["value"] == number
        assert await peers(a) == [cluster.url(1)]
        assert await peers(b) == [cluster.url(0)]
        plain = HttpClient.of_url(cluster.url(0).replace("https", "http"))
        async with plain:
            assert isinstance(await plain.get("/healthz"), NoReply)
