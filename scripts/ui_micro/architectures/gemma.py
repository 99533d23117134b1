"""A very small Gemma 3: plain positions, sliding windows, and images of a fixed size with learned positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path
from tokenizers import Tokenizer

from scripts.ui_micro.answers import THOUSANDTHS
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

_PAD, _EOS, _BOS = "<pad>", "<eos>", "<bos>"
_START, _END = "<start_of_turn>", "<end_of_turn>"
_IMAGE_TOKENS: Final = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
_IMAGE_START, _IMAGE_END, _IMAGE = _IMAGE_TOKENS.values()
_SIDE: Final = 168
"""Width and height to which images are resized."""
_TOKENS_PER_SIDE: Final = _SIDE // PATCH // MERGE
_POSITION_BASE: Final = 20.0

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "<start_of_turn>{{ role }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}<start_of_image>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class _Gemma:
    """Gemma 3."""

    name = "gemma3"
    folder = "ui-micro-gemma3"
    answers = THOUSANDTHS
    image = ImageForm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (_SIDE, _SIDE))
    tokens = PromptTokens(
        special=(_PAD, _EOS, _BOS, _START, _END, _IMAGE_START, _IMAGE_END, _IMAGE),
        end=_END,
        pad=_PAD,
        assistant="model",
        # The processor writes the line breaks around an image.
        before=f"{_BOS}{_START}user\n\n\n{_IMAGE_START}",
        after=f"{_IMAGE_END}\n\n",
        answer=f"{_END}\n{_START}model\n",
    )

    def config(self, tokenizer: Tokenizer) -> Json:
        """Return the content of config.json.

        The prompts have about 60 tokens, so half of the layers never see a whole one.
        """
        token = tokenizer.token_to_id
        return {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": self.name,
            "torch_dtype": "float32",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 128,
            "mm_tokens_per_image": _TOKENS_PER_SIDE**2,
            "bos_token_id": token(_BOS),
            "eos_token_id": [token(_END), token(_EOS)],
            "pad_token_id": token(_PAD),
            "boi_token_index": token(_IMAGE_START),
            "eoi_token_index": token(_IMAGE_END),
            "image_token_index": token(_IMAGE),
            "text_config": {
                "model_type": "gemma3_text",
                "vocab_size": tokenizer.get_vocab_size(),
                "hidden_size": 128,
                "intermediate_size": 320,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 32,
                "query_pre_attn_scalar": 16,
                "sliding_window": 32,
                "sliding_window_pattern": 2,
                "rope_theta": 1000.0,
                "rope_global_base_freq": 1000.0,
                "rope_local_base_freq": 100.0,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 2048,
                "mm_tokens_per_image": _TOKENS_PER_SIDE**2,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "num_hidden_layers": 3,
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_attention_heads": 4,
                "image_size": _SIDE,
                "patch_size": PATCH,
            },
        }

    def files(self) -> Mapping[str, Json]:
        """Return the configuration of tokenizer and processor."""
        length = {"image_seq_length": _TOKENS_PER_SIDE**2, "processor_class": "Gemma3Processor"}
        return {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": _TEMPLATE,
                "bos_token": _BOS,
                "eos_token": _END,
                "pad_token": _PAD,
                "additional_special_tokens": [_EOS, _START],
                "extra_special_tokens": _IMAGE_TOKENS,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 2048,
            },
            "preprocessor_config.json": {
                "image_processor_type": "Gemma3ImageProcessor",
                **self.image.settings(),
                "size": {"height": _SIDE, "width": _SIDE},
                "resample": 2,
                **length,
            },
            "processor_config.json": length,
        }

    def make_model(self, config: Json) -> Any:
        """Create mlx-vlm's model with random weights, without the output layer, which repeats the embeddings."""
        model = new_model(self.name, config)
        del model.language_model["lm_head"]
        model.update(tree_map_with_path(_initial, model.parameters()))
        return model

    def encode_images(self, model: Any, patches: mx.array, grid: Grid) -> tuple[mx.array, mx.array]:
        """Run the vision tower on images as one batch; return states per patch and per image token.

        The patches of an image token are next to each other here, while the library has whole rows of patches.
        """
        tower, projector = model.vision_tower.vision_model, model.multi_modal_projector
        embeddings = tower.embeddings
        kernel = embeddings.patch_embedding.weight.reshape(-1, PATCH * PATCH * 3)
        x = patches @ kernel.T + embeddings.patch_embedding.bias
        x = x + embeddings.position_embedding(mx.array(_patch_numbers(grid)))
        for layer in tower.encoder.layers:
            x = layer(x)
        states = tower.post_layernorm(x)
        n, count, width = states.shape
        pooled = projector.mm_soft_emb_norm(states.reshape(n, count // MERGE**2, MERGE**2, width).mean(2))
        return states, pooled @ projector.mm_input_projection_weight / width**0.5

    def read(self, text: Any, embeddings: mx.array, layout: Layout) -> tuple[mx.array, mx.array]:
        """Run mlx-vlm's language model without its output layer; return the states halfway and at the end."""
        places = layout.repeated(np.arange(layout.shared + layout.length, dtype=np.int32))
        seen = layout.mask()
        near = seen & (places[:, None] - places[None] < text.window_size)
        masks = [mx.array(each)[None, None] for each in (seen, near)]
        scale = mx.array(text.config.hidden_size**0.5, mx.bfloat16)  # rounded as in the library
        states, halfway = embeddings * scale.astype(mx.float32), mx.array(0)
        for number, layer in enumerate(text.layers, 1):
            local = layer.self_attn.is_sliding
            base = text.config.rope_local_base_freq if local else text.config.rope_global_base_freq
            states = _read_layer(layer, states, masks[local], _angles(places, text.config.head_dim, base))
            if number == len(text.layers) // 2:
                halfway = states
        return halfway, text.norm(states)


def _initial(path: str, weight: mx.array) -> mx.array:
    """Return the initial value of a weight where the library's is unsuitable."""
    if path.endswith("mm_input_projection_weight"):
        return mx.random.normal(weight.shape, scale=len(weight) ** -0.5)
    if path.endswith("position_embedding.weight"):
        return _wave_positions(*weight.shape)
    if ("language_model" in path and path.endswith("norm.weight")) or path.endswith("mm_soft_emb_norm.weight"):
        return mx.zeros_like(weight)  # these norms add 1
    return weight


def _wave_positions(count: int, width: int) -> mx.array:
    """Return sines and cosines of row and column, from which the tower learns faster than from random numbers."""
    side, frequencies = round(count**0.5), _POSITION_BASE ** -(np.arange(width // 4) / (width // 4))
    parts = [axis.reshape(-1, 1) * frequencies for axis in np.indices((side, side))]
    waves = [wave(part) for part in parts for wave in (np.sin, np.cos)]
    return mx.array(np.concatenate(waves, 1).astype(np.float32))


def _patch_numbers(grid: Grid) -> Ints:
    """Return the library's numbers of patches in the order of their image tokens."""
    rows, columns = grid
    numbers = np.arange(rows * columns, dtype=np.int32)
    parts = numbers.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE)
    return parts.transpose(0, 2, 1, 3).reshape(-1)


def _angles(places: Ints, width: int, base: float) -> tuple[mx.array, mx.array]:
    """Return cosines and sines of the rotary position embedding."""
    frequencies = base ** -(np.arange(0, width, 2) / width)
    angles = np.tile(places[:, None] * frequencies, 2)
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def _read_layer(layer: Any, x: mx.array, mask: mx.array, angles: tuple[mx.array, mx.array]) -> mx.array:
    """Run a layer of the language model. The library's own function takes only consecutive positions."""
    n, length, _ = x.shape
    attn, normed = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (
        project(normed).reshape(n, length, -1, attn.head_dim).transpose(0, 2, 1, 3)
        for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    cos, sin = angles
    q, k = (rotated(part, cos, sin) for part in (attn.q_norm(q), attn.k_norm(k)))
    mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=attn.scale, mask=mask)
    x = x + layer.post_attention_layernorm(attn.o_proj(mixed.transpose(0, 2, 1, 3).reshape(n, length, -1)))
    mlp, normed = layer.mlp, layer.pre_feedforward_layernorm(x)
    out: mx.array = x + layer.post_feedforward_layernorm(
        mlp.down_proj(_gelu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    )
    return out


def _gelu(x: mx.array) -> mx.array:
    """Return the tanh approximation of GELU, which takes half as long on a CPU when written with a sigmoid."""
    return x * mx.sigmoid(2 * (2 / math.pi) ** 0.5 * x * (1 + 0.044715 * x * x))


GEMMA: Final = _Gemma()
