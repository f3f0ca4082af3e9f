"""What the machine has done so far, as plain integers; metrics.py gives them their public names."""


class Counts:
    __slots__ = (
        "evictions", "hits", "ignored", "invalidations_received", "invalidations_sent",
        "lease_waits", "misses", "reads", "refetches", "upgrades", "use_once", "writebacks",
        "writes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.reads = 0
        self.writes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.upgrades = 0  # changes of a line held in S
        self.writebacks = 0  # modified lines given back to their home
        self.invalidations_sent = 0
        self.invalidations_received = 0
        self.use_once = 0  # data that was dead on arrival and served to those who may have it
        self.refetches = 0  # owner's changes asked for anew because the grant had ended
        self.lease_waits = 0  # copies of unreachable nodes whose lease the home waited out
        self.ignored = 0  # messages that the tables do not allow
