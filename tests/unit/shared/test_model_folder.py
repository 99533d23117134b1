"""Invalid and malicious model folders: each is rejected with one line, and their code never runs."""

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
from shared.models.facts import context_of, declared_context, separate_template, weights_bytes
from shared.models.folder import ModelError, check_folder, has_vision, model_kind
from shared.models.sampling_defaults import SamplingDefaults
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
    ("file", "content", "message"),
    [
        ("model.safetensors", safetensors({"w": {"data_offsets": [0, 8]}}, bytes(4)), "has 43 of 47 bytes"),
        ("model.safetensors", safetensors({"w": {"data_offsets": [8, 4]}}), "no valid data_offsets"),
        ("model.safetensors", safetensors({"w": {"data_offsets": [-8, 4]}}), "no valid data_offsets"),
        ("model.safetensors", safetensors({"w": {"data_offsets": "ab"}}), "no valid data_offsets"),
        ("model.safetensors", safetensors({"w": 7}), "no valid data_offsets"),
        ("model.safetensors", safetensors([1]), "not a JSON object"),
        ("model.safetensors", safetensors(b"\xff" * 9), "not valid JSON"),
        ("model.safetensors", safetensors(b"[" * 100_000), "not valid JSON"),
        ("model.safetensors", safetensors({}, length=2**63), "not a complete"),
        ("model.safetensors", b"", "not a complete"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "../../etc/passwd"}}), "outside its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "/etc/passwd"}}), "outside its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "a\\..\\b"}}), "outside its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": 7}}), "outside its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "other.safetensors"}}), "lacks"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "model.bin"}}), "not a safetensors"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "m" * 300 + ".safetensors"}}), "not a safe"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "a\nb.safetensors"}}), "not a safetensors"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "\ud800.safetensors"}}), "not a safetensors"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": None}}), "outside its"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": []}}), "outside its"),
        ("model.safetensors", safetensors({n: {"data_offsets": [0, 8]} for n in "ab"}, bytes(8)), "overlap"),
        ("model-00001-of-00002.safetensors", safetensors({}), "lacks the weight file model-00002-of-00002.safetensors"),
        ("model-more.safetensors", safetensors({"w": {"data_offsets": [0, 8]}}), "has 39 of 47 bytes"),
        ("config.json", json.dumps({"model_type": "llama", "model_file": "evil.py"}), "its own code"),
        ("config.json", json.dumps({"model_type": "llama", "model_file": "a\nb"}), "its own code"),
        ("config.json", json.dumps({"model_type": ["llama"]}), "has no model_type"),
        ("config.json", "{", "not valid JSON"),
    ],
)  # fmt: skip
def test_invalid_folder_is_rejected_with_one_line(folder: Path, file: str, content: str | bytes, message: str) -> None:
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message) as caught:
        check_folder(folder)
    assert "\n" not in str(caught.value)


VISION = json.dumps({"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}})
ENCODERS = (
    "visual.patch_embed.weight",
    "model.visual.w",
    "vision_tower.w",
    "model.vision_model.w",
    "vpm.w",
    "sam_model.w",
)


@pytest.mark.parametrize("tensor", ENCODERS)
def test_a_folder_with_an_image_encoder_needs_its_processor(folder: Path, tensor: str) -> None:
    (folder / "config.json").write_text(VISION)
    header = {name: {"data_offsets": [0, 0]} for name in ("lm_head.w", tensor)}
    (folder / "model.safetensors").write_bytes(safetensors(header))
    assert model_kind(folder) == "vision"
    with pytest.raises(ModelError, match="lacks preprocessor_config"):
        check_folder(folder)
    check_folder(folder, kind="text")


@pytest.mark.parametrize(("declares", "tensor"), [("vision_config", "visual.w"), ("img_processor", "vision_tower.w")])
def test_a_folder_with_an_unsupported_image_encoder_is_text(folder: Path, declares: str, tensor: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "idefics2", declares: {"depth": 2}}))
    (folder / "model.safetensors").write_bytes(safetensors({tensor: {"data_offsets": [0, 0]}}))
    assert has_vision(folder)
    assert model_kind(folder) == "text"
    check_folder(folder)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}, "vision"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "text"),
        ({"model_type": "internvl_chat", "vision_config": {"x": 1}, "llm_config": {"model_type": "internlm2"}}, "text"),
        ({"model_type": "mistral3", "vision_config": {"x": 1}, "text_config": {"model_type": "mistral4"}}, "text"),
        ({"model_type": "mistral3", "vision_config": {"x": 1}, "text_config": {"model_type": "mistral"}}, "vision"),
    ],
)
def test_a_family_may_be_supported_in_part(folder: Path, config: dict[str, object], kind: str) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors({"vision_tower.w": {"data_offsets": [0, 0]}}))
    assert model_kind(folder) == kind


def test_a_text_checkpoint_that_keeps_the_vision_config_of_its_origin_is_text(folder: Path) -> None:
    (folder / "config.json").write_text(VISION)
    assert model_kind(folder) == "text"
    assert not has_vision(folder)
    check_folder(folder)
    index = {"weight_map": {"model.layers.0.w": "model.safetensors", "visual.w": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_kind(folder) == "vision"


def test_an_index_of_shards_that_were_merged_is_ignored(folder: Path) -> None:
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_folder(folder)
    assert model_folder.weight_files(folder) == ["model.safetensors"]
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"lacks the weight file model-00002-of-00002\.safetensors"):
        check_folder(folder)


def test_oversized_config_is_not_read(folder: Path) -> None:
    os.truncate(folder / "config.json", model_folder.MAX_JSON_BYTES + 1)  # a sparse file
    assert model_kind(folder) == "text"
    with pytest.raises(ModelError, match="is larger than 209,715,200 bytes"):
        check_folder(folder)


def test_weight_files_outside_the_index_are_checked(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "model.safetensors"}}))
    check_folder(folder)
    (folder / "model-2.safetensors").write_bytes(b"x")  # mlx-lm reads model*.safetensors
    with pytest.raises(ModelError, match=r"model-2\.safetensors is not a complete"):
        check_folder(folder)


