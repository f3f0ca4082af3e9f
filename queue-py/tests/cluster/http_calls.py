"""What an outsider does: one request, one answer."""

from __future__ import annotations

from typing import Any

import msgspec

from testkit.cluster import HttpClient, Reply


async def post(client: HttpClient, path: str, body: object) -> Reply:
    reply = await client.post(path, body)
    assert isinstance(reply, Reply), reply
    return reply


async def get(client: HttpClient, path: str) -> Reply:
    reply = await client.get(path)
    assert isinstance(reply, Reply), reply
    return reply


async def put(client: HttpClient, path: str, body: object) -> Reply:
    reply = await client.request("PUT", path, body=msgspec.json.encode(body))
    assert isinstance(reply, Reply), reply
    return reply


async def produce(client: HttpClient, queue: str, body: object, **fields: Any) -> str:
    reply = await post(client, "/produce", {"queue": queue, "body": body, **fields})
    assert reply.status == 201, reply
    return reply.json["id"]


async def delete(client: HttpClient, path: str) -> Reply:
    reply = await client.request("DELETE", path)
    assert isinstance(reply, Reply), reply
    return reply


async def somebody_waits(client: HttpClient, queue: str) -> bool:
    """Of a queue that is configured: one that nobody used yet is not listed."""
    listed = (await get(client, "/queues")).json["queues"]
    return any(q["queue"] == queue and q["waiting_consumers"] > 0 for q in listed)
