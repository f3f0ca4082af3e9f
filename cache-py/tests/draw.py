"""Draw DESIGN.md's state diagrams (Mermaid) from the transition tables: `python tests/draw.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mesi_cache.core.cache.table import TABLE as LINES
from mesi_cache.core.directory.table import TABLE as ENTRIES


def _mermaid(table: dict[Any, Any]) -> str:
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, event), (after, _) in table.items():
        arrows.setdefault((str(state), str(after)), []).append(str(event))
    rows = [
        f"    {before} --> {after}: {', '.join(events)}"
        for (before, after), events in arrows.items()
        if before != after
    ]
    return "\n".join(["```mermaid", "stateDiagram-v2", *rows, "```"])


def diagrams() -> dict[str, str]:
    """The line's and the entry's diagram, by name; events that change no state are left out."""
    return {"line": _mermaid(LINES), "entry": _mermaid(ENTRIES)}


if __name__ == "__main__":
    for name, diagram in diagrams().items():
        print(f"{name}\n\n{diagram}\n")
