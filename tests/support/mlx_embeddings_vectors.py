"""Computes vectors with mlx-embeddings, which a test installs in a virtual environment of its own.

python -P tests/support/mlx_embeddings_vectors.py MODEL_FOLDER

Reads a JSON list of inputs, each with `ids` and `types`, from standard input. Writes for each of them the last hidden
states and the library's own vector or score as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    import mlx.core as mx
    from mlx_embeddings.utils import load_model  # type: ignore[import-not-found]

    model = load_model(folder)
    takes_types = "bert" in type(model).__module__.rpartition(".")[2].split("_")
    outputs = []
    for each in json.load(sys.stdin):
        ids = mx.array([each["ids"]])
        more: dict[str, Any] = {"token_type_ids": mx.array([each["types"]])} if takes_types else {}
        output = model(ids, attention_mask=mx.ones(ids.shape, mx.int32), **more)
        result = output.text_embeds if output.pooler_output is None else output.pooler_output
        states = output.last_hidden_state
        outputs.append(
            {"states": states[0].tolist(), "vector": output.text_embeds[0].tolist(), "result": result[0].tolist()}
        )
    json.dump(outputs, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
