"""Real node processes on loopback, a breakable TCP link per ordered pair, a lean HTTP client."""

from testkit.cluster.cluster import Cluster, NodeView
from testkit.cluster.http import HttpClient, NoReply, Outcome, Reply, unverified
from testkit.cluster.ports import Reservation, free_port
from testkit.cluster.process import CAN_PAUSE, NodeProcess, ProcessFailure
from testkit.cluster.proxy import LinkProxy

__all__ = [
    "CAN_PAUSE",
    "Cluster",
    "HttpClient",
    "LinkProxy",
    "NoReply",
    "NodeProcess",
    "NodeView",
    "Outcome",
    "ProcessFailure",
    "Reply",
    "Reservation",
    "free_port",
    "unverified",
]
