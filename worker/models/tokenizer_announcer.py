"""Makes a model's tokenizer available to API hosts: proves that its file is equivalent, then uploads it to Redis.

A tokenizer is several megabytes. It is uploaded on a separate connection: on the lease's connection, a slow network
would delay the renewal of the lease.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from redis import RedisError

from shared.models.registry import ModelCard
from shared.redis.client import connect, passes
from shared.settings import Settings
from shared.tokenizing.files import TokenizerStore
from shared.tokenizing.messages import TokenizerSource
from worker.models.tokenizer_proof import ModelTokenizer, of_file, prove, remembered, unproved

logger = logging.getLogger(__name__)

_UPLOAD_S: Final = 60.0
"""Time limit for one upload. At 1 MB/s the largest tokenizers take ten seconds."""
_RETRY_S: Final = 2.0


class TokenizerAnnouncer:
    """Proves and uploads one model's tokenizer. No method waits for the proof or the network.

    Args:
        on_change: called when the proof has changed the model's card.
    """

    def __init__(self, settings: Settings, on_change: Callable[[], object]) -> None:
        self._settings = settings
        self._on_change = on_change
        self._tokenizer: ModelTokenizer | None = None
        self._uploading = threading.Lock()
        self._closed = threading.Event()

    @property
    def sources(self) -> tuple[TokenizerSource, ...]:
        """Sources from which a helper can load the tokenizer, best first; none before `begin`."""
        return self._tokenizer.sources if self._tokenizer else ()

    def card(self, card: ModelCard) -> ModelCard:
        """Return the model's card, with its tokenizer once that is proved."""
        return self._tokenizer.card(card) if self._tokenizer else card

    def begin(self, folder: Path, card: ModelCard, defaults: dict[str, Any] | None) -> None:
        """Use an earlier proof for the folder of a loaded model, or start a new one.

        Args:
            defaults: `worker.models.load.tokenizer_defaults`.
        """
        candidate = unproved(folder, card, defaults)
        self._tokenizer = remembered(candidate, self._settings.tokenizers_dir)
        if self._tokenizer is None:
            self._tokenizer = candidate
            threading.Thread(target=self._prove, args=[candidate], name="tokenizer-proof", daemon=True).start()

    def begin_file(self, folder: Path) -> None:
        """Use the folder's tokenizer.json, which needs no proof: this worker reads nothing else."""
        self._tokenizer = of_file(folder, self._settings.tokenizers_dir)

    def upload(self) -> None:
        """Upload the tokenizer that the card names, because Redis does not have it."""
        if self._uploading.acquire(blocking=False):
            threading.Thread(target=self._upload, name="tokenizer-upload", daemon=True).start()

    def close(self) -> None:
        """Stop retrying uploads, and ignore a proof under way."""
        self._closed.set()

    def _prove(self, candidate: ModelTokenizer) -> None:
        try:
            proved = prove(candidate, self._settings.tokenizers_dir)
        except Exception:
            logger.exception("tokenizer_not_proved", extra={"model_path": candidate.folder.path})
            return
        if not self._closed.is_set():
            self._tokenizer = proved
            self._on_change()

    def _upload(self) -> None:
        try:
            file = self._tokenizer.file if self._tokenizer else None
            if file is not None:
                self._put(file.digest, Path(file.path).read_bytes())
        except (OSError, RedisError) as error:
            logger.warning("tokenizer_not_uploaded", extra={"reason": str(error)})
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
                    logger.warning("tokenizer_upload_delayed", extra={"reason": str(error)})
                    self._closed.wait(_RETRY_S)
        finally:
            client.close()
