"""The pictures of a run: speed beside mlx_lm.server's by clients, and time to the first token by load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.bench.contenders import PEER
from tests.bench.results import Place, Results
from tests.bench.samples import Figures
from tests.bench.svg import Chart, document


def picture(results: Results) -> str:
    """A row of charts a model, as far as they were measured."""
    medians = results.medians()
    models = dict.fromkeys(place.model for place in medians)
    return document([chart for model in models for chart in _charts(model, medians) if chart.series], columns=3)


def _charts(model: str, medians: Mapping[Place, Figures]) -> Iterator[Chart]:
    of_model = {place: figures for place, figures in medians.items() if place.model == model}
    yield Chart(f"{model}: speed by clients", "clients", f"tokens/s, {PEER} = 1", _ratios(of_model))
    for name, figure in (("p50", "ttft_p50_s"), ("p99", "ttft_p99_s")):
        yield Chart(
            f"{model}: TTFT {name} by load",
            "% of its own capacity",
            "seconds (log)",
            _loads(of_model, figure),
            log=True,
        )


def _ratios(medians: Mapping[Place, Figures]) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for place, figures in medians.items():
        peer = medians.get(Place(place.scenario, place.model, place.case, PEER))
        if place.scenario in ("single", "closed") and peer and peer["tokens_per_s"]:
            point = figures["clients"], figures["tokens_per_s"] / peer["tokens_per_s"]
            series.setdefault(place.who, []).append(point)
    return {who: sorted(points) for who, points in series.items()}


def _loads(medians: Mapping[Place, Figures], figure: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for place, figures in medians.items():
        if place.scenario == "open" and "load" in figures:
            series.setdefault(place.who, []).append((round(figures["load"] * 100), figures[figure]))
    return {who: sorted(points) for who, points in series.items()}
