"""scripts/batch against a stub of the API: failures, interruptions and retries."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.client.api import Client
from shared.jobs.log import EventKind
from shared.settings import ROOT
from tests.support.stub_api import CHUNKS, KEY, State, StubApi

COUNT = 60


class Command:
    """Runs the command with one prompts file and one results file."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self.prompts = folder / "prompts.jsonl"
        self.output = folder / "results.jsonl"
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "ENV_FILE": os.devnull,
            "MLXQ_API_KEY": KEY,
        }
        self.write(*(json.dumps({"prompt": f"prompt {n % 50}", "id": f"n{n}"}) for n in range(1, COUNT + 1)))

    def write(self, *lines: str) -> None:
        self.prompts.write_text("".join(line + "\n" for line in lines))

    @contextmanager
    def started(self, *options: str) -> Iterator[subprocess.Popen[str]]:
        module = [sys.executable, "-m", "scripts.client.batch"]
        arguments = [str(self.prompts), "-o", str(self.output), "--url", self.url, "--concurrency", "8", *options]
        with subprocess.Popen([*module, *arguments], env=self.env, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *options: str) -> tuple[int, str]:
        """Run the command; return exit status and stderr."""
        with self.started(*options) as process:
            _, output = process.communicate(timeout=60)
            return process.returncode, output

    def lines(self) -> list[int]:
        return [each["line"] for each in self.results()]

    def results(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def api() -> Iterator[StubApi]:
    with StubApi() as server:
        yield server


@pytest.fixture
def command(tmp_path: Path, api: StubApi) -> Command:
    return Command(tmp_path, api.url)


def assert_sent_once(state: State, count: int = COUNT) -> None:
    """Check that each line was sent once."""
    assert len(state.sent) == count
    assert Counter(body["prompt"] for _, body in state.sent) == Counter(f"prompt {n % 50}" for n in range(1, count + 1))


@pytest.mark.parametrize("options", [(), ("--in-order",)])
def test_troubles_are_waited_out_and_nothing_is_sent_twice(
    command: Command, api: StubApi, options: tuple[str, ...]
) -> None:
    api.state.failures = itertools.cycle(
        ["dropped_response", None, None, "unavailable", None, "dropped_request", None, None, "limited", None]
    )
    status, output = command.run(*options)
    assert status == 0, output
    assert f"{COUNT} of {COUNT} done, 0 failed" in output
    assert_sent_once(api.state)
    assert sorted(command.lines()) == list(range(1, COUNT + 1))
    if options:
        assert command.lines() == list(range(1, COUNT + 1))
    for result in command.results():
        assert result["text"] == f"PROMPT {int(str(result['line'])) % 50}"
        assert result["custom_id"] == f"n{result['line']}"
        assert (result["status"], result["finish_reason"]) == ("succeeded", "stop")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), ("--in-order",)])
def test_an_interrupted_run_is_continued(
    command: Command, api: StubApi, end: signal.Signals, options: tuple[str, ...]
) -> None:
    quick = ({"prompt": f"quick {n}"} for n in range(20))
    slow = ({"prompt": f"slow {n}"} for n in range(20))
    command.write(*(json.dumps(line) for pair in zip(quick, slow, strict=True) for line in pair))
    api.state.hold(True)
    with command.started(*options) as process:
        api.state.wait_sent(15)  # eight slow ones use up the concurrency, seven quick ones have ended
        process.send_signal(end)
        _, output = process.communicate(timeout=10)
    if end is not signal.SIGKILL:
        assert process.returncode == 130
        assert "run the same command again to continue" in output
    with command.output.open("a") as file:
        file.write('{"line": 4')  # as after a kill in the middle of a write

    api.state.hold(False)
    status, output = command.run(*options)
    assert status == 0, output
    assert sorted(command.lines()) == list(range(1, 41))
    assert len({key for key, _ in api.state.sent}) == len({body["prompt"] for _, body in api.state.sent}) == 40


def test_a_finished_file_is_not_sent_again(command: Command, api: StubApi) -> None:
    assert command.run()[0] == 0
    written = command.output.read_bytes()
    assert command.run()[0] == 0
    assert command.output.read_bytes() == written
    assert_sent_once(api.state)


def test_a_restart_of_the_service_is_tolerated(tmp_path: Path) -> None:
    state = State()
    state.hold(True)
    with StubApi(state) as server:
        command, port = Command(tmp_path, server.url), server.server_address[1]
        with command.started() as process:
            state.wait_sent(8)
            server.__exit__()
            with StubApi(state, port):
                _, output = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert_sent_once(state)


