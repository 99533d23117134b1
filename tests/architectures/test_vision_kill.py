"""A job with images continues after its worker is killed. Tests the families of vision models that a worker can load.

`tests/integration/test_vision_stack.py` tests one family and runs by default.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm")

from shared.jobs.log import EventKind
from shared.jobs.record import Status
from tests.architectures.vision_models import VISION_MODELS, build
from tests.architectures.vision_models_tiled import STAND_INS
from tests.plugins.stack import Stack, made_stack
from tests.support.architecture_configs import VOCABULARY
from tests.support.image_files import data_url, picture

pytestmark = pytest.mark.long

END = VOCABULARY + 1
"""The token that ends an answer."""


@pytest.fixture(params=[name for name in VISION_MODELS if name not in STAND_INS])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    """Only the API, for a family's tiny model."""
    for stack in made_stack(build(request.param, tmp_path / request.param), {"LEASE_S": "1"}):
        stack.start_web()
        yield stack


def test_a_stream_of_any_vision_family_continues_after_its_worker_was_killed(stack: Stack) -> None:
    worker = stack.start_worker()
    images = [{"type": "image_url", "image_url": {"url": data_url(picture(200, 150, seed=n))}} for n in range(2)]
    content = [*images, {"type": "text", "text": "Tell me everything."}]
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 400,
        "temperature": 0.9,
        "seed": 5,
    }
    body["logit_bias"] = {str(END): -100}  # random models end an answer at any time
    with stack.client() as client:
        expected = client.job(client.submit(body, wait_s=60).id, wait_s=60)
        job = client.submit(body)
        texts, resumed = [], False
        for number, event in enumerate(client.events(job.id)):
            if event.kind is EventKind.CHUNK:
                texts.append(json.loads(event.data)["text"])
            resumed |= event.kind is EventKind.RESUMED
            if number == 10:
                worker.send_signal(signal.SIGKILL)
                worker.wait(10)
                stack.start_worker()
        assert client.job(job.id).status is expected.status is Status.SUCCEEDED
    assert resumed
    assert "".join(texts) == expected.text
