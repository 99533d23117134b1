"""Where the service keeps its data, and what else follows from the settings."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shared.redis import urls
from shared.redis.urls import Tls

ROOT: Final = Path(__file__).resolve().parent.parent
TLS_FILES: Final = ("redis_ca_file", "redis_cert_file", "redis_key_file")


class Locations:
    """The part of `shared.settings.Settings` that derives paths, URLs and names."""

    if TYPE_CHECKING:
        data_dir: Path
        files_dir: Path | None
        responses_dir: Path | None
        archive_url: str
        model_path: Path
        models_file: Path
        backend: str
        redis_url: str
        broker_url: str
        redis_ca_file: Path | None
        redis_cert_file: Path | None
        redis_key_file: Path | None

    @cached_property
    def run_dir(self) -> Path:
        """Sockets, pid files and generated configuration."""
        return self.data_dir / "run"

    def create_run_dir(self) -> None:
        """Create DATA_DIR and `run_dir` with mode 700. Raises OSError."""
        for folder in (self.data_dir, self.run_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @cached_property
    def log_dir(self) -> Path:
        """Log files of supervisord and its child processes."""
        return self.data_dir / "logs"

    @cached_property
    def files_path(self) -> Path:
        """Uploaded files and the results of batches."""
        return self.files_dir or self.data_dir / "files"

    @cached_property
    def responses_path(self) -> Path:
        """Stored responses, if they are on disk."""
        return self.responses_dir or self.data_dir / "responses"

    @cached_property
    def models_dir(self) -> Path:
        """The folder of the catalog, to which models are downloaded."""
        return self.models_file.parent

    @cached_property
    def archive_file(self) -> Path | None:
        """The archive's database; None if there is no archive. A relative path is in DATA_DIR."""
        if self.archive_url == "off":
            return None
        name = "archive.sqlite3" if self.archive_url == "auto" else self.archive_url.removeprefix("sqlite:///")
        return self.data_dir / name

    @cached_property
    def prefixes_dir(self) -> Path:
        """Cached prefixes on disk, shared by all workers of DATA_DIR."""
        return self.data_dir / "prefixes"

    @cached_property
    def batching_dir(self) -> Path:
        """What workers measured about the batching of each model."""
        return self.data_dir / "batching"

    @cached_property
    def tokenizers_dir(self) -> Path:
        """Tokenizer files, shared by the API and the workers of this host."""
        return self.data_dir / "tokenizers"

    @cached_property
    def redis_socket(self) -> Path:
        """Socket of the embedded Valkey."""
        return self.run_dir / "valkey.sock"

    @cached_property
    def keys_file(self) -> Path:
        """Hashed API keys."""
        return self.data_dir / "keys.json"

    @property
    def modelless(self) -> bool:
        """Whether workers run without a model."""
        return self.backend != "auto"

    @cached_property
    def embedded_redis(self) -> bool:
        """Whether the queue is in the embedded Valkey, which listens on a Unix socket in DATA_DIR."""
        return not self.redis_url

    @cached_property
    def store_url(self) -> str:
        """URL of the queue's Redis, for `shared.redis.client.connect`."""
        return urls.with_tls_files(self.redis_url, self._tls) or f"unix://{self.redis_socket}"

    @cached_property
    def celery_url(self) -> str:
        """URL of the broker, for `shared.queue.broker`."""
        return urls.with_tls_files(self.broker_url, self._tls) or self.store_url

    @property
    def _tls(self) -> Tls:
        files = (self.redis_ca_file, self.redis_cert_file, self.redis_key_file)
        return Tls(*(str(file) if file else None for file in files))

    @cached_property
    def model_id(self) -> str:
        """Id of the model of MODEL_PATH: the name of its folder."""
        return self.model_path.name
