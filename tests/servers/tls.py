"""A certificate authority of the tests: what it signed is trusted by whoever trusts it, and by nobody else."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509 import load_pem_x509_certificate

STORE_PASSWORD = "throwaway"


class Authority:
    """One authority and one server's certificate, for 127.0.0.1 and for no other name."""

    def __init__(self) -> None:
        """Make the keys."""
        self._authority = trustme.CA()
        self._certificate = self._authority.issue_cert("127.0.0.1")

    def client_context(self) -> ssl.SSLContext:
        """A client's default context that trusts this authority only."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._authority.configure_trust(context)
        return context

    def server_context(self) -> ssl.SSLContext:
        """A server's context with the certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._certificate.configure_cert(context)
        return context

    def write_pem(self, folder: Path) -> dict[str, Path]:
        """The files that servers in C and Erlang want: `cacertfile`, `certfile`, `keyfile`."""
        files = {name: folder / f"{name}.pem" for name in ("cacertfile", "certfile", "keyfile")}
        self._authority.cert_pem.write_to_path(str(files["cacertfile"]))
        self._certificate.cert_chain_pems[0].write_to_path(str(files["certfile"]))
        self._certificate.private_key_pem.write_to_path(str(files["keyfile"]))
        return files

    def write_store(self, path: Path) -> None:
        """The key store that servers in Java want (PKCS 12), with `STORE_PASSWORD`."""
        key = serialization.load_pem_private_key(self._certificate.private_key_pem.bytes(), None)
        certificate = load_pem_x509_certificate(self._certificate.cert_chain_pems[0].bytes())
        authority = load_pem_x509_certificate(self._authority.cert_pem.bytes())
        secret = serialization.BestAvailableEncryption(STORE_PASSWORD.encode())
        path.write_bytes(pkcs12.serialize_key_and_certificates(b"server", key, certificate, [authority], secret))
