"""An ack of a stream on its way, until each of its ids has a status."""

from __future__ import annotations

from message_queue.api import frames
from message_queue.api.errors import ApiError
from message_queue.api.frames import AckItem
from message_queue.api.requests import SETTLED, SINGLE_ACK
from message_queue.core.operations import Answer


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
