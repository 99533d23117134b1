"""Trains the model to find the element that an instruction describes.

From the answers alone, the model would take many times as long to learn to read labels. So auxiliary heads, which are
dropped after training, predict name, colour and centre of the element at each patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn as _nn
from mlx_vlm.models.rope_utils import rotate_half
from numpy.typing import NDArray
from tokenizers import Tokenizer

from scripts.ui_micro.batches import (
    ANSWER_TOKENS,
    COLOUR_COUNT,
    NAMES,
    QUESTION_TOKENS,
    Batches,
    Floats,
    Grid,
    positions,
    prefix,
)
from scripts.ui_micro.shape import MERGE, PATCH

nn: Any = _nn
"""Untyped: MLX's annotations of this module are incomplete."""

STEPS: Final = 6000
SCENES: Final = 16
"""Images per step."""
PER_SCENE: Final = 6
"""Instructions per image."""
RATE: Final = 1e-3
"""Maximum learning rate; it decays to a fiftieth."""
COLOURS_FIRST: Final = 1000
"""Steps over which the share of instructions that need the colour falls from 1 to BY_COLOUR.

A model that learns labels first ignores colours and never learns them."""
BY_COLOUR: Final = 0.25
_HEADS: Final = (1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 2.0)
"""Weights of the auxiliary losses, relative to the answers. The pointer (last) teaches where to look."""
_POINTER: Final = 64
BEFORE: Final = 4
"""Number of tokens before those of the image."""
_REPORT_STEPS: Final = 100
_COORDINATES: Final = (1, 3)
"""Indices of an answer's tokens for x and y."""


