"""How a client knows a node: by an authority, or by the very certificate (pinned).

The seed's certificate has no name in it, so no name can be compared; a pin says more than a name
anyway. The pin is compared inside the handshake, before a byte of the request (and so of the token)
is sent. One context remembers the last TLS session of its node and offers it on the next
connection, which saves the node its signature.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TrustError(ValueError):
    """What was given to trust by is unusable; the text says why."""


class _Pinned(ssl.SSLObject):
    """A TLS connection that ends in its handshake if the certificate is none of the pinned ones."""

    def do_handshake(self) -> None:
        super().do_handshake()
        context = self.context
        if isinstance(context, NodeContext):
            context.check(self.getpeercert(binary_form=True))


class NodeContext(ssl.SSLContext):
    """A client's context for one node; made by `Trust.context`."""

    pins: frozenset[bytes] = frozenset()
    _last: ssl.SSLObject | None = None

    def check(self, certificate: bytes | None) -> None:
        """Raise SSLCertVerificationError unless the certificate (DER) is a pinned one."""
        if not self.pins or (certificate and hashlib.sha256(certificate).digest() in self.pins):
            return
        raise ssl.SSLCertVerificationError("the certificate is not the pinned one")

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """asyncio and uvloop make their TLS connections by this; it offers the last session."""
        if session is None and self._last is not None:
            session = self._last.session  # with TLS 1.3 the ticket came after the handshake
        name: Any = server_hostname
        made = super().wrap_bio(incoming, outgoing, server_side, name, session)
        self._last = made
        return made

    @property
    def session_reused(self) -> bool | None:
        """Whether the newest connection resumed an earlier session."""
        return self._last.session_reused if self._last is not None else None


class Trust:
    """`ca`: a PEM file of authorities (the host's name is checked). `cert`: PEM files of the nodes'
    own certificates. `pin`: their SHA-256, hex, colons allowed. None given: the system's
    authorities. Raises TrustError."""

    def __init__(
        self,
        *,
        ca: str | Path | None = None,
        cert: Sequence[str | Path] = (),
        pin: Sequence[str] = (),
        tls_min: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> None:
        if ca is not None and (cert or pin):
            raise TrustError("trust by an authority or by pinned certificates, not by both")
        self._ca = str(ca) if ca is not None else None
        self._certificates = b"".join(_certificate(Path(path)) for path in cert)
        self._pins = frozenset(_digest(text) for text in pin).union(
            hashlib.sha256(_certificate(Path(path))).digest() for path in cert
        )
        self._by_hash_alone = bool(pin)
        self._tls_min = tls_min
        self.context()  # a bad file is told of now

    def context(self) -> NodeContext:
        """A new context, for one node."""
        context = NodeContext(ssl.PROTOCOL_TLS_CLIENT)
        context.sslobject_class = _Pinned
        context.minimum_version = self._tls_min
        context.pins = self._pins
        try:
            if self._pins:
                context.check_hostname = False
                if self._by_hash_alone:
                    # There is no chain to check: the handshake proves that the other side holds the
                    # key of its certificate, and the pin says that it is this certificate.
                    context.verify_mode = ssl.CERT_NONE
                else:
                    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
                    context.load_verify_locations(cadata=self._certificates)
            elif self._ca is not None:
                context.load_verify_locations(cafile=self._ca)
            else:
                context.load_default_certs()
        except (ssl.SSLError, OSError) as e:
            raise TrustError(f"{self._ca or 'certificate'}: {e}") from None
        return context


def _certificate(path: Path) -> bytes:
    """The first certificate of a PEM file, as DER."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise TrustError(f"certificate {path}: {getattr(e, 'strerror', None) or e}") from None
    end = "-----END CERTIFICATE-----"
    start = text.find("-----BEGIN CERTIFICATE-----")
    try:
        return ssl.PEM_cert_to_DER_cert(text[start : text.index(end) + len(end)])
    except ValueError:
        raise TrustError(f"certificate {path}: not a PEM certificate") from None


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text.removeprefix("sha256:").replace(":", ""))
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise TrustError("a pin is the SHA-256 of a certificate: 64 hex digits")
    return digest
