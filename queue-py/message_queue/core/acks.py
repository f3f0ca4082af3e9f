"""An ack names messages of several partitions: who is asked about which, and what they answered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from message_queue.core.ids import parse_ids
from message_queue.core.operations import Answer, Settle, results_decoder
from message_queue.core.placement.ring import PARTITIONS


class Share(NamedTuple):
    """What one partition's owner is asked, and where its messages stand among all."""

    settle: Settle
    places: list[int]


def shares(ids: Sequence[str], receipt: str | None) -> list[Share]:
    """One for each partition that is named. What is no id of a message is in none of them."""
    by_partition: dict[int, tuple[list[int], list[int]]] = {}
    for place, name in enumerate(parse_ids(ids)):
        if name is not None and name.partition < PARTITIONS:
            places, dots = by_partition.setdefault(name.partition, ([], []))
            places.append(place)
            dots.append(name.dot)
    return [
        Share(Settle(partition, tuple(dots), (receipt,) * len(dots)), places)
        for partition, (places, dots) in by_partition.items()
    ]


def statuses_of(count: int, answered: Iterable[tuple[Share, Answer]]) -> list[int] | Answer:
    """A status for each of `count` ids (404: in no share), or the first refusal of an owner."""
    statuses = [404] * count
    for share, answer in answered:
        if answer.status != 200:
            return answer
        found = results_decoder.decode(answer.body).statuses
        for place, status in zip(share.places, found, strict=True):
            statuses[place] = status
    return statuses
