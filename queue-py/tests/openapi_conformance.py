"""A running cluster against its own /openapi.json, by schemathesis: no server error, no status,
header, media type or body that the document does not know, nothing accepted that it forbids.

By default the *coverage* phase: the bounds of every parameter and field, one at a time, and what
lies beyond them. FUZZ_EXAMPLES=200 adds as many drawn requests per operation; SCHEMATHESIS_SEED
says which.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")
engine = pytest.importorskip("schemathesis.engine")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
STREAMS = ("/events", "/stream")  # they go on for ever
MOVING = ("/admin/join", "/admin/leave")  # they change the cluster under test
ALIKE = ("/extend", "/queues/{queue}/peek")  # as /nack and /consume: only when asked
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "negative_data_rejection",
    "unsupported_method", "allow_header_conformance",
)  # fmt: skip


class Outcome:
    """What was asked, and what was wrong with the answers."""

    def __init__(self) -> None:
        self.sent = 0
        self.refused = 0
        self.wrong: set[str] = set()

    def take(self, event: Any) -> None:
        """A scenario is over."""
        recorder = event.recorder
        self.wrong |= {
            f"{event.label}: {check.name}: {check.failure_info.failure.message}"
            for checks in recorder.checks.values()
            for check in checks
            if check.failure_info is not None
        }
        for each in recorder.interactions.values():
            if each.response is None:
                self.wrong.add(f"{event.label}: no answer to {each.request.uri}")
                continue
            self.sent += 1
            self.refused += each.response.status_code >= 400


def narrowed(document: Any) -> Any:
    """Without what would take minutes: streams, long polls, and batches unless asked for."""
    paths, schemas = document["paths"], document["components"]["schemas"]
    for path in (*STREAMS, *MOVING, *(() if EXAMPLES else ALIKE)):
        del paths[path]
    query = paths["/consume"]["get"]["parameters"]
    query[:] = [parameter for parameter in query if parameter["name"] != "wait_ms"]
    del schemas["NextBody"]["properties"]["wait_ms"]
    if not EXAMPLES:
        del schemas["ProduceBody"]["properties"]["messages"], schemas["ProduceBody"]["oneOf"]
        schemas["ProduceBody"]["required"].append("body")
    return document


def conformance(url: str, document: Any) -> Outcome:
    """Ask the node at `url` for everything in its document."""
    config = schemathesis.Config.from_dict(
        {
            "base-url": url,
            "continue-on-failure": True,
            "seed": int(os.environ.get("SCHEMATHESIS_SEED", "1")),
            "generation": {"max-examples": EXAMPLES or 1, "deterministic": not EXAMPLES},
            "phases": {
                "examples": {"enabled": False},
                # (Wrong methods have a test of their own, see testkit.contract.)
                "coverage": {"enabled": True, "unexpected-methods": []},
                "fuzzing": {"enabled": bool(EXAMPLES)},
                "stateful": {"enabled": False},
            },
            "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
        }
    )
    found = Outcome()
    schema = schemathesis.openapi.from_dict(narrowed(document), config=config)
    for event in engine.from_schema(schema).execute():
        if isinstance(event, engine.events.NonFatalError | engine.events.FatalError):
            found.wrong.add(str(event))
        elif isinstance(event, engine.events.ScenarioFinished):
            found.take(event)
    return found
