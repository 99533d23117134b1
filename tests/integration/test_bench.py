"""`scripts/bench` with real servers and small loads: every scenario, for this stack and for others."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from shared.settings import ROOT
from tests.bench import cli, constrained, recovery, saving, speculation, streams
from tests.bench.contenders import BARE, OWN, PEER, own_stack
from tests.bench.modelless import modelless
from tests.bench.path import Case, submit
from tests.bench.plans import ChatRequest, Client, Plan, opened
from tests.bench.prompts import question, text_of
from tests.bench.resources import Meter
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

WHO = [OWN, BARE]


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of saved runs, in place of the repository's own."""
    monkeypatch.setattr(saving, "FOLDER", tmp_path / "bench")
    return tmp_path / "bench"


@pytest.mark.long
def test_a_quick_run_measures_every_scenario_and_saves_it(
    tiny_model_path: Path, tiny_vision_path: Path, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "bench.json"
    small = ["--quick", "--seconds", "1", "--who", *WHO, "--only", "load", "--vision-model", str(tiny_vision_path)]
    status = cli.main([*small, "--json", str(report), "--save", "v1"])

    assert status == cli.OK, capsys.readouterr().out
    found = json.loads(report.read_text())
    records = {(each["scenario"], each["case"], each["who"]): each["figures"] for each in found["records"]}
    for who in WHO:
        for scenario, case in [
            ("single", "1 client"), ("closed", "4 clients"), ("open", "capacity"), ("open", "120% of capacity"),
            ("prefix", "300 tokens"), ("mixed", "2 rows, 600 tokens"),
        ]:  # fmt: skip
            figures = records[scenario, case, who]
            assert figures["failed"] == 0, (scenario, case, who)
            assert figures["tokens_per_s"] > 0
            # The open loop is so short that all its requests may be of the batch class.
            assert figures["ttft_p50_s"] > 0 or not figures.get("interactive", 1)
            assert figures["cpu_s_per_1k"] > 0
            assert figures["peak_mb"] > 50
    assert ("prefix", "after a restart", OWN) in records
    assert records["open", "capacity", OWN]["capacity_per_s"] > 0
    assert records["mixed", "2 rows, 600 tokens", OWN]["disturbance"] > 0
    assert found["commit"]
    first, again = (records["images", f"16 clients{more}", OWN] for more in ("", ", the same images again"))
    assert (first["failed"], first["images_encoded"], again["images_encoded"]) == (0, 16, 0)
    assert f"not measured: {BARE}, images" in capsys.readouterr().out
    ElementTree.parse(docs / "v1/bench.svg")
    assert "[v1](v1/README.md)" in (docs / "README.md").read_text()


@pytest.mark.long
def test_a_librarys_own_server_gets_the_same_load(tiny_model_path: Path, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    assert not cli.main(["--quick", "--scenario", "closed", "--who", PEER, "--only", "load", "--json", str(report)])

    (record,) = json.loads(report.read_text())["records"]
    assert (record["who"], record["figures"]["failed"], record["figures"]["tokens"]) == (PEER, 0, 4 * 16)


def libraries(pid: int) -> list[psutil.Process]:
    """The processes of the bare library that a run has started."""
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            found += [child] if "tests.bench.bare" in " ".join(child.cmdline()) else []
    return found


@pytest.mark.long
def test_an_interrupted_run_reports_its_figures(tiny_model_path: Path, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    command = [sys.executable, "-m", "tests.bench.cli", "--quick", "--scenario", "closed", "open"]
    options = ["--seconds", "600", "--who", BARE, "--only", "load", "--json", str(report)]
    with subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            (library,) = eventually(lambda: libraries(run.pid), "the library is running", 60)
            eventually(lambda: library.cpu_times().user > 6, "it is in its open loop", 120)
            run.terminate()
            assert run.wait(60) == cli.INTERRUPTED
        finally:
            run.kill()

    assert not library.is_running()
    assert json.loads(report.read_text())["records"][0]["scenario"] == "closed"


@pytest.mark.long
def test_every_kind_of_request_is_answered_by_this_stack(tiny_model_path: Path) -> None:
    long = text_of(500, 1, tiny_model_path)
    with own_stack(tiny_model_path, 8) as stack:
        before = {worker.pid for worker in stack.workers()}
        stack.restart_worker()
        after = {worker.pid for worker in stack.workers()}
        with Meter(stack.pid) as meter:
            outcome = stack.run(
                Plan([
                    *opened([
                        ChatRequest(question(1), 5, 0.2, "late"),
                        ChatRequest(question(2), 5, kind="waits", batch=True),
                    ]).clients,
                    Client([
                        ChatRequest(question(3, long), 5, kind="first"),
                        ChatRequest(question(4, long), 5, kind="second"),
                    ]),
                    Client([ChatRequest(question(5), 5000, kind="endless")], background=True),
                ])
            )  # fmt: skip
        generated = stack.metric("mlxq_worker_generated_tokens")

    assert after
    assert not before & after
    samples = {sample.kind: sample for sample in outcome.samples}
    assert {kind for kind, sample in samples.items() if sample.ended_s} == {"late", "waits", "first", "second"}
    assert not any(sample.error for sample in outcome.samples)
    assert {samples[kind].tokens for kind in ("late", "waits", "first", "second")} == {5}
    assert samples["late"].due_s == 0.2
    assert samples["late"].chunks[0] > 0.2
    assert samples["second"].due_s >= (samples["first"].ended_s or 0)
    assert meter.cpu_s > 0
    assert generated >= 20


def test_a_text_has_the_length_that_was_asked_for(tiny_model_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model_path / "tokenizer.json"))

    assert len(tokenizer.encode(text_of(777, 3, tiny_model_path)).ids) == pytest.approx(777, abs=2)
    assert text_of(50, 3, tiny_model_path) != text_of(50, 4, tiny_model_path)


@pytest.mark.parametrize("module", ["constrained", "speculation"])
def test_measurements_in_process_load_openblas_before_mlx(module: str) -> None:
    code = f"import sys, tests.bench.{module}; sys.exit('mlx.core' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_constrained_rows_are_measured_next_to_free_ones(tiny_model_path: Path) -> None:
    found = constrained.compare(tiny_model_path, rounds=1, rows=3, tokens=10)
    assert list(found) == [case.name for case in constrained.CASES]
    assert all(turn["tokens_per_s"] > 0 and turn["cpu_ms"] > 0 for [turn] in found.values())
    assert constrained.table({"tiny": found}).row_count == len(constrained.CASES)


def test_speculation_is_measured_on_answers_that_repeat_their_prompts_and_on_others(tiny_model_path: Path) -> None:
    found = speculation.compare(tiny_model_path, rounds=1, tokens=30)
    assert {turn["same"] for turns in found.values() for turn in turns} == {True}
    assert all(turn[way] > 0 for turns in found.values() for turn in turns for way in ("with", "without"))
    assert speculation.table({"tiny": found}).row_count == len(speculation.CASES)


def test_the_token_path_and_submissions_are_measured_without_a_model() -> None:
    with modelless(SLOTS="64") as stack:
        streamed = Case(streams=10, tokens=50, every_s=0.02).run(stack)
        submitted = submit(stack, clients=3, jobs=20)

    assert streamed["tokens"] > 0
    assert streamed["delay_p99_ms"] >= streamed["delay_p50_ms"] > 0
    assert set(streamed["cpu_ms_per_1000_tokens"]) == {"valkey", "web", "worker", "client"}
    assert (submitted["jobs"], submitted["clients"]) == (20, 3)
    assert submitted["jobs_per_s"] > 0


def test_memory_of_idle_streams_is_measured() -> None:
    found = streams.idle_streams(5)
    assert found["streams"] == 5
    assert found["rss_mb"] >= found["before_mb"] > 10


@pytest.mark.long
def test_scenes_of_recovery_run(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHORT_JOBS", "WAITING_JOBS", "STREAMS"):
        monkeypatch.setattr(recovery, name, 4)
    monkeypatch.setattr(recovery, "_STREAM_TOKENS", 60)
    monkeypatch.setattr(recovery, "_KILLS_S", (0.2, 0.4))
    found = recovery.recovery(tiny_model_path, 1, None)

    scenes = [rounds["now"][0] for rounds in found["scenes"].values()]
    assert [
        scene.figure for scene in recovery.SCENES.values() if not any(scene.figure in each for each in scenes)
    ] == []
    assert scenes[0]["emptied_s"] > 0
    assert scenes[2]["failed"] == 0
