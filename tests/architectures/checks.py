"""What is checked for each architecture. The tests run these checks, and `report` writes what works into the docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from tests.architectures.batches import RESTRICTED, TOLERANCE, TOLERANCE_SHORT, compare_all
from tests.architectures.folders import QUANTISATIONS, adapted, quantised, write_folder
from tests.architectures.memory import check_memory
from tests.architectures.reuse import check_conversation, check_disk, check_shared_prefix, check_speculation
from tests.support.architecture_configs import VOCABULARY, config
from tests.support.architectures import make, measured
from worker.models.load import load_model
from worker.runner.batching.support import UNRESTRICTED, BatchingSupport

_IDS = mx.array([[(7 * i + i * i) % VOCABULARY for i in range(24)]])


def batching(name: str) -> BatchingSupport:
    """Return how rows of an architecture are expected to share passes."""
    return RESTRICTED.get(name, UNRESTRICTED)


def check_batched(name: str, _folder: Path) -> None:
    """Rows have the same logits in a batch as alone, also if they join late or continue after an interruption."""
    model = make(name)
    found = measured(model)
    assert replace(found, reason="") == batching(name)
    assert bool(found.reason) == batching(name).restricted
    compare_all(name, model, found)


def check_quantised(name: str, folder: Path, kind: str) -> None:
    """A quantised folder has the logits of the model that was written, and batches like it."""
    model, own_config = quantised(name, QUANTISATIONS[kind])
    found = load_model(write_folder(folder / "model", model, own_config)).model
    _compare(found, model)
    # Some types are computed in 16 bits, whatever the type of the model.
    tolerance = 10 * TOLERANCE if found(_IDS).dtype == mx.float32 else TOLERANCE_SHORT
    compare_all(name, found, batching(name), tolerance, cut=())


def check_shards(name: str, folder: Path) -> None:
    """A folder in shards has the logits of the model that was written."""
    model = make(name)
    _compare(load_model(write_folder(folder / "model", model, config(name), shards=3)).model, model)


def check_adapter(name: str, folder: Path) -> None:
    """A folder with LoRA weights has the logits of the adapted model, which differ from those without them."""
    model = adapted(name, folder / "adapter")
    base = write_folder(folder / "model", make(name), config(name))
    _compare(load_model(base, adapter=folder / "adapter").model, model)
    assert not mx.allclose(load_model(base).model(_IDS), model(_IDS), atol=1e-2).item()


def _compare(found: Any, expected: Any) -> None:
    assert mx.allclose(found(_IDS), expected(_IDS), rtol=1e-4, atol=1e-4).item()


Run = Callable[[str, Path], None]


@dataclass(frozen=True, slots=True)
class Check:
    """A check, which takes an architecture and an empty folder.

    Attributes:
        column: heading in the docs; checks with the same heading share a column.
        always: whether it runs by default, for a dozen architectures.
    """

    column: str
    run: Run
    always: bool = True


CHECKS: Final[Mapping[str, Check]] = {
    "batched": Check("batched = alone", check_batched),
    **{
        f"quantised to {kind}": Check("quantised", partial(check_quantised, kind=kind), kind in ("4 bits", "mixed"))
        for kind in QUANTISATIONS
    },
    "conversation": Check("next turn", check_conversation),
    "shared prefix": Check("shared prefix", check_shared_prefix),
    "disk": Check("after a restart", check_disk, always=False),
    "speculation": Check("speculation", check_speculation),
    "memory": Check("memory predicted", check_memory),
    "shards": Check("shards", check_shards),
    "adapter": Check("adapter", check_adapter),
}
