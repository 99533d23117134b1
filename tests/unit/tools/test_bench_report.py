"""What the bench says: medians, the table, the goals, the picture, the pages that are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from scripts.model_files.shapes import QWEN2_5_7B
from tests.bench import cli, goals, machine, saving, tables
from tests.bench.charts import picture
from tests.bench.contenders import CONTENDERS, OWN, PEER
from tests.bench.results import Absence, Place, Record, Results
from tests.bench.samples import Figures, Sample, figures
from tests.bench.scenarios import images
from tests.bench.scenarios.closed_loop import case_name
from tests.bench.scenarios.registry import SCENARIOS
from tests.bench.svg import Chart, document, even_ticks, log_ticks
from tests.bench.turns import turns

SVG = "{http://www.w3.org/2000/svg}"


def measured(tokens_per_s: float, **more: float) -> Figures:
    return figures([Sample(0, "", 0.0, [0.25, 0.5], 2, 0.5)], 1.0) | {
        "tokens_per_s": tokens_per_s, "cpu_s_per_1k": 1.5, "peak_mb": 200.0, **more
    }  # fmt: skip


def record(
    case: str, who: str, tokens_per_s: float, number: int = 0, scenario: str = "closed", **more: float
) -> Record:
    return Record(Place(scenario, goals.TINY, case, who), number, measured(tokens_per_s, **more))


@pytest.fixture
def results() -> Results:
    found = Results(
        [
            *(record("64 clients", OWN, speed, i, clients=64) for i, speed in enumerate((2900.0, 100.0, 3100.0))),
            *(record("64 clients", PEER, speed, i, clients=64) for i, speed in enumerate((900.0, 1000.0, 1100.0))),
            record("8 clients", OWN, 500.0, clients=8),
            record("8 clients", PEER, 1000.0, clients=8),
            *(
                record(f"{load:.0%} of capacity", who, 10.0, scenario="open", load=load, offered_per_s=load,
                       capacity_per_s=1.0, goodput_per_s=0.5, batch_ttft_p50_s=3.0, batch_ttft_p99_s=9.0)
                for load in (0.5, 1.2) for who in (OWN, PEER)
            ),
        ]
    )  # fmt: skip
    found.leave_out(Absence("images", "", "", "there is no picture"))
    found.leave_out(Absence("images", "", "", "there is no picture"))
    found.leave_out(Absence("mixed", goals.TINY, PEER, "it fell over", fault=True))
    return found


@pytest.fixture
def report(results: Results) -> dict[str, Any]:
    return {**machine.about(), "command": "scripts/bench", "lines": ["queue hop 5 ms"], **results.to_json()}


def test_a_median_is_that_of_the_rounds(results: Results) -> None:
    assert results.medians()[Place("closed", goals.TINY, "64 clients", OWN)]["tokens_per_s"] == 2900.0


def test_results_pass_through_json(results: Results) -> None:
    data = json.loads(json.dumps(results.to_json()))

    assert Results.from_json(data) == results
    assert {"scenario", "model", "case", "who", "round", "figures"} == set(data["records"][0])


def test_a_row_a_case_and_contender_with_the_ratio_to_the_peer(results: Results) -> None:
    found = [(row[0], row[1], row[2], row[3]) for row in tables.rows(results)]

    assert found[:4] == [
        ("closed: tiny-random-llama, 64 clients", OWN, "2,900.0", "2.90"),
        ("", PEER, "1,000.0", "1.00"),
        ("closed: tiny-random-llama, 8 clients", OWN, "500.0", "0.50"),
        ("", PEER, "1,000.0", "1.00"),
    ]
    assert len(tables.terminal(results).rows) == len(found)


def test_failed_requests_show_beside_the_latencies(results: Results) -> None:
    results.records.append(record("1 client", OWN, 1.0, failed=3.0))

    assert any("(3 failed)" in row[4] for row in tables.rows(results))


def test_what_is_missing_is_told_once_with_its_reason(results: Results) -> None:
    assert tables.absences(results) == [
        "left out: images: there is no picture",
        f"FAILED: {PEER}, mixed, tiny-random-llama: it fell over",
    ]


def test_goals_are_held_against_what_was_measured_only(results: Results) -> None:
    found = {each["goal"]: each for each in goals.verdicts(results)}

    assert not found["tiny-random-llama, 64 clients: tokens/s of mlx_lm.server's"]["reached"]  # 2.9 of 3
    assert found["tiny-random-llama, 120 % of capacity: requests lost"]["reached"]
    assert not any(goals.SMOLLM2 in goal for goal in found)


def test_every_goal_is_of_a_case_that_the_whole_run_has() -> None:
    cases = {
        "single": {"1 client"},
        "closed": {f"{n} clients" for n in cli.Sizes().clients},
        "open": {f"{load:.0%} of capacity" for load in cli.Sizes().loads},
        "prefix": {f"{cli.Sizes().prefix_tokens} tokens", "after a restart"},
        "mixed": {f"{cli.Sizes().running} rows, {cli.Sizes().long_tokens} tokens"},
        "images": {f"{case_name(n)}{more}" for n in images.CLIENTS for more in ("", f", {images.AGAIN}")},
    }
    for goal in goals.GOALS:
        scenario, model, case = goal.case
        assert case in cases[scenario]
        assert model in (cli.SMOLLM2.name, cli.TINY.name, cli.VISION.name, QWEN2_5_7B.folder)
        assert goal.beside in CONTENDERS


def test_the_picture_is_svg_with_a_line_a_contender(results: Results) -> None:
    root = ElementTree.fromstring(picture(results))

    assert root.tag == f"{SVG}svg"
    assert len(root.findall(f".//{SVG}polyline")) == 2 * 3  # speed, TTFT p50, TTFT p99
    said = [text.text for text in root.findall(f".//{SVG}text")]
    assert {OWN, PEER, "tiny-random-llama: speed by clients", "tiny-random-llama: TTFT p99 by load"} <= set(said)


def test_points_of_a_chart_lie_where_their_values_say() -> None:
    chart = Chart("a < b", "x", "y", {"one & two": [(0, 0), (1, 5), (2, 10)]})
    root = ElementTree.fromstring(document([chart], 1))
    line = root.find(f".//{SVG}polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]

    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] > points[1][1] > points[2][1]  # y grows downwards
    assert points[0][1] + points[2][1] == pytest.approx(2 * points[1][1], abs=0.2)


def test_a_chart_of_nothing_says_so() -> None:
    assert "nothing was measured" in document([Chart("empty", "x", "y")], 1)
    ElementTree.fromstring(document([], 1))


@pytest.mark.parametrize("high", [0.003, 0.9, 1.0, 3.4, 7.0, 99.0, 2769.0])
def test_even_ticks_reach_the_value_in_a_few_round_steps(high: float) -> None:
    ticks = even_ticks(high)

    assert ticks[0] == 0
    assert ticks[-2] < high <= ticks[-1]
    assert 4 <= len(ticks) - 1 <= 8
    assert re.fullmatch(r"[125]0*", f"{ticks[1]:g}".replace(".", "").lstrip("0"))


def test_logarithmic_ticks_are_powers_of_ten_around_the_values() -> None:
    assert log_ticks(0.02, 3.0) == pytest.approx([0.01, 0.1, 1.0, 10.0])
    assert log_ticks(1.0, 1.0) == pytest.approx([1.0, 10.0])


def test_a_run_is_kept_with_its_data_picture_and_page(results: Results, report: dict[str, Any], tmp_path: Path) -> None:
    folder = saving.save(report, results, "v1", tmp_path)

    assert json.loads((folder / "bench.json").read_text())["records"] == report["records"]
    ElementTree.parse(folder / "bench.svg")
    page = (folder / "README.md").read_text()
    for part in (
        report["commit"],
        report["machine"]["cpu"],
        "`scripts/bench`",
        "bench.svg",
        "2,900.0",
        "queue hop 5 ms",
    ):
        assert part in page


def test_the_list_of_runs_has_all_of_them_newest_first(
    results: Results, report: dict[str, Any], tmp_path: Path
) -> None:
    saving.save(report, results, "v2", tmp_path)
    saving.save(report, results, "v1", tmp_path)
    saving.save(report, results, "v1", tmp_path)

    assert re.findall(r"\| \[(\w+)\]", (tmp_path / "README.md").read_text()) == ["v2", "v1"]


def test_a_run_without_a_name_is_called_by_date_and_commit() -> None:
    assert saving.default_name({"date": "2026-01-02T03:04:05+00:00", "commit": "abc1234+"}) == "2026-01-02-abc1234"


def test_where_figures_come_from_is_told() -> None:
    about = machine.about()

    assert about["machine"]["cores"] >= 1
    assert about["machine"]["cpu"]
    assert {"mlx", "mlx-lm", "celery"} <= set(about["versions"])


def asked(*argv: str) -> cli.Question:
    return cli.question(cli.arguments(argv))


def test_contenders_take_turns_within_each_scenario_and_round() -> None:
    found = list(turns(asked("--rounds", "2", "--who", OWN, PEER, "--scenario", "closed", "open"), lambda _: None))

    assert [(t.scenarios[0].name, t.model.name, t.round, t.contender.name) for t in found[:6]] == [
        ("closed", goals.SMOLLM2, 0, OWN),
        ("closed", goals.SMOLLM2, 0, PEER),
        ("closed", goals.SMOLLM2, 1, OWN),
        ("closed", goals.SMOLLM2, 1, PEER),
        ("open", goals.SMOLLM2, 0, OWN),
        ("open", goals.SMOLLM2, 0, PEER),
    ]


def test_who_is_not_there_is_left_out_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_VLM_PYTHON", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    results = Results()

    assert not list(turns(asked("--who", "mlx_vlm.server"), results.leave_out))
    lines = [line for line in tables.absences(results) if "mlx_vlm.server" in line]
    assert len(lines) == 1
    assert "MLX_VLM_PYTHON" in lines[0]


def test_images_are_asked_of_those_who_see(tmp_path: Path) -> None:
    results = Results()
    question = asked("--scenario", "images", "--vision-model", str(tmp_path), "--who", OWN, PEER)

    assert {turn.contender.name for turn in turns(question, results.leave_out)} == {OWN}
    assert f"left out: {PEER}, images, {tmp_path.name}: it serves text only" in tables.absences(results)


def test_one_client_is_the_scenario_of_its_own() -> None:
    question = asked("--model", "some/model", "--clients", "1", "8", "--tokens", "7")
    (sizes,) = question.models.values()

    assert (sizes.clients, sizes.tokens) == ((8,), 7)
    assert "single" in question.scenarios
    assert "single" not in asked("--clients", "8").scenarios
    assert set(asked().scenarios) == set(SCENARIOS)
