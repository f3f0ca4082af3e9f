"""TLS contexts for `--tls_cert/--tls_key/--tls_ca`: one certificate for clients and peers."""

from __future__ import annotations

import ssl

from message_queue.config import ConfigError, TlsFiles


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For the listening sockets; raises ConfigError if certificate and key do not fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return _load(context, files)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For dialling peers, who are verified against `--tls_ca` (default: the certificate)."""
    try:
        context = ssl.create_default_context(cafile=str(files.ca or files.cert))
    except (ssl.SSLError, OSError) as e:
        raise ConfigError(f"--tls_ca: {e}") from e
    return _load(context, files)


def _load(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    try:
        context.load_cert_chain(files.cert, files.key)
    except (ssl.SSLError, OSError) as e:
        raise ConfigError(f"--tls_cert/--tls_key: {e}") from e
    return context
