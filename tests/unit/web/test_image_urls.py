"""Images at URLs, and the addresses that must not be reachable through them (SSRF)."""

from __future__ import annotations

import gzip
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import pytest

from shared.errors import Invalid, MlxqError, TooLarge
from shared.settings import ROOT
from tests.support.image_files import picture
from web.admission import image_urls
from web.admission.image_urls import ImageUrls
from web.http.outbound import is_public_address

PNG = picture()


class ImageHandler(BaseHTTPRequestHandler):
    """Serves images, redirects and faulty responses."""

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.headers['Host']}{self.path}")  # type: ignore[attr-defined]
        path = self.path
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/to/"))
            self.end_headers()
        elif path == "/compressed":
            self._send(gzip.compress(PNG), ("Content-Encoding", "gzip"))
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(64 * 1024))
            except OSError:
                pass
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            self.server.released.wait(30)  # type: ignore[attr-defined]
        elif path == "/missing":
            self.send_error(404)
        else:
            self._send(PNG)

    def _send(self, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(200)
        for name, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the output of the tests clean."""


@pytest.fixture
def site() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), ImageHandler)
    server.requests, server.released = [], threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.fixture
def urls() -> ImageUrls:
    """Names under images.example resolve to this machine, which counts as public; others to a private address."""
    return ImageUrls(
        lambda host, _: ["127.0.0.1"] if host.endswith("images.example") else ["10.0.0.1"],
        lambda address: address == "127.0.0.1",
        None,
    )


def at(site: ThreadingHTTPServer, path: str, host: str = "images.example") -> str:
    return f"http://{host}:{site.server_address[1]}{path}"


def refusal(urls: ImageUrls, url: str, max_bytes: int = 10**6) -> MlxqError:
    with pytest.raises(MlxqError) as caught:
        urls.fetch(url, max_bytes)
    return caught.value


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("8.8.8.8", True),
        ("127.0.0.1", False), ("127.1.2.3", False), ("::1", False), ("0.0.0.0", False), ("::", False),
        ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
        ("fe80::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("fd12::1", False), ("100.64.0.1", False),
        ("224.0.0.1", False), ("ff02::1", False), ("255.255.255.255", False), ("240.0.0.1", False),
        ("fec0::1", False), ("192.0.0.8", False), ("192.88.99.1", False), ("64:ff9b:1::808:808", False),
        ("::7f00:1", False), ("::ffff:240.0.0.1", False), ("64:ff9b::808:808", True),
        ("192.0.2.1", False), ("198.18.0.1", False), ("2001:db8::1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:169.254.169.254", False), ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False), ("2002:808:808::", True), ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False),
        ("nonsense", False), ("", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public_address(address) is public


def test_the_request_has_the_host_name_of_the_url(site: ThreadingHTTPServer, urls: ImageUrls) -> None:
    assert urls.fetch(at(site, "/a.png?size=1"), 10**6) == PNG
    assert site.requests == [f"images.example:{site.server_address[1]}/a.png?size=1"]  # type: ignore[attr-defined]


def test_at_most_three_redirects_are_followed(site: ThreadingHTTPServer, urls: ImageUrls) -> None:
    assert urls.fetch(at(site, "/to//to//to//a.png"), 10**6) == PNG
    assert refusal(urls, at(site, "/to//to//to//to//a.png")).code == "image_unreachable"


@pytest.mark.parametrize(
    "target",
    [
        "http://inside.example/", "http://10.0.0.1/", "file:///etc/passwd", "ftp://images.example/a",
        "http://user:secret@images.example/", "gopher://inside.example/",
    ],
)  # fmt: skip
def test_the_target_of_a_redirect_is_checked_like_a_url(
    site: ThreadingHTTPServer, urls: ImageUrls, target: str
) -> None:
    for url in (target, at(site, f"/to/{target}")):
        error = refusal(urls, url)
        assert error.code in ("image_url_refused", "image_unreachable"), url
    assert len(site.requests) <= 1  # type: ignore[attr-defined]


def test_a_name_with_one_private_address_is_refused() -> None:
    urls = ImageUrls(lambda *_: ["8.8.8.8", "127.0.0.1"])
    assert refusal(urls, "http://mixed.example/").code == "image_url_refused"


def test_a_name_is_resolved_once_so_that_dns_rebinding_has_no_effect(site: ThreadingHTTPServer) -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    urls = ImageUrls(lambda *_: next(answers), lambda address: address == "127.0.0.1", None)
    assert urls.fetch(at(site, "/a.png", "rebinding.example"), 10**6) == PNG
    assert next(answers) == ["10.0.0.1"], "the name was resolved once"


def test_this_machine_is_refused_with_real_name_resolution(site: ThreadingHTTPServer) -> None:
    port = site.server_address[1]
    for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f000001"):
        error = refusal(ImageUrls(ports=None), f"http://{host}:{port}/a.png")
        assert error.code in ("image_url_refused", "image_unreachable")
    assert not site.requests  # type: ignore[attr-defined]


def test_other_ports_than_the_default_are_refused() -> None:
    assert refusal(ImageUrls(lambda *_: ["8.8.8.8"]), "http://dns.example:53/").code == "image_url_refused"


def test_too_large_compressed_missing_and_slow_content_is_refused(
    site: ThreadingHTTPServer, urls: ImageUrls, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(refusal(urls, at(site, "/a.png"), len(PNG) - 1), TooLarge)
    assert isinstance(refusal(urls, at(site, "/endless")), TooLarge)
    for path in ("/compressed", "/missing"):
        error = refusal(urls, at(site, path))
        assert (type(error), error.code) == (Invalid, "image_unreachable")
    monkeypatch.setattr(image_urls, "TIMEOUT_S", 0.2)
    assert refusal(urls, at(site, "/slow")).code == "image_unreachable"


class SlowServer(threading.Thread):
    """Sends some bytes, and then a few more at short intervals until the client disconnects."""

    def __init__(self, first: bytes, more: bytes) -> None:
        super().__init__(daemon=True)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(30)
        self._first, self._more = first, more
        self._ended = threading.Event()
        self.disconnected = threading.Event()
        """Set when the client has disconnected."""
        self.port: int = self._server.getsockname()[1]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self._server.close()

    def run(self) -> None:
        client, _ = self._server.accept()
        with client:
            client.recv(4096)
            try:
                client.sendall(self._first)
                while not self._ended.wait(0.02):
                    client.sendall(self._more)
            except OSError:
                self.disconnected.set()


SLOW_RESPONSES = {
    "header": ("http", b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "headers": ("http", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk": ("http", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "body": ("http", b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
    "handshake": ("https", b"\x16\x03\x03\x40\x00", b"\x02"),
}


@pytest.mark.parametrize("where", SLOW_RESPONSES)
def test_a_server_that_sends_byte_by_byte_is_cut_off_at_the_deadline(
    urls: ImageUrls, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    scheme, first, more = SLOW_RESPONSES[where]
    monkeypatch.setattr(image_urls, "TIMEOUT_S", 0.3)
    with SlowServer(first, more) as server:
        assert refusal(urls, f"{scheme}://images.example:{server.port}/").code == "image_unreachable"
        assert server.disconnected.wait(10)


GEVENT_SCRIPT = """
from gevent import monkey; monkey.patch_all()
import sys
from shared.errors import MlxqError
from web.admission import image_urls
image_urls.TIMEOUT_S = 0.5
urls = image_urls.ImageUrls(lambda *_: ["127.0.0.1"], lambda _: True, None)
for url in sys.argv[1:]:
    try:
        print(len(urls.fetch(url, 10**6)))
    except MlxqError as error:
        print(error.code)
"""


def test_the_deadline_holds_under_gevent_too(site: ThreadingHTTPServer) -> None:
    with SlowServer(*SLOW_RESPONSES["header"][1:]) as plain, SlowServer(*SLOW_RESPONSES["handshake"][1:]) as secure:
        targets = [f"http://a.example:{plain.port}/", f"https://a.example:{secure.port}/", at(site, "/a.png")]
        script = subprocess.run(
            [sys.executable, "-c", GEVENT_SCRIPT, *targets],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert script.stdout.split() == ["image_unreachable", "image_unreachable", str(len(PNG))], script.stderr
        assert plain.disconnected.wait(10) and secure.disconnected.wait(10)


def test_a_name_lookup_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "TIMEOUT_S", 0.2)
    released = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        assert released.wait(30)
        return ["8.8.8.8"]

    try:
        assert refusal(ImageUrls(resolve), "http://silent.example/").code == "image_unreachable"
    finally:
        released.set()


def test_slow_name_lookups_of_one_caller_do_not_delay_another(
    site: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_urls, "TIMEOUT_S", 0.2)
    released = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        assert host == "images.example" or released.wait(30)
        return ["127.0.0.1"]

    urls = ImageUrls(resolve, lambda _: True, None)
    try:
        for number in range(10):
            with pytest.raises(Invalid):
                urls.fetch(f"http://silent{number}.example/", 10**6, "one")
        monkeypatch.setattr(image_urls, "TIMEOUT_S", 10)
        assert urls.fetch(at(site, "/a.png"), 10**6, "another") == PNG
    finally:
        released.set()


def test_the_next_address_is_tried_if_one_refuses_the_connection(site: ThreadingHTTPServer) -> None:
    # The first refuses: on Linux nothing listens there, and elsewhere 127.0.0.2 does not exist.
    urls = ImageUrls(lambda *_: ["127.0.0.2", "127.0.0.1"], lambda address: address.startswith("127."), None)
    assert urls.fetch(at(site, "/a.png"), 10**6) == PNG


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1", "http://images.example:99999/", "http://images.example:x/", "http:///a.png", "http://",
        "http://user@images.example/", "http://:secret@images.example/",
        "http://images.example\\@inside.example/", "http://images.example:81/",
    ],
)  # fmt: skip
def test_a_url_with_credentials_another_port_or_malformed_is_refused(url: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError(host)

    error = refusal(ImageUrls(resolve), url)
    assert (type(error), error.code) == (Invalid, "image_url_refused")


def test_a_url_is_percent_encoded_as_browsers_do_it(site: ThreadingHTTPServer, urls: ImageUrls) -> None:
    assert urls.fetch(at(site, "/née a%20b.png?q=é&x=%2F"), 10**6) == PNG
    assert site.requests[0].endswith("/n%C3%A9e%20a%20b.png?q=%C3%A9&x=%2F")  # type: ignore[attr-defined]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of `images.example`, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to create a certificate")
    key, signed, both, config = (tmp_path / name for name in ("key", "signed", "both.pem", "config"))
    config.write_text(
        "[req]\ndistinguished_name=name\nx509_extensions=more\nprompt=no\n[name]\nCN=images.example\n"
        "[more]\nsubjectAltName=DNS:images.example\nbasicConstraints=critical,CA:TRUE\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*command, "-config", config, "-keyout", key, "-out", signed], check=True, capture_output=True)
    both.write_text(key.read_text() + signed.read_text())
    return both


def test_the_certificate_is_verified_for_the_host_name(
    site: ThreadingHTTPServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    monkeypatch.setattr(site, "handle_error", lambda *_: None)
    urls = ImageUrls(lambda *_: ["127.0.0.1"], lambda _: True, None)
    secure = at(site, "/a.png").replace("http:", "https:")
    assert refusal(urls, secure).code == "image_unreachable", "the certificate is self-signed"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert urls.fetch(secure, 10**6) == PNG
    assert refusal(urls, secure.replace("images.", "other.")).code == "image_unreachable"
