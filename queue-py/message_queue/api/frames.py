"""What travels on `/stream`: frames of JSON, each an array of items or a single one.

A client's item names an `op` and carries the fields of the HTTP row of that name, and a `cid` of
the client's choice. The answer is `{"cid", "status", "body"}` with the row's status and body. An
item without `cid` is answered only if it fails (with `"cid":null`).
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from message_queue.api.errors import ApiError
from message_queue.api.schemas import (
    MAX_JSON_DEPTH,
    ExtendBody,
    MessageId,
    NackBody,
    Name,
    ProduceBody,
    Receipt,
    Visibility,
    decode_json,
    may_hold_long_number,
)
from message_queue.core.operations import MAX_BATCH, Answer

MAX_ITEMS: Final = 1000
"""In one frame."""
MAX_CREDIT: Final = MAX_BATCH
"""Messages that a subscription may be owed at a time."""

Cid = Annotated[str, Meta(max_length=64)] | Annotated[int, Meta(ge=0, le=2**53)]
Credit = Annotated[int, Meta(ge=0, le=MAX_CREDIT)]
DeliveryReceipt = Annotated[str, Meta(max_length=6400)]


STREAM_PROTOCOL: Final = """\
Frames are JSON text: an array of items, or (from a client) a single one. A client's item has an
`op`, a `cid` of its choice (a string or a number) and the fields of the HTTP row of that name; its
answer is `{"cid", "status", "body"}` with that row's status and body (and `retry_after_s`). An item
without `cid` is answered only if it fails, with `"cid":null`.

* `produce`: as POST /produce.
* `ack`: as POST /ack (`receipts` may stand beside `message_ids`, one for each); `nack`, `extend`
  likewise. `release` (`message_id`, `receipt`): fetched ahead and not used, counts as no attempt.
* `subscribe` (`cid`, `queue`, `credit`, `visibility_ms?`): deliveries come as `{"subscription":
  cid, "messages": […]}`, each message as in GET /consume, no more than there is credit. One of
  several messages mostly has a `receipt` beside `messages`, too: `{"op":"ack", "delivery":
  receipt}` acks them all in a word, on any connection. It is answered as an ack of one; what was
  overtaken meanwhile is named (409, `overtaken`: ids), all others are acked. `credit`
  (`subscription`, `credit`) adds some, `unsubscribe` (`subscription`) ends it. While the queue has
  no owner, `{"subscription", "status", "body"}` says so; deliveries go on by themselves.