class Learner(nn.Module):  # type: ignore[misc]  # MLX has no types for it
    """The model with the auxiliary heads."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        vision_width, text_width = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        self.name = nn.Linear(vision_width, NAMES)
        self.colour = nn.Linear(vision_width, COLOUR_COUNT)
        self.filled = nn.Linear(vision_width, 1)
        self.offset = nn.Linear(vision_width, 2)
        self.centre = nn.Linear(text_width, 2 * MERGE**2)
        self.read_colour = nn.Linear(text_width, COLOUR_COUNT * MERGE**2)
        self.read_name = nn.Linear(text_width, NAMES * MERGE**2)
        self.query = nn.Linear(text_width, _POINTER)
        self.key = nn.Linear(text_width, _POINTER)
        self._tokenizer = tokenizer

    def losses(
        self, patches: mx.array, ids: mx.array, answers: mx.array, targets: mx.array, labels: mx.array, grid: Grid
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return the loss of each answer token, the share of exact answers, and the losses of the heads."""
        n, count, _ = ids.shape
        states, merged = _encode_images(self.model.vision_tower, patches, grid)
        halfway, hidden = self._read(merged, ids, grid)
        images = merged.shape[1]
        final, half = (
            each[:, BEFORE + images + 1 :].reshape(n, count, QUESTION_TOKENS, -1) for each in (hidden, halfway)
        )
        answer_positions = answers[..., None] + mx.arange(ANSWER_TOKENS)
        states_before = mx.take_along_axis(final, (answer_positions - 1)[..., None], 2)
        expected = mx.take_along_axis(ids, answer_positions, 2)
        logits = self.model.language_model.model.embed_tokens.as_linear(states_before)
        loss = nn.losses.cross_entropy(logits, expected).mean((0, 1))
        exact = (logits.argmax(-1) == expected).all(-1).mean()
        image_states, half_image_states = (each[:, BEFORE : BEFORE + images] for each in (hidden, halfway))
        query_states = mx.take_along_axis(half, (answers - 1)[..., None, None], 2)[:, :, 0]
        heads = [
            *self._encoder_losses(states, image_states, labels, grid),
            self._readout_loss(image_states, labels),
            self._pointer_loss(query_states, half_image_states, targets, labels),
        ]
        return loss, exact, mx.stack(heads)

    def _encoder_losses(
        self, states: mx.array, image_states: mx.array, labels: mx.array, grid: Grid
    ) -> tuple[mx.array, ...]:
        """Return the losses of name, colour, filling and offset per patch, and of the element's centre at the end."""
        name, colour = labels[..., 0].astype(mx.int32), labels[..., 1].astype(mx.int32)
        present = (name > 0).astype(mx.float32)
        total = present.sum() + 1
        predicted = self.centre(image_states).reshape(len(states), -1, 2)
        filled = nn.losses.binary_cross_entropy(self.filled(states)[..., 0], labels[..., 2], reduction="none")
        centres = mx.array(_patch_centres(grid))
        return (
            nn.losses.cross_entropy(self.name(states), name).mean(),
            nn.losses.cross_entropy(self.colour(states), colour).mean(),
            (filled * (colour == 1)).mean(),
            (((self.offset(states) * 28 - (labels[..., 3:] - centres)).abs() / 28).sum(-1) * present).sum() / total,
            (((predicted * 50 + 70 - labels[..., 3:]).abs() / 28).sum(-1) * present).sum() / total,
        )

    def _readout_loss(self, image_states: mx.array, labels: mx.array) -> mx.array:
        """Return the loss of names and colours predicted from the language model's final image states."""
        n, places = image_states.shape[0], image_states.shape[1] * MERGE**2
        name, colour = labels[..., 0].astype(mx.int32), labels[..., 1].astype(mx.int32)
        colours = self.read_colour(image_states).reshape(n, places, COLOUR_COUNT)
        names = self.read_name(image_states).reshape(n, places, NAMES)
        loss: mx.array = nn.losses.cross_entropy(colours, colour).mean() + nn.losses.cross_entropy(names, name).mean()
        return loss

    def _pointer_loss(
        self, query_states: mx.array, image_states: mx.array, targets: mx.array, labels: mx.array
    ) -> mx.array:
        """Return the loss of attention to the target's patches, halfway through the language model."""
        n, images, _ = image_states.shape
        centres = labels[..., 3:].reshape(n, 1, images, MERGE**2, 2)
        on_target = (mx.abs(centres - targets[:, :, None, None]).sum(-1) < 1e-3).any(-1)
        scores = self.query(query_states) @ self.key(image_states).transpose(0, 2, 1) * _POINTER**-0.5
        probability = mx.where(on_target, mx.softmax(scores, -1), 0).sum(-1)
        visible = on_target.any(-1)  # a small element may lie between the centres of patches
        loss: mx.array = -mx.where(visible, mx.log(probability + 1e-6), 0).sum() / mx.maximum(visible.sum(), 1)
        return loss

    def _read(self, merged: mx.array, ids: mx.array, grid: Grid) -> tuple[mx.array, mx.array]:
        """Run the language model on an image and its instructions; return the states halfway and at the end."""
        text = self.model.language_model.model
        n, count, _ = ids.shape
        start = prefix(self._tokenizer, 0)
        before = len(start) - 1
        opening = mx.broadcast_to(text.embed_tokens(mx.array(start))[None], (n, before + 1, merged.shape[-1]))
        parts = [opening[:, :before], merged, opening[:, before:], text.embed_tokens(ids.reshape(n, -1))]
        place, mask = _layout(before, grid[0] // MERGE, grid[1] // MERGE, count)
        where = mx.broadcast_to(mx.array(place)[:, None], (3, n, place.shape[1]))
        states, halfway = mx.concatenate(parts, 1), mx.array(0)
        angles = text.layers[0].self_attn.rotary_emb(states, where)
        for number, layer in enumerate(text.layers, 1):
            states = layer(states, mx.array(mask)[None, None], None, where, angles)
            if number == len(text.layers) // 2:
                halfway = states
        return halfway, text.norm(states)


def train(model: Any, tokenizer: Tokenizer, steps: int, show: Callable[[int, str], None]) -> None:
    """Train for `steps` steps; `show` receives the number of steps and the last mean losses."""
    learner = Learner(model, tokenizer)
    warmup = min(200, steps // 5)
    schedule = optim.join_schedules(
        [optim.linear_schedule(RATE / 100, RATE, warmup), optim.cosine_decay(RATE, steps - warmup, RATE / 50)],
        [warmup],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.01)
    batches = Batches(tokenizer, SCENES, PER_SCENE)
    weights = mx.array(_HEADS)

    def compute(
        patches: mx.array, ids: mx.array, answers: mx.array, targets: mx.array, labels: mx.array, grid: Grid
    ) -> tuple[mx.array, ...]:
        answer, exact, heads = learner.losses(patches, ids, answers, targets, labels, grid)
        return answer.sum() + (weights * heads).sum(), answer, exact, heads

    gradient = nn.value_and_grad(learner, compute)
    sums, losses = np.zeros(11), ""
    for step in range(steps):
        batch = batches.make(step, max(BY_COLOUR, 1 - (1 - BY_COLOUR) * step / COLOURS_FIRST))
        arrays = (mx.array(each) for each in (batch.patches, batch.ids, batch.answers, batch.targets, batch.labels))
        (loss, answer, exact, heads), grads = gradient(*arrays, batch.grid)
        grads, _ = optim.clip_grad_norm(grads, 1.0)  # type: ignore[no-untyped-call]
        optimizer.update(learner, grads)
        mx.eval(learner.parameters(), optimizer.state, loss, answer, exact, heads)
        sums += np.concatenate([[loss.item()], np.array(answer)[list(_COORDINATES)], [exact.item()], np.array(heads)])
        if (step + 1) % _REPORT_STEPS == 0:
            losses = _losses(sums / _REPORT_STEPS)
            sums[:] = 0
        show(step + 1, losses)


def _losses(means: NDArray[np.float64]) -> str:
    loss, x, y, exact, name, colour, *_, pointer = means
    return (
        f"loss {loss:.3f}, x {x:.3f}, y {y:.3f}, {exact:.1%} exact, name {name:.3f}, "
        f"colour {colour:.3f}, pointer {pointer:.3f}"
    )


def _encode_images(tower: Any, patches: mx.array, grid: Grid) -> tuple[mx.array, mx.array]:
    """Run the vision tower on images of one size as one batch; return states per patch and per image token.

    The library's own function takes a single list of patches and loops over the images.
    """
    n, count, _ = patches.shape
    kernel = tower.patch_embed.proj.weight.sum(1).reshape(-1, PATCH * PATCH * 3)
    x = patches @ kernel.T
    angles = tower.rot_pos_emb(mx.array([[1, *grid]]))
    angles = mx.stop_gradient(mx.concatenate([angles, angles], -1))[:, None]
    cos, sin = mx.cos(angles), mx.sin(angles)
    for block in tower.blocks:
        attn = block.attn
        q, k, v = mx.split(attn.qkv(block.norm1(x)).reshape(n, count, 3 * attn.num_heads, -1), 3, 2)
        q, k = (
            part * cos + rotate_half(part) * sin  # type: ignore[no-untyped-call]
            for part in (q, k)
        )
        q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, k, v))
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        x = x + attn.proj(mixed.transpose(0, 2, 1, 3).reshape(n, count, -1))
        x = x + block.mlp(block.norm2(x))
    return x, tower.merger(x.reshape(n * count, -1)).reshape(n, count // MERGE**2, -1)


def _patch_centres(grid: Grid) -> Floats:
    """Return the centres of the patches in pixels, with axes patch, (x, y), in the processor's order."""
    rows, columns = grid[0] // MERGE, grid[1] // MERGE
    return np.array(
        [
            ((c * MERGE + j + 0.5) * PATCH, (r * MERGE + i + 0.5) * PATCH)
            for r in range(rows)
            for c in range(columns)
            for i in range(MERGE)
            for j in range(MERGE)
        ],
        np.float32,
    )


def _layout(before: int, rows: int, columns: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return positions and mask for an image followed by several instructions that do not see each other."""
    one = positions(before, rows, columns, 1 + QUESTION_TOKENS)
    shared = before + rows * columns + 1
    place = np.concatenate([one[:, :shared], *[one[:, shared:]] * count], 1)
    block = np.concatenate([np.zeros(shared), np.arange(count).repeat(QUESTION_TOKENS) + 1])
    mask = np.tril(np.ones((len(block), len(block)), bool)) & ((block[None] == 0) | (block[None] == block[:, None]))
    return place, mask
