"""A copy of this repository's scripts in a path with spaces, with stand-ins for the services.

The stand-in is a process that answers /readyz and does as it is told: so the scripts' own promises
(nothing left behind, nobody else's process touched) are proven without waiting for real clusters;
test_demo.py runs the real ones.
"""

import os
import random
import shutil
import site
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import environment

SCRIPTS = Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent
STAND_IN = """
import http.server, os, signal, ssl, sys, threading
flags = dict(flag.lstrip("-").split("=", 1) for flag in sys.argv[1:])
print("stand-in", flags["id"], "says hello", flush=True)
mode = os.environ.get("STAND_IN_" + flags["id"].upper(), "serve")
if mode == "exit":
    sys.exit("error: this stand-in was told to fail")
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
data = flags.get("dataDir") or flags["data_dir"]
os.makedirs(data, exist_ok=True)
with open(os.path.join(data, "starts"), "a") as starts:
    starts.write("started\\n")

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "unready" else 200)
        self.end_headers()
        self.wfile.write(b"no quorum yet")

    def log_message(self, *_):
        pass

def serve(address):
    host, port = address.split(":")
    server = http.server.ThreadingHTTPServer((host, int(port)), Answer)
    if "secure-app-py" in __file__:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.environ["STAND_IN_CERT"])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()

if "raft_addr" in flags:
    threading.Thread(target=serve, args=(flags["raft_addr"],), daemon=True).start()
serve(flags.get("http_addr") or flags["addr"])
"""


def free_base() -> int:
    """A PORT_BASE whose whole range (Raft included) is free just now. Each of pytest's processes
    has ranges of its own: what another one is about to take still looks free."""
    chance = random.Random()
    workers = min(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 8)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % workers
    low, high = (11_000 + (30_000 - 11_000) * n // workers for n in (worker, worker + 1))
    for _ in range(200):
        base = chance.randrange(low + 1000, high - 302)
        wanted = [base - 1000 + k for k in range(3)]
        wanted += [base + offset + k for offset in (0, 100, 200, 300) for k in range(3)]
        if all(_free(port) for port in wanted):
            return base
    raise RuntimeError("no free range of ports found")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Copy:
    """A working copy and how to run its scripts."""

    def __init__(self, root: Path, port_base: int) -> None:
        self.root = root
        self.port_base = port_base

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run scripts/`script` with bash; its output as text."""
        return subprocess.run(
            ["bash", str(self.root / "scripts" / script), *arguments],
            cwd=cwd or self.root,
            env={
                **os.environ,
                "PORT_BASE": str(self.port_base),
                "STAND_IN_CERT": str(self.root / "stand-in.pem"),
                **env,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    def pids(self, service: str) -> dict[str, int]:
        """What the pid files of `service` say, by node."""
        files = (self.root / ".run" / service).glob("*.pid")
        return {path.stem: int(path.read_text()) for path in files}


def requirement_files(root: Path) -> list[Path]:
    """The four services' requirement files under `root`."""
    folders = ("distributed-lock-py", "queue-py", "cache-py", "secure-app-py")
    return [root / folder / "requirements.txt" for folder in folders]


def lend_environment(root: Path) -> None:
    """Give the copy at `root` a .venv that sees this test run's packages: nothing is downloaded."""
    venv = root / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = environment.python_of(venv)
    shown = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        check=True,
        capture_output=True,
        text=True,
    )
    lent = "\n".join(site.getsitepackages())
    (Path(shown.stdout.strip()) / "lent.pth").write_text(lent + "\n")
    (venv / "installed").mkdir()
    for file in requirement_files(root):
        environment.stamp(venv, file).touch()


def write_certificate(path: Path) -> None:
    """A throw-away key and self-signed certificate for the secure stand-in, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand-in")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + certificate.public_bytes(pem))


@contextmanager
def stand_in_copy(root: Path) -> Iterator[Copy]:
    """A copy with stand-in services; whatever it started is stopped at the end."""
    shutil.copytree(
        SCRIPTS, root / "scripts", ignore=shutil.ignore_patterns("tests", "__pycache__")
    )
    for file in requirement_files(root):
        file.parent.mkdir()
        shutil.copy(ROOT / file.relative_to(root), file)
    mains = ("distributed-lock-py/src", "queue-py", "cache-py", "secure-app-py")
    for folder in mains:
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "main.py").write_text(STAND_IN)
    write_certificate(root / "stand-in.pem")
    lend_environment(root)
    made = Copy(root, free_base())
    yield made
    done = made.run("stop.sh")
    assert done.returncode == 0, done.stderr
