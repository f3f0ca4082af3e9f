"""Flags: the seed's, exactly; what is wrong is said in one line that names the flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesi_cache import config
from mesi_cache.config import ConfigError

SEED = [
    "--addr=127.0.0.1:8000",
    "--peers=http://127.0.0.1:8001,http://127.0.0.1:8002",
    "--capacity=10",
    "--id=nodeA",
]


def test_the_seeds_flags_are_all_that_is_needed() -> None:
    parsed = config.parse(SEED, {})
    assert parsed.members == tuple(f"http://127.0.0.1:{port}" for port in (8000, 8001, 8002))
    assert parsed.data_dir == Path("data/nodeA")
    assert (parsed.capacity, parsed.lease_ms, parsed.fsync) == (10, 2000, "interval")


def test_its_own_url_among_the_peers_is_ignored() -> None:
    flags = ["--addr=127.0.0.1:8000", "--id=a", "--peers=http://127.0.0.1:8000/,http://x:1"]
    assert config.parse(flags, {}).peers == ("http://x:1",)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--capacity=0"], "--capacity"),
        (["--capacity=ten"], "--capacity"),
        (["--peers=127.0.0.1:8001"], "--peers: expected http://host:port"),
        (["--peers=http://a:1,http://a:1"], "--peers: names a member twice"),
        (["--peers=http://u@a:1"], "--peers"),
        (["--peers=http://a:1/path"], "--peers"),
        (["--lease_ms=5"], "--lease_ms"),
        (["--store=redis://127.0.0.1:6379/x"], "--store: expected redis://host:port/NUMBER"),
        (["--store=redis://127.0.0.1:6379?timeout=3"], "--store: of the options"),
        (["--store=redis://127.0.0.1:99999"], "--store: expected redis://host"),
        (["--store=http://"], "--store: expected http://host"),
        (["--store=http://origin/path?query"], "--store: an origin's URL"),
        (["--store=http://user:word@origin"], "--store: an origin's URL"),
        (["--store=ftp://origin"], "--store: expected memory, sqlite:PATH"),
        (["--store=sqlite:"], "--store"),
        (["--store=sqlite:/no/such/place/x.db"], "--store: no such directory"),
        (["--store=disk"], "--store"),
        (["--write_policy=never"], "--write_policy"),
        (["--policy=fifo"], "--policy"),
        (["--write_policy=back_unsafe", "--fsync=always"], "--fsync"),
        (["--fsync=never"], "--fsync"),
        (["--addr=0.0.0.0:8000"], "beyond loopback"),
        (["--dial=http://a:1=http://b:1"], "--dial"),
        (["--cap=3"], "--cap"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        config.parse(SEED + flags, {})
    assert "\n" not in str(caught.value)
