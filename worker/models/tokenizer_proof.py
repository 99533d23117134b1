"""Proves once per model folder whether API hosts may tokenise for the model, and stores the result on disk.

A helper process does the proof (`worker.models.tokenizer_helper`), because it renders the model's template. The result
depends only on the folder's files and the libraries' versions, so a restarted worker uses the stored one.
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
from shared.tokenizing import generic_tools
from shared.tokenizing.client import TokenizerError, Tokenizing
from shared.tokenizing.files import TokenizerFiles, write_private
from shared.tokenizing.messages import TokenizerSource, digest

logger = logging.getLogger(__name__)

HELPER: Final = "worker.models.tokenizer_helper"
PROOF_S: Final = 120.0
"""Time limit for a proof. On an idle machine it takes two seconds, most of them to import transformers."""
_VERSION: Final = 3
"""Version of the proof. Results of other versions are not used."""
_LIBRARIES: Final = ("transformers", "tokenizers", "jinja2", "mlx-lm", "mlx-vlm")
_FILES: Final = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
_IGNORED: Final = ("model.safetensors.index.json", "mlxq.json")


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A model's tokenizer.

    Attributes:
        folder: the source that the model libraries read: always right, but slow to load.
        file: a single file that API hosts may use instead; None unless it is proved to be equivalent.
        fields: the fields of the model's card for that file.
    """

    folder: TokenizerSource
    file: TokenizerSource | None = None
    fields: dict[str, Any] | None = None

    @property
    def sources(self) -> tuple[TokenizerSource, ...]:
        """Sources for a helper, best first."""
        return (self.folder,) if self.file is None else (self.file, self.folder)

    def card(self, card: ModelCard) -> ModelCard:
        """Return the model's card with this tokenizer."""
        if self.file is None or self.fields is None:
            return card
        return replace(card, tokenizer=self.file.digest, **self.fields)


def unproved(folder: Path, card: ModelCard, defaults: dict[str, Any] | None = None) -> ModelTokenizer:
    """Return a folder's tokenizer before its proof."""
    source = TokenizerSource(
        str(folder.resolve()),
        defaults=defaults,
        vision=card.kind == "vision",
        explain_tools=card.tool_format == generic_tools.FORMAT,
    )
    return ModelTokenizer(source)


def of_file(folder: Path, files: Path) -> ModelTokenizer:
    """Return the tokenizer of a model that reads its tokens as its tokenizer.json gives them, without a template.

    Args:
        files: the folder of `TokenizerFiles`. If the file cannot be stored there, only this worker tokenises.
    """
    file = folder.resolve() / "tokenizer.json"
    own = TokenizerSource(str(file))
    try:
        text = file.read_text("utf-8")
        name = digest(text)
        path = TokenizerFiles(files).put(name, text)
    except OSError as error:
        logger.warning("tokenizer_not_stored", extra={"model_path": str(folder), "reason": str(error)})
        return ModelTokenizer(own)
    return ModelTokenizer(own, TokenizerSource(str(path), name), {})


def remembered(unproved: ModelTokenizer, files: Path) -> ModelTokenizer | None:
    """Return the result of an earlier proof; None if the folder in its present state was never proved."""
    try:
        result = json.loads(_proof_file(unproved.folder, files).read_bytes())
        return _proved(unproved, result, files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def prove(unproved: ModelTokenizer, files: Path) -> ModelTokenizer:
    """Prove in a separate helper whether a file is equivalent to the folder, and store the result.

    Args:
        files: the folder of `TokenizerFiles`.
    """
    try:
        with Tokenizing(PROOF_S, HELPER) as tokenizing:
            result = tokenizing.call("prove", {"source": unproved.folder.to_dict(), "files": str(files)}, PROOF_S)
    except TokenizerError as error:
        logger.warning("tokenizer_not_proved", extra={"model_path": unproved.folder.path, "reason": str(error)})
        return unproved
    if reason := result.get("reason"):
        logger.warning("tokenizer_not_proved", extra={"model_path": unproved.folder.path, "reason": reason})
    try:
        write_private(_proof_file(unproved.folder, files), json.dumps(result).encode())
    except OSError as error:
        logger.warning("tokenizer_proof_not_stored", extra={"reason": str(error)})
    return _proved(unproved, result, files) or unproved


def _proved(unproved: ModelTokenizer, result: dict[str, Any], files: Path) -> ModelTokenizer | None:
    """Return the tokenizer after a proof; None if the file that the proof names no longer exists."""
    if "digest" not in result:
        return unproved
    path = TokenizerFiles(files).path(result["digest"])
    if path is None:
        return None
    fields = result["fields"]
    source = TokenizerSource.of_card(str(path), result["digest"], fields)
    file = replace(source, explain_tools=unproved.folder.explain_tools)
    return replace(unproved, file=file, fields=fields)


def _proof_file(source: TokenizerSource, files: Path) -> Path:
    """Return the path of the result for a folder in its present state."""
    folder = Path(source.path)
    state = hashlib.sha256(json.dumps([_VERSION, source.to_dict(), *map(version, _LIBRARIES)]).encode())
    paths = {path for pattern in _FILES for path in folder.glob(pattern)}
    for path in sorted(paths):
        if path.name not in _IGNORED and path.is_file():
            state.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return files / f"{state.hexdigest()[:32]}.proof.json"
