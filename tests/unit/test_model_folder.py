"""Folders that are no models, or mean harm: told in one line, and nothing of them is run."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.model_folder import ModelError, check_folder
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
        ("config.json", json.dumps({"model_type": "llama", "model_file": "evil.py"}), "its own code"),
        ("config.json", json.dumps({"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}}), "preprocessor_config"),
        ("config.json", "{", "not valid JSON"),
    ],
)  # fmt: skip
def test_what_is_refused_is_told_in_a_line(folder: Path, file: str, content: str | bytes, told: str) -> None:
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=told) as refused:
        check_folder(folder)
    assert "\n" not in str(refused.value)


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
        ("config.json", json.dumps(content).encode()),
        ("config.json", json.dumps({"model_type": "llama", "vision_config": content}).encode()),
    ):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(bytes_)
        with contextlib.suppress(ModelError):
            check_folder(folder)
        (folder / file).write_bytes(before)


def poisoned(source: Path, target: Path, marker: Path) -> Path:
    """A model with code beside it, wherever a library might look for some."""
    shutil.copytree(source, target)
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "processing_evil", "__init__"):
        (target / f"{name}.py").write_text(code)
    auto = {
        "AutoConfig": "configuration_evil.C",
        "AutoModelForCausalLM": "modeling_evil.M",
        "AutoTokenizer": [None, "tokenization_evil.T"],
        "AutoProcessor": "processing_evil.P",
        "AutoImageProcessor": "processing_evil.P",
    }
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (target / name).exists():
            said = json.loads((target / name).read_text())
            (target / name).write_text(json.dumps(said | {"auto_map": auto, "trust_remote_code": True}))
    (target / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    return target


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_code_that_comes_with_a_model_is_never_run(
    kind: str, tiny_model_path: Path, tiny_vision_path: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "was-run"
    folder = poisoned(tiny_model_path if kind == "text" else tiny_vision_path, tmp_path / "evil", marker)
    with contextlib.suppress(ModelError):
        if kind == "text":
            from worker.models import load_model

            load_model(folder)
        else:
            from worker.backends.vision import load_vision_model

            load_vision_model(folder)
    assert not marker.exists()
