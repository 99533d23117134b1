"""The metrics of workers: which numbers they report, and under which names Prometheus gets them.

Workers report through Redis, so one page has all of them, on whichever machine they run. Their series are labelled with
the name of the process, which restarts do not change. Counters start at 0 after a restart, which Prometheus handles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from shared.histogram import Histogram
from shared.jobs.request import EMBED, RERANK
from shared.models.registry import WorkerInfo

PREFIX: Final = "mlxq_worker_"
PROVIDER: Final = "mlxq"
"""Value of OpenTelemetry's attribute `gen_ai.provider.name`."""
_OPERATIONS: Final = {EMBED: "embeddings", RERANK: "rerank"}
_GENERATE: Final = "generate_content"
"""Values of `gen_ai.operation.name` by kind of model. Workers do not tell conversations from text completions."""
_SEMANTIC_LABELS: Final = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")


class WorkerMetric(NamedTuple):
    """A number that workers report.

    Attributes:
        name: without the prefix; ends in `_total` if it is a counter.
    """

    name: str
    help: str


WORKER_METRICS: Final = {
    "slots": WorkerMetric("slots", "Maximum rows in the decode batch"),
    "slots_used": WorkerMetric("slots_used", "Rows in the batch"),
    "claims_total": WorkerMetric("claims_total", "Jobs claimed"),
    "claimed_jobs": WorkerMetric(
        "claimed_jobs", "Jobs that the worker has claimed and not finished, including those in the batch"
    ),
    "attempts_started_total": WorkerMetric("attempts_started_total", "Attempts started: jobs admitted to the batch"),
    "batch_size": WorkerMetric("batch_size", "Rows that got a token in the last step"),
    "batch_rows_total": WorkerMetric(
        "batch_rows_total", "Rows that got a token, summed over all steps; per step it is the mean batch size"
    ),
    "steps": WorkerMetric("engine_steps_total", "Engine steps"),
    "generated_tokens": WorkerMetric("output_tokens_total", "Tokens generated"),
    "prompt_tokens": WorkerMetric(
        "prefilled_tokens_total", "Prompt tokens prefilled, excluding those from the prefix cache"
    ),
    "tokens_per_s": WorkerMetric("output_tokens_per_second", "Generated tokens per second over the last minute"),
    "engine_idle_s": WorkerMetric("engine_stalled_seconds", "Seconds without progress while there are rows"),
    "publisher_backlog": WorkerMetric("publisher_backlog", "Jobs with output that Redis has not confirmed yet"),
    "preemptions_total": WorkerMetric("preemptions_total", "Rows preempted because memory ran short"),
    "batch_preemptions_total": WorkerMetric(
        "batch_preemptions_total", "Rows of the class batch preempted because a row of another class waited"
    ),
    "prefill_chunk_tokens": WorkerMetric(
        "prefill_chunk_tokens", "Tokens of the last prefill chunk that ran together with decoding rows"
    ),
    "length_buckets": WorkerMetric("length_buckets", "Length buckets in use; each costs one forward pass per step"),
    "load_s": WorkerMetric("load_duration_seconds", "Seconds that loading the model took"),
    "load_progress": WorkerMetric("load_progress_ratio", "Fraction of the model that is loaded, 0 to 1"),
    "model_bytes": WorkerMetric("model_bytes", "Bytes of the model's weights"),
    "pinned": WorkerMetric("pinned", "1 if the model is pinned"),
    "unused_s": WorkerMetric("unused_seconds", "Seconds since the model last had a job"),
    "reserved_rows": WorkerMetric("reserved_rows", "Rows that jobs of the class batch leave free"),
    "kv_bytes": WorkerMetric("kv_bytes", "Bytes of the KV caches of all rows"),
    "memory_active_bytes": WorkerMetric("memory_active_bytes", "Bytes in use by MLX in the worker process"),
    "memory_spare_bytes": WorkerMetric(
        "memory_spare_bytes", "Bytes of free memory that MLX keeps for reuse in the worker process"
    ),
    "memory_peak_bytes": WorkerMetric("memory_peak_bytes", "Peak of the bytes in use by MLX in the worker process"),
    "resident_memory_bytes": WorkerMetric("resident_memory_bytes", "Resident memory of the worker process"),
    "threads": WorkerMetric("threads", "Threads of the worker process"),
    "open_files": WorkerMetric("open_files", "Open file descriptors of the worker process"),
    "prefix_cache_bytes": WorkerMetric("prefix_cache_bytes", "Bytes of cached prefixes in memory"),
    "prefix_cache_entries": WorkerMetric("prefix_cache_entries", "Runs of tokens in the prefix trees"),
    "prefix_cache_lookups_total": WorkerMetric(
        "prefix_cache_lookups_total", "Prompts for which a cached prefix was looked up"
    ),
    "prefix_cache_hits_total": WorkerMetric("prefix_cache_hits_total", "Prompts for which a cached prefix was found"),
    "prefix_cache_tokens_total": WorkerMetric(
        "prefix_cache_tokens_total", "Prompt tokens that came from the prefix cache"
    ),
    "prefix_disk_bytes": WorkerMetric("prefix_disk_bytes", "Bytes of cached prefixes on disk"),
    "prefix_disk_read_blocks_total": WorkerMetric(
        "prefix_disk_read_blocks_total", "Blocks of 128 tokens read from disk"
    ),
    "prefix_disk_written_blocks_total": WorkerMetric(
        "prefix_disk_written_blocks_total", "Blocks of 128 tokens written to disk"
    ),
    "speculation_drafted_tokens_total": WorkerMetric(
        "speculation_drafted_tokens_total", "Draft tokens that were verified"
    ),
    "speculation_accepted_tokens_total": WorkerMetric(
        "speculation_accepted_tokens_total", "Draft tokens that were accepted"
    ),
    "inputs_total": WorkerMetric("inputs_total", "Inputs of embedding and rerank jobs that were computed"),
    "adapter_slots": WorkerMetric("adapter_slots", "Adapters that fit into memory at the same time"),
    "adapters_loaded": WorkerMetric("adapters_loaded", "Adapters in memory"),
    "adapter_bytes": WorkerMetric("adapter_bytes", "Bytes that are reserved for adapters"),
    "adapter_loads_total": WorkerMetric("adapter_loads_total", "Adapters loaded because a job named them"),
    "adapter_evictions_total": WorkerMetric(
        "adapter_evictions_total", "Adapters dropped from memory to make room for another"
    ),
    "images_encoded_total": WorkerMetric("images_encoded_total", "Images processed by the vision encoder"),
    "image_cache_hits_total": WorkerMetric("image_cache_hits_total", "Images whose encoding was found in the cache"),
    "image_cache_bytes": WorkerMetric("image_cache_bytes", "Bytes of cached image encodings"),
}
"""The metrics of the numbers that workers report in `WorkerInfo.stats`. docs/metrics.md has the same texts."""

