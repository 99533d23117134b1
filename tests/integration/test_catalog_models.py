"""A model is loaded with the type, quantisation and adapter of its catalog entry."""

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
from shared.models.facts import declared_context, weights_bytes
from shared.models.folder import ModelError
from shared.settings import Settings
from tests.support.runner import alone, row, step
from worker.runner.loading import READ_SHARE, load
from worker.runner.model_runner import MLXRunner

pytestmark = pytest.mark.usefixtures("own_data_dir")

PROMPT = tuple(range(200, 240))


def loaded(model: CatalogModel, settings: Settings | None = None) -> tuple[MLXRunner, list[float]]:
    """Return the runner, and the progress after each piece of the loading."""
    settings = settings or Settings(model_path=model.path, prefix_disk_bytes=0)
    pieces, progress = load(settings, model), []
    while True:
        try:
            progress.append(next(pieces))
        except StopIteration as end:
            return end.value, progress


def generate(runner: MLXRunner) -> list[int]:
    """Return the tokens that follow the prompt."""
    return alone(runner, row(1, PROMPT))


@pytest.fixture
def plain(tiny_model_path: Path) -> CatalogModel:
    return CatalogModel("tiny", tiny_model_path, "text")


def test_a_model_loads_in_pieces(plain: CatalogModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.runner.loading.PIECE_BYTES", 2**20)
    runner, progress = loaded(plain)
    assert progress == sorted(progress)
    read = [each for each in progress if each < READ_SHARE + 1e-6]
    assert 0 < read[0] < read[-1] == pytest.approx(READ_SHARE)
    assert len(progress) > len(read) + 3, "the warm-up has several pieces"
    assert progress[-1] < 1
    on_disk = sum(file.stat().st_size for file in plain.path.glob("*.safetensors"))
    assert runner.weights_bytes == pytest.approx(on_disk, rel=0.01)


def test_the_image_encoder_is_never_quantised(tiny_vision_path: Path) -> None:
    whole, quantised = (loaded(CatalogModel("seer", tiny_vision_path, "vision", quantize_bits=n))[0] for n in (None, 4))
    assert quantised.weights_bytes < whole.weights_bytes
    assert weights_bytes(tiny_vision_path, None, 4) == pytest.approx(quantised.weights_bytes, rel=0.02)


def test_types_and_quantisation(plain: CatalogModel) -> None:
    whole = loaded(plain)[0]
    half = loaded(CatalogModel("half", plain.path, "text", dtype="float16"))[0]
    quantised = loaded(CatalogModel("quantised", plain.path, "text", quantize_bits=4))[0]
    assert (whole.about["dtype"], half.about["dtype"]) == ("float32", "float16")
    assert half.weights_bytes * 2 == whole.weights_bytes
    assert quantised.about["quantisation_bits"] == 4
    assert quantised.weights_bytes < whole.weights_bytes / 4
    assert len(generate(half)) == len(generate(quantised)) == 12
    for runner, dtype, bits in ((whole, None, None), (half, "float16", None), (quantised, None, 4)):
        assert weights_bytes(plain.path, dtype, bits) == pytest.approx(runner.weights_bytes, rel=0.01)
    assert declared_context(plain.path) == whole.card.context


@pytest.fixture
def adapter(plain: CatalogModel, tmp_path: Path) -> Path:
    """A folder of LoRA weights that change the output."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    parameters = {"rank": 4, "scale": 40.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = load_with_mlx_lm(str(plain.path))[0]
    linear_to_lora_layers(model, 2, parameters)
    weights = {name: array for name, array in tree_flatten(model.parameters()) if "lora" in name}
    mx.random.seed(1)
    weights = {name: mx.random.normal(array.shape) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder


def test_an_adapter_changes_the_output_and_a_broken_one_is_rejected(plain: CatalogModel, adapter: Path) -> None:
    tuned = replace(plain, id="tuned", adapter=adapter)
    assert generate(loaded(tuned)[0]) != generate(loaded(plain)[0])
    (adapter / "adapters.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapters\.safetensors"):
        loaded(tuned)


def test_variants_of_one_folder_share_no_prefixes_on_disk(plain: CatalogModel, adapter: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", model_path=plain.path)
    prompt = tuple(range(200, 500))

    def run(model: CatalogModel) -> tuple[list[int], int]:
        """Return the answer, and the number of prompt tokens that were cached."""
        runner, _ = loaded(model, settings)
        runner.insert([row(1, prompt, owner="me")])
        tokens, cached = [], 0
        while len(tokens) < 12:
            output = step(runner)
            tokens += [each.token for each in output.tokens]
            cached += output.prefilled.get(1, 0)
        runner.remove([1])
        runner.close()
        return tokens, cached

    first = run(plain)[0]
    assert run(plain) == (first, 256), "its own two blocks are reused"
    for other in ({"adapter": adapter}, {"dtype": "float16"}, {"quantize_bits": 4}):
        model = replace(plain, id="other", **other)  # type: ignore[arg-type]
        assert run(model)[1] == 0
        assert run(model)[1] == 256


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_memory_is_wired_only_if_configured(
    kind: str, plain: CatalogModel, tiny_vision_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired: list[object] = []
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    information = mx.device_info() | {"max_recommended_working_set_size": 2**33}
    monkeypatch.setattr(mx, "device_info", lambda *_: information)
    model = plain if kind == "text" else CatalogModel("eyes", tiny_vision_path, "vision")
    for wired_limit in (False, True):
        generate(loaded(model, Settings(model_path=model.path, prefix_disk_bytes=0, wired_limit=wired_limit))[0])
        assert wired == ([2**33] if wired_limit else [])
