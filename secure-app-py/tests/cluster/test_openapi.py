"""A running pair against its own /openapi.json, by schemathesis: no server error, no status,
header, media type or body that the document does not know, nothing accepted that it forbids; and
what is refused changes nothing.

By default the *coverage* phase: the bounds of every parameter and field, one at a time, and what
lies beyond them. FUZZ_EXAMPLES=200 adds as many drawn requests per operation; SCHEMATHESIS_SEED
says which.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testkit.cluster import Cluster, HttpClient, Reply
from testkit.sim.loading import load

schemathesis = pytest.importorskip("schemathesis")
engine = pytest.importorskip("schemathesis.engine")

pytestmark = pytest.mark.cluster

kit = load(str(Path(__file__).with_name("pair.py")))

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
STREAMS = ("/events", "/watch")  # they go on for ever
ALIKE = ("/undelete", "/history")  # their schemas are those of /destroy and /get: only when asked
METHODS = ["get", "put", "post", "delete", "options", "patch", "trace"]
WITHOUT_RECORD = ("/admin/promote", "/admin/rotate")  # they change this node's own state
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "negative_data_rejection",
    "unsupported_method", "allow_header_conformance",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with kit.running(tmp_path_factory.mktemp("openapi")) as running:
        yield running


def ask(pair: Cluster, path: str) -> Any:
    async def asked() -> Any:
        async with pair.client(0) as client:
            return await kit.get(client, path)

    return asyncio.run(asked())


def records(pair: Cluster) -> int:
    """How many records clients have made. (The node destroys what has expired, in its own.)"""
    log = (pair.root / "data" / "nodeA" / "audit" / "audit.log").read_bytes()
    lines = [line for line in log.splitlines() if b'"record":' in line]
    return sum(not line.startswith(b'{"action":"expire"') for line in lines)


@pytest.mark.timeout(300 + 5 * EXAMPLES)
def test_every_answer_is_as_documented_and_what_is_refused_changes_nothing(pair: Cluster) -> None:
    config = schemathesis.Config.from_dict(
        {
            "base-url": pair.url(0),
            "headers": kit.ADMIN,
            "tls-verify": False,
            "continue-on-failure": True,
            "seed": int(os.environ.get("SCHEMATHESIS_SEED", "1")),
            "generation": {"max-examples": EXAMPLES or 1, "deterministic": not EXAMPLES},
            "phases": {
                "examples": {"enabled": False},
                # (Wrong methods have a test of their own, see testkit.contract.)
                "coverage": {"enabled": True, "unexpected-methods": METHODS if EXAMPLES else []},
                "fuzzing": {"enabled": bool(EXAMPLES)},
                "stateful": {"enabled": False},
            },
            "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
        }
    )  # fmt: skip
    document = ask(pair, "/openapi.json").json
    for path in STREAMS if EXAMPLES else (*STREAMS, *ALIKE):
        del document["paths"][path]
    schema = schemathesis.openapi.from_dict(document, config=config)
    made, sent, refused, wrong = records(pair), 0, 0, []
    for event in engine.from_schema(schema).execute():
        if isinstance(event, engine.events.NonFatalError | engine.events.FatalError):
            wrong.append(str(event))
        if not isinstance(event, engine.events.ScenarioFinished):
            continue
        recorder = event.recorder
        wrong += [
            f"{event.label}: {check.name}: {check.failure_info.failure.message}"
            for checks in recorder.checks.values()
            for check in checks
            if check.failure_info is not None
        ]
        done = 0
        for each in recorder.interactions.values():
            assert each.response is not None, each.request.uri
            sent += 1
            refused += each.response.status_code >= 400
            done += each.response.status_code < 300 and each.request.method not in ("GET", "HEAD")
        if event.label is None or event.label.split()[1] in WITHOUT_RECORD:
            continue
        made, before = records(pair), made
        if made != before + done:
            wrong.append(f"{event.label}: {done} accepted changes are {made - before} records")
    assert not wrong, "\n".join(sorted(set(wrong))[:20])
    assert sent > 400
    assert refused > 200


def test_every_operation_asks_for_a_token_unless_it_is_documented_as_public(pair: Cluster) -> None:
    document = ask(pair, "/openapi.json").json

    async def strangers() -> None:
        async with HttpClient.of_url(pair.url(0)) as client:
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    where = path.replace("{role}", "user")
                    reply = await client.request(method.upper(), where)
                    assert isinstance(reply, Reply)
                    public = operation.get("security") == []
                    assert (reply.status == 200) is public, (method, path, reply)
                    assert public or reply.status == 401, (method, path, reply)
                    assert str(reply.status) in operation["responses"]

    asyncio.run(strangers())
