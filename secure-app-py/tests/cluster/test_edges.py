"""At the edges: secrets that must stand nowhere, input that must do nothing, audit lines that must
survive a kill."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from testkit.cluster import HttpClient, Reply
from testkit.sim.loading import load

pytestmark = pytest.mark.cluster


kit = load(str(Path(__file__).with_name("pair.py")))


async def send(client: HttpClient, method: str, path: str, body: Any = None) -> Reply:
    raw = None if body is None else json.dumps(body).encode()
    reply = await client.request(method, path, body=raw, timeout_s=20)
    assert isinstance(reply, Reply), (method, path, body, reply)
    return reply


async def last_seq(client: HttpClient) -> int:
    return int((await kit.get(client, "/status")).json["last_seq"])


async def test_canaries_in_values_and_tokens_stand_in_no_file_log_metric_or_error(
    tmp_path: Path,
) -> None:
    value, guess = "canary-of-a-value-7f3a", "canary-of-a-token-91bc"
    answers: list[bytes] = []
    async with kit.pair(tmp_path, "--log_level=debug") as cluster, cluster.client(0) as admin:
        await kit.set_value(admin, "k", value)
        await kit.set_value(admin, "k", {"deep": [value]})
        await send(admin, "POST", "/txn", {"ops": [{"op": "set", "key": "t", "value": value}]})
        again = {"Idempotency-Key": "once"}
        body = json.dumps({"key": "i", "value": value}).encode()
        for _ in range(2):
            await admin.request("POST", "/set", body=body, headers=again)
        made = (await send(admin, "POST", "/tokens", {"roles": ["user"], "name": "n"})).json
        for bad in (
            {"key": "k", "value": value, "extra": 1},
            {"key": "k", "value": value, "expected_version": 77},
            {"key": ["k"], "value": value},
        ):
            answers.append((await send(admin, "POST", "/set", bad)).body)
        half = await admin.request("POST", "/set", body=b'{"key":"k","value":"%s' % value.encode())
        assert isinstance(half, Reply)
        answers.append(half.body)
        async with cluster.client(0, headers={"Authorization": f"Bearer {guess}"}) as guesser:
            answers.append((await kit.get(guesser, "/get?key=k")).body)
            answers.append((await send(guesser, "POST", "/set", {"key": "k", "value": value})).body)
        async with cluster.client(0, headers={"Authorization": f"Basic {guess}"}) as basic:
            answers.append((await kit.get(basic, "/get?key=k")).body)
        answers.append((await kit.get(admin, f"/get?key=k&access_token={guess}")).body)
        answers.append((await kit.get(admin, f"/get?key=k&key={guess}")).body)
        cluster.kill(1)
        await kit.set_value(admin, "k", value)
        cluster.start(1)
        await cluster.linked()
        pages = ["/metrics", "/metrics?format=prometheus", "/status", "/replication", "/tokens"]
        for path in (*pages, "/audit?limit=1000", "/history?key=k", "/openapi.json"):
            answers.append((await kit.get(admin, path)).body)
        assert await cluster.terminate_all() == [0, 0]
        everything = {str(path): path.read_bytes() for path in kit.files_under(tmp_path)}
        assert any("audit.log" in path for path in everything)
        assert any(path.endswith("node0.log") for path in everything)
    for secret in (value, guess, made["token"], "token-admin-123"):
        assert not any(secret.encode() in answer for answer in answers), secret
        for path, raw in everything.items():
            assert secret.encode() not in raw, (secret, path)


async def test_fuzzed_tokens_headers_and_request_lines_get_an_answer_and_no_more(
    tmp_path: Path,
) -> None:
    rng = random.Random(4)
    letters = [chr(c) for c in range(33, 127)] + ["é", "\t", " ", "token-admin-123", "Bearer"]
    async with kit.pair(tmp_path) as cluster, cluster.client(0) as admin:
        before = await last_seq(admin)
        async with HttpClient.of_url(cluster.url(0)) as client:
            for _ in range(150):
                token = "".join(rng.choices(letters, k=rng.randrange(60)))
                scheme = rng.choice(["Bearer", "bearer", "Basic", "", "Bearer Bearer"])
                head = f"POST /set HTTP/1.1\r\nHost: x\r\nAuthorization: {scheme} {token}x\r\n"
                body = '{"key":"fuzz","value":1}'
                head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                reply = await client.raw((head + body).encode())
                assert isinstance(reply, Reply), head
                assert reply.status in (400, 401, 429), (head, reply)
            for _ in range(60):
                noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200)))
                reply = await client.raw(noise + b"\r\n\r\n")
                assert not isinstance(reply, Reply) or 400 <= reply.status < 500
        assert await last_seq(admin) == before
        assert (await kit.set_value(admin, "k", 1)).status == 200
        assert "Traceback" not in cluster.nodes[0].output()


@pytest.mark.timeout(120 + 90 * float(os.environ.get("SOAK", "0")))
async def test_every_acknowledged_write_has_its_audit_line_through_kills(tmp_path: Path) -> None:
    """SOAK=5 (minutes) goes on for longer."""
    acknowledged: list[str] = []
    async with kit.pair(tmp_path) as cluster:

        async def writer(name: str) -> None:
            async with cluster.client(0) as client:
                for number in range(10_000):
                    request_id = f"{name}-{number}"
                    reply = await client.request(
                        "POST", "/set", body=b'{"key":"k","value":1}',
                        headers={"X-Request-Id": request_id}, timeout_s=20,
                    )  # fmt: skip
                    if not isinstance(reply, Reply):
                        return
                    if reply.status == 200:
                        acknowledged.append(request_id)

        rng = random.Random(6)
        until = time.monotonic() + 60 * float(os.environ.get("SOAK", "0"))
        faults = ["power cut", "kill", "kill twice"]  # each once, then as they come
        round_number = 0
        while faults or time.monotonic() < until:
            fault = faults.pop() if faults else rng.choice(("power cut", "kill", "kill twice"))
            round_number += 1
            count = len(acknowledged)
            tasks = [asyncio.create_task(writer(f"r{round_number}w{n}")) for n in range(4)]

            async def enough(wanted: int = count + rng.randrange(10, 30)) -> bool:
                return len(acknowledged) >= wanted

            await kit.eventually(enough)
            if fault == "power cut":
                cluster.power_cut()
            else:
                cluster.kill(0)
            await asyncio.gather(*tasks)
            path = tmp_path / "data" / "nodeA" / "audit" / "audit.log"
            lines = path.read_bytes()  # as the kill left it
            assert all(b'"%s"' % r.encode() in lines for r in acknowledged)
            if fault == "kill twice":  # while it takes up what the first kill left
                cluster.start(0)
                await cluster.ready(0)
                await asyncio.sleep(rng.choice((0, 0.02, 0.1, 0.4)))
                cluster.kill(0)
            await cluster.start_all()
        assert await cluster.terminate_all() == [0, 0]
    done = kit.command(tmp_path, "audit", "verify", "--id", "nodeA")
    assert done.returncode == 0, done.stdout
    entries = [json.loads(line) for line in path.read_bytes().splitlines()]
    records = Counter(entry["record"] for entry in entries if entry.get("record"))
    assert max(records.values()) == 1, "a record was told twice"
    told = {entry["request_id"] for entry in entries if entry.get("record")}
    assert set(acknowledged) <= told


async def test_a_client_that_goes_away_does_not_undo_what_it_began(tmp_path: Path) -> None:
    """A cancelled wait is no rollback: the write is decided, readable, and has its line."""
    async with kit.pair(tmp_path) as cluster, cluster.client(0) as admin:
        await kit.set_value(admin, "k", "before")
        before = await last_seq(admin)
        cluster.pause(1)  # the write is begun, and cannot be decided yet
        host, port = cluster.views[0].bind().split(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=cluster.tls)
        body = b'{"key":"k","value":"after"}'
        writer.write(
            b"POST /set HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-admin-123\r\n"
            b"X-Request-Id: went-away\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )

        async def begun() -> bool:
            return await last_seq(admin) > before

        await kit.eventually(begun)
        writer.transport.abort()
        cluster.resume(1)

        async def decided() -> bool:
            return (await kit.get(admin, "/get?key=k")).json["value"] == "after"

        await kit.eventually(decided)
        assert await cluster.terminate_all() == [0, 0]
    log = (tmp_path / "data" / "nodeA" / "audit" / "audit.log").read_bytes().splitlines()
    mine = [entry for entry in map(json.loads, log) if entry["request_id"] == "went-away"]
    assert [e["record"] for e in mine if e["outcome"] == "allowed"] == [before + 1]
