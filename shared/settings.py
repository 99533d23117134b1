"""Every setting of every process, read from the environment and `.env` (the environment wins).

Names are the same in both places, and `.env.example` lists all of them with these defaults: a test
holds the two together.
"""

from __future__ import annotations

import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.queue import redis_url

ROOT = Path(__file__).resolve().parent.parent
ENV_FILE = Path(os.environ.get("ENV_FILE", ROOT / ".env")).absolute()
RATE = r"^\d+ ?(/|per) ?(\d+ ?)?(second|minute|hour|day|month|year)s?$"
"""A rate as the `limits` package writes it."""

_IN_ORDER: Final = {
    "max_start_within_s": ("start_within_s", "max_start_within_s"),
    "max_deadline_s": ("deadline_s", "max_deadline_s"),
    "log_retention_s": ("log_retention_s", "retention_s"),
}
"""For the later of two variables: which of them must not be more than which."""


class Settings(BaseSettings):
    """One attribute a variable; times are seconds, sizes bytes."""

    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding="utf-8",
        extra="ignore",
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,  # it may be a password
    )

    # Where things are
    data_dir: Path = Field(ROOT / "data", description="Everything that is written: queue, keys, logs, sockets")
    model_path: Path = Field(ROOT / "models/SmolLM2-135M-Instruct", description="The MLX model folder to serve")
    models_file: Path = Field(
        ROOT / "models/catalog.toml", description="The catalog: all models that may be served; absent: MODEL_PATH alone"
    )
    redis_url: str = Field(
        "",
        description="Redis or Valkey to use: `redis://`, `rediss://`, `unix://` or "
        "`sentinel://host,host/0?master=NAME`; empty: one of our own, inside DATA_DIR",
    )
    broker_url: str = Field("", description="Celery's broker, in the same forms; empty: the same as REDIS_URL")

    # The API
    host: str = Field("127.0.0.1", description="Address the API and Flower listen on")
    port: int = Field(8080, ge=1, le=65535, description="Port of the API")
    web_workers: int = Field(1, ge=1, le=64, description="API processes")
    mlxq_api_key: SecretStr = Field(SecretStr(""), description="Key of local use; written on the first run")
    rate_limit: str = Field("100/minute", pattern=RATE, description="Requests a key may send, unless it says otherwise")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="Largest request body")
    max_images: int = Field(16, ge=0, description="Most images of a request")
    max_image_bytes: int = Field(10 * 2**20, ge=1024, description="Largest image file")
    max_image_pixels: int = Field(7680 * 4320, ge=1, description="Most pixels of an image")
    image_urls: bool = Field(
        False,
        description="Also read images from http(s) URLs, together at most MAX_BODY_BYTES, but none of private, "
        "loopback or link-local addresses",
    )
    heartbeat_s: float = Field(15.0, gt=0, description="Idle streams get a comment this often")
    max_wait_s: float = Field(60.0, gt=0, description="Longest wait of a long poll")

    # Jobs
    max_tokens: int = Field(512, ge=1, description="Tokens generated when a request does not say")
    temperature: float = Field(0.0, ge=0, le=2, description="Temperature when a request does not say")
    durable: bool = Field(True, description="Accept a job only when Redis proves it to be on disk; false: trust Redis")
    max_queue: int = Field(10_000, ge=1, description="Jobs that may wait per model; more are refused with 503")
    start_within_s: float = Field(
        24 * 3600.0, gt=0, description="A job that has not started by then expires, when its request does not say"
    )
    max_start_within_s: float = Field(
        7 * 24 * 3600.0, gt=0, description="Most that a request may ask for as start_within_s", validate_default=True
    )
    deadline_s: float = Field(
        24 * 3600.0, gt=0, description="A job that takes longer in all expires, when its request does not say"
    )
    max_deadline_s: float = Field(
        7 * 24 * 3600.0, gt=0, description="Most that a request may ask for as deadline_s", validate_default=True
    )
    retention_s: int = Field(24 * 3600, ge=1, description="Finished jobs are kept this long, with their texts")
    log_retention_s: int | None = Field(
        None, ge=1, description="Their logs, from which streams are read; empty: as long. At most RETENTION_S"
    )
    max_attempts: int = Field(3, ge=1, description="Workers a job may lose before it is failed")

    # The workers
    workers: int = Field(1, ge=1, le=64, description="Worker processes that scripts/serve starts")
    backend: Literal["auto", "fake"] = Field(
        "auto", description="`auto`: what the model folder needs; `fake`: no model, made-up words, for tests"
    )
    worker_models: str = Field(
        "",
        description="Models of the catalog that workers load when they start, with commas between; empty: the default. "
        "With `;` between lists, each worker has its own",
    )
    load_on_demand: bool = Field(
        True,
        description="Load a model of the catalog when a job asks for one that no worker has; false: refuse the job",
    )
    slots: int = Field(32, ge=1, le=1024, description="Jobs decoded at once per worker")
    prefill_step_tokens: int = Field(
        0, ge=0, description="Most tokens of a prompt read between two decode steps; 0: chosen by device"
    )
    speculation_tokens: int = Field(
        16, ge=0, description="Most tokens guessed ahead for a job while few decode and it pays; 0: none"
    )
    memory_limit_bytes: int = Field(
        0, ge=0, description="Memory for a worker's model and caches; jobs wait for it; 0: chosen by device"
    )
    prefix_cache_bytes: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="Of that, for prefixes that later jobs of a key reuse; 0: none; `auto`: a quarter"
    )
    prefix_disk_bytes: int = Field(
        8 * 2**30, ge=0, description="Disk for prefixes in DATA_DIR, where a restarted worker finds them; 0: none"
    )
    lease_s: float = Field(2.0, ge=0.2, description="A worker silent for longer loses its jobs to the others")
    watchdog_s: float = Field(60.0, gt=0, description="An engine without progress for longer ends its process")
    drain_s: float = Field(10.0, ge=0, description="Running jobs get this long at shutdown, then go back to the queue")
    wired_limit: bool = Field(False, description="Let MLX wire model memory on a Mac")

    # Operations
    flower_port: int = Field(5555, ge=1, le=65535, description="Port of Flower")
    flower_user: str = Field("admin", min_length=1, description="Flower's user")
    flower_password: SecretStr = Field(SecretStr(""), description="Flower's password; written on the first run")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Least severe line logged")

    @field_validator("redis_url")
    @classmethod
    def _redis_is_reachable_in_principle(cls, url: str) -> str:
        return url and redis_url.check_store(url)

    @field_validator("broker_url")
    @classmethod
    def _broker_is_reachable_in_principle(cls, url: str) -> str:
        return url and redis_url.check_broker(url)

    @field_validator("max_start_within_s", "max_deadline_s", "log_retention_s")
    @classmethod
    def _in_order(cls, value: float | None, info: ValidationInfo) -> float | None:
        field = str(info.field_name)
        names = _IN_ORDER[field]
        small, large = ({**info.data, field: value}.get(name) for name in names)
        if small is not None and large is not None and small > large:
            raise ValueError(f"{names[0].upper()} ({small:.15g}) is more than {names[1].upper()} ({large:.15g})")
        return value

    @model_validator(mode="after")
    def _paths_are_absolute(self) -> Self:
        # Relative paths are meant from the repository, whatever directory a script is called from.
        object.__setattr__(self, "data_dir", ROOT / self.data_dir.expanduser())
        object.__setattr__(self, "model_path", ROOT / self.model_path.expanduser())
        object.__setattr__(self, "models_file", ROOT / self.models_file.expanduser())
        return self

    @cached_property
    def run_dir(self) -> Path:
        """Sockets, pid files and generated configuration."""
        return self.data_dir / "run"

    @cached_property
    def log_dir(self) -> Path:
        """What supervisord and its children write, a file each."""
        return self.data_dir / "logs"

    @cached_property
    def prefixes_dir(self) -> Path:
        """Prefixes that outlive their worker; all workers of DATA_DIR share it."""
        return self.data_dir / "prefixes"

    @cached_property
    def embedded_redis(self) -> bool:
        """Whether the queue lives in our own Valkey, on a Unix socket inside DATA_DIR."""
        return not self.redis_url

    @cached_property
    def redis_socket(self) -> Path:
        """Socket of the embedded Valkey."""
        return self.run_dir / "valkey.sock"

    @cached_property
    def store_url(self) -> str:
        """URL of the queue's Redis, for `shared.queue.redis.connect`."""
        return self.redis_url or f"unix://{self.redis_socket}"

    @cached_property
    def tickets_url(self) -> str:
        """URL of the broker, for `shared.queue.broker`."""
        return self.broker_url or self.store_url

    @cached_property
    def model_id(self) -> str:
        """The name requests use for the model of MODEL_PATH: its folder's name."""
        return self.model_path.name

    @cached_property
    def keys_file(self) -> Path:
        """Hashed API keys."""
        return self.data_dir / "keys.json"


def load_settings() -> Settings:
    """Read the environment and `.env` now.

    Raises:
        pydantic.ValidationError: naming each variable that does not fit.
    """
    return Settings()


def load_or_exit() -> Settings:
    """The same for a process that can only end when a variable does not fit: it says so, a line each."""
    try:
        return load_settings()
    except ValidationError as error:
        sys.exit(faults(error))


def faults(error: ValidationError) -> str:
    """A line for each variable that does not fit."""
    return "\n".join(
        f"{'.'.join(map(str, each['loc'])).upper() or 'settings'}: {each['msg'].removeprefix('Value error, ')}"
        for each in error.errors()
    )