def test_all_weight_files_of_a_vision_model_without_an_index_are_checked(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}}))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "tower.safetensors").write_bytes(b"x")  # mlx-vlm reads *.safetensors
    with pytest.raises(ModelError, match=r"tower\.safetensors is not a complete"):
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
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},  # not the shape in the model
    ],
)
def test_weights_with_false_shapes_are_rejected_when_loaded(
    tensor: dict[str, Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    from worker.models.load import load_model

    folder = tmp_path / "false-shapes"
    shutil.copytree(tiny_model_path, folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    (folder / "model-extra.safetensors").write_bytes(safetensors({name: tensor}, bytes(8)))
    check_folder(folder)  # the file size matches its header
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)


YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}


@pytest.mark.parametrize(
    ("config", "tokenizer_limit", "context"),
    [
        ({"max_position_embeddings": 131072}, 16384, 131072),  # DeepSeek-R1-Distill
        ({"max_position_embeddings": 4096}, 10**30, 4096),
        ({}, 8192, 8192),
        ({}, 10**30, None),
        ({}, None, None),
        ({"max_position_embeddings": None}, 2048, 2048),
        ({"text_config": {"max_position_embeddings": 128000}}, 32768, 128000),
        ({"n_positions": 1024}, 512, 1024),
        ({"max_position_embeddings": 32768, **YARN}, 131072, 131072),  # Qwen2.5 with YaRN
        ({"max_position_embeddings": 131072, **YARN}, 131072, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4}}, 4096, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096, 8192),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            8192,
            131072,
        ),
        (
            {"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            4096,
            131072,
        ),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "mrope", "mrope_section": [16]}}, 1, 32768),
        ({"text_config": {"max_position_embeddings": 8192, "rope_parameters": YARN["rope_scaling"]}}, None, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": float("nan")}}, None, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": "4"}}, None, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": ["linear"]}, None, 4096),
        ({"max_position_embeddings": -1, "n_positions": True}, 77, 77),
    ],
)
def test_the_context_is_that_of_the_config_with_its_scaling(
    config: dict[str, Any], tokenizer_limit: float | None, context: int | None
) -> None:
    assert context_of(config, tokenizer_limit) == context


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_any_header_or_config_is_accepted_or_rejected_with_a_model_error(folder: Path, content: Any) -> None:
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
        assert declared_context(folder) is None
        (folder / file).unlink()
        if before is not None:
            (folder / file).write_bytes(before)


def poisoned(source: Path, target: Path, marker: Path, **more: object) -> Path:
    """Copy a model and add code everywhere that a library might load it from."""
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
        content = json.loads((target / name).read_text()) if (target / name).exists() else {}
        (target / name).write_text(json.dumps(content | evil))
    (target / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    return target


PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
UNKNOWN = dict.fromkeys(("tokenizer_class", "processor_class", "image_processor_type"), "EvilOne")
"""Class names that no library defines: libraries then look for code in the model folder."""


@pytest.mark.parametrize("more", [{}, UNKNOWN], ids=["known", "unknown"])
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_code_in_a_model_folder_never_runs(
    kind: str,
    more: dict[str, object],
    tiny_model_path: Path,
    tiny_vision_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "was-run"
    folder = poisoned(tiny_model_path if kind == "text" else tiny_vision_path, tmp_path / "evil", marker, **more)
    prompts: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *args: prompts.append(args) or "y")  # consents to running remote code
    from worker.models.load import load_model
    from worker.runner.vision.load import load_vision_model

    load = load_model if kind == "text" else load_vision_model
    with pytest.raises(ModelError, match=r"contains Python code .*not allowed"):
        load(folder)
    monkeypatch.setattr(model_folder, "CODE", ())  # also if the check above were missing
    fails = kind == "text" and bool(more)  # mlx-vlm ignores the declared class and uses the model family's tokenizer
    with pytest.raises(ModelError) if fails else contextlib.nullcontext():
        load(folder)
    assert not marker.exists()
    assert not prompts


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        ({"top_k": 20}, {"top_k": 20}),
        ({"repetition_penalty": 1.05, "min_p": 0.1, "eos_token_id": [1]}, {"repetition_penalty": 1.05, "min_p": 0.1}),
        ({"temperature": 0.6, "do_sample": False}, {"temperature": 0.0}),
        ({"temperature": 7, "top_p": 0, "top_k": -1, "min_p": True, "repetition_penalty": "2"}, {}),
        ({"temperature": None, "top_k": 50.0}, {}),
        ([], {}),
    ],
)
def test_sampling_parameters_of_a_folder(tmp_path: Path, file: Any, expected: dict[str, float]) -> None:
    assert SamplingDefaults.declared(tmp_path) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert SamplingDefaults.declared(tmp_path).model_dump(exclude_none=True) == expected


def test_a_chat_template_in_a_file_of_its_own_counts_if_there_is_no_other(tmp_path: Path) -> None:
    assert separate_template(tmp_path) is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "one"}')
    assert separate_template(tmp_path) == "one"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "two"}')
    assert separate_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert separate_template(tmp_path) == "one"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert separate_template(tmp_path) is None
