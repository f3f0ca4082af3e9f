"""`main.py`: a node if the first word is a flag, else one of the operator's commands.

Exit codes of a command: 0 done (or: the answer is yes), 1 refused, failed (or: no), 2 a mistake in
using it; `audit verify` has its own, `token revoke` and `key rotate` say 3 for "not everywhere
yet".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from secure_store import logs
from secure_store.config import ConfigError

if TYPE_CHECKING:
    from secure_store.commands.terminal import Parser


def parser() -> Parser:
    # Here, because a node need not wait for the commands' imports, nor a command for the node's.
    from secure_store.commands import access, audit, doctor, keeping, quarantine
    from secure_store.commands.terminal import Parser

    p = Parser(
        prog="main.py",
        description="The operator's commands. (A node: main.py --id nodeA --addr 127.0.0.1:8000, "
        "see main.py --help.)",
    )
    commands = p.add_subparsers(dest="command", required=True, parser_class=Parser)
    for room in (keeping, access, audit, doctor, quarantine):
        room.add(commands)
    return p


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    if not argv or argv[0].startswith("-"):
        from secure_store import server

        return server.main(argv)
    try:
        return run(argv)
    except ConfigError as e:
        print(f"main.py: error: {logs.one_line(str(e))}", file=sys.stderr)  # noqa: T201
        return 2


def run(argv: Sequence[str]) -> int:
    """Carry out one command; raises ConfigError for a mistake in it."""
    words = list(argv)
    if words[0] == "key" and len(words) == 2 and words[1] not in ("make", "rotate", "-h", "--help"):
        words.insert(1, "make")  # `main.py key FILE`
    args = parser().parse_args(words)
    code: int = args.run(args)
    return code
