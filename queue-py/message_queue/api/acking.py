"""An ack of a stream on its way, until each of its ids has a status."""

from __future__ import annotations

from message_queue.api import frames
from message_queue.api.errors import ApiError
from message_queue.api.frames import AckItem
from message_queue.api.requests import SETTLED, SINGLE_ACK
from message_queue.core.ids import message_id, parse_delivery
from message_queue.core.operations import (
    MAX_BATCH,
    MAX_RUNS,
    Answer,
    Run,
    SettleRuns,
    settled_runs_decoder,
)
from message_queue.core.placement.ring import PARTITIONS


def whole(item: AckItem) -> SettleRuns:
    """What an ack of a whole delivery asks for. Raises ApiError 400, or 404: there was no such
    delivery."""
    for field in ("message_id", "message_ids", "receipt", "receipts"):
        if getattr(item, field) is not None:
            detail = "Not together with delivery"
            raise ApiError(400, "Invalid field", field=field, detail=detail)
    named = parse_delivery(item.delivery or "")
    if named is None:
        raise ApiError(404, "Delivery not found")
    partition, runs = named
    if partition >= PARTITIONS or len(runs) > MAX_RUNS or sum(run[1] for run in runs) > MAX_BATCH:
        raise ApiError(404, "Delivery not found")
    return SettleRuns(
        partition,
        tuple([Run(first, count, f"{epoch}.{attempt}") for first, count, epoch, attempt in runs]),
    )


def whole_answer(partition: int, reply: Answer) -> tuple[int, Answer]:
    """How many messages of a delivery were acked, and what its client is told."""
    if reply.status != 200:
        return 0, reply
    settled = settled_runs_decoder.decode(reply.body)
    if not (settled.overtaken or settled.unknown):
        return settled.acknowledged, SINGLE_ACK[200]
    if settled.unknown:
        lost, error, field = settled.unknown, ApiError(404, "Message not found"), "unknown"
    else:
        lost, field = settled.overtaken, "overtaken"
        error = ApiError(409, "Receipt overtaken by another delivery")
    error.details[field] = [message_id(partition, dot) for dot in lost]
    error.details["acknowledged"] = settled.acknowledged
    return settled.acknowledged, frames.failure(error)


class Acking:
    """An ack on its way: its ids may belong to several partitions."""

    __slots__ = ("_failure", "_statuses", "answered", "cid", "named", "open", "several")

    def __init__(self, item: AckItem) -> None:
        self.cid = item.cid
        self.several = item.message_ids is not None
        if item.message_ids is None:
            if item.message_id is None:
                raise ApiError(400, "Missing field", field="message_id")
            if item.receipts is not None:
                raise ApiError(400, "Invalid field", field="receipts", detail="Needs message_ids")
            self.named = [(item.message_id, item.receipt)]
        else:
            if item.message_id is not None or item.receipt is not None:
                field = "message_id" if item.message_id is not None else "receipt"
                detail = "Not together with message_ids"
                raise ApiError(400, "Invalid field", field=field, detail=detail)
            receipts = item.receipts or [None] * len(item.message_ids)
            if len(receipts) != len(item.message_ids):
                detail = "Expected one for each of message_ids"
                raise ApiError(400, "Invalid field", field="receipts", detail=detail)
            self.named = list(zip(item.message_ids, receipts, strict=True))
        self.open = len(self.named)
        self.answered = False
        self._statuses = [0] * self.open
        self._failure: Answer | None = None

    def settled(self, index: int, status: int) -> None:
        """What became of one id."""
        self._statuses[index] = status
        self.open -= 1

    def failed(self, index: int, reply: Answer) -> None:
        """Its owner could not say."""
        self._failure = reply
        self.open -= 1

    def answer(self) -> Answer:
        """As POST /ack answers."""
        if self._failure is not None:
            return self._failure
        if not self.several:
            return SINGLE_ACK[self._statuses[0]]
        results = [
            {"message_id": text, "status": SETTLED[status]}
            for (text, _), status in zip(self.named, self._statuses, strict=True)
        ]
        return frames.done({"results": results})
