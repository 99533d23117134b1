"""A small file that records what a worker process is doing, so that its parent can read it after the process died.

The file is memory-mapped: written pages belong to the kernel and survive SIGKILL. It has two slots that are written in
turn, each with a sequence number and a checksum. A process that dies while writing one slot leaves the other intact.
The process holds a lock on the file for as long as it lives.
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

from shared.wire import known_fields

SIZE: Final = 64 * 1024
_SLOT: Final = SIZE // 2
_HEADER: Final = struct.Struct("<8sQII")
"""Magic, sequence number, length of the payload, CRC-32 of number and payload."""
_MAGIC: Final = b"mlxqcrmb"
_MAX_PAYLOAD: Final = _SLOT - _HEADER.size
_SUFFIX: Final = ".breadcrumb"
_FIELDS: Final = ("phase", "pid", "worker", "workers", "jobs", "model")

_to_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Trace:
    """The content of a breadcrumb.

    Attributes:
        phase: `step` (the engine runs a batch), `load` (it loads a model) or `idle`.
        worker: id of the model worker that owns the batch.
        workers: ids of all model workers of the process. The jobs they hold must return to the queue.
        jobs: ids of the jobs in the batch, the newest last.
        model: the model that is being stepped or loaded.
        torn: whether the process died while writing a newer trace.
    """

    phase: str = "idle"
    pid: int = 0
    worker: str = ""
    workers: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    model: str = ""
    torn: bool = False


class Breadcrumb:
    """The breadcrumb of this process. A change costs a few microseconds; without a change nothing is written.

    Only the engine thread may call `step`, `resume`, `loading` and `idle`. Any thread may call `workers`.
    """

    def __init__(self, path: Path | None) -> None:
        """Create the file. Without a path, write to memory: if the process dies, all its jobs are suspects.

        Raises:
            OSError: the file cannot be created or locked.
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
        """Record the model workers of this process: model names by worker id."""
        self._models = dict(models)
        self._change(workers=tuple(models))

    def step(self, worker: str, jobs: Sequence[str]) -> None:
        """Record that the engine steps a model worker's batch from now on, with the newest job last."""
        self._batches[worker] = tuple(jobs)
        self.resume(worker)

    def resume(self, worker: str) -> None:
        """Record that the engine steps a model worker again, with its last recorded batch."""
        jobs, model = self._batches.get(worker, ()), self._models.get(worker, "")
        self._set_activity(Trace(phase="step", worker=worker, jobs=jobs, model=model))

    def loading(self, model: str) -> None:
        """Record that the engine loads a model from now on."""
        self._set_activity(Trace(phase="load", model=model))

    def idle(self) -> None:
        """Record that the engine waits from now on."""
        self._set_activity(Trace())

    def remove(self) -> None:
        """Delete the file, because the process ends in order."""
        if self.path:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock and close the file, as the end of the process does."""
        self._map.close()
        if self._file:
            self._file.close()

    def _set_activity(self, new: Trace) -> None:
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
    """Create a locked file and allocate all its blocks.

    A write to a mapped page would end the process if the disk had no space left for it.
    """
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
    """Encode a trace into at most one slot. If not all jobs fit, the newest are kept."""
    payload = _to_json(_fields(trace)).encode()
    if len(payload) <= _MAX_PAYLOAD:
        return payload
    without_jobs = len(_to_json(_fields(replace(trace, jobs=()))).encode())
    max_jobs = max(0, _MAX_PAYLOAD - without_jobs) // (max(map(len, trace.jobs), default=0) + 3)
    newest = trace.jobs[len(trace.jobs) - max_jobs :]
    return _to_json(_fields(replace(trace, jobs=newest))).encode()[:_MAX_PAYLOAD]


def _fields(trace: Trace) -> dict[str, object]:
    return {name: getattr(trace, name) for name in _FIELDS}


def breadcrumb_path(folder: Path, label: str, token: str) -> Path:
    """Return the path of the breadcrumb of the process with this label and token (`worker.process.identity`)."""
    return folder / f"{label}.{socket.gethostname()}.{token}{_SUFFIX}"


def find(folder: Path, token: str) -> Path | None:
    """Return the breadcrumb of the process with this token; None if it never wrote one."""
    return next(folder.glob(f"*.{token}{_SUFFIX}"), None)


def label_of(path: Path) -> str:
    """Return the label of the process that wrote a breadcrumb."""
    return path.name.partition(".")[0]


def read(path: Path) -> Trace | None:
    """Read a breadcrumb; None if the file does not exist or has no valid slot."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    slots = [_read_slot(content, start) for start in (0, _SLOT)]
    valid = sorted((slot for slot in slots if slot.payload is not None), key=lambda slot: slot.number)
    trace = _decode(valid[-1].payload or b"") if valid else None
    return trace and replace(trace, torn=any(slot.payload is None and slot.started for slot in slots))


def _decode(payload: bytes) -> Trace | None:
    """Decode a trace of this or another version; None if it cannot be read."""
    try:
        fields = known_fields(Trace, json.loads(payload))
        lists = {name: tuple(fields.get(name, ())) for name in ("workers", "jobs")}
    except (ValueError, TypeError, AttributeError):
        return None
    return Trace(**fields | lists)


@dataclass(frozen=True, slots=True)
class _Slot:
    number: int
    payload: bytes | None
    started: bool
    """Whether anything was ever written to the slot."""


def _read_slot(content: bytes, start: int) -> _Slot:
    slot = content[start : start + _SLOT]
    if len(slot) < _SLOT:
        return _Slot(0, None, started=False)
    magic, number, length, crc = _HEADER.unpack_from(slot)
    payload = slot[_HEADER.size : _HEADER.size + length]
    valid = magic == _MAGIC and zlib.crc32(payload, number & 0xFFFFFFFF) == crc
    return _Slot(number, payload if valid else None, started=any(slot[: _HEADER.size + 1]))


def leftovers(folder: Path, label: str) -> Iterator[Path]:
    """Yield the breadcrumbs of dead processes with this label, also those of other hosts that shared the folder."""
    for path in sorted(folder.glob(f"{label}.*{_SUFFIX}")):
        with suppress(OSError), path.open("r+b") as file:
            if not _is_locked(file):
                yield path


def is_taken(folder: Path, label: str) -> bool:
    """Return whether a living process on this host has this label."""
    return any(map(_is_alive, folder.glob(f"{label}.{socket.gethostname()}.*{_SUFFIX}")))


def _is_alive(path: Path) -> bool:
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
