"""In a worker, a harmful chat template fails its job and no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.plugins.stack import Stack
from tests.support.tokenizers import HARM
from tests.support.waiting import eventually

HARMFUL = ("endless", "huge", "talkative")
# Harmful only if the last message says so, so that the proof of the tokenizer succeeds.
TEMPLATE = (
    "{% set request = messages[-1].content %}"
    + "".join(f"{{% if request == '{harm}' %}}{HARM[harm]}{{% endif %}}" for harm in HARMFUL)
    + "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_harmful_template_fails_only_its_job(tiny_stack: Stack, tmp_path: Path) -> None:
    folder = tmp_path / tiny_stack.model
    shutil.copytree(tiny_stack.settings.model_path, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)

    def submit(content: str) -> str:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        answer = client.request("POST", "/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ended(job_id: str) -> dict[str, Any]:
        def view() -> dict[str, Any] | None:
            job: dict[str, Any] = client.request("GET", f"/v1/jobs/{job_id}").json()
            return job if job["status"] not in ("queued", "running") else None

        return eventually(view, "the job's end", 60)

    with tiny_stack.client() as client:
        # The API does not know the model yet, so the worker tokenises.
        bad, good = [submit(harm) for harm in HARMFUL], submit("hello")
        # The time limit also covers loading the tokenizer.
        worker = tiny_stack.start_worker(MODEL_PATH=str(folder), TEMPLATE_TIMEOUT_S="5")
        assert ended(good)["status"] == "succeeded"
        for failed in map(ended, bad):
            assert (failed["status"], failed["error"]["code"]) == ("failed", "template_error")
        assert worker.poll() is None
        assert ended(submit("hello again"))["status"] == "succeeded"
