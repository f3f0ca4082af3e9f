"""TLS: one certificate for clients and for the other node, and the pins by which peers know each
other.

Peers do not trust an authority: each holds the set of certificates that the other may present
(by default its own, which both use in the seed's set-up; two during a rotation). OpenSSL verifies
the chain up to one of those (a leaf may be its own anchor), and then the very certificate is
compared. The host name is not compared: a pinned certificate says more, and the seed's has no name
in it.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import ssl
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from secure_store.config import Config, ConfigError
from secure_store.files import FileLock, write_private

VALID_DAYS = 825
TLS_12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # (1.3 has its own) forward secret, authenticated


class Tls:
    """The two contexts and the pins; `reload` takes changed files over for new connections."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stamp = self._look()
        self.pins = _pins(config)
        minimum = ssl.TLSVersion.TLSv1_2 if config.tls_min == "1.2" else ssl.TLSVersion.TLSv1_3
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.verify_mode = ssl.CERT_OPTIONAL  # required on the peer's route, see is_peer
        self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.client.check_hostname = False  # pinned instead
        self.client.verify_mode = ssl.CERT_REQUIRED
        for context in (self.server, self.client):
            context.minimum_version = minimum
            context.set_ciphers(TLS_12_CIPHERS)
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self._load()

    def _load(self) -> None:
        for context in (self.server, self.client):
            try:
                context.load_cert_chain(self._config.cert, self._config.key)
            except (ssl.SSLError, OSError) as e:
                raise ConfigError(
                    f"--cert/--key: {self._config.cert} and {self._config.key}: {_reason(e)}"
                ) from None
            context.load_verify_locations(cadata=b"".join(self.pins.values()))

    def is_peer(self, certificate: bytes | None) -> bool:
        """Whether this (DER, already verified by OpenSSL) is one of the pinned certificates."""
        return certificate is not None and hashlib.sha256(certificate).digest() in self.pins

    def _look(self) -> tuple[object, ...]:
        paths = (self._config.cert, self._config.key, *self._config.peer_certs)
        return tuple((s.st_mtime_ns, s.st_size) for s in (p.stat() for p in paths))

    def reload_if_changed(self) -> bool:
        """Take over changed files; False if nothing changed. Raises ConfigError, and changes
        nothing, if the new files do not fit (they may be half written: the next look tries
        again)."""
        try:
            stamp = self._look()
        except OSError as e:
            raise ConfigError(f"certificate {e.filename}: {e.strerror}") from None
        if stamp == self._stamp:
            return False
        pins = _pins(self._config)
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            trial.load_cert_chain(self._config.cert, self._config.key)
        except (ssl.SSLError, OSError) as e:
            raise ConfigError(f"--cert/--key: {_reason(e)}") from None
        self.pins = pins
        self._load()
        self._stamp = stamp
        return True


def _pins(config: Config) -> dict[bytes, bytes]:
    """SHA-256 -> DER of each certificate that the other node may present."""
    pins = {}
    for path in config.peer_certs or (config.cert,):
        try:
            text = path.read_bytes()
            certificates = x509.load_pem_x509_certificates(text)
        except OSError as e:
            raise ConfigError(f"certificate {path}: {e.strerror}") from None
        except ValueError:
            raise ConfigError(f"certificate {path}: not a PEM certificate") from None
        der = certificates[0].public_bytes(serialization.Encoding.DER)
        pins[hashlib.sha256(der).digest()] = der
    return pins


def _reason(e: Exception) -> str:
    if isinstance(e, ssl.SSLError):
        return f"{e.reason or 'not a certificate and its key'}".lower().replace("_", " ")
    return str(getattr(e, "strerror", None) or e)


def ensure_certificate(config: Config) -> bool:
    """Make the certificate and key if both are absent and may be made; True if they were made.

    Under a lock: two nodes started in one folder at once end with one pair of files.
    """
    if config.cert.exists() and config.key.exists():
        return False
    if not config.make_cert:
        missing = config.key if config.cert.exists() else config.cert
        raise ConfigError(f"--cert/--key: {missing} does not exist (main.py cert makes both)")
    with FileLock(config.cert.with_name(f".{config.cert.name}.lock")):
        if config.cert.exists() and config.key.exists():
            return False
        if config.cert.exists() or config.key.exists():
            both = f"{config.cert} and {config.key}"
            raise ConfigError(f"--cert/--key: only one of {both} exists")
        make_certificate(config.cert, config.key, (config.addr.host,))
        return True


def make_certificate(cert: Path, key: Path, hosts: tuple[str, ...], days: int = VALID_DAYS) -> None:
    """A self-signed P-256 certificate for localhost and `hosts`; the key's file has mode 0600.

    The certificate is written last: whoever sees it finds its key. Raises FileExistsError.
    """
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "secure-store")])
    now = datetime.datetime.now(datetime.UTC)
    names = [_general_name(h) for h in dict.fromkeys(("localhost", "127.0.0.1", "::1", *hosts))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False
        )
        .sign(private, hashes.SHA256())
    )
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_private(key, pem)
    write_private(cert, certificate.public_bytes(serialization.Encoding.PEM))
    cert.chmod(0o644)


def certificate_problems(path: Path) -> list[str]:
    """What an operator should know about a certificate file; empty if all is well."""
    try:
        certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except OSError as e:
        return [f"certificate {path}: {e.strerror}"]
    except ValueError:
        return [f"certificate {path}: not a PEM certificate"]
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    if left.total_seconds() <= 0:
        return [f"certificate {path}: has expired; the nodes no longer accept each other"]
    return [f"certificate {path}: expires in {left.days} days"] if left.days < 14 else []


def key_problems(cert: Path, key: Path) -> list[str]:
    """What an operator should know about a private key file; empty if all is well."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
        mode = key.stat().st_mode
    except (ssl.SSLError, OSError) as e:
        return [f"{cert} and {key}: {_reason(e)}"]
    if sys.platform != "win32" and mode & 0o077:
        return [f"{key} is readable by others: chmod 600 it"]
    return []


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
