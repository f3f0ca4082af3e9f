"""Start one node: `python main.py --help` lists the flags."""

from __future__ import annotations

import sys

from mesi_cache.server import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