FORMER_NAMES: Final = {
    "mlxq_worker_steps": "steps",
    "mlxq_worker_generated_tokens": "generated_tokens",
    "mlxq_worker_prompt_tokens": "prompt_tokens",
    "mlxq_worker_tokens_per_s": "tokens_per_s",
    "mlxq_worker_engine_idle_s": "engine_idle_s",
    "mlxq_worker_load_s": "load_s",
    "mlxq_worker_load_progress": "load_progress",
}
"""Former names, which dashboards may still use. They will be removed in the release after the first."""


class HistogramMetric(NamedTuple):
    """A histogram that workers report.

    Attributes:
        name: with its unit. Names with `gen_ai_` are OpenTelemetry's.
        by_priority: whether there is one for each class of jobs.
    """

    name: str
    help: str
    by_priority: bool = False


HISTOGRAMS: Final = {
    "queue_wait": HistogramMetric(
        "mlxq_queue_wait_seconds", "Time from the acceptance of a job to its first admission to a batch", True
    ),
    "time_to_first_token": HistogramMetric(
        "gen_ai_server_time_to_first_token_seconds", "Time from the acceptance of a job to its first token", True
    ),
    "time_per_output_token": HistogramMetric(
        "gen_ai_server_time_per_output_token_seconds",
        "Mean time per token after the first, of jobs that succeeded",
        True,
    ),
    "request_duration": HistogramMetric(
        "gen_ai_server_request_duration_seconds", "Time from the acceptance of a job to its end, if it succeeded", True
    ),
    "prefill": HistogramMetric(
        "mlxq_prefill_seconds", "Time from the admission to the batch until the prompt is in the cache"
    ),
    "inter_token_latency": HistogramMetric(
        "mlxq_inter_token_latency_seconds", "Time between two consecutive tokens of a row"
    ),
    "redis_write": HistogramMetric(
        "mlxq_redis_write_seconds", "Duration of the call that writes the output of a step to Redis"
    ),
}
"""The metrics of `WorkerInfo.histograms`. docs/metrics.md has the same texts."""


