"""What an owner answers, as clients see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import msgspec

from message_queue.core.delivery.dedupe import Mark
from message_queue.core.delivery.model import Verdict
from message_queue.core.delivery.pending import Storing
from message_queue.core.ids import id_bytes, message_id
from message_queue.core.operations import Answer, refusal

_json = msgspec.json.Encoder()


def created(partition: int, item: Storing, dots: Sequence[int]) -> Answer:
    """Messages are stored; `dots`: of each message of the request, or of the one it repeats."""
    status = 201 if item.new else 200
    if item.batch:
        ids = b'","'.join([id_bytes(partition, dot) for dot in dots])
        tail = b""
        if item.messages < len(dots):
            repeated = [n for n, piece in enumerate(item.pieces) if isinstance(piece, Mark)]
            tail = b',"duplicates":%b,"duplicate":%b' % (
                _json.encode(repeated), b"false" if item.new else b"true",
            )  # fmt: skip
        queue = _json.encode(item.queue)
        text = b'{"ids":["%b"],"queue":%b,"status":"created"%b}' % (ids, queue, tail)
        return Answer(status, text, messages=item.messages)
    name = id_bytes(partition, dots[0])
    queue = _json.encode(item.queue)
    tail = b"}" if item.new else b',"duplicate":true}'
    text = b'{"id":"%b","queue":%b,"status":"created"%b' % (name, queue, tail)
    return Answer(status, text, messages=item.messages)


def returned(partition: int, dot: int, verdict: Verdict, word: str) -> Answer:
    """Of a nack or an extend."""
    match verdict:
        case Verdict.DONE:
            return Answer(200, b'{"status":"%b"}' % word.encode())
        case Verdict.OVERTAKEN:
            return refusal(409, "Receipt overtaken by another delivery")
        case Verdict.NOT_LEASED:
            return refusal(409, "Message is not leased")
        case Verdict.TOO_LONG:
            return refusal(400, "Invalid field", field="visibility_ms", detail="12 h in total")
        case Verdict.SETTLING:
            return refusal(409, "Message is being settled")
        case Verdict.UNKNOWN:
            return refusal(404, "Message not found", id=message_id(partition, dot))
        case _:
            assert_never(verdict)
