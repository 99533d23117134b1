"""Target values of figures, and whether a run reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.bench.contenders import BARE, OWN, PEER
from tests.bench.results import Place, Results
from tests.bench.samples import Figures

SMOLLM2: Final = "SmolLM2-135M-Instruct"
TINY: Final = "tiny-random-llama"
VISION: Final = "tiny-random-qwen2.5-vl"
MORE_VISION: Final = ("tiny-random-qwen3-vl", "tiny-random-gemma3-vision")
"""Measured with `--vision-model`; scripts/make_tiny_model creates them."""
VLM_PEER: Final = "mlx_vlm.server"
QWEN: Final = "random-qwen2.5-7b"
"""Measured where there is an NVIDIA GPU, with `--model`."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A target value.

    Attributes:
        case: scenario, model and case.
        value: computes the figure from ours and those of `peer`.
        at_most: whether the target is a maximum.
        peer: the contender that ours is compared with.
    """

    text: str
    case: tuple[str, str, str]
    value: Callable[[Figures, Figures], float]
    target: float
    at_most: bool = False
    peer: str = OWN

    def measured(self, medians: Mapping[Place, Figures]) -> float | None:
        """The figure; None if the run did not measure it."""
        own, other = (medians.get(Place(*self.case, who)) for who in (OWN, self.peer))
        return None if own is None or other is None else self.value(own, other)

    def reached(self, value: float) -> bool:
        """Whether a value reaches the target."""
        return value <= self.target if self.at_most else value >= self.target


def _speed(own: Figures, other: Figures) -> float:
    return own["tokens_per_s"] / other["tokens_per_s"]


def _later_ms(own: Figures, other: Figures) -> float:
    return (own["ttft_p50_s"] - other["ttft_p50_s"]) * 1000


def _per_model(model: str) -> Iterator[Goal]:
    one = ("single", model, "1 client")
    yield Goal(f"{model}, one client: TTFT minus {PEER}'s, ms", one, _later_ms, 15, at_most=True, peer=PEER)
    yield Goal(f"{model}, one client: tokens/s ÷ {PEER}'s", one, _speed, 0.95, peer=PEER)
    over = ("open", model, "120% of capacity")
    yield Goal(f"{model}, 120 % of capacity: requests lost", over, lambda own, _: own["failed"], 0, at_most=True)
    yield Goal(
        f"{model}, 120 % of capacity: interactive TTFT p99 ÷ median of the batch class",
        over,
        lambda own, _: own["ttft_p99_s"] / max(own["batch_ttft_p50_s"], 1e-9),
        1,
        at_most=True,
    )
    rows = ("mixed", model, "8 rows, 4000 tokens")
    yield Goal(
        f"{model}, 4,000-token prompts while rows decode: ITL p99 ÷ quiet median",
        rows,
        lambda own, _: own["disturbance"],
        3,
        at_most=True,
    )
    for case, target in (("2000 tokens", 0.1), ("after a restart", 1 / 3)):
        yield Goal(
            f"{model}, shared prefix, {case}: TTFT ÷ the first request's",
            ("prefix", model, case),
            lambda own, _: own["second_ttft_s"] / own["first_ttft_s"],
            target,
            at_most=True,
        )


GOALS: Final = (
    Goal(f"{SMOLLM2}, 32 clients: tokens/s ÷ {PEER}'s", ("closed", SMOLLM2, "32 clients"), _speed, 1.15, peer=PEER),
    Goal(f"{SMOLLM2}, 32 clients: tokens/s ÷ {BARE}'s", ("closed", SMOLLM2, "32 clients"), _speed, 1.0, peer=BARE),
    Goal(f"{TINY}, 64 clients: tokens/s ÷ {PEER}'s", ("closed", TINY, "64 clients"), _speed, 3.0, peer=PEER),
    Goal(f"{QWEN}, 64 clients: tokens/s", ("closed", QWEN, "64 clients"), lambda own, _: own["tokens_per_s"], 372),
    *(
        Goal(
            f"{model}, 16 clients with an image each: tokens/s ÷ {VLM_PEER}'s",
            ("images", model, "16 clients"),
            _speed,
            1.3,
            peer=VLM_PEER,
        )
        for model in (VISION, *MORE_VISION)
    ),
    Goal(
        f"{VISION}, 16 clients with an image each: TTFT p50 ÷ {VLM_PEER}'s",
        ("images", VISION, "16 clients"),
        lambda own, other: own["ttft_p50_s"] / other["ttft_p50_s"],
        1.0,
        at_most=True,
        peer=VLM_PEER,
    ),
    Goal(
        f"{VISION}, the same images again: images encoded",
        ("images", VISION, "16 clients, the same images again"),
        lambda own, _: own["images_encoded"],
        0,
        at_most=True,
    ),
    *_per_model(SMOLLM2),
    *_per_model(TINY),
)


def verdicts(results: Results) -> list[dict[str, Any]]:
    """Each goal that the run has measured, with the measured value."""
    medians = results.medians()
    return [
        {
            "goal": goal.text,
            "wanted": f"{'≤' if goal.at_most else '≥'} {goal.target:.3g}",
            "found": found,
            "reached": goal.reached(found),
        }
        for goal in GOALS
        if (found := goal.measured(medians)) is not None
    ]


def lines(results: Results) -> list[str]:
    """The same for the terminal."""
    return [
        f"{'reached' if each['reached'] else 'MISSED '}  {each['found']:8.3g} (target {each['wanted']})  {each['goal']}"
        for each in verdicts(results)
    ]
