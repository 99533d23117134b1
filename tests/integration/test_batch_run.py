"""scripts/batch as a process against a stand-in for the API: troubles, interruptions, and what is sent meanwhile."""

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
from tests.plugins.stand_in import CHUNKS, KEY, StandIn, State

COUNT = 60


class Command:
    """The command over one prompts file and one results file."""

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
        """Exit status and stderr."""
        with self.started(*options) as process:
            _, said = process.communicate(timeout=60)
            return process.returncode, said

    def lines(self) -> list[int]:
        return [each["line"] for each in self.results()]

    def results(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def api() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@pytest.fixture
def command(tmp_path: Path, api: StandIn) -> Command:
    return Command(tmp_path, api.url)


def assert_sent_once(state: State, count: int = COUNT) -> None:
    """Every line one job, no line two keys: the bodies sent are those of the file."""
    assert len(state.sent) == count
    assert Counter(body["prompt"] for _, body in state.sent) == Counter(f"prompt {n % 50}" for n in range(1, count + 1))


@pytest.mark.parametrize("options", [(), ("--in-order",)])
def test_troubles_are_waited_out_and_nothing_is_sent_twice(
    command: Command, api: StandIn, options: tuple[str, ...]
) -> None:
    api.state.troubles = itertools.cycle(["mute", None, None, "unavailable", None, "deaf", None, None, "limited", None])
    status, said = command.run(*options)
    assert status == 0, said
    assert f"{COUNT} of {COUNT} done, 0 failed" in said
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
    command: Command, api: StandIn, end: signal.Signals, options: tuple[str, ...]
) -> None:
    quick = ({"prompt": f"quick {n}"} for n in range(20))
    slow = ({"prompt": f"slow {n}"} for n in range(20))
    command.write(*(json.dumps(line) for pair in zip(quick, slow, strict=True) for line in pair))
    api.state.hold(True)
    with command.started(*options) as process:
        api.state.wait_sent(15)  # eight slow ones fill all places, seven quick ones went by
        process.send_signal(end)
        _, said = process.communicate(timeout=10)
    if end is not signal.SIGKILL:
        assert process.returncode == 130
        assert "the same command continues" in said
    with command.output.open("a") as file:
        file.write('{"line": 4')  # what a kill in the middle of a write leaves

    api.state.hold(False)
    status, said = command.run(*options)
    assert status == 0, said
    assert sorted(command.lines()) == list(range(1, 41))
    assert len({key for key, _ in api.state.sent}) == len({body["prompt"] for _, body in api.state.sent}) == 40


def test_a_finished_file_is_not_sent_again(command: Command, api: StandIn) -> None:
    assert command.run()[0] == 0
    written = command.output.read_bytes()
    assert command.run()[0] == 0
    assert command.output.read_bytes() == written
    assert_sent_once(api.state)


def test_a_restart_of_the_service_is_borne(tmp_path: Path) -> None:
    state = State()
    state.hold(True)
    with StandIn(state) as server:
        command, port = Command(tmp_path, server.url), server.server_address[1]
        with command.started() as process:
            state.wait_sent(8)
            server.__exit__()
            with StandIn(state, port):
                _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert_sent_once(state)


def test_failures_are_recorded_and_retried_only_when_asked(command: Command, api: StandIn) -> None:
    command.write('"fine"', '"to fail"', '""')
    status, said = command.run()
    assert status == 1
    assert "--retry-failed" in said
    errors = {each["line"]: (each["status"], each["error"]) for each in command.results()}
    assert errors[2] == ("failed", {"code": "worker_lost", "message": "lost"})
    assert errors[3] == ("rejected", {"code": "invalid_request", "message": "prompt is empty"})

    assert command.run()[0] == 1
    assert len(api.state.sent) == 2

    assert command.run("--retry-failed")[0] == 1  # the rejected one still is
    sent = [body["prompt"] for _, body in api.state.sent]
    assert sorted(sent[:2]) == ["fine", "to fail"], "at once, so in either order"
    assert sent[2:] == ["to fail"]
    assert command.lines() == [1, 2, 3]
    assert [each["status"] for each in command.results()] == ["succeeded", "succeeded", "rejected"]


