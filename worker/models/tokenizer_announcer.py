"""How a worker brings its model's tokenizer to API hosts: the proof first, then the file, over a connection of its own.

A tokenizer has megabytes: on the lease's connection, a slow network would keep the lease from being renewed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from redis import RedisError

from shared.models.registry import ModelCard
from shared.queue.redis import connect, passes
from shared.settings import Settings
from shared.tokenizing.files import TokenizerStore
from shared.tokenizing.messages import TokenizerSource
from worker.models.tokenizer_proof import ModelTokenizer, prove, remembered, unproved

logger = logging.getLogger(__name__)

_UPLOAD_S: Final = 60.0
"""Bound on one upload; at 1 MB/s the largest tokenizers take ten seconds."""
_RETRY_S: Final = 2.0


class TokenizerAnnouncer:
    """One model's tokenizer, on its way to API hosts. No method waits for the proof or the network.

    Args:
        changed: called when the model's card has changed, because the proof is there.
    """

    def __init__(self, settings: Settings, changed: Callable[[], object]) -> None:
        self._settings = settings
        self._changed = changed
        self._found: ModelTokenizer | None = None
        self._uploading = threading.Lock()
        self._closed = threading.Event()

    @property
    def sources(self) -> tuple[TokenizerSource, ...]:
        """Where a helper may have the tokenizer from, best first; none before `begin`."""
        return self._found.sources if self._found else ()

    def card(self, card: ModelCard) -> ModelCard:
        """The model's card, with its tokenizer once that is proved."""
        return self._found.card(card) if self._found else card

    def begin(self, folder: Path, card: ModelCard, defaults: dict[str, Any] | None) -> None:
        """The model is loaded: take what was proved of its folder before, or begin to prove it.

        Args:
            defaults: `worker.models.load.tokenizer_defaults`.
        """
        plain = unproved(folder, card, defaults)
        self._found = remembered(plain, self._settings.tokenizers_dir)
        if self._found is None:
            self._found = plain
            threading.Thread(target=self._prove, args=[plain], name="tokenizer-proof", daemon=True).start()

    def upload(self) -> None:
        """Redis lacks the tokenizer that the card names: bring it there."""
        if self._uploading.acquire(blocking=False):
            threading.Thread(target=self._upload, name="tokenizer-upload", daemon=True).start()

    def close(self) -> None:
        """Begin nothing more."""
        self._closed.set()

    def _prove(self, plain: ModelTokenizer) -> None:
        try:
            found = prove(plain, self._settings.tokenizers_dir)
        except Exception:
            logger.exception("tokenizer_not_proved", extra={"model_path": plain.folder.path})
            return
        if not self._closed.is_set():
            self._found = found
            self._changed()

    def _upload(self) -> None:
        try:
            file = self._found.file if self._found else None
            if file is not None:
                self._put(file.digest, Path(file.path).read_bytes())
        except (OSError, RedisError) as error:
            logger.warning("tokenizer_not_announced", extra={"reason": str(error)})
        finally:
            self._uploading.release()

    def _put(self, digest: str, content: bytes) -> None:
        client = connect(
            self._settings.store_url, timeout_s=_UPLOAD_S, retries=0, connections=1, decode_responses=False
        )
        try:
            while not self._closed.is_set():
                try:
                    return TokenizerStore(client).put(digest, content)
                except RedisError as error:
                    if not passes(error):
                        raise
                    logger.warning("tokenizer_not_announced_yet", extra={"reason": str(error)})
                    self._closed.wait(_RETRY_S)
        finally:
            client.close()
