"""Certificates of a test CA, and a proxy that adds TLS to a server. The bundled Valkey is built without TLS."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

_HANDSHAKE: Final = b"\x16"
"""First byte of a TLS connection. Commands of Redis begin with `*`."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA with one certificate for 127.0.0.1, which servers and clients use.

    Attributes:
        ca_file: the CA's certificate.
        cert_file, key_file: certificate and private key for 127.0.0.1.
        other_host_file: certificate and private key for another host, in one file.
    """

    ca_file: Path
    cert_file: Path
    key_file: Path
    other_host_file: Path

    @classmethod
    def create(cls, folder: Path) -> Self:
        folder.mkdir()
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca = _certificate("test CA", ca_key, None, ca_key)
        authority = cls(*(folder / name for name in ("ca.pem", "cert.pem", "key.pem", "other.pem")))
        authority.ca_file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        for address, file in (("127.0.0.1", authority.cert_file), ("192.0.2.1", authority.other_host_file)):
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _certificate(address, key, ca, ca_key).public_bytes(serialization.Encoding.PEM)
            file.write_bytes(certificate + (_pem(key) if file is authority.other_host_file else b""))
            if file is authority.cert_file:
                authority.key_file.write_bytes(_pem(key))
        return authority


class TlsProxy:
    """Accepts TLS on a port of its own and passes the decrypted bytes to a server; plain connections pass as they are.

    Attributes:
        received: what clients sent over TLS, decrypted.
        plain: whether a client connected without TLS.
        handshakes_failed: number of clients that rejected the certificate, or that were rejected.
    """

    def __init__(
        self, target: int, cert_file: Path, key_file: Path | None = None, client_ca: Path | None = None
    ) -> None:
        self._target = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(cert_file, key_file)
        if client_ca is not None:
            self._context.load_verify_locations(client_ca)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.received = bytearray()
        self.plain = False
        self.handshakes_failed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        encrypted = client.recv(1, socket.MSG_PEEK) == _HANDSHAKE
        self.plain |= not encrypted
        try:
            if encrypted:
                client = self._context.wrap_socket(client, server_side=True)
        except OSError:
            self.handshakes_failed += 1
            client.close()
            return
        server = socket.create_connection(("127.0.0.1", self._target))
        threading.Thread(target=self._pass_on, args=(server, client, None), daemon=True).start()
        self._pass_on(client, server, self.received if encrypted else None)

    def _pass_on(self, source: socket.socket, target: socket.socket, record: bytearray | None) -> None:
        with suppress(OSError), source, target:
            while data := source.recv(65536):
                if record is not None:
                    record += data
                target.sendall(data)


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Certificate | None, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if issuer is not None:
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name))])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer_key, SHA256())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
