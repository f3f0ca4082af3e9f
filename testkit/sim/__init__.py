"""Deterministic simulation of a whole cluster in one process: one seed decides everything."""

from testkit.sim.clock import Clock, Timer
from testkit.sim.coverage import Coverage
from testkit.sim.disk import Damaged, Disk, DiskSettings
from testkit.sim.driver import Harness, Result, Scenario, SimFailure, many, run, seeds
from testkit.sim.faults import Faults
from testkit.sim.loading import scenarios
from testkit.sim.network import PERFECT, ROUGH, DropRule, LinkSettings, Network
from testkit.sim.tasks import TIMED_OUT, Promise
from testkit.sim.world import Host, Node, World

__all__ = [
    "PERFECT",
    "ROUGH",
    "TIMED_OUT",
    "Clock",
    "Coverage",
    "Damaged",
    "Disk",
    "DiskSettings",
    "DropRule",
    "Faults",
    "Harness",
    "Host",
    "LinkSettings",
    "Network",
    "Node",
    "Promise",
    "Result",
    "Scenario",
    "SimFailure",
    "Timer",
    "World",
    "many",
    "run",
    "scenarios",
    "seeds",
]
