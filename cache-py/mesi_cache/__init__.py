"""A cache that several nodes share and that is never stale: MESI with a directory.

Read `core/machine.py` first; DESIGN.md says why it is so. `CacheNode` (library.py) is what a
program imports to have a node of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesi_cache.calls import (
        CacheError,
        CacheUnavailable,
        KeyReused,
        NotAnInteger,
        VersionMismatch,
    )
    from mesi_cache.config import ConfigError
    from mesi_cache.library import CacheNode, Entry

__version__ = "0.1.0"

_PUBLIC = {
    "CacheError": "calls",
    "CacheNode": "library",
    "CacheUnavailable": "calls",
    "ConfigError": "config",
    "Entry": "library",
    "KeyReused": "calls",
    "NotAnInteger": "calls",
    "VersionMismatch": "calls",
}
__all__ = [
    "CacheError", "CacheNode", "CacheUnavailable", "ConfigError", "Entry", "KeyReused",
    "NotAnInteger", "VersionMismatch",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for: the core alone must not load the rest."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
