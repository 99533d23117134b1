"""What a catalog says of a model's weights holds when it is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load as load_with_mlx_lm
from mlx_lm.tuner.utils import linear_to_lora_layers

from shared.models.catalog import CatalogModel
from shared.models.facts import told_context, weights_bytes
from shared.models.folder import ModelError
from shared.settings import Settings
from tests.support.runner import alone, row, step
from worker.runner.loading import READ_SHARE, load
from worker.runner.model_runner import MLXRunner

PROMPT = tuple(range(200, 240))


def loaded(model: CatalogModel, settings: Settings | None = None) -> tuple[MLXRunner, list[float]]:
    """The runner, and how far its loading was from piece to piece."""
    settings = settings or Settings(model_path=model.path, prefix_disk_bytes=0)
    pieces, seen = load(settings, model), []
    while True:
        try:
            seen.append(next(pieces))
        except StopIteration as end:
            return end.value, seen


def says(runner: MLXRunner) -> list[int]:
    return alone(runner, row(1, PROMPT))


@pytest.fixture
def plain(tiny_model_path: Path) -> CatalogModel:
    return CatalogModel("tiny", tiny_model_path, "text")


def test_it_loads_in_pieces(plain: CatalogModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.runner.loading.PIECE_BYTES", 2**20)
    runner, seen = loaded(plain)
    assert seen == sorted(seen)
    read = [far for far in seen if far < READ_SHARE + 1e-6]
    assert 0 < read[0] < read[-1] == pytest.approx(READ_SHARE)
    assert len(seen) > len(read) + 3, "so it is warmed up"
    assert seen[-1] < 1
    on_disk = sum(file.stat().st_size for file in plain.path.glob("*.safetensors"))
    assert runner.weights_bytes == pytest.approx(on_disk, rel=0.01)


def test_what_encodes_images_is_never_packed(tiny_vision_path: Path) -> None:
    whole, packed = (loaded(CatalogModel("seer", tiny_vision_path, "vision", quantize_bits=n))[0] for n in (None, 4))
    assert packed.weights_bytes < whole.weights_bytes
    assert weights_bytes(tiny_vision_path, None, 4) == pytest.approx(packed.weights_bytes, rel=0.02)


def test_types_and_packing(plain: CatalogModel) -> None:
    whole = loaded(plain)[0]
    half = loaded(CatalogModel("half", plain.path, "text", dtype="float16"))[0]
    packed = loaded(CatalogModel("packed", plain.path, "text", quantize_bits=4))[0]
    assert (whole.about["dtype"], half.about["dtype"]) == ("float32", "float16")
    assert half.weights_bytes * 2 == whole.weights_bytes
    assert packed.about["quantisation_bits"] == 4
    assert packed.weights_bytes < whole.weights_bytes / 4
    assert len(says(half)) == len(says(packed)) == 12
    for runner, dtype, bits in ((whole, None, None), (half, "float16", None), (packed, None, 4)):
        assert weights_bytes(plain.path, dtype, bits) == pytest.approx(runner.weights_bytes, rel=0.01)
    assert told_context(plain.path) == whole.card.context


@pytest.fixture
def adapter(plain: CatalogModel, tmp_path: Path) -> Path:
    """A folder of LoRA weights that change everything."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    parameters = {"rank": 4, "scale": 40.0, "dropout": 0.0}
    said = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    model = load_with_mlx_lm(str(plain.path))[0]
    linear_to_lora_layers(model, 2, parameters)
    weights = {name: array for name, array in tree_flatten(model.parameters()) if "lora" in name}
    mx.random.seed(1)
    weights = {name: mx.random.normal(array.shape) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder


def test_an_adapter_changes_what_it_says_and_a_broken_one_is_refused(plain: CatalogModel, adapter: Path) -> None:
    tuned = replace(plain, id="tuned", adapter=adapter)
    assert says(loaded(tuned)[0]) != says(loaded(plain)[0])
    (adapter / "adapters.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapters\.safetensors"):
        loaded(tuned)


def test_models_of_one_folder_find_no_prefixes_of_each_other_on_disk(
    plain: CatalogModel, adapter: Path, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data", model_path=plain.path)
    prompt = tuple(range(200, 500))

    def said(model: CatalogModel) -> tuple[list[int], int]:
        """Its answer, and how many tokens of the prompt it knew."""
        runner, _ = loaded(model, settings)
        runner.insert([row(1, prompt, owner="me")])
        tokens, known = [], 0
        while len(tokens) < 12:
            output = step(runner)
            tokens += [each.token for each in output.tokens]
            known += output.prefilled.get(1, 0)
        runner.remove([1])
        runner.close()
        return tokens, known

    first = said(plain)[0]
    assert said(plain) == (first, 256), "its own it finds, two blocks"
    for other in ({"adapter": adapter}, {"dtype": "float16"}, {"quantize_bits": 4}):
        model = replace(plain, id="other", **other)  # type: ignore[arg-type]
        assert said(model)[1] == 0
        assert said(model)[1] == 256


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_memory_is_wired_only_where_it_is_asked_for(
    kind: str, plain: CatalogModel, tiny_vision_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired: list[object] = []
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    information = mx.device_info() | {"max_recommended_working_set_size": 2**33}
    monkeypatch.setattr(mx, "device_info", lambda *_: information)
    model = plain if kind == "text" else CatalogModel("eyes", tiny_vision_path, "vision")
    for wish in (False, True):
        says(loaded(model, Settings(model_path=model.path, prefix_disk_bytes=0, wired_limit=wish))[0])
        assert wired == ([2**33] if wish else [])
