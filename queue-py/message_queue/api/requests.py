"""Between HTTP and the operations: what a request asks for, and how it is answered.

The handlers of `routes.py` and the short way (`express.py`) read their requests with the same few
functions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from message_queue.api.errors import ApiError
from message_queue.api.keys import SERVICE, WrongNode
from message_queue.api.schemas import (
    AckBody,
    ConsumeQuery,
    ExtendBody,
    MessageBody,
    NackBody,
    NextBody,
    ProduceBody,
    RouteQuery,
    check_name,
    decode_json,
    read_query,
)
from message_queue.core.ids import MessageName, parse_id
from message_queue.core.operations import (
    Answer,
    Consume,
    Extend,
    Nack,
    NewMessage,
    Operation,
    Produce,
    refusal,
)

T = TypeVar("T")
_json = msgspec.json.Encoder()
_produce = msgspec.json.Decoder(ProduceBody)
_ack = msgspec.json.Decoder(AckBody)
_nack = msgspec.json.Decoder(NackBody)
_extend = msgspec.json.Decoder(ExtendBody)

SETTLED: Mapping[int, str] = {200: "acknowledged", 404: "not found", 409: "overtaken"}
SINGLE_ACK: Mapping[int, Answer] = {
    200: Answer(200, b'{"status":"acknowledged"}'),
    404: refusal(404, "Message not found"),
    409: refusal(409, "Receipt overtaken by another delivery"),
}


def error_of(answer: Answer) -> ApiError:
    """The error that an answer of the owner (400 and above) means."""
    details: dict[str, Any] = msgspec.json.decode(answer.body, type=dict[str, Any])
    error = details.pop("error", "Internal error")
    headers = {"Retry-After": str(answer.retry_after_s)} if answer.retry_after_s else None
    return ApiError(answer.status, error, headers=headers, **details)


def respond(answer: Answer) -> web.Response:
    """An answer of the owner as a response. Errors go through the middleware (problem+json)."""
    if answer.status >= 400:
        raise error_of(answer)
    if answer.status == 204:
        return web.Response(status=204)
    return web.Response(body=answer.body, status=answer.status, content_type="application/json")


async def ask(request: web.Request, operation: Operation, forward: bool) -> Answer:
    """Have the owner do it."""
    return await guarded(request.app[SERVICE].ask(operation, forward))


async def guarded(asked: Awaitable[T]) -> T:
    """What was asked, or 421 with the owner's address."""
    try:
        return await asked
    except WrongNode as e:
        if e.owner is None:
            raise ApiError(
                503, "No owner elected", headers={"Retry-After": "1"}, definite=True
            ) from None
        raise ApiError(421, "Wrong node", owner=e.owner) from None


async def fetch(
    request: web.Request, query: ConsumeQuery | NextBody, forward: bool
) -> web.Response:
    """Lease and deliver. A client that went away meanwhile has leased nothing."""
    operation = consume_of(query)
    delivered = await guarded(request.app[SERVICE].consume(operation, forward))
    transport = request.transport
    if transport is None or transport.is_closing():
        delivered.undo()
    return respond(delivered.answer)


def read_forward(request: web.Request) -> bool:
    """`?forward=`, true unless said otherwise."""
    return read_query(request, RouteQuery).forward if request.query_string else True


def queue_name(request: web.Request) -> str:
    """The queue in the path."""
    name = request.match_info["queue"]
    if not name:
        raise ApiError(400, "Invalid field", field="queue", detail="Expected a name")
    if len(name) > 256:
        raise ApiError(400, "Invalid field", field="queue", detail="Expected at most 256 bytes")
    return check_name(name, "queue")


def produce_of(body: bytes) -> Produce:
    """What the body of POST /produce asks for. Raises ApiError 400."""
    asked = decode_json(body, _produce)
    return Produce(check_name(asked.queue, "queue"), *new_messages(asked))


def consume_of(query: ConsumeQuery | NextBody) -> Consume:
    """What GET /consume, or the `next` of an ack, asks for. Raises ApiError 400."""
    return Consume(
        check_name(query.queue, "queue"),
        query.max or 1,
        query.max is not None,
        query.wait_ms,
        query.visibility_ms,
    )


def ack_of(body: bytes) -> tuple[AckBody, list[str]]:
    """The body of POST /ack, and the ids in it. Raises ApiError 400."""
    asked = decode_json(body, _ack)
    return asked, ids_of(asked)


def nack_of(body: bytes) -> Nack:
    """What the body of POST /nack asks for. Raises ApiError 400 or 404."""
    asked = decode_json(body, _nack)
    return Nack(*known_id(asked.message_id), asked.receipt, asked.delay_ms)


def extend_of(body: bytes) -> Extend:
    """What the body of POST /extend asks for. Raises ApiError 400 or 404."""
    asked = decode_json(body, _extend)
    return Extend(*known_id(asked.message_id), asked.receipt, asked.visibility_ms)


def acked(asked: AckBody, ids: Sequence[str], statuses: Sequence[int]) -> Answer:
    """What became of an ack: a status for each of its ids."""
    if asked.message_ids is None:
        return SINGLE_ACK[statuses[0]]
    results = [
        {"message_id": name, "status": SETTLED[status]}
        for name, status in zip(ids, statuses, strict=True)
    ]
    return Answer(200, _json.encode({"results": results}))


def new_messages(body: ProduceBody) -> tuple[tuple[NewMessage, ...], bool]:
    """The messages of a request, and whether it was a batch."""
    if isinstance(body.messages, msgspec.UnsetType):
        if isinstance(body.body, msgspec.UnsetType):
            raise ApiError(400, "Missing field", field="body")
        return (_message(body, body.body),), False
    if not isinstance(body.body, msgspec.UnsetType):
        raise ApiError(400, "Invalid field", field="body", detail="Not together with messages")
    for field in ("headers", "delay_ms", "priority", "ttl_ms", "dedupe_id", "group_id"):
        if getattr(body, field):
            raise ApiError(400, "Invalid field", field=field, detail="Belongs into each message")
    return tuple(_message(message, message.body) for message in body.messages), True


def _message(fields: ProduceBody | MessageBody, body: msgspec.Raw) -> NewMessage:
    for field, name in (("dedupe_id", fields.dedupe_id), ("group_id", fields.group_id)):
        if name is not None:
            check_name(name, field)
    return NewMessage(
        bytes(body),
        _json.encode(fields.headers) if fields.headers else None,
        fields.delay_ms,
        fields.priority,
        fields.ttl_ms or 0,
        fields.dedupe_id,
        fields.group_id,
    )


def known_id(text: str) -> MessageName:
    """What an id names. One that no node can have issued is 404 at once."""
    name = parse_id(text)
    if name is None:
        raise ApiError(404, "Message not found", id=text)
    return name


def ids_of(body: AckBody) -> list[str]:
    """The ids of an ack, exactly one of its two forms. What it wants next is judged as well, for a
    request that is refused changes nothing. Raises ApiError 400."""
    if body.next is not None:
        check_name(body.next.queue, "next.queue")
    if body.message_id is not None:
        if body.message_ids is not None:
            raise ApiError(
                400, "Invalid field", field="message_ids", detail="Not together with message_id"
            )
        return [body.message_id]
    if body.message_ids is None:
        raise ApiError(400, "Missing field", field="message_id")
    if body.receipt is not None:
        raise ApiError(400, "Invalid field", field="receipt", detail="Needs a single message_id")
    return body.message_ids
