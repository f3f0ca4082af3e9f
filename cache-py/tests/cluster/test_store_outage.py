"""A store that is away, and a home that dies meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testkit.cluster import Cluster, NoReply, Reply

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "embedded"))

from cache_nodes import MAIN, argv, linked, until
from other_stores import http_origin

pytestmark = pytest.mark.cluster


async def answer(reply: Any, status: int = 200) -> Any:
    got = await reply
    assert isinstance(got, Reply), got
    assert got.status == status, (got.status, got.text)
    return got.json


async def test_while_the_store_is_away_reads_are_503_and_what_is_written_waits(
    tmp_path: Path,
) -> None:
    async with (
        http_origin() as origin,
        Cluster(argv(f"--store={origin.url}"), 2, root=tmp_path) as cluster,
        cluster.client(0) as a,
        cluster.client(1) as b,
    ):
        await linked(cluster)
        origin.values = {"old": b"1", "unread": b"1"}
        await answer(a.get("/read?key=old"))
        origin.trouble = 500
        assert (await answer(a.get("/read?key=old")))["hit"] is True  # it is still coherent
        written = await answer(a.post("/write", {"key": "old", "value": 2}))
        assert written["version"] == 2
        async with cluster.client(1) as hasty:  # in time it would be 503, as in test_main_memories
            unread = await hasty.get("/read?key=unread", timeout_s=1.0)
            assert isinstance(unread, NoReply) or unread.status == 503, unread
        cluster.power_cut()
        await cluster.start_all()

        async def newest() -> bool:
            reply = await b.get("/read?key=old", timeout_s=10)
            assert isinstance(reply, Reply)
            assert reply.status == 503 or reply.json["value"] == 2
            return reply.status == 200

        await until(newest, "the log still has it")
        origin.trouble = 0

        async def stored() -> bool:
            return origin.values == {"old": b"2", "unread": b"1"}

        await until(stored, "it is stored after all")
        assert (await answer(b.get("/read?key=unread")))["value"] == 1


def test_redis_without_its_library_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'redis' else find(name, *rest)\n"
    )
    done = subprocess.run(
        [sys.executable, str(MAIN), "--addr=127.0.0.1:1", "--id=a", "--store=redis://127.0.0.1",
         f"--data_dir={tmp_path / 'data'}"],
        capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "main.py: error: --store: redis needs redis-py: pip install redis"
    assert not (tmp_path / "data").exists()
