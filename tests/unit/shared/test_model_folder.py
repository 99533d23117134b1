"""Folders that are no models, or mean harm: told in one line, and nothing of them is run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.models import folder as model_folder
from shared.models.facts import told_context, weights_bytes
from shared.models.folder import ModelError, check_folder, model_kind
from tests.support.small_models import make_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_folder(tmp_path / "model")
    check_folder(made)
    return made


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("model.safetensors", safetensors({"w": {"data_offsets": [0, 8]}}, bytes(4)), "has 43 of 47 bytes"),
        ("model.safetensors", safetensors({"w": {"data_offsets": [8, 4]}}), "nowhere"),
        ("model.safetensors", safetensors({"w": {"data_offsets": [-8, 4]}}), "nowhere"),
        ("model.safetensors", safetensors({"w": {"data_offsets": "ab"}}), "nowhere"),
        ("model.safetensors", safetensors({"w": 7}), "nowhere"),
        ("model.safetensors", safetensors([1]), "not a JSON object"),
        ("model.safetensors", safetensors(b"\xff" * 9), "not valid JSON"),
        ("model.safetensors", safetensors(b"[" * 100_000), "not valid JSON"),
        ("model.safetensors", safetensors({}, length=2**63), "not a whole"),
        ("model.safetensors", b"", "not a whole"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "../../etc/passwd"}}), "outside of its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "/etc/passwd"}}), "outside of its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "a\\..\\b"}}), "outside of its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": 7}}), "outside of its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "other.safetensors"}}), "lacks"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "model.bin"}}), "no safetensors file"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "m" * 300 + ".safetensors"}}), "no safetens"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "a\nb.safetensors"}}), "no safetensors file"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "\ud800.safetensors"}}), "no safet"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": None}}), "outside of its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": []}}), "outside of its"),
        ("model.safetensors", safetensors({n: {"data_offsets": [0, 8]} for n in "ab"}, bytes(8)), "overlap"),
        ("model-00001-of-00002.safetensors", safetensors({}), "lacks the weight file model-00002-of-00002.safetensors"),
        ("model-more.safetensors", safetensors({"w": {"data_offsets": [0, 8]}}), "has 39 of 47 bytes"),
        ("config.json", json.dumps({"model_type": "llama", "model_file": "evil.py"}), "its own code"),
        ("config.json", json.dumps({"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}}), "preprocessor_config"),
        ("config.json", json.dumps({"model_type": "llama", "model_file": "a\nb"}), "its own code"),
        ("config.json", json.dumps({"model_type": ["llama"]}), "names no model_type"),
        ("config.json", "{", "not valid JSON"),
    ],
)  # fmt: skip
def test_what_is_refused_is_told_in_a_line(folder: Path, file: str, content: str | bytes, told: str) -> None:
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=told) as refused:
        check_folder(folder)
    assert "\n" not in str(refused.value)


def test_a_configuration_is_not_read_however_large_it_is(folder: Path) -> None:
    os.truncate(folder / "config.json", model_folder.MOST_JSON + 1)  # takes no space, but would in memory
    assert model_kind(folder) == "text"
    with pytest.raises(ModelError, match="is larger than a file of its kind is: refused"):
        check_folder(folder)


def test_weights_that_a_library_would_read_beside_those_of_the_index_are_checked_too(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "model.safetensors"}}))
    check_folder(folder)
    (folder / "model-2.safetensors").write_bytes(b"x")  # mlx-lm reads model*.safetensors
    with pytest.raises(ModelError, match=r"model-2\.safetensors is not a whole"):
        check_folder(folder)


def test_of_a_vision_model_without_an_index_all_weights_are_checked(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}}))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "tower.safetensors").write_bytes(b"x")  # mlx-vlm reads *.safetensors
    with pytest.raises(ModelError, match=r"tower\.safetensors is not a whole"):
        check_folder(folder)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [65536] * 4, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "code", "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},  # of another shape than the model's
    ],
)
def test_weights_that_lie_about_their_shapes_are_refused_when_they_are_loaded(
    tensor: dict[str, Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    from worker.models.load import load_model

    folder = tmp_path / "liar"
    shutil.copytree(tiny_model_path, folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    (folder / "model-liar.safetensors").write_bytes(safetensors({name: tensor}, bytes(8)))
    check_folder(folder)  # it has the bytes that it tells
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_whatever_a_header_or_a_config_says_it_is_one_error_or_none(folder: Path, content: Any) -> None:
    for file, bytes_ in (
        ("model.safetensors", safetensors({"w": content})),
        ("model.safetensors", safetensors({"w": {"data_offsets": content}})),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": content}}).encode()),
        ("config.json", json.dumps(content).encode()),
        ("config.json", json.dumps({"model_type": "llama", "vision_config": content}).encode()),
    ):
        before = (folder / file).read_bytes() if (folder / file).exists() else None
        (folder / file).write_bytes(bytes_)
        with contextlib.suppress(ModelError):
            check_folder(folder)
        assert weights_bytes(folder, "float16", 4) is not None
        assert told_context(folder) is None
        (folder / file).unlink()
        if before is not None:
            (folder / file).write_bytes(before)


def poisoned(source: Path, target: Path, marker: Path, **more: object) -> Path:
    """A model with code beside it, wherever a library might look for some."""
    shutil.copytree(source, target)
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "processing_evil", "__init__"):
        (target / f"{name}.py").write_text(code)
    auto = {
        "AutoConfig": "configuration_evil.C",
        "AutoModelForCausalLM": "modeling_evil.M",
        "AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"],
        "AutoProcessor": "processing_evil.P",
        "AutoImageProcessor": "processing_evil.P",
        "AutoVideoProcessor": "processing_evil.P",
    }
    evil = {"auto_map": auto, "trust_remote_code": True, **more}
    for name in ("config.json", "tokenizer_config.json", *PROCESSORS):
        said = json.loads((target / name).read_text()) if (target / name).exists() else {}
        (target / name).write_text(json.dumps(said | evil))
    (target / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    return target


PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
UNKNOWN = dict.fromkeys(("tokenizer_class", "processor_class", "image_processor_type"), "EvilOne")
"""Classes that no library has: then they ask for the code that comes with the model."""


@pytest.mark.parametrize("more", [{}, UNKNOWN], ids=["known", "unknown"])
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_code_that_comes_with_a_model_is_never_run(
    kind: str,
    more: dict[str, object],
    tiny_model_path: Path,
    tiny_vision_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "was-run"
    folder = poisoned(tiny_model_path if kind == "text" else tiny_vision_path, tmp_path / "evil", marker, **more)
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")  # whoever asks is told to run it
    from worker.models.load import load_model
    from worker.runner.vision.load import load_vision_model

    load = load_model if kind == "text" else load_vision_model
    with pytest.raises(ModelError, match=r"holds Python code .*: refused"):
        load(folder)
    monkeypatch.setattr(model_folder, "CODE", ())  # and if it were not refused
    refused = kind == "text" and bool(more)  # mlx-vlm takes the tokenizer of the model's family, whatever is said
    with pytest.raises(ModelError) if refused else contextlib.nullcontext():
        load(folder)
    assert not marker.exists()
    assert not asked
