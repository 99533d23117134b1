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
from numpy.typing import NDArray
from tokenizers import Tokenizer

from scripts.ui_micro.architectures.architecture import MERGE, Architecture, Grid, Layout
from scripts.ui_micro.batches import (
    ANSWER_TOKENS,
    COLOUR_COUNT,
    NAMES,
    QUESTION_TOKENS,
    Batches,
    patch_centres,
)

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
_REPORT_STEPS: Final = 100
_COORDINATES: Final = (1, 3)
"""Indices of an answer's tokens for x and y."""


class Learner(nn.Module):  # type: ignore[misc]  # MLX has no types for it
    """The model with the auxiliary heads."""

    def __init__(self, architecture: Architecture, model: Any, tokenizer: Tokenizer) -> None:
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
        self._architecture = architecture
        self._before, self._after = (
            list(tokenizer.encode(text).ids) for text in (architecture.tokens.before, architecture.tokens.after)
        )

    def losses(
        self, patches: mx.array, ids: mx.array, answers: mx.array, targets: mx.array, labels: mx.array, grid: Grid
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return the loss of each answer token, the share of exact answers, and the losses of the heads."""
        n, count, _ = ids.shape
        states, merged = self._architecture.encode_images(self.model, patches, grid)
        layout = self.layout(grid, count)
        halfway, hidden = self.read(merged, ids, layout)
        final, half = (each[:, layout.shared :].reshape(n, count, QUESTION_TOKENS, -1) for each in (hidden, halfway))
        answer_positions = answers[..., None] + mx.arange(ANSWER_TOKENS)
        states_before = mx.take_along_axis(final, (answer_positions - 1)[..., None], 2)
        expected = mx.take_along_axis(ids, answer_positions, 2)
        logits = self.model.language_model.model.embed_tokens.as_linear(states_before)
        loss = nn.losses.cross_entropy(logits, expected).mean((0, 1))
        exact = (logits.argmax(-1) == expected).all(-1).mean()
        image_states, half_image_states = (
            each[:, layout.before : layout.before + merged.shape[1]] for each in (hidden, halfway)
        )
        query_states = mx.take_along_axis(half, (answers - 1)[..., None, None], 2)[:, :, 0]
        heads = [
            *self._encoder_losses(states, image_states, labels, grid),
            self._readout_loss(image_states, labels),
            self._pointer_loss(query_states, half_image_states, targets, labels),
        ]
        return loss, exact, mx.stack(heads)

    def layout(self, grid: Grid, count: int) -> Layout:
        """Return the layout of images with this grid of patches, each with `count` instructions."""
        rows, columns = grid[0] // MERGE, grid[1] // MERGE
        return Layout(len(self._before), rows, columns, len(self._after), count, QUESTION_TOKENS)

    def _encoder_losses(
        self, states: mx.array, image_states: mx.array, labels: mx.array, grid: Grid
    ) -> tuple[mx.array, ...]:
        """Return the losses of name, colour, filling and offset per patch, and of the element's centre at the end."""
        name, colour = labels[..., 0].astype(mx.int32), labels[..., 1].astype(mx.int32)
        present = (name > 0).astype(mx.float32)
        total = present.sum() + 1
        predicted = self.centre(image_states).reshape(len(states), -1, 2)
        filled = nn.losses.binary_cross_entropy(self.filled(states)[..., 0], labels[..., 2], reduction="none")
        centres = mx.array(patch_centres(grid))
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

    def read(self, merged: mx.array, ids: mx.array, layout: Layout) -> tuple[mx.array, mx.array]:
        """Run the language model on an image and its instructions; return the states halfway and at the end."""
        text = self.model.language_model.model
        n, before = len(merged), layout.before
        start = mx.array(self._before + self._after)
        opening = mx.broadcast_to(text.embed_tokens(start)[None], (n, before + layout.after, merged.shape[-1]))
        parts = [opening[:, :before], merged, opening[:, before:], text.embed_tokens(ids.reshape(n, -1))]
        return self._architecture.read(text, mx.concatenate(parts, 1), layout)


def train(
    architecture: Architecture, model: Any, tokenizer: Tokenizer, steps: int, show: Callable[[int, str], None]
) -> None:
    """Train for `steps` steps; `show` receives the number of steps and the last mean losses."""
    learner = Learner(architecture, model, tokenizer)
    warmup = min(200, steps // 5)
    schedule = optim.join_schedules(
        [optim.linear_schedule(RATE / 100, RATE, warmup), optim.cosine_decay(RATE, steps - warmup, RATE / 50)],
        [warmup],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.01)
    batches = Batches(architecture, tokenizer, SCENES, PER_SCENE)
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
