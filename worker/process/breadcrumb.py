"""What a worker process is doing, in a small file that survives its death: pages of a mapped file are the kernel's.

The file has two slots that are written in turn, each with a number and a checksum. A process that dies while it writes
one leaves the other whole. The process locks the file while it lives.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from shared.wire import known

SIZE: Final = 64 * 1024
_SLOT: Final = SIZE // 2
_HEADER: Final = struct.Struct("<8sQII")
"""Magic, number, length of the payload, CRC-32 of number and payload."""
_MAGIC: Final = b"mlxqcrmb"
_ROOM: Final = _SLOT - _HEADER.size
_SUFFIX: Final = ".breadcrumb"
_WRITTEN: Final = ("phase", "pid", "worker", "workers", "jobs", "model")

_to_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Trace:
    """What a breadcrumb says.

    Attributes:
        phase: `step` (a batch is being worked on), `load` (a model is being loaded) or `idle`.
        worker: the model worker whose batch it is.
        workers: all model workers of the process: what they hold must return to the queue.
        jobs: ids of the jobs in that batch, the newest last.
        model: the model that is being stepped or loaded.
        torn: whether the process died while it wrote a newer trace.
    """

    phase: str = "idle"
    pid: int = 0
    worker: str = ""
    workers: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    model: str = ""
    torn: bool = False


class Breadcrumb:
    """The file of this process. A change costs a few microseconds, and nothing when nothing has changed.

    `step`, `resume`, `loading` and `idle` belong to the engine's thread; `workers` may be set by any thread.
    """

    def __init__(self, path: Path | None) -> None:
        """Create the file. Without a path, write to memory: if the process dies, all its jobs are suspects.

        Raises:
            OSError: it cannot be created or locked.
        """
        self.path = path
        self._file = _create(path) if path else None
        self._map = mmap.mmap(self._file.fileno() if self._file else -1, SIZE)
        self._lock = threading.Lock()
        self._number = 0
        self._batches: dict[str, tuple[str, ...]] = {}
        self._models: dict[str, str] = {}
        self._trace = Trace(pid=os.getpid())
        self._write()

    def workers(self, models: Mapping[str, str]) -> None:
        """Note the models of this process, by the ids of their model workers."""
        self._models = dict(models)
        self._change(workers=tuple(models))

    def step(self, worker: str, jobs: Sequence[str]) -> None:
        """The engine works on these jobs of a model worker from now on; the newest come last."""
        self._batches[worker] = tuple(jobs)
        self.resume(worker)

    def resume(self, worker: str) -> None:
        """The engine steps a model worker again, with the batch that was last noted for it."""
        jobs, model = self._batches.get(worker, ()), self._models.get(worker, "")
        self._enter(Trace(phase="step", worker=worker, jobs=jobs, model=model))

    def loading(self, model: str) -> None:
        """The engine loads a model from now on."""
        self._enter(Trace(phase="load", model=model))

    def idle(self) -> None:
        """The engine waits from now on."""
        self._enter(Trace())

    def remove(self) -> None:
        """Delete the file: the process ends in order."""
        if self.path:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock and close the file, as the end of the process does."""
        self._map.close()
        if self._file:
            self._file.close()

    def _enter(self, new: Trace) -> None:
        now = self._trace
        if (new.phase, new.worker, new.jobs, new.model) != (now.phase, now.worker, now.jobs, now.model):
            self._change(phase=new.phase, worker=new.worker, jobs=new.jobs, model=new.model)

    def _change(self, **fields: Any) -> None:
        with self._lock:
            self._trace = replace(self._trace, **fields)
            self._write()

    def _write(self) -> None:
        self._number += 1
        payload = _encode(self._trace)
        crc = zlib.crc32(payload, self._number)
        start = self._number % 2 * _SLOT
        body = start + _HEADER.size
        self._map[body : body + len(payload)] = payload
        self._map[start:body] = _HEADER.pack(_MAGIC, self._number, len(payload), crc)


