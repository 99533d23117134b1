"""Two checkouts in turns: the order, the ratios, and a turn that fails."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from shared.settings import ROOT
from tests.bench import cli
from tests.bench.checkouts import Checkout
from tests.bench.comparison import BEFORE, NOW, compare, table
from tests.bench.processes import NotUp


def shown(results: dict[str, object]) -> str:
    out = io.StringIO()
    Console(width=160, file=out).print(table(results))
    return out.getvalue()


def test_checkouts_take_turns_and_ratios_are_within_a_round(tmp_path: Path) -> None:
    order: list[Path] = []
    values = iter([100.0, 110.0, 200.0, 180.0, 50.0, 60.0])

    def speed(checkout: Checkout, models: Path) -> Iterator[tuple[str, float]]:
        order.append(checkout.root)
        yield "speed", next(values)

    results = compare(tmp_path, 3, tmp_path, {"speed": speed}, say=lambda _: None)

    assert order == [tmp_path, ROOT] * 3
    assert results["figures"]["speed"] == {BEFORE: {0: 100, 1: 200, 2: 50}, NOW: {0: 110, 1: 180, 2: 60}}
    (row,) = (line for line in shown(results).splitlines() if "speed" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "speed",
        "100.00",
        "110.00",
        "1.10",
        "0.90 to 1.20",
    ]


def test_a_turn_that_fails_is_reported_and_the_others_count(tmp_path: Path) -> None:
    def speed(checkout: Checkout, models: Path) -> Iterator[tuple[str, float]]:
        yield "first", 1.0
        if checkout.root == tmp_path:
            raise NotUp("it did not come up", "a line\nthe last line")
        yield "second", 2.0

    results = compare(tmp_path, 1, tmp_path, {"speed": speed}, say=lambda _: None)

    assert results["failed"] == ["round 1, speed, before: the last line"]
    assert results["figures"]["second"] == {BEFORE: {}, NOW: {0: 2.0}}
    assert "FAILED: round 1, speed, before: the last line" in shown(results)


def test_a_comparison_needs_another_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.arguments(["--only", "comparison"])
    assert "needs --before" in capsys.readouterr().err


def test_a_run_without_another_checkout_has_no_part_that_compares(tmp_path: Path) -> None:
    without = [name for name, _ in cli.due_parts(cli.arguments([]))]
    with_another = [name for name, _ in cli.due_parts(cli.arguments(["--before", str(tmp_path)]))]
    assert "comparison" not in without
    assert set(with_another) - set(without) == {"comparison"}
