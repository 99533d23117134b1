"""aiperf measures the service: every request of a load succeeds, and its figures are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.model_files import default_model
from shared.settings import ROOT
from tests.support.clients import environment, executable, run, scripted_stack

pytestmark = pytest.mark.clients

REQUESTS = 24
TOKENIZER = ROOT / "models" / default_model.NAME
"""Its files, to generate prompts. The figures use the service's own counts of tokens."""


def test_a_load_of_streams(tmp_path: Path) -> None:
    program = executable("aiperf/bin/aiperf")
    with scripted_stack([{"text": "one two three four five six seven eight"}]) as stack:
        stack.start_worker()
        variables = environment(tmp_path / "home", stack)
        options = {
            "model": stack.model,
            "url": stack.url,
            "api-key": stack.key,
            "tokenizer": TOKENIZER,
            "endpoint-type": "chat",
            "concurrency": 4,
            "request-count": REQUESTS,
            "warmup-request-count": 2,
            "synthetic-input-tokens-mean": 50,
            "output-artifact-dir": tmp_path / "artifacts",
            "ui": "none",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        command = [program, "profile", "--streaming", "--use-server-token-count", *arguments]
        run(command, tmp_path, variables, within_s=300)
    figures = json.loads((tmp_path / "artifacts/profile_export_aiperf.json").read_text())
    assert figures["request_count"]["avg"] == REQUESTS
    assert figures["time_to_first_token"]["avg"] > 0
    assert not figures.get("error_summary")
