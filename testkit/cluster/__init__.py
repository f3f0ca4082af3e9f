"""Real node processes on loopback, a breakable TCP link per ordered pair, a lean HTTP client."""

from testkit.cluster.cluster import Cluster, NodeView
from testkit.cluster.files import CAN_LIMIT, cut_tail, flip_bit, limit_file_size
from testkit.cluster.http import HttpClient, NoReply, Outcome, Reply, unverified
from testkit.cluster.ports import Reservation, free_port
from testkit.cluster.process import CAN_PAUSE, NodeProcess, ProcessFailure
from testkit.cluster.proxy import LinkProxy
from testkit.cluster.waiting import settle, until

__all__ = [
    "CAN_LIMIT",
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
    "cut_tail",
    "flip_bit",
    "free_port",
    "limit_file_size",
    "settle",
    "until",
    "unverified",
]
