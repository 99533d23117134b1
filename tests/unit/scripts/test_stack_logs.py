"""The reason for a failure, and process events, from logs."""

from __future__ import annotations

from pathlib import Path

from scripts.stack.logs import SupervisorLog, last_error

STAMP = "2026-01-01 10:00:00,000"


def test_the_last_error_is_preferred_to_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "web.log"
    log.write_text('{"level": "ERROR", "message": "no such thing\\nTraceback"}\n{"level": "INFO", "message": "bye"}\n')
    assert last_error(log) == "no such thing"


def test_an_event_is_shown_with_its_reason(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    log.write_text('{"level": "CRITICAL", "message": "worker_ends", "reason": "no progress for too long"}\n')
    assert last_error(log) == "worker_ends: no progress for too long"


def test_plain_lines_are_read_too(tmp_path: Path) -> None:
    log = tmp_path / "valkey.log"
    log.write_text("1\nbad directive\n\n")
    assert last_error(log) == "bad directive"


def test_a_missing_log_has_no_error(tmp_path: Path) -> None:
    assert last_error(tmp_path / "missing.log") == ""


def test_events_are_those_since_the_last_call(tmp_path: Path) -> None:
    path = tmp_path / "supervisord.log"
    path.write_text(f"{STAMP} INFO spawned: 'old' with pid 1\n")
    log = SupervisorLog(path)
    with path.open("a") as file:
        file.write(f"{STAMP} INFO success: web entered RUNNING state\n")
        file.write(f"{STAMP} WARN exited: web (exit status 1; not expected)\n{STAMP} INFO spawn")
        file.flush()
        assert log.read_events() == ["exited: web (exit status 1; not expected)"]
        file.write("ed: 'web' with pid 2\n")
        file.flush()
        assert log.read_events() == ["spawned: 'web' with pid 2"]


def test_a_rotated_log_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "supervisord.log"
    path.write_text("x" * 500)
    log = SupervisorLog(path)
    path.write_text(f"{STAMP} INFO stopped: web (exit status 0)\n")
    assert log.read_events() == ["stopped: web (exit status 0)"]


def test_lines_before_the_offset_and_consequences_are_ignored(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    log.write_text('{"level": "ERROR", "message": "an earlier run"}\n')
    offset = log.stat().st_size
    assert last_error(log, offset) == ""
    with log.open("a") as file:
        file.write('{"level": "CRITICAL", "message": "thread_died", "exc_info": "Traceback\\nOSError: disk full"}\n')
        file.write('{"level": "ERROR", "message": "worker_process_died", "exit": "status 70"}\n')
    assert last_error(log, offset) == "thread_died: OSError: disk full"
