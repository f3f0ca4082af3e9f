"""Start and stop the clusters of this copy: what start.sh, stop.sh and their .ps1 twins call.

    python clusters.py start|stop|list [all|lock|queue|cache|secure]

Everything lives under .run/<service>/: <node>.log, <node>.pid (for people), <node>.json (what
`stop` trusts: the pid and when that process started) and data/<first port>/<node>, which stays when
the node stops. Each layout of ports has its own data: a cluster remembers its members' addresses.
Exit code 0; 1 when something failed (what was started is stopped again); 2 for a wrong argument.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import processes
from catalogue import HOST, ROOT, RUN, SERVICES, Node, Service, chosen, port_base

STOP_GRACE_S = 6.0
LOG_LINES = 20


@dataclass(frozen=True)
class Running:
    """A live node: what its .json file says, checked against the process table."""

    service: str
    name: str
    pid: int
    started: str
    base: int
    ports: tuple[int, ...]
    url: str
    log: str


class Failed(Exception):
    """Something a person must know and mend; the message says what."""


def _read(path: Path) -> Running | None:
    try:
        fields = json.loads(path.read_text())
        return Running(**{**fields, "ports": tuple(fields["ports"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # half-written when the power went: the process is gone as well


def running(service: Service) -> list[Running]:
    """The live nodes of `service`; files left by dead ones are removed."""
    found = []
    for path in sorted(service.run.glob("*.json")):
        node = _read(path)
        if node is not None and processes.started_at(node.pid) == node.started:
            found.append(node)
        else:
            _forget(path)
    return found


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".pid").unlink(missing_ok=True)


def _spawn(service: Service, base: int, node: Node) -> tuple[Running, subprocess.Popen[bytes]]:
    log = service.run / f"{node.name}.log"
    process = processes.start_detached(
        [sys.executable, str(service.main), *node.flags], cwd=service.run, log=log
    )
    # A child that is already gone is a zombie until we poll it, so its start can still not be read.
    started = processes.started_at(process.pid) or "gone"
    url = f"{service.scheme}://{HOST}:{node.ports[0]}"
    record = Running(service.name, node.name, process.pid, started, base, node.ports, url, str(log))
    path = service.run / f"{node.name}.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(asdict(record)))
    partial.replace(path)
    path.with_suffix(".pid").write_text(f"{process.pid}\n")
    return record, process


def _check_ports(wanted: list[tuple[Service, int, Node]], ours: list[Running]) -> None:
    taken = []
    for service, _, node in wanted:
        for port in node.ports:
            if processes.port_is_free(port):
                continue
            holder = next((f"the {o.service} node {o.name}" for o in ours if port in o.ports), None)
            taken.append(
                f"  port {port} (for {service.name} {node.name}) is taken by "
                + (f"{holder} of this copy" if holder else processes.port_holder(port))
            )
    if taken:
        raise Failed(
            "\n".join(["ports are taken; nothing was started:", *taken])
            + "\nStop what holds them (./scripts/stop.sh stops this copy's own nodes), or move"
            " all of ours: PORT_BASE=18000 ./scripts/start.sh"
        )


def _opener() -> urllib.request.OpenerDirector:
    # Only "is our own child on loopback ready?" is asked, so its certificate proves nothing here.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )


def _why_not_ready(opener: urllib.request.OpenerDirector, url: str) -> str | None:
    """None when /readyz answers 200, otherwise what it (or the socket) said."""
    try:
        with opener.open(f"{url}/readyz", timeout=2) as answer:
            return None if answer.status == 200 else f"answered {answer.status}"
    except urllib.error.HTTPError as error:
        return f"answered {error.code} {error.read(300).decode(errors='replace')}"
    except (OSError, ValueError) as error:
        return str(error)


def _wait_ready(nodes: list[Running], children: dict[int, subprocess.Popen[bytes]]) -> None:
    deadline_s = float(os.environ.get("START_TIMEOUT", "60"))
    deadline = time.monotonic() + deadline_s
    opener = _opener()
    waiting = dict.fromkeys(nodes, "not asked yet")
    while waiting:
        for node in list(waiting):
            child = children.get(node.pid)
            code = child.poll() if child else None
            if code is not None:
                raise Failed(
                    f"{node.service} {node.name} exited with code {code}.{_last_lines(node)}"
                )
            why = _why_not_ready(opener, node.url)
            if why is None:
                del waiting[node]
            else:
                waiting[node] = why
        if waiting and time.monotonic() > deadline:
            node, why = next(iter(waiting.items()))
            names = ", ".join(f"{each.service} {each.name}" for each in waiting)
            raise Failed(
                f"not ready after {deadline_s:g} s (START_TIMEOUT): {names}; "
                f"{node.name}: {why}.{_last_lines(node)}"
            )
        if waiting:
            time.sleep(0.05)


def _last_lines(node: Running) -> str:
    try:
        lines = Path(node.log).read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError as error:
        return f" Its log cannot be read: {error}"
    return "\n".join([f" The end of {node.log}:", *(f"  | {line}" for line in lines)])


def start(services: list[Service], spread: bool) -> None:
    """Start what is not running of `services`; `spread` puts them beside each other (`all`)."""
    base = port_base()
    ours = [node for service in SERVICES for node in running(service)]
    wanted: list[tuple[Service, int, Node]] = []
    kept: list[Running] = []
    for service in services:
        mine = [node for node in ours if node.service == service.name]
        kept += mine
        # A cluster of which some nodes still run keeps its ports, wherever it was started.
        at = mine[0].base if mine else base + (service.offset if spread else 0)
        names = {node.name for node in mine}
        layout = service.nodes(at, service.run / "data" / str(at))
        wanted += [(service, at, node) for node in layout if node.name not in names]
    for service, _, _ in wanted:
        if not service.main.exists():
            raise Failed(f"{service.main.relative_to(ROOT)} is missing; is this a complete copy?")
    _check_ports(wanted, ours)
    children: dict[int, subprocess.Popen[bytes]] = {}
    begun: list[Running] = []
    try:
        for service, at, node in wanted:
            (service.run / "data" / str(at)).mkdir(parents=True, exist_ok=True)
            record, child = _spawn(service, at, node)
            begun.append(record)
            children[child.pid] = child
        if begun:
            print(f"Started {len(begun)} nodes, waiting until each is ready ...", flush=True)
        _wait_ready(kept + begun, children)
    except BaseException:
        _end(begun)
        raise
    _report(services, {node.service for node in begun})


def _report(services: list[Service], begun: set[str]) -> None:
    for service in services:
        nodes = running(service)
        if not nodes:
            raise Failed(
                f"{service.name}: its nodes were ready and are gone again; see {service.run}"
            )
        again = "" if service.name in begun else "  (was running already: nothing changed)"
        print(f"\n{service.name}: {service.title}{again}")
        for node in nodes:
            print(f"  {node.name}  {node.url}/   log {os.path.relpath(node.log, ROOT)}")
        print(f"  dashboard  {nodes[0].url}/")
        print(f"  try        {service.first_try(nodes[0].ports[0])}")
    word = services[0].name if len(services) == 1 else "all"
    print(f"\nLogs and pids: {RUN}{os.sep}<service>{os.sep}   Data stays there when nodes stop.")
    print(f"Walkthrough: ./scripts/demo.sh {word}   Stop: ./scripts/stop.sh {word}")


def _end(nodes: list[Running]) -> bool:
    """Stop exactly these processes, politely first; True when none is left."""
    alive = [node for node in nodes if processes.started_at(node.pid) == node.started]
    for node in alive:
        processes.terminate(node.pid)
    left = processes.wait_gone({node.pid: node.started for node in alive}, STOP_GRACE_S)
    for node in alive:
        if node.pid in left:
            print(
                f"{node.service} {node.name} (pid {node.pid}) did not stop in {STOP_GRACE_S:g} s:"
                " killing it"
            )
            processes.kill(node.pid)
    left = processes.wait_gone(left, STOP_GRACE_S)
    for node in nodes:
        if node.pid not in left:
            _forget(RUN / node.service / f"{node.name}.json")
    return not left


def stop(services: list[Service]) -> None:
    """Stop what runs of `services`; all nodes of all of them are asked at once."""
    found = {service.name: running(service) for service in services}
    ok = _end([node for nodes in found.values() for node in nodes])
    for name, nodes in found.items():
        names = ", ".join(node.name for node in nodes)
        print(f"{name}: stopped {names}" if nodes else f"{name}: not running")
    if not ok:
        raise Failed("some processes could not be stopped; their .pid files stay")


def show(services: list[Service]) -> None:
    """One line a live node, for scripts: service, node, URL, log; separated by tabs."""
    for service in services:
        for node in running(service):
            print("\t".join((node.service, node.name, node.url, node.log)))


def _interrupted(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    verb = argv[0] if argv else ""
    word = argv[1] if len(argv) > 1 else "all"
    services = chosen(word)
    if verb not in ("start", "stop", "list") or len(argv) > 2 or services is None:
        usage = f"usage: {verb or 'start|stop|list'} [all|{'|'.join(s.name for s in SERVICES)}]"
        wrong = f"error: unknown service {word!r}\n" if services is None else ""
        sys.stderr.write(f"{wrong}{usage}\n")
        return 2
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        if verb == "list":
            show(services)
            return 0
        lock = processes.FileLock(
            RUN / "scripts.lock", "Another start or stop is at work in this copy; waiting"
        )
        with lock:
            if verb == "start":
                start(services, spread=word == "all")
            else:
                stop(services)
    except Failed as failure:
        sys.stderr.write(f"error: {failure}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(
            f"interrupted: {verb} did not finish (a start stops what it had started)\n"
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
