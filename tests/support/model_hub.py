"""A model hub with one repository, over HTTP. It can cut or stall connections and send wrong content."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" * 6 + "c0ff"
LARGE = (".safetensors", ".bin")
"""Suffixes of files that the hub stores outside git, with a SHA-256."""


@dataclass
class Sent:
    """A response with the content of a file."""

    name: str
    first: int
    bytes: int = 0
    authorization: str | None = None


@dataclass
class ModelHub:
    """One repository, at one commit.

    Attributes:
        cuts: by file, numbers of bytes after which the connections of the next responses are cut.
        resets: whether a cut is a TCP reset instead of a normal close.
        stalls: by file, number of bytes after which responses stall.
        content: by file, content that is sent in place of the announced one.
        statuses: by file, HTTP statuses of the next responses.
        ignores_ranges: whether Range headers are ignored.
        redirect_to: base URL to which requests for content are redirected.
    """

    folder: Path
    url: str = ""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    resets: bool = False
    stalls: dict[str, int] = field(default_factory=dict)
    content: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    ignores_ranges: bool = False
    redirect_to: str = ""
    info_status: int = 200
    info_error: str = ""
    requests: list[str] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def info(self) -> dict[str, Any]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {"id": "org/model", "sha": COMMIT, "siblings": [self._sibling(path) for path in paths]}

    def _sibling(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        git_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"rfilename": path.relative_to(self.folder).as_posix(), "size": len(content)}
        if path.suffix in LARGE:
            digest = hashlib.sha256(content).hexdigest()
            pointer = hashlib.sha1(digest.encode()).hexdigest()  # git stores a pointer file
            return entry | {"blobId": pointer, "lfs": {"sha256": digest, "size": len(content), "pointerSize": 134}}
        return entry | {"blobId": git_id}

    def of(self, name: str) -> list[Sent]:
        """Return the responses with a file, in order."""
        return [each for each in self.sent if each.name == name]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: ModelHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    @property
    def hub(self) -> ModelHub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(path)
        if path.startswith("/api/models/"):
            self._answer(hub.info_status, json.dumps(hub.info()).encode(), {"X-Error-Code": hub.info_error})
            return
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if hub.redirect_to and hub.url in f"http://{self.headers['Host']}":
            self._answer(302, b"", {"Location": hub.redirect_to + path})
            return
        statuses = hub.statuses.get(name)
        if not name:  # such as the library's announcements
            self._answer(404, b"", {})
        elif statuses:
            self._answer(statuses.pop(0), b"not now", {})
        else:
            self._send(name)

    def _send(self, name: str) -> None:
        hub = self.hub
        whole = hub.content.get(name, (hub.folder / name).read_bytes())
        range_ = self.headers["Range"]
        first = int(range_.removeprefix("bytes=").removesuffix("-")) if range_ and not hub.ignores_ranges else 0
        if first >= len(whole) > 0:
            self._answer(416, b"", {})
            return
        body = whole[first:]
        sent = Sent(name, first, authorization=self.headers["Authorization"])
        hub.sent.append(sent)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body)))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        cuts, stall = hub.cuts.get(name), hub.stalls.get(name)
        cut = cuts.pop(0) if cuts else None
        body = body[:stall] if cut is None else body[:cut]
        self.wfile.write(body)
        self.wfile.flush()
        sent.bytes = len(body)
        if cut is not None and hub.resets:
            # Closing a socket with a linger time of zero resets the connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if stall is not None:
            hub.stopping.wait(60)
        self.close_connection = True

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def model_hub(folder: Path) -> Iterator[ModelHub]:
    """Serve a folder as `org/model`."""
    hub = ModelHub(folder)
    with _Server(hub) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.stopping.set()
            server.shutdown()
            thread.join()