def _create(path: Path) -> BinaryIO:
    """A locked file with all its blocks: a write to a mapped page for which the disk has no room ends the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("x+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(bytes(SIZE))
        file.flush()
    except OSError:
        with suppress(OSError):
            file.close()
        path.unlink(missing_ok=True)
        raise
    return file


def _encode(trace: Trace) -> bytes:
    """A trace in as many bytes as there is room for: of more jobs than fit, the newest."""
    payload = _to_json(_fields(trace)).encode()
    if len(payload) <= _ROOM:
        return payload
    others = len(_to_json(_fields(replace(trace, jobs=()))).encode())
    most = max(0, _ROOM - others) // (max(map(len, trace.jobs), default=0) + 3)
    return _to_json(_fields(replace(trace, jobs=trace.jobs[len(trace.jobs) - most :]))).encode()[:_ROOM]


def _fields(trace: Trace) -> dict[str, object]:
    return {name: getattr(trace, name) for name in _WRITTEN}


def breadcrumb_path(folder: Path, label: str, token: str) -> Path:
    """Where the process with this label and token (`worker.process.identity`) has its breadcrumb."""
    return folder / f"{label}.{socket.gethostname()}.{token}{_SUFFIX}"


def find(folder: Path, token: str) -> Path | None:
    """The breadcrumb of the process with this token; None if it never wrote one."""
    return next(folder.glob(f"*.{token}{_SUFFIX}"), None)


def label_of(path: Path) -> str:
    """The label of the process that wrote this breadcrumb."""
    return path.name.partition(".")[0]


def read(path: Path) -> Trace | None:
    """What a breadcrumb says; None when there is none, or nothing whole in it."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    slots = [_read_slot(content, start) for start in (0, _SLOT)]
    whole = sorted((slot for slot in slots if slot.payload is not None), key=lambda slot: slot.number)
    trace = _decode(whole[-1].payload or b"") if whole else None
    return trace and replace(trace, torn=any(slot.payload is None and slot.begun for slot in slots))


def _decode(payload: bytes) -> Trace | None:
    """A trace of this or another version; None where it cannot be read."""
    try:
        fields = known(Trace, json.loads(payload))
        lists = {name: tuple(fields.get(name, ())) for name in ("workers", "jobs")}
    except (ValueError, TypeError, AttributeError):
        return None
    return Trace(**fields | lists)


@dataclass(frozen=True, slots=True)
class _Slot:
    number: int
    payload: bytes | None
    begun: bool
    """Whether anything was ever written to it."""


def _read_slot(content: bytes, start: int) -> _Slot:
    slot = content[start : start + _SLOT]
    if len(slot) < _SLOT:
        return _Slot(0, None, begun=False)
    magic, number, length, crc = _HEADER.unpack_from(slot)
    payload = slot[_HEADER.size : _HEADER.size + length]
    whole = magic == _MAGIC and zlib.crc32(payload, number & 0xFFFFFFFF) == crc
    return _Slot(number, payload if whole else None, begun=any(slot[: _HEADER.size + 1]))


def leftovers(folder: Path, label: str) -> Iterator[Path]:
    """Breadcrumbs that processes with this label have left behind, also of other hosts that shared the folder.

    Those of processes that live are not among them.
    """
    for path in sorted(folder.glob(f"{label}.*{_SUFFIX}")):
        with suppress(OSError), path.open("r+b") as file:
            if not _is_locked(file):
                yield path


def is_taken(folder: Path, label: str) -> bool:
    """Whether a living process on this host has this label."""
    return any(map(_lives, folder.glob(f"{label}.{socket.gethostname()}.*{_SUFFIX}")))


def _lives(path: Path) -> bool:
    with suppress(OSError), path.open("r+b") as file:
        return _is_locked(file)
    return False


def _is_locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False
