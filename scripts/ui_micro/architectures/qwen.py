"""A very small Qwen2.5-VL: positions with three axes (M-RoPE), images in their own size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from scripts.ui_micro.answers import PIXELS
from scripts.ui_micro.architectures.architecture import (
    MERGE,
    PATCH,
    Grid,
    ImageForm,
    Ints,
    Json,
    Layout,
    PromptTokens,
    new_model,
    rotated,
)

_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_VISION_START, _VISION_END, _IMAGE, _VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
_VISION = "<|vision_pad|>"

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's template without its system message."""


class _Qwen:
    """Qwen2.5-VL."""

    name = "qwen2_5_vl"
    folder = "ui-micro"
    answers = PIXELS
    image = ImageForm((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    tokens = PromptTokens(
        special=(_PAD, _START, _END, _VISION_START, _VISION_END, _VISION, _IMAGE, _VIDEO),
        end=_END,
        pad=_PAD,
        assistant="assistant",
        before=f"{_START}user\n{_VISION_START}",
        after=_VISION_END,
        answer=f"{_END}\n{_START}assistant\n",
    )

    def config(self, tokenizer: Tokenizer) -> Json:
        """Return the content of config.json."""
        token = tokenizer.token_to_id
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": self.name,
            "torch_dtype": "float32",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 8.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 7, 7]},
            "tie_word_embeddings": True,
            "bos_token_id": token(_START),
            "eos_token_id": [token(_END), token(_PAD)],
            "pad_token_id": token(_PAD),
            "image_token_id": token(_IMAGE),
            "video_token_id": token(_VIDEO),
            "vision_start_token_id": token(_VISION_START),
            "vision_end_token_id": token(_VISION_END),
            "vision_token_id": token(_VISION),
            "vision_config": {
                "model_type": self.name,
                "depth": 3,
                "hidden_size": 128,
                "intermediate_size": 256,
                "out_hidden_size": 128,
                "num_heads": 4,
                "hidden_act": "silu",
                "in_channels": 3,
                "patch_size": PATCH,
                "spatial_patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "window_size": 112,
                "fullatt_block_indexes": [0, 1, 2],
            },
        }

    def files(self) -> Mapping[str, Json]:
        """Return tokenizer_config.json and preprocessor_config.json."""
        side = PATCH * MERGE
        return {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": _TEMPLATE,
                "eos_token": _END,
                "pad_token": _PAD,
                "additional_special_tokens": [each for each in self.tokens.special if each not in (_END, _PAD)],
                "clean_up_tokenization_spaces": False,
                "model_max_length": 2048,
            },
            "preprocessor_config.json": {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
                **self.image.settings(),
                "min_pixels": 4 * side * side,
                "max_pixels": 64 * side * side,
                "patch_size": PATCH,
                "temporal_patch_size": 2,
                "merge_size": MERGE,
            },
        }

    def make_model(self, config: Json) -> Any:
        """Create mlx-vlm's model with random weights."""
        return new_model(self.name, config)

    def encode_images(self, model: Any, patches: mx.array, grid: Grid) -> tuple[mx.array, mx.array]:
        """Run the vision tower on images of one size as one batch; return states per patch and per image token.

        The library's own function takes a single list of patches, with each image repeated as two frames, and loops
        over the images.
        """
        tower = model.vision_tower
        n, count, _ = patches.shape
        kernel = tower.patch_embed.proj.weight.sum(1).reshape(-1, PATCH * PATCH * 3)
        x = patches @ kernel.T
        angles = tower.rot_pos_emb(mx.array([[1, *grid]]))
        angles = mx.stop_gradient(mx.concatenate([angles, angles], -1))[:, None]
        cos, sin = mx.cos(angles), mx.sin(angles)
        for block in tower.blocks:
            attn = block.attn
            q, k, v = mx.split(attn.qkv(block.norm1(x)).reshape(n, count, 3 * attn.num_heads, -1), 3, 2)
            q, k = (rotated(part, cos, sin) for part in (q, k))
            q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, k, v))
            mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=attn.scale)
            x = x + attn.proj(mixed.transpose(0, 2, 1, 3).reshape(n, count, -1))
            x = x + block.mlp(block.norm2(x))
        return x, tower.merger(x.reshape(n * count, -1)).reshape(n, count // MERGE**2, -1)

    def read(self, text: Any, embeddings: mx.array, layout: Layout) -> tuple[mx.array, mx.array]:
        """Run mlx-vlm's language model without its output layer; return the states halfway and at the end."""
        n = len(embeddings)
        place = layout.repeated(positions(layout.before, layout.rows, layout.columns, layout.after + layout.length))
        where = mx.broadcast_to(mx.array(place)[:, None], (3, n, place.shape[1]))
        mask = mx.array(layout.mask())[None, None]
        states, halfway = embeddings, mx.array(0)
        angles = text.layers[0].self_attn.rotary_emb(states, where)
        for number, layer in enumerate(text.layers, 1):
            states = layer(states, mask, None, where, angles)
            if number == len(text.layers) // 2:
                halfway = states
        return halfway, text.norm(states)


def positions(before: int, rows: int, columns: int, after: int) -> Ints:
    """Return Qwen's positions (time, height, width) of text, one image, and text after it."""
    text = np.arange(before)[None].repeat(3, 0)
    image = np.indices((1, rows, columns)).reshape(3, -1) + before
    rest = np.arange(after)[None].repeat(3, 0) + before + max(rows, columns)
    return np.concatenate([text, image, rest], 1).astype(np.int32)


QWEN: Final = _Qwen()