def test_malformed_lines_are_reported_by_number_and_skipped(command: Command, api: StandIn) -> None:
    command.write('"a"', "{", "", '{"max_tokens": 1}', '"b"')
    status, said = command.run()
    assert status == 1
    assert "line 2 " in said
    assert "line 4 " in said
    assert "line 3 " not in said
    assert sorted(command.lines()) == [1, 5]


def test_a_broken_line_is_reported_with_its_column(command: Command) -> None:
    command.write('"a"', '{"prompt": "b"', '{"prompt": "b",, "id": 1}')
    said = command.run()[1]
    assert "line 2 is not JSON (Expecting ',' delimiter at column 15)" in said
    assert "line 3 is not JSON (Expecting property name enclosed in double quotes at column 16)" in said


def test_a_custom_id_is_used_once(command: Command, api: StandIn) -> None:
    same = ('{"prompt": "a", "custom_id": "x"}', '{"prompt": "b", "custom_id": "x"}')
    command.write(*same, '{"prompt": "c", "id": "y"}')
    status, said = command.run()
    assert (status, sorted(command.lines())) == (1, [1, 3])
    assert "line 2 has the `custom_id` 'x' of line 1; skipped" in said
    assert command.run()[0] == 1, "the same again when it is continued"
    assert len(api.state.sent) == 2


def test_a_line_in_the_format_of_openai_says_what_to_change(command: Command) -> None:
    command.write('{"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}')
    assert "put the fields of `body` beside `custom_id`" in command.run()[1]


def test_lines_that_are_added_while_it_runs_are_left_for_the_next_run(command: Command, api: StandIn) -> None:
    command.write('"a"', '"b"')

    def add_a_line() -> None:
        with command.prompts.open("a") as file:
            file.write('"late"\n')

    api.state.on_submit = add_a_line
    status, said = command.run("--concurrency", "1")
    assert (status, sorted(command.lines())) == (0, [1, 2])
    assert "2 of 2 done" in said
    api.state.on_submit = lambda: None
    assert command.run()[0] == 0
    assert {body["prompt"] for _, body in api.state.sent} == {"a", "b", "late"}


def test_defaults_go_with_every_line(command: Command, api: StandIn) -> None:
    command.write('"a"', '{"prompt": "b", "max_tokens": 1}')
    assert command.run("--max-tokens", "9", "--model", "tiny")[0] == 0
    bodies = {body["prompt"]: body for _, body in api.state.sent}
    assert bodies["a"] == {"model": "tiny", "max_tokens": 9, "priority": "batch", "prompt": "a"}
    assert bodies["b"]["max_tokens"] == 1


def test_what_cannot_start_is_one_line(command: Command, tmp_path: Path) -> None:
    def refusal(*options: str) -> str:
        status, said = command.run("--patience", "0.2", *options)
        assert status == 2
        return said.splitlines()[-1]

    (tmp_path / "other.jsonl").write_text("notes\n")
    assert "not a result" in refusal("-o", str(tmp_path / "other.jsonl"))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal("-o", str(tmp_path / "pipe"))
    assert "is not a regular file" in refusal("-o", os.devnull)
    assert "no service at" in refusal("--url", "http://127.0.0.1:9")
    command.env["MLXQ_API_KEY"] = "wrong"
    assert "not one of our keys" in refusal()
    command.env["MLXQ_API_KEY"] = ""
    assert "no API key" in refusal()
    command.env["MLXQ_API_KEY"] = KEY
    command.prompts.unlink()
    assert "is not a file" in refusal()


def test_a_cut_stream_is_taken_up_at_the_cursor(api: StandIn) -> None:
    with Client(api.url, KEY) as client:
        events = list(client.events("job_1"))
    assert [event.n for event in events] == list(range(1, len(CHUNKS) + 2))
    assert "".join(event.text for event in events) == "".join(CHUNKS)
    assert events[-1].kind is EventKind.DONE
