"""A toy for the simulation's own tests: each node keeps a durable counter and tells its peers.

`honest` answers a client after the sync; otherwise before it, which a crash must reveal.
"""

from functools import partial
from typing import Any

from testkit.sim import (
    PERFECT,
    ROUGH,
    TIMED_OUT,
    Disk,
    DiskSettings,
    Faults,
    Harness,
    Host,
    Promise,
    Scenario,
    World,
)


class ToyNode:
    def __init__(self, host: Host, honest: bool) -> None:
        self.host = host
        self.honest = honest
        self.total = 0
        self.waiting: list[tuple[int, Promise]] = []

    def start(self, disk: Disk) -> None:
        self.total = disk.get("total", 0)
        self.host.cover("starts")
        self.host.set_timer("beat", 20)

    def on_message(self, source: str, message: Any) -> None:
        self.host.cover("heard")

    def on_timer(self, name: str) -> None:
        for peer in self.host.peers:
            self.host.send(peer, ("total", self.total))
        self.host.set_timer("beat", 20 + self.host.rng.random())

    def on_sync_done(self, token: Any) -> None:
        while self.waiting and self.waiting[0][0] <= token:
            total, reply = self.waiting.pop(0)
            reply.resolve(total)

    def add(self, reply: Promise) -> None:
        self.total += 1
        self.host.disk.put("total", self.total)
        self.host.disk.sync(self.total)
        if self.honest:
            self.waiting.append((self.total, reply))
        else:
            reply.resolve(self.total)


class ToyHarness(Harness[ToyNode]):
    def __init__(self, world: World[ToyNode], *, honest: bool) -> None:
        super().__init__(world)
        self.honest = honest
        self.answered = dict.fromkeys(world.names, 0)

    def build(self, host: Host) -> ToyNode:
        return ToyNode(host, self.honest)

    def begin(self) -> None:
        for name in self.world.names:
            self.world.spawn(self.client(name))

    async def client(self, name: str) -> None:
        world = self.world
        for _ in range(30):
            reply = world.promise(timeout_ms=100)
            world.tell(name, partial(ToyNode.add, reply=reply))
            outcome = await reply
            if outcome is TIMED_OUT:
                world.coverage.hit("timeouts")
            else:
                self.answered[name] = outcome
            await world.sleep_ms(world.rng.uniform(0, 30))

    def check(self, name: str) -> None:
        node = self.world.node(name)
        if node is not None:
            assert node.total >= self.answered[name], f"{name} forgot an answered addition"

    def finish(self) -> None:
        assert len(self.world.nodes) == len(self.world.names)


EVERYTHING = Faults(
    crash=4,
    stop=1,
    pause=1,
    partition=1,
    isolate=1,
    one_way=1,
    power_cut=2,
    sync_failure=1,
    wall_jump=1,
    drift_ppm=500,
    every_ms=(20, 100),
    down_ms=(5, 50),
    pause_ms=(5, 80),
    cut_ms=(20, 100),
)
HONEST = Scenario(
    "toy",
    ("a", "b", "c"),
    partial(ToyHarness, honest=True),
    duration_ms=1_000,
    settle_ms=200,
    faults=EVERYTHING,
    links=(PERFECT, ROUGH),
    disk=DiskSettings(sync_ms=(0.5, 5.0)),
)
HASTY = Scenario(
    "hasty",
    ("a", "b", "c"),
    partial(ToyHarness, honest=False),
    duration_ms=1_000,
    settle_ms=200,
    faults=EVERYTHING,
    disk=DiskSettings(sync_ms=(0.5, 5.0)),
)
