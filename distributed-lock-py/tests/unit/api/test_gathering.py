"""A batch waits for those who are about to come, never for time."""

from __future__ import annotations

import asyncio

from lock_manager.api.gathering import TURNS, Gathering


class Inbox:
    def __init__(self, arriving: int) -> None:
        """One request arrives in each of so many turns."""
        self.waiting, self.arriving, self.went = 1, arriving, 0
        self.loop = asyncio.get_running_loop()
        self.gathering = Gathering(self.loop, lambda: self.waiting, self.go)

    def go(self) -> None:
        self.went += 1

    def arrive(self) -> None:
        if self.arriving:
            self.arriving -= 1
            self.waiting += 1
            self.loop.call_soon(self.arrive)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_after_a_batch_of_one_nothing_is_waited_for() -> None:
    inbox = Inbox(arriving=0)
    assert inbox.gathering.is_over()
    inbox.gathering.proposed(1)
    assert inbox.gathering.is_over()


async def test_after_a_larger_one_a_turn_without_requests_lets_the_batch_go_once() -> None:
    inbox = Inbox(arriving=5)
    inbox.gathering.proposed(2)
    inbox.arrive()
    assert not inbox.gathering.is_over()
    assert not inbox.gathering.is_over()  # asked twice, looked once
    await turns(4)
    assert inbox.went == 0
    await turns(10)
    assert (inbox.went, inbox.waiting) == (1, 6)
    assert inbox.gathering.is_over()
    inbox.gathering.proposed(6)
    assert not inbox.gathering.is_over()


async def test_requests_without_end_do_not_hold_a_batch_back() -> None:
    inbox = Inbox(arriving=10 * TURNS)
    inbox.gathering.proposed(2)
    inbox.arrive()
    assert not inbox.gathering.is_over()
    await turns(TURNS + 2)
    assert inbox.went == 1
