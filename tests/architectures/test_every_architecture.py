"""All checks, by default for one or two architectures of each kind, and with `-m long` for all that can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

from tests.architectures.batches import RESTRICTED
from tests.architectures.checks import CHECKS
from tests.architectures.folders import Unsupported
from tests.support.architectures import names

FAST = (
    *("llama", "qwen3_moe", "deepseek_v3"),  # attention to all tokens: plain, with experts, with latent keys
    *("gemma3_text", "gpt_oss"),  # sliding windows
    *("qwen3_5", "falcon_h1", "mamba2", "lfm2"),  # recurrent state, with and without attention
    "deepseek_v32",  # several caches per layer
    *("mamba", "gemma2"),  # rows that do not share all passes
)
_ALWAYS = [name for name, check in CHECKS.items() if check.always]


@pytest.mark.parametrize("check", _ALWAYS)
@pytest.mark.parametrize("name", FAST)
def test_architecture(name: str, check: str, tmp_path: Path) -> None:
    run(name, check, tmp_path)


@pytest.mark.parametrize("name", [name for name in RESTRICTED if name not in FAST])
def test_an_architecture_with_restrictions(name: str, tmp_path: Path) -> None:
    run(name, "batched", tmp_path)


def test_an_adapter_of_a_multimodal_model_applies_to_its_text(tmp_path: Path) -> None:
    run("kimi_vl", "adapter", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", names())
def test_any_architecture(name: str, check: str, tmp_path: Path) -> None:
    run(name, check, tmp_path)


def run(name: str, check: str, folder: Path) -> None:
    try:
        CHECKS[check].run(name, folder)
    except Unsupported as error:
        pytest.skip(str(error))
