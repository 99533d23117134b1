"""The header `traceparent`, and that tracing costs nothing when it is off."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shared.settings import ROOT
from shared.tracing import TraceParent, span_id

VALID = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize("header", [VALID, VALID.replace("-01", "-00"), f" {VALID} "])
def test_a_valid_header_survives_a_round_trip(header: str) -> None:
    assert str(TraceParent.parse(header)) == header.strip()


def test_a_header_of_a_newer_version_is_read() -> None:
    assert str(TraceParent.parse("01" + VALID[2:] + "-more")) == VALID


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("vendor=a,other=b", "vendor=a,other=b"),
        ("vendor=a,, ", "vendor=a"),
        ("not valid", ""),
        ("vendor=" + "x" * 510, ""),
        ("vendor=a\nb", ""),
    ],
)
def test_the_state_of_a_vendor_is_kept_if_it_is_valid(state: str, kept: str) -> None:
    trace = TraceParent.parse(VALID, state)
    assert trace is not None and str(trace) == VALID
    assert trace.context().trace_state.to_header() == kept


INVALID = (
    "",
    "x",
    VALID[:-1],
    VALID.upper(),
    "ff" + VALID[2:],
    VALID.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
    VALID.replace("00f067aa0ba902b7", "0" * 16),
)


@pytest.mark.parametrize("header", INVALID)
def test_an_invalid_header_is_ignored(header: str) -> None:
    assert TraceParent.parse(header) is None


def test_span_ids_depend_on_job_attempt_and_kind() -> None:
    ids = {span_id(*parts) for parts in (("a", 1, "queue"), ("a", 2, "queue"), ("b", 1, "queue"), ("a", 1, "attempt"))}
    assert len(ids) == 4 and span_id("a", 1, "queue") in ids and all(0 < each < 2**64 for each in ids)


@pytest.mark.parametrize("module", ["web.app", "worker.service.model_worker"])
def test_opentelemetry_is_not_imported_without_a_collector(module: str) -> None:
    # redis-py imports OpenTelemetry's metrics if they are installed, but neither traces nor exporters.
    code = f"import sys, {module}; print({{'opentelemetry.sdk.trace', 'opentelemetry.exporter'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
