"""Flags: the seed's work as they stand, and every mistake is one clear line."""

from __future__ import annotations

import pytest

from lock_manager.config import Address, ConfigError, parse

SEED = {
    "--id": "node1",
    "--raft_addr": "127.0.0.1:7000",
    "--http_addr": "127.0.0.1:8000",
    "--peers": "127.0.0.1:7000,127.0.0.1:7001,127.0.0.1:7002",
    "--peer_http_addrs": "127.0.0.1:8000,127.0.0.1:8001,127.0.0.1:8002",
}


def argv(**changes: str | None) -> list[str]:
    flags: dict[str, str | None] = {
        **SEED,
        **{f"--{name}": value for name, value in changes.items()},
    }
    return [f"{flag}={value}" for flag, value in flags.items() if value is not None]


def test_the_seeds_flags_give_the_seeds_defaults() -> None:
    config = parse(argv(id="node2", raft_addr="127.0.0.1:7001", http_addr="127.0.0.1:8001"), {})
    assert config.position == 2
    assert config.data_dir.parts == ("data", "node2")
    assert config.peers[2] == Address("127.0.0.1", 7002)
    assert not config.join
    assert config.scheme == "http"
    assert config.cluster_secret is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"id": None}, "--id"),
        ({"id": "../x"}, "--id"),
        ({"id": ""}, "--id"),
        ({"raft_addr": "7000"}, "--raft_addr"),
        ({"raft_addr": "http://127.0.0.1:7000"}, "--raft_addr"),
        ({"http_addr": "127.0.0.1:0"}, "--http_addr"),
        ({"http_addr": "127.0.0.1:99999"}, "--http_addr"),
        ({"peers": "127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003"}, "--peers"),
        ({"peers": "127.0.0.1:7000,127.0.0.1:7000,127.0.0.1:7002"}, "--peers"),
        ({"peers": "127.0.0.1:7000,127.0.0.1:7001"}, "--peer_http_addrs"),
        (
            {"peer_http_addrs": "127.0.0.1:8001,127.0.0.1:8000,127.0.0.1:8002"},
            "--peer_http_addrs",
        ),
        (
            {"peer_http_addrs": "127.0.0.1:8000,127.0.0.1:7001,127.0.0.1:8002"},
            "have an address in common",
        ),
        ({"heartbeat_ms": "0"}, "--heartbeat_ms"),
        ({"heartbeat_ms": "200"}, "--election_timeout_ms"),
        ({"election_timeout_ms": "-1"}, "--election_timeout_ms"),
        ({"lock_delay_ms": "soon"}, "--lock_delay_ms"),
        ({"max_body_bytes": "0"}, "--max_body_bytes"),
        ({"log_format": "xml"}, "--log_format"),
        ({"tls_cert": "cert.pem"}, "--tls_key"),
        ({"cluster_secret_file": "/nowhere/secret"}, "--cluster_secret_file"),
        ({"unknown": "1"}, "--unknown"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(
    changes: dict[str, str | None], word: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse(argv(**changes), {})
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_beyond_loopback_a_secret_is_needed() -> None:
    changes = {
        "http_addr": "0.0.0.0:8000",
        "peer_http_addrs": "0.0.0.0:8000,127.0.0.1:8001,127.0.0.1:8002",
    }
    with pytest.raises(ConfigError, match="beyond loopback"):
        parse(argv(**changes), {})
    assert parse(argv(**changes), {"CLUSTER_SECRET": "s"}).cluster_secret == b"s"
    assert parse([*argv(**changes), "--insecure"], {}).cluster_secret is None
    assert "s3cret" not in repr(parse(argv(), {"CLUSTER_SECRET": "s3cret"}))
