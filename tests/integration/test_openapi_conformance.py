"""The API behaves as its OpenAPI document says, for valid and invalid requests that Schemathesis generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.web_stack import StubWorker, running_web
from web.access.api_keys import SCOPES

NO_LIMIT = "1000000/minute"
CONFIG = """
[generation]
allow-extra-parameters = false  # HTTP allows any header
with-security-parameters = false  # the key that each request has is enough, whatever its other headers are

[checks.positive_data_acceptance]
# 422: some rules, such as "at least one message has text", are beyond JSON Schema.
# 406, 503: a valid request for a format that a stream does not have, or for a worker when none is running.
# 504: the deadline of a job can be shorter than its execution.
# 410: the request of a job that has ended is usually no longer stored.
expected-statuses = ["2xx", "3xx", 404, 406, 409, 410, 422, 429, 503, 504]

[checks.negative_data_rejection]
# 413: what is wrong with a body does not matter if it is too large.
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 429]

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504, 529]

# The statuses of OpenAI and Anthropic are 400 instead of 422; Anthropic's is 529 instead of 503.
[[operations]]
include-path-regex = "^/v1/(messages|chat/completions|completions|responses|embeddings|rerank)"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 409, 429, 503, 504, 529]

# Which URLs and which periods are refused is beyond JSON Schema.
[[operations]]
include-path-regex = "^/v1/(webhooks|usage)"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 409, 429, 503]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phases", "examples"), [("fuzzing", 5), pytest.param("coverage,fuzzing", 30, marks=pytest.mark.long)]
)
def test_responses_conform_to_the_document(tmp_path: Path, phases: str, examples: int) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    with running_web(RATE_LIMIT=NO_LIMIT, READ_RATE_LIMIT=NO_LIMIT, MAX_WAIT_S="0.2") as web:
        worker = StubWorker(web.redis_url)
        worker.start()
        try:
            result = subprocess.run(
                [
                    Path(sys.executable).with_name("schemathesis"), "run", f"{web.url}/openapi.json",
                    "--header", f"X-API-Key: {web.keys.create('schemathesis', SCOPES, NO_LIMIT)}",
                    "--checks", "all", "--phases", phases, "--max-examples", str(examples),
                    "--seed", "1", "--request-timeout", "30", "--generation-database", "none", "--no-color",
                ],
                cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False,
            )  # fmt: skip
        finally:
            worker.stop()
        assert result.returncode == 0, result.stdout + result.stderr
        assert '"level": "ERROR"' not in web.log.read_text()
