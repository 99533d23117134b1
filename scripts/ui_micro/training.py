"""Trains the model: to say where what an instruction names is, and, on the way, to tell what is where in the picture.

From the answers alone it would take the model many times as long to learn to read labels. So heads that are thrown
away afterwards are asked, of each patch, for the name and colour of what is there and for its middle.
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
"""MLX's types for it say less than there is."""

STEPS: Final = 6000
SCENES: Final = 16
"""Pictures of a step."""
PER_SCENE: Final = 6
"""Instructions for each picture."""
RATE: Final = 1e-3
"""How far a step goes at most; it goes down to nearly nothing at the end."""
COLOURS_FIRST: Final = 1000
"""Steps over which what only the colour decides falls from all instructions to BY_COLOUR of them.

A model that learns labels first does without colours, and never comes to read them."""
BY_COLOUR: Final = 0.25
_HEADS: Final = (1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 2.0)
"""What each head weighs beside the answers; the last one the most: it is soon learnt to look where one is told."""
_POINTER: Final = 64
BEFORE: Final = 4
"""Tokens before the picture's."""
_TOLD_EVERY: Final = 100
_COORDINATES: Final = (1, 3)
"""Of an answer's tokens, those of x and y."""


class Learner(nn.Module):  # type: ignore[misc]  # MLX has no types for it
    """The model and, while it learns, heads that tell what is where in the picture."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        wide, read = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        self.name = nn.Linear(wide, NAMES)
        self.colour = nn.Linear(wide, COLOUR_COUNT)
        self.filled = nn.Linear(wide, 1)
        self.offset = nn.Linear(wide, 2)
        self.place = nn.Linear(read, 2 * MERGE**2)
        self.read_colour = nn.Linear(read, COLOUR_COUNT * MERGE**2)
        self.read_name = nn.Linear(read, NAMES * MERGE**2)
        self.asked = nn.Linear(read, _POINTER)
        self.shown = nn.Linear(read, _POINTER)
        self._tokenizer = tokenizer

    def losses(
        self, patches: mx.array, ids: mx.array, answers: mx.array, targets: mx.array, seen: mx.array, grid: Grid
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Of each token of the answer; how many answers are right to the letter; of the heads."""
        n, count, _ = ids.shape
        states, merged = _encoded(self.model.vision_tower, patches, grid)
        halfway, hidden = self._read(merged, ids, grid)
        images = merged.shape[1]
        told, half_told = (
            each[:, BEFORE + images + 1 :].reshape(n, count, QUESTION_TOKENS, -1) for each in (hidden, halfway)
        )
        where = answers[..., None] + mx.arange(ANSWER_TOKENS)
        predicted = mx.take_along_axis(told, (where - 1)[..., None], 2)
        wanted = mx.take_along_axis(ids, where, 2)
        logits = self.model.language_model.model.embed_tokens.as_linear(predicted)
        loss = nn.losses.cross_entropy(logits, wanted).mean((0, 1))
        right = (logits.argmax(-1) == wanted).all(-1).mean()
        held, half_held = (each[:, BEFORE : BEFORE + images] for each in (hidden, halfway))
        about_to = mx.take_along_axis(half_told, (answers - 1)[..., None, None], 2)[:, :, 0]
        heads = [
            *self._seen(states, held, seen, grid),
            self._kept(held, seen),
            self._pointed(about_to, half_held, targets, seen),
        ]
        return loss, right, mx.stack(heads)

    def _seen(self, states: mx.array, held: mx.array, seen: mx.array, grid: Grid) -> tuple[mx.array, ...]:
        """What the encoder tells of each patch: name, colour, filling, way to the middle; and the middle at the end."""
        name, colour = seen[..., 0].astype(mx.int32), seen[..., 1].astype(mx.int32)
        there = (name > 0).astype(mx.float32)
        total = there.sum() + 1
        at = self.place(held).reshape(len(states), -1, 2)
        filled = nn.losses.binary_cross_entropy(self.filled(states)[..., 0], seen[..., 2], reduction="none")
        own = mx.array(_middles(grid))
        return (
            nn.losses.cross_entropy(self.name(states), name).mean(),
            nn.losses.cross_entropy(self.colour(states), colour).mean(),
            (filled * (colour == 1)).mean(),
            (((self.offset(states) * 28 - (seen[..., 3:] - own)).abs() / 28).sum(-1) * there).sum() / total,
            (((at * 50 + 70 - seen[..., 3:]).abs() / 28).sum(-1) * there).sum() / total,
        )

    def _kept(self, held: mx.array, seen: mx.array) -> mx.array:
        """Whether what is where can still be told when the language model has read the picture."""
        n, places = held.shape[0], held.shape[1] * MERGE**2
        name, colour = seen[..., 0].astype(mx.int32), seen[..., 1].astype(mx.int32)
        colours = self.read_colour(held).reshape(n, places, COLOUR_COUNT)
        names = self.read_name(held).reshape(n, places, NAMES)
        loss: mx.array = nn.losses.cross_entropy(colours, colour).mean() + nn.losses.cross_entropy(names, name).mean()
        return loss

    def _pointed(self, about_to: mx.array, held: mx.array, targets: mx.array, seen: mx.array) -> mx.array:
        """Whether, halfway through the language model, what is asked for is told from all else in the picture."""
        n, images, _ = held.shape
        middles = seen[..., 3:].reshape(n, 1, images, MERGE**2, 2)
        there = (mx.abs(middles - targets[:, :, None, None]).sum(-1) < 1e-3).any(-1)
        scores = self.asked(about_to) @ self.shown(held).transpose(0, 2, 1) * _POINTER**-0.5
        chances = mx.where(there, mx.softmax(scores, -1), 0).sum(-1)
        some = there.any(-1)  # a small element may lie between the middles of patches
        loss: mx.array = -mx.where(some, mx.log(chances + 1e-6), 0).sum() / mx.maximum(some.sum(), 1)
        return loss

    def _read(self, merged: mx.array, ids: mx.array, grid: Grid) -> tuple[mx.array, mx.array]:
        """The language model's states of a picture and its instructions, halfway through its layers and at the end."""
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
    """Take `steps` steps; `show` gets the steps taken and the last mean losses."""
    learner = Learner(model, tokenizer)
    warm = min(200, steps // 5)
    schedule = optim.join_schedules(
        [optim.linear_schedule(RATE / 100, RATE, warm), optim.cosine_decay(RATE, steps - warm, RATE / 50)],
        [warm],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.01)
    batches = Batches(tokenizer, SCENES, PER_SCENE)
    weights = mx.array(_HEADS)

    def compute(
        patches: mx.array, ids: mx.array, answers: mx.array, targets: mx.array, seen: mx.array, grid: Grid
    ) -> tuple[mx.array, ...]:
        answer, right, heads = learner.losses(patches, ids, answers, targets, seen, grid)
        return answer.sum() + (weights * heads).sum(), answer, right, heads

    gradient = nn.value_and_grad(learner, compute)
    sums, losses = np.zeros(11), ""
    for step in range(steps):
        batch = batches.make(step, max(BY_COLOUR, 1 - (1 - BY_COLOUR) * step / COLOURS_FIRST))
        arrays = (mx.array(each) for each in (batch.patches, batch.ids, batch.answers, batch.targets, batch.seen))
        (loss, answer, right, heads), grads = gradient(*arrays, batch.grid)
        grads, _ = optim.clip_grad_norm(grads, 1.0)  # type: ignore[no-untyped-call]
        optimizer.update(learner, grads)
        mx.eval(learner.parameters(), optimizer.state, loss, answer, right, heads)
        sums += np.concatenate([[loss.item()], np.array(answer)[list(_COORDINATES)], [right.item()], np.array(heads)])
        if (step + 1) % _TOLD_EVERY == 0:
            losses = _losses(sums / _TOLD_EVERY)
            sums[:] = 0
        show(step + 1, losses)


def _losses(means: NDArray[np.float64]) -> str:
    loss, x, y, exact, name, colour, *_, pointed = means
    return (
        f"loss {loss:.3f}, x {x:.3f}, y {y:.3f}, {exact:.1%} to the letter, name {name:.3f}, "
        f"colour {colour:.3f}, pointed {pointed:.3f}"
    )


def _encoded(tower: Any, patches: mx.array, grid: Grid) -> tuple[mx.array, mx.array]:
    """What the vision tower makes of pictures of one size, all in one: patches' states, and what the text model reads.

    The library's own call takes one list of patches and makes a loop of the pictures.
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


def _middles(grid: Grid) -> Floats:
    """[patches, 2] their middles in pixels, in the processor's order."""
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
    """Positions and mask of a picture that is followed by several instructions, each as if it were the only one."""
    one = positions(before, rows, columns, 1 + QUESTION_TOKENS)
    shared = before + rows * columns + 1
    place = np.concatenate([one[:, :shared], *[one[:, shared:]] * count], 1)
    block = np.concatenate([np.zeros(shared), np.arange(count).repeat(QUESTION_TOKENS) + 1])
    mask = np.tril(np.ones((len(block), len(block)), bool)) & ((block[None] == 0) | (block[None] == block[:, None]))
    return place, mask
