"""Whether API hosts may tokenise for a model: proved once for each folder, and remembered on disk.

The proof is a helper's work (`worker.models.tokenizer_helper`), for it renders the model's template. What it finds
depends on the folder's files and the libraries' versions alone, so a worker that restarts knows it at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from shared.models.registry import ModelCard
from shared.tokenizing.client import TokenizerError, Tokenizing
from shared.tokenizing.files import TokenizerFiles, write_private
from shared.tokenizing.messages import TokenizerSource

logger = logging.getLogger(__name__)

HELPER: Final = "worker.models.tokenizer_helper"
PROOF_S: Final = 120.0
"""Time for a proof; on an idle machine it takes two seconds, most of them to import transformers."""
_VERSION: Final = 1
"""Of the proof itself: another one is asked for anew."""
_LIBRARIES: Final = ("transformers", "tokenizers", "jinja2", "mlx-lm", "mlx-vlm")
_FILES: Final = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
_LEFT_OUT: Final = ("model.safetensors.index.json", "mlxq.json")


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A model's tokenizer.

    Attributes:
        folder: as the model libraries read it: always right, and slower to load.
        file: the same in a file that API hosts may use; None: it is not the same, or not known to be.
        fields: what the model's card says of that file.
    """

    folder: TokenizerSource
    file: TokenizerSource | None = None
    fields: dict[str, Any] | None = None

    @property
    def sources(self) -> tuple[TokenizerSource, ...]:
        """Sources for a helper, best first."""
        return (self.folder,) if self.file is None else (self.file, self.folder)

    def card(self, card: ModelCard) -> ModelCard:
        """The card of the model with this tokenizer."""
        if self.file is None or self.fields is None:
            return card
        return replace(card, tokenizer=self.file.digest, **self.fields)


def unproved(folder: Path, card: ModelCard, defaults: dict[str, Any] | None = None) -> ModelTokenizer:
    """A folder's tokenizer before its proof."""
    return ModelTokenizer(TokenizerSource(str(folder.resolve()), defaults=defaults, vision=card.kind == "vision"))


def remembered(unproved: ModelTokenizer, files: Path) -> ModelTokenizer | None:
    """What an earlier proof found; None when there was none of this folder as it is now."""
    try:
        found = json.loads(_proof_file(unproved.folder, files).read_bytes())
        return _proved(unproved, found, files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def prove(unproved: ModelTokenizer, files: Path) -> ModelTokenizer:
    """Prove, in a helper of its own, whether the file equals the folder, and remember the result.

    Args:
        files: the folder of `TokenizerFiles`.
    """
    try:
        with Tokenizing(PROOF_S, HELPER) as tokenizing:
            found = tokenizing.call("prove", {"source": unproved.folder.to_dict(), "files": str(files)}, PROOF_S)
    except TokenizerError as error:
        logger.warning("tokenizer_not_proved", extra={"model_path": unproved.folder.path, "reason": str(error)})
        return unproved
    if reason := found.get("reason"):
        logger.warning("tokenizer_not_proved", extra={"model_path": unproved.folder.path, "reason": reason})
    try:
        write_private(_proof_file(unproved.folder, files), json.dumps(found).encode())
    except OSError as error:
        logger.warning("tokenizer_proof_not_kept", extra={"reason": str(error)})
    return _proved(unproved, found, files) or unproved


def _proved(unproved: ModelTokenizer, found: dict[str, Any], files: Path) -> ModelTokenizer | None:
    """What a proof says; None when the file that it names is gone."""
    if "digest" not in found:
        return unproved
    path = TokenizerFiles(files).path(found["digest"])
    if path is None:
        return None
    fields = found["fields"]
    file = TokenizerSource.of_card(str(path), found["digest"], fields)
    return replace(unproved, file=file, fields=fields)


def _proof_file(source: TokenizerSource, files: Path) -> Path:
    """Where the proof of a folder as it is now is kept."""
    folder = Path(source.path)
    state = hashlib.sha256(json.dumps([_VERSION, source.to_dict(), *map(version, _LIBRARIES)]).encode())
    found = {path for pattern in _FILES for path in folder.glob(pattern)}
    for path in sorted(found):
        if path.name not in _LEFT_OUT and path.is_file():
            state.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return files / f"{state.hexdigest()[:32]}.proof.json"
