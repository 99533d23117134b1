"""Draws the state of a service as tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scripts.client.cluster_state import History, Json, Latency, State

_COLOURS = {"ok": "green", "degraded": "yellow", "down": "red", "ready": "green", "loading": "yellow"}
_NOTHING = "-"


def screen(history: History, url: str) -> RenderableType:
    """Draw everything."""
    state = history.now
    tables = (_models(history), _latencies(history), _workers(state), _jobs(history))
    return Group(_head(history, url), *_reasons(state), *tables)


def _head(history: History, url: str) -> Text:
    state, errors = history.now, 60 * history.server_errors()
    status = str(state.health.get("status", "unknown"))
    redis_ms = 1000 * state.page.sum("mlxq_redis_ping_seconds")
    text = Text.assemble(("mlxq ", "bold"), url, "  ", (status, f"bold {_COLOURS.get(status, '')}"))
    text.append(f"  Redis {redis_ms:.1f} ms  streams {state.page.sum('mlxq_streams_open'):.0f}")
    text.append(f"  server errors {errors:.0f}/min", "red" if errors else "")
    return text.append(time.strftime("  %H:%M:%S"), "dim")


def _reasons(state: State) -> Iterator[Text]:
    for reason in state.health.get("reasons", []):
        yield Text(f"  {reason}", "yellow")


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in left:  # these become narrower on a narrow terminal, because rich shrinks columns that may wrap first
        table.add_column(name, overflow="ellipsis")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _models(history: History) -> Table:
    page = history.now.page
    counts = [
        "waiting",
        "oldest",
        "rows",
        "tok/s",
        "ended/min",
        "failed/min",
        "lost",
    ]
    table = _table("\nModels (waiting: high + normal + batch; lost: attempts whose worker died)", ["model"], counts)
    for (model,) in sorted(page.by("mlxq_jobs_waiting", "model")):
        waiting = page.by("mlxq_jobs_waiting", "priority", model=model)
        ages = page.by("mlxq_oldest_job_age_seconds", "priority", model=model).values()
        failed = 60 * history.per_second("mlxq_jobs_ended_total", model=model, status="failed")
        lost = page.sum("mlxq_attempts_ended_total", model=model, outcome="worker_lost")
        table.add_row(
            model,
            " + ".join(f"{waiting.get((name,), 0):.0f}" for name in ("high", "normal", "batch")),
            _duration(max(ages, default=0.0)),
            _share(page.sum("mlxq_worker_slots_used", model=model), page.sum("mlxq_worker_slots", model=model)),
            f"{page.sum('mlxq_worker_output_tokens_per_second', model=model):.0f}",
            f"{60 * history.per_second('mlxq_jobs_ended_total', model=model):.0f}",
            Text(f"{failed:.0f}", "red" if failed else ""),
            f"{lost:.0f}",
        )
    return table


def _latencies(history: History) -> Table:
    names = ["wait in queue", "first token", "between tokens", "whole job"]
    table = _table("\nLatency (median, 99th percentile)", ["model"], names)
    for (model,) in sorted(history.now.page.by("mlxq_jobs_waiting", "model")):
        table.add_row(
            model,
            _latency(history.latency("mlxq_queue_wait_seconds", model=model)),
            _latency(history.latency("gen_ai_server_time_to_first_token_seconds", gen_ai_request_model=model)),
            _latency(history.latency("mlxq_inter_token_latency_seconds", model=model)),
            _latency(history.latency("gen_ai_server_request_duration_seconds", gen_ai_request_model=model)),
        )
    return table


def _workers(state: State) -> Table:
    page = state.page
    states = {(each["node"], each["model"]): each["state"] for each in state.health.get("workers", [])}
    counts = ["rows", "tok/s", "KV", "in use", "resident", "cached", "stalled"]
    table = _table("\nWorkers", ["worker", "model", "state"], counts)
    for worker, model in sorted(page.by("mlxq_worker_slots", "worker", "model")):
        is_here = {"worker": worker, "model": model}
        shown = states.get((worker, model), _NOTHING)
        stalled_s = page.sum("mlxq_worker_engine_stalled_seconds", **is_here)
        computed = page.sum("mlxq_worker_prefilled_tokens_total", **is_here)
        cached = page.sum("mlxq_worker_prefix_cache_tokens_total", **is_here)
        table.add_row(
            worker,
            model,
            Text(shown, _COLOURS.get(shown, "")),
            _share(page.sum("mlxq_worker_slots_used", **is_here), page.sum("mlxq_worker_slots", **is_here)),
            f"{page.sum('mlxq_worker_output_tokens_per_second', **is_here):.0f}",
            _bytes(page.sum("mlxq_worker_kv_bytes", **is_here)),
            _bytes(page.sum("mlxq_worker_memory_active_bytes", **is_here)),
            _bytes(page.sum("mlxq_worker_resident_memory_bytes", **is_here)),
            f"{cached / (cached + computed):.0%}" if cached + computed else _NOTHING,
            Text(_duration(stalled_s) if stalled_s > 1 else _NOTHING, "red" if stalled_s > 1 else ""),
        )
    return table


def _jobs(history: History) -> Table:
    state = history.now
    title = "Running jobs" if state.all_keys else "Running jobs of this API key"
    table = _table(
        f"\n{title}", ["job", "key", "model", "class"], ["attempt", "queued", "running", "chunks", "chunks/s"]
    )
    for job in sorted(state.jobs, key=lambda job: job["started_at"] or 0):
        rate = history.chunks_per_second(job)
        table.add_row(
            job["id"],
            job.get("key_id", ""),
            job["model"],
            job["priority"],
            str(job["attempt"]),
            *_times(job),
            str(job["last_event"]),
            _NOTHING if rate is None else f"{rate:.1f}",
        )
    return table


def _times(job: Json) -> tuple[str, str]:
    started = job["started_at"]
    if started is None:
        return _NOTHING, _NOTHING
    return _duration(started - job["created_at"]), _duration(max(0.0, time.time() - started))


def _latency(latency: Latency) -> str:
    return _NOTHING if latency.median is None else f"{_duration(latency.median)}, {_duration(latency.p99)}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds else "0"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _share(used: float, total: float) -> str:
    return f"{used:.0f}/{total:.0f}"


def _bytes(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1000 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.1f} {units[0]}" if count < 10 and units[0] != "B" else f"{count:.0f} {units[0]}"
