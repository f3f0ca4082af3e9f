"""A cache that several nodes share and that is never stale: MESI with a directory, over a network.

Read `core/machine.py` first; DESIGN.md says why it is so.
"""

__version__ = "0.1.0"