def test_failures_are_retried_only_with_the_option(command: Command, api: StubApi) -> None:
    command.write('"fine"', '"to fail"', '""')
    status, output = command.run()
    assert status == 1
    assert "--retry-failed" in output
    errors = {each["line"]: (each["status"], each["error"]) for each in command.results()}
    assert errors[2] == ("failed", {"code": "worker_lost", "message": "lost"})
    assert errors[3] == ("rejected", {"code": "invalid_request", "message": "prompt is empty"})

    assert command.run()[0] == 1
    assert len(api.state.sent) == 2

    assert command.run("--retry-failed")[0] == 1  # the rejected prompt is rejected again
    sent = [body["prompt"] for _, body in api.state.sent]
    assert sorted(sent[:2]) == ["fine", "to fail"], "sent concurrently, so in any order"
    assert sent[2:] == ["to fail"]
    assert command.lines() == [1, 2, 3]
    assert [each["status"] for each in command.results()] == ["succeeded", "succeeded", "rejected"]


def test_malformed_lines_are_reported_by_number_and_skipped(command: Command, api: StubApi) -> None:
    command.write('"a"', "{", "", '{"max_tokens": 1}', '"b"')
    status, output = command.run()
    assert status == 1
    assert "line 2 " in output
    assert "line 4 " in output
    assert "line 3 " not in output
    assert sorted(command.lines()) == [1, 5]


def test_a_broken_line_is_reported_with_its_column(command: Command) -> None:
    command.write('"a"', '{"prompt": "b"', '{"prompt": "b",, "id": 1}')
    output = command.run()[1]
    assert "line 2 is not JSON (Expecting ',' delimiter at column 15)" in output
    assert "line 3 is not JSON (Expecting property name enclosed in double quotes at column 16)" in output


def test_a_duplicate_custom_id_is_rejected(command: Command, api: StubApi) -> None:
    same = ('{"prompt": "a", "custom_id": "x"}', '{"prompt": "b", "custom_id": "x"}')
    command.write(*same, '{"prompt": "c", "id": "y"}')
    status, output = command.run()
    assert (status, sorted(command.lines())) == (1, [1, 3])
    assert "line 2 has the `custom_id` 'x' of line 1; skipped" in output
    assert command.run()[0] == 1, "the same result when the run is continued"
    assert len(api.state.sent) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"custom_id": "x", "method": "POST", "url": "/v1/embeddings", "body": {}}, "needs `url`: one of"),
        ({"custom_id": "x", "method": "GET", "url": "/v1/completions", "body": {}}, "needs `method` POST"),
        ({"custom_id": "x", "url": "/v1/completions", "body": "hi"}, "has a `body` that is not a JSON object"),
        ({"custom_id": "x", "url": "/v1/completions", "body": {}, "seed": 1}, "has the unknown field `seed`"),
    ],
)
def test_a_malformed_line_in_openais_format_is_reported(command: Command, line: dict[str, object], reason: str) -> None:
    command.write(json.dumps(line))
    assert f"line 1 {reason}" in command.run()[1]


def test_lines_added_during_a_run_are_sent_by_the_next_run(command: Command, api: StubApi) -> None:
    command.write('"a"', '"b"')

    def add_a_line() -> None:
        with command.prompts.open("a") as file:
            file.write('"late"\n')

    api.state.on_submit = add_a_line
    status, output = command.run("--concurrency", "1")
    assert (status, sorted(command.lines())) == (0, [1, 2])
    assert "2 of 2 done" in output
    api.state.on_submit = lambda: None
    assert command.run()[0] == 0
    assert {body["prompt"] for _, body in api.state.sent} == {"a", "b", "late"}


def test_options_set_missing_fields(command: Command, api: StubApi) -> None:
    command.write('"a"', '{"prompt": "b", "max_tokens": 1}')
    assert command.run("--max-tokens", "9", "--model", "tiny")[0] == 0
    bodies = {body["prompt"]: body for _, body in api.state.sent}
    assert bodies["a"] == {"model": "tiny", "max_tokens": 9, "priority": "batch", "prompt": "a"}
    assert bodies["b"]["max_tokens"] == 1


def test_a_run_that_cannot_start_prints_one_line(command: Command, tmp_path: Path) -> None:
    def failure(*options: str) -> str:
        status, output = command.run("--max-outage", "0.2", *options)
        assert status == 2
        return output.splitlines()[-1]

    (tmp_path / "other.jsonl").write_text("notes\n")
    assert "contains something else than results" in failure("-o", str(tmp_path / "other.jsonl"))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in failure("-o", str(tmp_path / "pipe"))
    assert "is not a regular file" in failure("-o", os.devnull)
    assert "no service at" in failure("--url", "http://127.0.0.1:9")
    command.env["MLXQ_API_KEY"] = "wrong"
    assert "not valid" in failure()
    command.env["MLXQ_API_KEY"] = ""
    assert "no API key" in failure()
    command.env["MLXQ_API_KEY"] = KEY
    command.prompts.unlink()
    assert "is not a file" in failure()


def test_a_broken_stream_continues_at_the_cursor(api: StubApi) -> None:
    with Client(api.url, KEY) as client:
        events = list(client.events("job_1"))
    assert [event.n for event in events] == list(range(1, len(CHUNKS) + 2))
    assert "".join(event.text for event in events) == "".join(CHUNKS)
    assert events[-1].kind is EventKind.DONE
