"""Which writes leave together."""

from __future__ import annotations

import asyncio

from secure_store.gathering import TURNS, Gathering


async def test_a_lone_write_leaves_in_the_next_turn_and_a_crowd_is_waited_for() -> None:
    loop = asyncio.get_running_loop()
    waiting: list[int] = []
    left: list[int] = []

    def go() -> None:
        left.append(len(waiting))
        waiting.clear()

    gathering = Gathering(loop, lambda: len(waiting), go)

    async def turns(arrivals: list[int]) -> None:
        for count in arrivals:
            for _ in range(count):
                if not waiting:
                    gathering.begin()
                waiting.append(1)
            await asyncio.sleep(0)
        for _ in range(TURNS + 2):
            await asyncio.sleep(0)

    await turns([1, 1])
    assert left == [1, 1], "after a batch of one nothing is waited for"
    await turns([5])
    assert left == [1, 1, 5]
    await turns([1, 1, 1, 1])
    assert left == [1, 1, 5, 4], "while each turn brings one"
    await turns([2, 0, 3])
    assert left[4:] == [2, 3], "a turn that brought none lets it go"
    await turns([2, *[1] * (TURNS * 3)])
    assert max(left[6:]) <= 2 + TURNS, "and it does not wait for ever"
    assert sum(left) == 2 + 5 + 4 + 5 + 2 + TURNS * 3