def worker_metrics(workers: Iterable[WorkerInfo], kinds: Mapping[str, str]) -> Iterator[Metric]:
    """Yield what workers report.

    Args:
        kinds: the kind of each model.
    """
    # The card of a dead process can still exist when its successor announces itself: the newest one counts.
    newest = {(each.node, each.model): each for each in sorted(workers, key=lambda each: each.heartbeat_at)}
    live = [worker for _, worker in sorted(newest.items())]
    yield from _numbers(live)
    yield from _former_names(live)
    yield from _histograms(live, kinds)


def _numbers(workers: Iterable[WorkerInfo]) -> Iterable[Metric]:
    families: dict[str, Metric] = {}
    for worker in workers:
        for name, value in {"slots": worker.slots, "slots_used": worker.slots_used, **worker.stats}.items():
            metric = WORKER_METRICS.get(name) or WorkerMetric(name, f"As a worker reports it: {name}")
            _family(families, PREFIX + metric.name, metric.help).add_metric([worker.node, worker.model], value)  # type: ignore[attr-defined]
    return families.values()


def _family(families: dict[str, Metric], metric: str, help_text: str) -> Metric:
    kind = CounterMetricFamily if metric.endswith("_total") else GaugeMetricFamily
    name = metric.removesuffix("_total")
    return families.setdefault(name, kind(name, help_text, labels=["worker", "model"]))


def _former_names(workers: Iterable[WorkerInfo]) -> Iterator[Metric]:
    cards = [*workers]
    for former, stat in FORMER_NAMES.items():
        help_text = f"Deprecated, use {PREFIX}{WORKER_METRICS[stat].name}"
        family = GaugeMetricFamily(former, help_text, labels=["worker", "model"])
        for worker in cards:
            if stat in worker.stats:
                family.add_metric([worker.node, worker.model], worker.stats[stat])
        if family.samples:
            yield family


def _histograms(workers: Iterable[WorkerInfo], kinds: Mapping[str, str]) -> Iterable[Metric]:
    families: dict[str, HistogramMetricFamily] = {}
    for worker in workers:
        for histogram in worker.histograms:
            metric = HISTOGRAMS.get(histogram.name)
            if metric is None:  # of a newer version
                continue
            family = families.setdefault(
                metric.name, HistogramMetricFamily(metric.name, metric.help, labels=_labels(metric))
            )
            operation = _OPERATIONS.get(kinds.get(worker.model, ""), _GENERATE)
            values = _values(metric, worker, operation, histogram.priority)
            family.add_metric(values, _buckets(histogram), histogram.sum)
    return families.values()


def _labels(metric: HistogramMetric) -> list[str]:
    is_semantic = metric.name.startswith("gen_ai_")
    names = ["worker", *_SEMANTIC_LABELS] if is_semantic else ["worker", "model"]
    return [*names, "priority"] if metric.by_priority else names


def _values(metric: HistogramMetric, worker: WorkerInfo, operation: str, priority: str) -> list[str]:
    is_semantic = metric.name.startswith("gen_ai_")
    values = [worker.node, operation, PROVIDER, worker.model] if is_semantic else [worker.node, worker.model]
    return [*values, priority] if metric.by_priority else values


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return the cumulative buckets of Prometheus."""
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    return [*zip(bounds, map(float, accumulate(histogram.counts)), strict=True)]
