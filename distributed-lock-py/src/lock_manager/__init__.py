"""A fault-tolerant lock service: a replicated lock machine on Raft, spoken to over HTTP."""

__version__ = "0.1.0"
