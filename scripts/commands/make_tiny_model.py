"""scripts/make_tiny_model: a llama of random weights, so small that only the cost of serving it shows.

It speaks nonsense in SmolLM2's tokens. The benchmarks and the tests of scheduling use it; the same call makes
the same weights every time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from scripts.model_files.manifest import Origin, check_replaceable, is_intact, read_origin, write_manifest
from scripts.model_files.staging import locked, staged
from scripts.model_files.weights import save_weights
from shared.model_folder import ModelError, check_folder
from shared.settings import ROOT

_MODELS = ROOT / "models"
_SOURCE = "random weights"
_SEED = 20
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_CHANGED = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "torch_dtype": "float32",
    # With tied embeddings a random llama repeats its last token for ever, and a stream of one token hides mistakes.
    "tie_word_embeddings": False,
}
_LEFT_OUT = ("quantization", "quantization_config")


def tiny_config(of: dict[str, Any]) -> dict[str, Any]:
    """The configuration `of` a real llama, shrunk; vocabulary, context and special tokens stay."""
    return {name: value for name, value in (of | _CHANGED).items() if name not in _LEFT_OUT}


def make_tiny_model(target: Path, tokenizer_from: Path) -> None:
    """Write the model into `target`, with the tokenizer of the model folder `tokenizer_from`.

    Raises:
        ModelError: `tokenizer_from` is not a complete model folder, or `target` is something else.
    """
    check_folder(tokenizer_from)
    config = tiny_config(json.loads((tokenizer_from / "config.json").read_text("utf-8")))
    origin = Origin(_SOURCE, str(_SEED), dtype=config["torch_dtype"])
    with locked(target.parent):
        if read_origin(target) == origin and is_intact(target):
            return
        check_replaceable(target, _SOURCE)
        with staged(target) as folder:
            _write(folder, config, tokenizer_from)
            check_folder(folder)
            write_manifest(folder, origin)


def _write(folder: Path, config: dict[str, Any], tokenizer_from: Path) -> None:
    for name in _COPIED:
        shutil.copyfile(tokenizer_from / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_weights(folder / "model.safetensors", _random_weights(config))


def _random_weights(config: dict[str, Any]) -> dict[str, mx.array]:
    mx.random.seed(_SEED)
    arguments: ModelArgs = ModelArgs.from_dict(config)  # type: ignore[no-untyped-call]
    model = Model(arguments)
    return dict(tree_flatten(model.parameters()))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/make_tiny_model", description="Make a tiny llama of random weights for benchmarks and tests."
    )
    parser.add_argument("-o", "--output", type=Path, default=_MODELS / "tiny-random-llama", help="folder to make")
    parser.add_argument(
        "--tokenizer-from",
        type=Path,
        default=_MODELS / "SmolLM2-135M-Instruct",
        help="model folder that gives the tokenizer (default: %(default)s; scripts/fetch_model makes it)",
    )
    arguments = parser.parse_args()
    try:
        make_tiny_model(arguments.output, arguments.tokenizer_from)
    except (ModelError, OSError) as error:
        print(f"make_tiny_model: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
