"""Folders of tiny vision models with random weights, and the real settings of their image processors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_vlm.utils import update_module_configs
from tokenizers import Tokenizer

from tests.architectures.vision_models_gemma import GEMMA
from tests.architectures.vision_models_glm import GLM
from tests.architectures.vision_models_other import OTHER
from tests.architectures.vision_models_plain import PLAIN
from tests.architectures.vision_models_tiled import TILED
from tests.architectures.vision_spec import CLIP, HALF, TEXT, Json, VisionModel
from tests.support.architecture_configs import VOCABULARY
from tests.support.tokenizers import byte_tokenizer

_TOKENS: Final = ("<|im_start|>", "<|im_end|>", "<pad>")
_AMPLIFICATION: Final = 16.0
_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(name: str, folder: Path) -> Path:
    """Write a model into a new folder."""
    spec = VISION_MODELS[name]
    config = write_settings(name, folder)
    weights = {
        path: array * _AMPLIFICATION if spec.amplified is not None and spec.amplified in path else array
        for path, array in tree_flatten(_model(config).parameters())
        if path not in spec.without
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def write_settings(name: str, folder: Path) -> Json:
    """Write all files of a model but its weights into a new folder. Returns the content of config.json."""
    spec = VISION_MODELS[name]
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_str(byte_tokenizer())
    tokenizer.add_special_tokens([*_TOKENS, *spec.tokens])
    ids = {token: tokenizer.token_to_id(token) for token in (*_TOKENS, *spec.tokens)}
    config = {"model_type": name, "torch_dtype": "float32", "eos_token_id": ids["<|im_end|>"]}
    config |= spec.config(ids, VOCABULARY + len(ids))
    special = {"pad_token": "<pad>", "eos_token": "<|im_end|>"}
    files: dict[str, Json] = {
        "config.json": config,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **special, **spec.tokenizer},
        **spec.files,
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "chat_template.jinja").write_text(_TEMPLATE.replace("IMAGE", spec.image))
    return config


def _model(config: Json) -> Any:
    library: Any = importlib.import_module(f"mlx_vlm.models.{config['model_type']}")
    values = json.loads(json.dumps(config))
    values.setdefault("text_config", values.pop("llm_config", {}))
    settings = library.ModelConfig.from_dict(values)
    settings = update_module_configs(settings, library, values, ["text", "vision", "perceiver", "projector", "audio"])
    mx.random.seed(1)
    model = library.Model(settings)
    model.update(tree_map_with_path(_with_variance, model.parameters()))
    return model


def _with_variance(path: str, array: mx.array) -> mx.array:
    """Return larger weights, with which tokens depend on the images: those of a new model would hide mistakes."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    if array.ndim == 2 and "language" in path:
        return array * 2 + 0.02 * mx.random.normal(array.shape)
    return array * 3 if array.ndim > 1 else array + 0.1 * mx.random.normal(array.shape)


_QWEN_TOKENS: Final = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IMAGE: Final = "<|vision_start|><|image_pad|><|vision_end|>"
_TOWER: Final[Json] = {"depth": 3, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen_config(ids: Mapping[str, int], vision: Json) -> Json:
    return {
        "vision_config": _TOWER | vision,
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }


def _qwen(config: Callable[[Mapping[str, int], int], Json], preprocessor: Json) -> VisionModel:
    return VisionModel(config, _QWEN_IMAGE, _QWEN_TOKENS, {"preprocessor_config.json": preprocessor})


def _qwen2(kind: str, vision: Json) -> VisionModel:
    def config(ids: Mapping[str, int], vocabulary: int) -> Json:
        rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        vision_config = {"model_type": kind, "patch_size": 14, "in_channels": 3, **vision}
        return TEXT | rope | {"vocab_size": vocabulary} | _qwen_config(ids, vision_config)

    return _qwen(
        config,
        {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}
        | {"temporal_patch_size": 2, "merge_size": 2, **CLIP},
    )


def _qwen3(kind: str, text: Json, deepstack: list[int]) -> VisionModel:
    def config(ids: Mapping[str, int], vocabulary: int) -> Json:
        vision = {
            "model_type": kind,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": deepstack,
        }
        text_config = {"model_type": f"{kind}_text", "vocab_size": vocabulary, **TEXT, **text}
        return {"text_config": text_config, "vocab_size": vocabulary, **_qwen_config(ids, vision)}

    return _qwen(
        config,
        {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "temporal_patch_size": 2}
        | {"merge_size": 2, "size": {"longest_edge": 16777216, "shortest_edge": 65536}, **HALF},
    )


_QWEN3_VL: Final[Json] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "rope_theta": 5e6,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
}
_QWEN3_MOE: Final[Json] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_QWEN3_5: Final[Json] = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "full_attention_interval": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
    },
}

VISION_MODELS: Final[dict[str, VisionModel]] = {
    "qwen2_vl": _qwen2("qwen2_vl", {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "qwen2_5_vl": _qwen2(
        "qwen2_5_vl",
        {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 112}
        | {"fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": _qwen3("qwen3_vl", _QWEN3_VL, [0, 1]),
    "qwen3_vl_moe": _qwen3("qwen3_vl_moe", _QWEN3_VL | _QWEN3_MOE, [0, 1]),
    "qwen3_5": _qwen3("qwen3_5", _QWEN3_5, []),
    "qwen3_5_moe": _qwen3(
        "qwen3_5_moe", _QWEN3_5 | _QWEN3_MOE | {"shared_expert_intermediate_size": 32, "intermediate_size": 64}, []
    ),
    **PLAIN,
    **TILED,
    **GEMMA,
    **GLM,
    **OTHER,
}
"""By `model_type`, or a variant of one."""
