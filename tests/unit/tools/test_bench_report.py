"""The output of the bench: medians, the table, the goals, the charts, the saved pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from scripts.model_files.shapes import QWEN2_5_7B
from shared.settings import ROOT
from tests.bench import cli, goals, machine, saving, tables
from tests.bench.charts import charts, draw, svg
from tests.bench.contenders import CONTENDERS, OWN, PEER
from tests.bench.results import Absence, Place, Record, Results
from tests.bench.samples import Figures, Sample, figures
from tests.bench.scenarios import images
from tests.bench.scenarios.closed_loop import case_name
from tests.bench.scenarios.registry import SCENARIOS
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
    found.add_absence(Absence("images", "", "", "there is no image"))
    found.add_absence(Absence("images", "", "", "there is no image"))
    found.add_absence(Absence("mixed", goals.TINY, PEER, "it failed", fault=True))
    return found


@pytest.fixture
def report(results: Results) -> dict[str, Any]:
    return {**machine.about(), "command": "scripts/bench", "lines": ["queue hop 5 ms"], **results.to_json()}


def test_medians_are_over_rounds(results: Results) -> None:
    assert results.medians()[Place("closed", goals.TINY, "64 clients", OWN)]["tokens_per_s"] == 2900.0


def test_results_pass_through_json(results: Results) -> None:
    data = json.loads(json.dumps(results.to_json()))

    assert Results.from_json(data) == results
    assert {"scenario", "model", "case", "who", "round", "figures"} == set(data["records"][0])


def test_the_table_has_a_row_per_case_and_contender_with_the_ratio_to_the_peer(results: Results) -> None:
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


def test_an_absence_is_reported_once_with_its_reason(results: Results) -> None:
    assert tables.absences(results) == [
        "not measured: images: there is no image",
        f"FAILED: {PEER}, mixed, tiny-random-llama: it failed",
    ]


def test_goals_that_were_not_measured_are_not_reported(results: Results) -> None:
    found = {each["goal"]: each for each in goals.verdicts(results)}

    assert not found["tiny-random-llama, 64 clients: tokens/s ÷ mlx_lm.server's"]["reached"]  # 2.9 of 3
    assert found["tiny-random-llama, 120 % of capacity: requests lost"]["reached"]
    assert not any(goals.SMOLLM2 in goal for goal in found)


def test_every_goal_is_of_a_case_of_a_full_run() -> None:
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
        measured = (cli.SMOLLM2.name, cli.TINY.name, cli.VISION.name, QWEN2_5_7B.folder, *goals.MORE_VISION)
        assert model in measured
        assert goal.peer in CONTENDERS


def test_charts_have_the_medians_of_every_contender(results: Results) -> None:
    speed, p50, p99 = charts(results)

    assert (speed.x_label, speed.y_label) == ("clients", "tokens/s ÷ mlx_lm.server's")
    assert speed.series == {OWN: [(8, 0.5), (64, 2.9)], PEER: [(8, 1.0), (64, 1.0)]}
    assert (p50.x_label, p50.y_label) == ("load, % of own capacity", "TTFT, seconds")
    assert p50.series == p99.series == {OWN: [(50, 0.25), (120, 0.25)], PEER: [(50, 0.25), (120, 0.25)]}


def test_new_and_repeated_images_have_a_chart_each() -> None:
    cases = {"1 client": 5.0, f"1 client, {images.AGAIN}": 7.0}
    found = charts(Results([record(case, OWN, speed, scenario="images", clients=1) for case, speed in cases.items()]))

    assert [chart.series for chart in found] == [{OWN: [(1, 5.0)]}, {OWN: [(1, 7.0)]}]


def test_svg_has_a_line_per_contender_labels_and_the_caption(results: Results) -> None:
    root = ElementTree.fromstring(svg(results, "a < b, 2 cores · 2026-01-02"))

    assert root.tag == f"{SVG}svg"
    ids = {group.get("id") for group in root.iter(f"{SVG}g")}
    assert {
        f"tiny-random-llama: {title}: {who}"
        for title in ("speed", "time to first token, p50", "time to first token, p99")
        for who in (OWN, PEER)
    } <= ids
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {OWN, PEER, "clients", "TTFT, seconds", "load, % of own capacity", "a < b, 2 cores · 2026-01-02"} <= texts


def test_the_same_results_give_the_same_svg(results: Results) -> None:
    assert svg(results, "caption") == svg(results, "caption")


def test_lines_of_charts_with_shared_axes_are_not_cut_off() -> None:
    cases = {"1 client": 5.0, f"1 client, {images.AGAIN}": 7000.0}
    found = charts(Results([record(case, OWN, speed, scenario="images", clients=1) for case, speed in cases.items()]))
    for axes in draw(found, "caption").axes:
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 7000


def test_every_chart_of_a_model_is_drawn(results: Results) -> None:
    for case in ("1 client", f"1 client, {images.AGAIN}"):
        results.records.append(record(case, OWN, 5.0, scenario="images", clients=1))
    found = charts(results)
    titles = [axes.get_title() for axes in draw(found, "caption").axes]

    assert titles == [f"{goals.TINY}\n{chart.title}" for chart in found]
    assert len(titles) == 5


def test_results_without_anything_to_draw_have_no_charts(report: dict[str, Any], tmp_path: Path) -> None:
    folder = saving.save(report, Results(), "v1", tmp_path)

    assert not (folder / "bench.svg").exists()
    assert "bench.svg" not in (folder / "README.md").read_text()


def test_saved_runs_of_earlier_versions_can_be_read() -> None:
    for path in (ROOT / "docs/bench").glob("*/bench.json"):
        assert charts(Results.from_json(json.loads(path.read_text("utf-8")))), path


def test_a_run_is_saved_with_its_data_charts_and_page(results: Results, report: dict[str, Any], tmp_path: Path) -> None:
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


def test_the_default_name_of_a_run_is_date_and_commit() -> None:
    assert saving.default_name({"date": "2026-01-02T03:04:05+00:00", "commit": "abc1234+"}) == "2026-01-02-abc1234"


def test_a_report_has_the_machine_and_the_versions() -> None:
    about = machine.about()

    assert about["machine"]["cores"] >= 1
    assert about["machine"]["cpu"]
    assert {"mlx", "mlx-lm", "celery"} <= set(about["versions"])


def selected(*argv: str) -> cli.Selection:
    return cli.selection(cli.arguments(argv))


def test_contenders_take_turns_within_each_scenario_and_round() -> None:
    found = list(turns(selected("--rounds", "2", "--who", OWN, PEER, "--scenario", "closed", "open"), lambda _: None))

    assert [(t.scenarios[0].name, t.model.name, t.round, t.contender.name) for t in found[:6]] == [
        ("closed", goals.SMOLLM2, 0, OWN),
        ("closed", goals.SMOLLM2, 0, PEER),
        ("closed", goals.SMOLLM2, 1, OWN),
        ("closed", goals.SMOLLM2, 1, PEER),
        ("open", goals.SMOLLM2, 0, OWN),
        ("open", goals.SMOLLM2, 0, PEER),
    ]


def test_a_missing_library_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_VLM_PYTHON", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    results = Results()

    assert not list(turns(selected("--who", "mlx_vlm.server"), results.add_absence))
    lines = [line for line in tables.absences(results) if "mlx_vlm.server" in line]
    assert len(lines) == 1
    assert "MLX_VLM_PYTHON" in lines[0]


def test_images_are_sent_to_contenders_that_take_them(tmp_path: Path) -> None:
    results = Results()
    selection = selected("--scenario", "images", "--vision-model", str(tmp_path), "--who", OWN, PEER)

    assert {turn.contender.name for turn in turns(selection, results.add_absence)} == {OWN}
    assert f"not measured: {PEER}, images, {tmp_path.name}: it serves text only" in tables.absences(results)


def test_one_client_is_a_scenario_of_its_own() -> None:
    selection = selected("--model", "some/model", "--clients", "1", "8", "--tokens", "7")
    (sizes,) = selection.models.values()

    assert (sizes.clients, sizes.tokens) == ((8,), 7)
    assert "single" in selection.scenarios
    assert "single" not in selected("--clients", "8").scenarios
    assert set(selected().scenarios) == set(SCENARIOS)
