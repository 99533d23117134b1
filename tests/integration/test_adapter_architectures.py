"""Adapters of every architecture, and of a vision model: rows with different adapters get what each gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from shared.models.catalog import CatalogModel
from tests.support import vision_runner
from tests.support.adapters import finished, load_all, loading, write_for
from tests.support.architecture_configs import VOCABULARY
from tests.support.architectures import make, measured, names
from worker.models import text_half
from worker.runner import forward
from worker.runner.adapters.opening import opening
from worker.runner.batching.support import Together
from worker.runner.kv_cache import KVCache

REFUSED = {
    "dbrx": "does not run with adapters",
    "deepseek_v41": "adapters of these experts are not supported",
}
"""Architectures that cannot have adapters for each row, with the reason."""
NO_LORA = ("gemma3n",)
"""mlx-lm's own adapters do not work for them."""
IDS = [[(7 * k + 3 * row + 1) % VOCABULARY for k in range(40)] for row in range(3)]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in names() if name not in NO_LORA])
def test_rows_with_different_adapters_share_passes(name: str, tmp_path: Path) -> None:
    base = make(name)
    base.eval()
    models, folders = [base], {f"a{n}": tmp_path / f"a{n}" for n in range(2)}
    for n, folder in enumerate(folders.values()):
        models.append(make(name))
        write_for(models[-1], folder, seed=n, rank=2 + 3 * n)
    expected = [model(mx.array([ids]))[0] for model, ids in zip(models, IDS, strict=True)]
    mx.eval(expected)
    batching = measured(base)
    slots = finished(opening(base, folders, 64, 2**28, VOCABULARY, batching))
    if name in REFUSED:
        assert all(REFUSED[name] in problem for problem in slots.announced.values())
        return
    assert slots.announced == {"a0": "", "a1": ""}
    placed = load_all(slots, folders)
    order = [0, placed["a0"], placed["a1"]]
    groups = [[0], [1], [2]] if Together.ONE_BY_ONE in (batching.prefill, batching.decode) else [[0, 1, 2]]
    for rows in groups:
        cache, of_rows = KVCache.empty(base, len(rows)), forward.slot_array([order[row] for row in rows])
        logits = forward.fill(base, cache, [IDS[row] for row in rows], slots=of_rows)
        assert logits is not None
        for index, row in enumerate(rows):
            finite = mx.isfinite(expected[row])  # phi3small never chooses certain tokens
            found, right = (mx.where(finite, each, 0) for each in (logits[index], expected[row]))
            deviation = mx.abs(found - right).mean() / mx.std(right)
            assert deviation.item() < 1e-3


@pytest.mark.long
@pytest.mark.usefixtures("own_data_dir")
def test_rows_with_images_have_adapters_of_the_language_model(tiny_vision_path: Path, tmp_path: Path) -> None:
    text, *_ = text_half.load(tiny_vision_path, {}, adapter=None, lazy=False)
    write_for(text, tmp_path / "a", seed=1)
    files = vision_runner.ImageFiles()
    image = files.part(112, 84, seed=3)

    def answers(model: CatalogModel, names: Sequence[str | None]) -> list[list[int]]:
        """The tokens of a row with an image and of one without, for each adapter."""
        runner = finished(loading(model))
        rows = []
        for name in names:
            for images in ([image], []):
                request = replace(vision_runner.ask("What is this?", *images), max_tokens=8, adapter=name)
                prompt_tokens = vision_runner.prompt_of(runner, request, files)
                rows.append(vision_runner.row(prompt_tokens, request, len(rows) + 1))
        tokens, _ = vision_runner.run(runner, rows)
        return [tokens[row.uid] for row in rows]

    plain = CatalogModel("v", tiny_vision_path, "vision")
    together = answers(replace(plain, adapters={"a": tmp_path / "a"}), (None, "a"))
    expected = answers(plain, (None,)) + answers(replace(plain, adapter=tmp_path / "a"), (None,))
    assert together == expected
    assert together[:2] != together[2:]
