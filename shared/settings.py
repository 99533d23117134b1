"""Every setting of every process, read from the environment and from `.env`; the environment has precedence.

Names are the same in both. `.env.example` and `docs/configuration.md` are generated from this class by
`python -m scripts.docs.settings`; a test compares them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from shared import locations
from shared.locations import Locations
from shared.settings_checks import SettingsChecks

ROOT = locations.ROOT
ENV_FILE = Path(os.environ.get("ENV_FILE", ROOT / ".env")).absolute()
RATE = r"^\d+ ?(/|per) ?(\d+ ?)?(second|minute|hour|day|month|year)s?$"
"""A rate in the format of the `limits` package."""


class Settings(Locations, SettingsChecks):
    """One attribute per variable. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding="utf-8",
        extra="ignore",
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,  # values may be passwords
    )

    # Locations
    data_dir: Path = Field(
        ROOT / "data",
        description="Folder for all data that the service writes: queue, API keys, logs, sockets and cached prefixes",
    )
    model_path: Path = Field(
        ROOT / "models/SmolLM2-135M-Instruct", description="MLX model folder to serve as the default model"
    )
    models_file: Path = Field(
        ROOT / "models/catalog.toml",
        description="Catalog of models that may be served. Without the file, only the model of MODEL_PATH is served",
    )
    redis_url: str = Field(
        "",
        description="Redis or Valkey server for the queue: `redis://`, `rediss://` (TLS), `unix://` or "
        "`sentinel://host,host/0?master=NAME` (with TLS: `&tls=true`). Empty: start an embedded Valkey in DATA_DIR",
    )
    redis_maxmemory_bytes: Literal["auto"] | Annotated[int, Field(ge=64 * 2**20)] = Field(
        "auto",
        description="Memory limit (`maxmemory`) of the embedded Valkey. `auto`: a quarter of the "
        "machine's memory, at least 256 MiB and at most 4 GiB",
    )
    redis_ca_file: Path | None = Field(
        None, description="PEM file with the CAs that may sign Redis's certificate, for TLS. Empty: the system's"
    )
    redis_cert_file: Path | None = Field(
        None, description="Certificate that clients present to Redis, in PEM format, for TLS. Empty: none"
    )
    redis_key_file: Path | None = Field(
        None, description="Private key of REDIS_CERT_FILE. Empty: it is in the same file"
    )
    broker_url: str = Field(
        "",
        description="Celery broker, in the same forms as REDIS_URL, or RabbitMQ: `amqp://USER:PASSWORD@host:5672//`. "
        "Empty: use REDIS_URL",
    )

    # API
    host: str = Field("127.0.0.1", description="Address that the API listens on")
    port: int = Field(8080, ge=1, le=65535, description="Port of the API")
    web_workers: int = Field(1, ge=1, le=64, description="Number of API processes")
    mlxq_api_key: SecretStr = Field(
        SecretStr(""), description="API key for local use. The first run of scripts/serve writes one"
    )
    rate_limit: str = Field(
        "100/minute",
        pattern=RATE,
        description="Rate limit for API keys that have no limit of their own. Requests with GET do not count: see "
        "READ_RATE_LIMIT",
    )
    read_rate_limit: str = Field(
        "6000/minute",
        pattern=RATE,
        description="Rate limit for requests with GET, such as polls and streams, of each API key. A key whose "
        "limit for other requests is higher has that one",
    )
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="Maximum size of a request body")
    body_memory_bytes: int = Field(
        256 * 2**20,
        ge=1024,
        description="Maximum bytes of request bodies that one API process receives or checks at a time. "
        "Further requests are rejected with 503. At least MAX_BODY_BYTES",
        validate_default=True,
    )
    max_images: int = Field(16, ge=0, description="Maximum number of images per request")
    max_image_bytes: int = Field(10 * 2**20, ge=1024, description="Maximum size of one image file")
    max_image_pixels: int = Field(7680 * 4320, ge=1, description="Maximum number of pixels in one image")
    image_urls: bool = Field(
        False,
        description="Allow images from http(s) URLs, at most MAX_BODY_BYTES per request. Private, "
        "loopback and link-local addresses are never contacted",
    )
    trusted_proxies: str = Field(
        "",
        description="Addresses and networks of reverse proxies, separated by commas. Only their header "
        "`X-Forwarded-For` is read, for logs and for limits per address",
    )
    max_connections_per_address: int = Field(
        2048, ge=1, description="Maximum connections from one address to one API process"
    )
    max_streams_per_key: int = Field(
        1024,
        ge=1,
        description="Maximum streams and waiting requests of one API key in one API process. Further "
        "ones are rejected with 429",
    )
    cors_origins: str = Field(
        "",
        description="Origins of web pages that may call the API from a browser, such as `https://chat.example.com`, "
        "separated by commas. `*`: all. Empty: none",
    )
    metrics_public: bool = Field(
        False,
        description="Show `/metrics` to everyone. `false`: only to requests with an API key, and to those from the "
        "machine of the API that no proxy has forwarded",
    )
    heartbeat_s: float = Field(15.0, gt=0, description="Interval between heartbeats on idle streams")
    max_wait_s: float = Field(60.0, gt=0, description="Maximum duration of a long poll")

    # Files and batches
    files_dir: Path | None = Field(
        None,
        description="Folder for uploaded files and for the results of batches. Several API hosts must share it. "
        "Empty: `files` in DATA_DIR",
    )
    max_file_bytes: int = Field(200 * 2**20, ge=1024, description="Maximum size of an uploaded file")
    files_bytes_per_key: int = Field(
        4 * 2**30, ge=1024, description="Maximum size of all files of an API key. Further uploads are rejected with 413"
    )
    files_retention_s: int = Field(
        30 * 24 * 3600,
        ge=3600,
        description="How long uploaded files, the results of batches and ended batches are kept",
    )

    batch_lookahead: int = Field(
        128, ge=1, le=10_000, description="Maximum number of unfinished jobs of one batch; its other lines wait on disk"
    )

    # Archive
    archive_url: str = Field(
        "auto",
        description="Database for ended jobs and usage beyond RETENTION_S. `auto`: `archive.sqlite3` in DATA_DIR; "
        "`sqlite:///` and a path: another file; `off`: none",
    )
    archive_content: Literal["all", "output", "none"] = Field(
        "all",
        description="What the archive stores of a job besides its record. `all`: the request without images, and "
        "the text; `output`: only the text; `none`: neither",
    )
    archive_retention_s: int = Field(90 * 24 * 3600, ge=60, description="How long ended jobs are kept in the archive")
    archive_max_bytes: int = Field(
        20 * 2**30, ge=2**20, description="Maximum size of the archive. The jobs that ended first are deleted"
    )

    # Responses
    responses_store: Literal["disk", "redis"] = Field(
        "disk", description="Where stored responses are: `disk` or `redis`"
    )
    responses_dir: Path | None = Field(
        None,
        description="Folder for stored responses. Several API hosts must share it. Empty: `responses` in DATA_DIR",
    )
    responses_retention_s: int = Field(
        30 * 24 * 3600,
        ge=1,
        description="How long a stored response is kept after it was created or continued",
    )
    responses_bytes_per_key: int = Field(
        2**30,
        ge=1024,
        description="Maximum size of the stored responses of an API key. If they have more, the oldest are deleted",
    )

    # Webhooks
    webhook_networks: str = Field(
        "",
        description="Addresses and networks, separated by commas, that webhooks may reach without being public",
    )
    webhook_timeout_s: float = Field(15.0, gt=0, le=120, description="Time limit for one attempt to deliver a webhook")
    webhook_attempts: int = Field(
        10, ge=1, le=100, description="Attempts to deliver a webhook. With the default pauses they take about 20 hours"
    )
    webhook_backoff_s: float = Field(
        5.0, gt=0, description="Pause after the first failed attempt. Each further one is 4 times longer, up to 6 hours"
    )

    # Jobs
    template_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Time limit for applying the chat template and tokenising a prompt, plus 5 s per MiB "
        "of prompt. Slower prompts are rejected",
    )
    special_tokens_in_text: bool = Field(
        False,
        description="Whether special tokens in messages, such as `<|im_end|>`, are tokens. `false`: they are text, so "
        "that a text cannot end its message",
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Default for max_tokens in requests. Empty: the rest of the model's context"
    )
    temperature: float = Field(
        0.0, ge=0, le=2, description="Default for temperature in requests to models whose files declare none"
    )
    durable: bool = Field(
        True,
        description="Accept a job only if Redis confirms that it is on disk. `false`: as soon as Redis answers",
    )
    max_queue: int = Field(
        10_000, ge=1, description="Maximum number of waiting jobs per model. Further jobs are rejected with 503"
    )
    max_queue_per_key: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Maximum number of waiting jobs per model of an API key that has no limit of its own. Further "
        "jobs are rejected with 429. `auto`: a quarter of MAX_QUEUE",
    )
    max_running_per_key: int = Field(
        0,
        ge=0,
        description="Maximum number of running jobs, of all models, of an API key that has no limit of its own. "
        "Further jobs wait. 0: unlimited",
    )
    tokens_per_minute_per_key: int = Field(
        0,
        ge=0,
        description="Tokens of prompts and answers per minute of an API key that has no limit of its own. Further jobs "
        "are rejected with 429. 0: unlimited",
    )
    tokens_per_day_per_key: int = Field(
        0,
        ge=0,
        description="Tokens of prompts and answers per day (UTC) of an API key that has no limit of its own. Further "
        "jobs are rejected with 429. 0: unlimited",
    )
    queue_bytes: Literal["auto"] | Annotated[int, Field(ge=2**20)] = Field(
        "auto",
        description="Maximum Redis memory that all unfinished jobs may reserve. Further jobs are "
        "rejected with 503. `auto`: half of Redis's memory limit, or an eighth of the memory "
        "of Redis's machine if there is no limit",
    )
    queue_bytes_per_key: Literal["auto"] | Annotated[int, Field(ge=2**20)] = Field(
        "auto",
        description="Maximum Redis memory that the unfinished jobs of one API key may reserve. Further "
        "jobs are rejected with 429. `auto`: a quarter of QUEUE_BYTES",
    )
    failed_request_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Maximum Redis memory for the requests of ended jobs, with images. The oldest are deleted first",
    )
    keep_requests: Literal["failed", "all"] = Field(
        "failed",
        description="Which ended jobs keep their request, so that it can be read and run again: `failed` or `all`, "
        "within FAILED_REQUEST_BYTES",
    )
    prompt_access: Literal["admin", "owner", "none"] = Field(
        "admin",
        description="Who can read the prompt and the images of a job. `admin`: its API key and keys with the scope "
        "`admin`; `owner`: only its API key; `none`: nobody",
    )
    start_within_s: float = Field(
        24 * 3600.0,
        gt=0,
        description="Default for start_within_s in requests: a job that has not started by then expires",
    )
    max_start_within_s: float = Field(
        7 * 24 * 3600.0, gt=0, description="Maximum for start_within_s in requests", validate_default=True
    )
    deadline_s: float = Field(
        24 * 3600.0,
        gt=0,
        description="Default for deadline_s in requests: a job that takes longer, including waiting, expires",
    )
    max_deadline_s: float = Field(
        7 * 24 * 3600.0, gt=0, description="Maximum for deadline_s in requests", validate_default=True
    )
    retention_s: int = Field(24 * 3600, ge=1, description="How long finished jobs and their output are kept")
    log_retention_s: int | None = Field(
        None,
        ge=1,
        description="How long the event logs of finished jobs are kept; streams are read from them. At "
        "most RETENTION_S. Empty: RETENTION_S",
    )
    max_attempts: int = Field(
        3, ge=1, description="Number of worker crashes with a job as the only suspect after which the job fails"
    )

    # Workers
    workers: int = Field(1, ge=1, le=64, description="Number of worker processes that scripts/serve starts")
    backend: Literal["auto", "fake", "scripted"] = Field(
        "auto",
        description="Model runner. `auto`: chosen by the model folder. For tests, without a model: `fake` generates "
        "random words, `scripted` gives the answers in SCRIPT_FILE",
    )
    script_file: Path | None = Field(
        None,
        description="Answers of `BACKEND=scripted`, one JSON object per line; see `worker/runner/scripted.py`",
    )
    worker_models: str = Field(
        "",
        description="Catalog models that workers load when they start, separated by commas. Use `;` to "
        "separate the lists of different worker processes. Empty: the default model",
    )
    load_on_demand: bool = Field(
        True,
        description="Load a catalog model when a job asks for it and no worker has it. `false`: reject the job",
    )
    model_idle_s: float = Field(
        0,
        ge=0,
        description="Time without jobs after which a worker unloads a model that it loaded on request. Models of "
        "WORKER_MODELS and pinned ones stay. 0: never. Needs LOAD_ON_DEMAND",
    )
    slots: int = Field(32, ge=1, le=1024, description="Maximum number of rows in a model's decode batch")
    reserved_rows: int | None = Field(
        None,
        ge=0,
        description="Number of the SLOTS rows that jobs of the class `batch` leave free, so that other jobs start at "
        "once. Empty: a sixteenth of them",
    )
    prefill_step_tokens: int = Field(
        0,
        ge=0,
        description="Maximum tokens of a long prompt's prefill chunk while rows decode. 0: chosen for the device",
    )
    speculation_tokens: int = Field(
        16, ge=0, description="Maximum number of draft tokens per row and step in speculative decoding. 0: off"
    )
    memory_limit_bytes: int = Field(
        0, ge=0, description="Memory limit for the models and caches of one worker process. 0: chosen for the device"
    )
    prefix_cache_bytes: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="Maximum memory for a model's prefix cache. 0: off. `auto`: a quarter of the memory for caches",
    )
    adapter_bytes: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="Maximum memory for a model's adapters, at most half of that for caches. `auto`: an eighth of it",
    )
    adapter_max_rank: int = Field(64, ge=1, le=1024, description="Maximum rank of adapters that requests name")
    prefix_disk_bytes: int = Field(
        8 * 2**30,
        ge=0,
        description="Maximum disk space in DATA_DIR for cached prefixes; workers reuse them after a restart. 0: off",
    )
    lease_s: float = Field(
        2.0,
        ge=0.2,
        description="Lifetime of a worker's lease. If it is not renewed in time, the worker's jobs return to the queue",
    )
    watchdog_s: float = Field(
        60.0, gt=0, description="A worker process that makes no progress for this long terminates itself"
    )
    drain_s: float = Field(
        10.0, ge=0, description="Time that running jobs get to finish at shutdown before they return to the queue"
    )
    wired_limit: bool = Field(False, description="Let MLX wire the model's memory on a Mac")

    # Operation
    flower_host: str = Field(
        "127.0.0.1", description="Address that Flower listens on. It serves plain HTTP; see docs/security.md"
    )
    flower_port: int = Field(5555, ge=1, le=65535, description="Port of Flower")
    flower_user: str = Field("admin", min_length=1, description="User name for Flower")
    flower_password: SecretStr = Field(
        SecretStr(""), description="Password for Flower. The first run of scripts/serve writes one"
    )
    log_level: str = Field(
        "INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Minimum log level: DEBUG, INFO, WARNING or ERROR"
    )
    log_prompts: bool = Field(
        False, description="Log the prompt or the messages of each accepted job. Otherwise no log contains their text"
    )
    otel_exporter_otlp_endpoint: str = Field(
        "",
        pattern="^(https?://[^/]+.*)?$",
        description="OpenTelemetry collector that receives traces by OTLP over HTTP, such as http://127.0.0.1:4318. "
        "Empty: no traces. See docs/observability.md",
    )
    otel_exporter_otlp_headers: SecretStr = Field(
        SecretStr(""), description="Headers for the collector, as `name=value,name=value`"
    )