At most 1000 items a frame, 4096 without an answer (429), 64 subscriptions, 1000 credit. Answers
come in no particular order. Close codes: 1001 the node stops (go on at another), 1003 a binary
frame, 1009 a frame above `--max_body_bytes`.
"""


class ProduceItem(
    ProduceBody, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="produce"
):
    """As POST /produce."""

    cid: Cid | None = None


class AckItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="ack"):
    """As POST /ack; `receipts`, when given, has one for each of `message_ids`."""

    message_id: MessageId | None = None
    message_ids: Annotated[list[MessageId], Meta(min_length=1, max_length=MAX_BATCH)] | None = None
    receipt: Receipt | None = None
    receipts: Annotated[list[Receipt | None], Meta(max_length=MAX_BATCH)] | None = None
    delivery: DeliveryReceipt | None = None
    """Instead of all that: the `receipt` of a whole delivery."""
    cid: Cid | None = None


class NackItem(NackBody, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="nack"):
    """As POST /nack."""

    cid: Cid | None = None


class ExtendItem(ExtendBody, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="extend"):
    """As POST /extend."""

    cid: Cid | None = None


class ReleaseItem(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="release"
):
    """Give back a message that was fetched ahead and shown to nobody: it counts as no attempt."""

    message_id: MessageId
    receipt: Receipt
    cid: Cid | None = None


class SubscribeItem(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="subscribe"
):
    """Deliver messages of a queue, `credit` of them at first. Its `cid` names the subscription."""

    cid: Cid
    queue: Name
    credit: Credit = 0
    visibility_ms: Visibility | None = None


class CreditItem(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="credit"
):
    """Deliver `credit` more."""

    subscription: Cid
    credit: Credit
    cid: Cid | None = None


class UnsubscribeItem(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="unsubscribe"
):
    """Deliver no more."""

    subscription: Cid
    cid: Cid | None = None


Item = (
    ProduceItem
    | AckItem
    | NackItem
    | ExtendItem
    | ReleaseItem
    | SubscribeItem
    | CreditItem
    | UnsubscribeItem
)


class Bad(msgspec.Struct, frozen=True):
    """An item that cannot be done, or a whole frame (then `cid` is None)."""

    cid: Cid | None
    error: ApiError


class _Named(msgspec.Struct, frozen=True):
    cid: Cid | None = None


_item: Final[msgspec.json.Decoder[Item]] = msgspec.json.Decoder(Item)
_items: Final[msgspec.json.Decoder[list[Item]]] = msgspec.json.Decoder(list[Item])
_raws: Final = msgspec.json.Decoder(list[msgspec.Raw])
_named: Final = msgspec.json.Decoder(_Named)
_json: Final = msgspec.json.Encoder()


def parse(frame: bytes) -> list[Item | Bad]:
    """The items of a frame, in order. Never raises: what is wrong stands where it was found."""
    try:
        if not frame.isascii():
            frame.decode()
        if not frame.lstrip(b" \t\r\n").startswith(b"["):
            return [_one(frame)]
        if not may_hold_long_number(frame):
            items = _items.decode(frame)
            if len(items) <= MAX_ITEMS and not _deep(frame, items):
                return list(items)
        raws = _raws.decode(frame)
    except msgspec.ValidationError:
        try:
            raws = _raws.decode(frame)
        except (msgspec.DecodeError, RecursionError):
            return [Bad(None, ApiError(400, "Invalid JSON"))]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return [Bad(None, ApiError(400, "Invalid JSON"))]
    except RecursionError:
        return [Bad(None, ApiError(400, "JSON nested too deeply"))]
    if len(raws) > MAX_ITEMS:
        return [Bad(None, ApiError(400, "Too many items in a frame", limit=MAX_ITEMS))]
    return [_one(bytes(raw)) for raw in raws]


def _one(text: bytes) -> Item | Bad:
    try:
        return decode_json(text, _item)
    except ApiError as error:
        return Bad(_cid_of(text), error)


def _cid_of(text: bytes) -> Cid | None:
    try:
        return _named.decode(text).cid
    except (msgspec.MsgspecError, RecursionError):
        return None


def _deep(frame: bytes, items: list[Item]) -> bool:
    """Whether a body might be nested too deeply (then items are looked at one by one)."""
    if frame.count(b"[") + frame.count(b"{") <= MAX_JSON_DEPTH:
        return False
    for item in items:
        if not isinstance(item, ProduceItem):
            continue
        several = item.messages
        bodies = (
            [item.body] if isinstance(several, msgspec.UnsetType) else [m.body for m in several]
        )
        for body in bodies:
            raw = b"" if isinstance(body, msgspec.UnsetType) else bytes(body)
            if raw.count(b"[") + raw.count(b"{") > MAX_JSON_DEPTH:
                return True
    return False


def answer(cid: Cid | None, reply: Answer) -> bytes:
    """An item's answer."""
    name = b"%d" % cid if isinstance(cid, int) else _json.encode(cid)
    if reply.retry_after_s:
        return b'{"cid":%b,"status":%d,"retry_after_s":%d,"body":%b}' % (
            name, reply.status, reply.retry_after_s, reply.body or b"{}",
        )  # fmt: skip
    return b'{"cid":%b,"status":%d,"body":%b}' % (name, reply.status, reply.body or b"{}")


def failure(error: ApiError) -> Answer:
    """An error as an answer."""
    return Answer(error.status, _json.encode({"error": error.error, **error.details}))


def done(body: object) -> Answer:
    """Success with a body of its own."""
    return Answer(200, _json.encode(body))


def delivery(subscription: Cid, reply: Answer) -> bytes:
    """Messages, as /consume renders them (`{"messages":[…]}`), for a subscription."""
    name = b"%d" % subscription if isinstance(subscription, int) else _json.encode(subscription)
    if reply.receipt:
        name += b',"receipt":"%b"' % reply.receipt.encode()
    return b'{"subscription":%b,%b' % (name, reply.body[1:])


def trouble(subscription: Cid, reply: Answer) -> bytes:
    """Why a subscription gets nothing for the moment; it goes on by itself."""
    return b'{"subscription":%b,"status":%d,"body":%b}' % (
        _json.encode(subscription), reply.status, reply.body,
    )  # fmt: skip
